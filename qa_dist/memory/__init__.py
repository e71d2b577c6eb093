"""What a rank will hold in memory, before anything is loaded.

`estimate`: all of it together, by part and by strategy, for `qa-dist estimate`.
`by_strategy`: arithmetic on the sizes of tensors: weights, gradients, moments and buffers.
`tracing`: activations counted by running the model on tensors that have shapes only.
"""
