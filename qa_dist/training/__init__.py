"""A training run.

`loop` is the whole of it, from joining the ranks to the last result; `trainer` is one optimiser step. Around the steps,
`run` ties together who may write into the folder (`output_folder`), what is said and logged (`run_log`), evaluations
(`evaluator`) and the best of them (`best_weights`). `checkpoints` writes and verifies what a run goes on from;
`identity` says which runs may. `optimizer` has the schedule and the optimiser, `calls` the parts of a run for Python.
"""
