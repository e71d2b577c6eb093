"""Every option of a run.

To add one, or to look up what it means and which values it may have: `options`, four dataclasses. `optimizers` is the
table behind `--optim`. How flags and a recipe become a `RunConfig`, with all problems said at once: `parsing`.
"""
