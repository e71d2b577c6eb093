"""How the ranks hold the model: an engine for each strategy.

`choice`: makes the engine that the launcher asks for.
`torch_engine`: what engines share that step torch's own optimiser.
`data_parallel`: everything whole on every rank, gradients averaged once a step.
`gradient_exchange`: that average: flat buffers, sent while the backward pass goes on.
`fsdp`: FSDP2: every tensor cut along its first dimension.
`zero`: DeepSpeed's ZeRO, stages 1 to 3.
`optimizer_state`: moments as whole tensors by name, out of an optimiser and back into it.
"""
