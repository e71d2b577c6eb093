"""Every option of a run.

To add one, or to look up what it means, which values it may have and what contradicts it: `data_options`,
`model_options`, `training_options`, `evaluation_options`, a dataclass each; `options` puts them together. `optimizers`
is the table behind `--optim`. How flags and a recipe become a `RunConfig`, with all problems said at once: `parsing`.
"""
