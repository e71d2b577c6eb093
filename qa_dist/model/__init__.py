"""The encoder with its span head, on one rank.

`building` makes the model that trains, from its configuration; start there. What differs between architectures is a row
of `families`. `span_model` is the forward pass and the loss, `attention` and `dropout` its own operations; `adapters`
and `quantization` set up what trains and what stays frozen, `trainable` checks it. `pretrained` finds models by name
and refuses files that could run code. A trained model is written and read by `saved`, and an untrained one by
`rehearsal`, before its first step; `merging` folds its adapter into the base model; `initial` begins a run with the
tensors of an adapter; `folder` says what one is.
"""
