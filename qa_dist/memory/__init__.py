"""What a rank will hold in memory, before anything is loaded.

`estimate` puts the whole together for `qa-dist estimate`. `by_strategy` is arithmetic on the sizes of tensors: weights,
gradients, optimiser state and buffers of every strategy. `tracing` runs the model on tensors that have shapes only, and
counts the activations.
"""
