"""How the ranks hold the model: an engine for each strategy; `choice` makes the one that the launcher asks for.

`data_parallel` keeps everything on every rank, `fsdp` and `zero` hold shards. What engines with torch's optimisers
share is in `torch_engine`, and the state of an optimiser as whole tensors in `optimizer_state`.
"""
