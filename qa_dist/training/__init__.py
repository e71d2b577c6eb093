"""A training run.

The run:
    `loop`: the whole of it, from joining the ranks to the last result.
    `start`: the ranks join, the model is built.
    `inputs`: the feature stores of both splits, and what is wanted of them.
    `run`: what is done around the steps: resume, evaluate, save, pause, finish.
    `plan`: what a run would do, or stop at, without training.
    `calls`: parts of a run as functions for Python.

A step:
    `trainer`: one optimiser step, and what is done if it does not fit or diverges.
    `step_inputs`: which features this rank computes in a step, in which micro-batches.
    `passes`: a micro-batch forward and backward, operation by operation.
    `graph_passes`: the same replayed as CUDA graphs, which are compared first.
    `pass_choice`: which of both a run takes.
    `compile_choice`: whether compiled layers pay for a run, and compute the same.
    `distances`: how far tensors are from each other: for such comparisons.
    `memory_probe`: how many tokens a pass may have, tried out before the first step.
    `step_report`: what the ranks tell each other of a step, read once when it is over.
    `optimizer`: the schedule, which parameters decay, and the optimiser itself.
    `lr_multipliers`: parameters that learn slower than others, by their depth.

What is kept and said:
    `output_folder`: who may write into a run's folder, and what an earlier run left there.
    `checkpoints`: what a run goes on from: written whole, verified before use.
    `run_state`: how far a run is, apart from its tensors.
    `identity`: what a run and a checkpoint must have in common.
    `evaluator`: evaluations during a run and of its result.
    `best_weights`: the best evaluation so far with its weights, and whether to stop early.
    `run_log`: sentences, trackers and run.json.
    `metrics_log`: the figures of every step, a line each.
    `progress`: the bar and the stopwatch.
"""
