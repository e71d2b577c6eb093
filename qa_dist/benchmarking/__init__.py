"""Speed and memory, measured beside others: the parts of `python -m qa_dist.bench`.

How anything is measured:
    `settings`: what is asked for, and what "auto" means on this machine.
    `job`: one measurement, in fresh processes, so that peaks of memory and caches are its own; jobs take turns.
    `worker`: the process that carries one out.
    `neighbours`: how much of the machine others used meanwhile.
    `synthetic`: features with the lengths of SQuAD and random tokens.
    `measuring`: features and rates as both sides of a comparison need them.
    `report`: bench.json, and the tables of docs/benchmarks.md.
    `charts`: drawings of a bench.json.

What is compared:
    `trainer`: a training step beside transformers' own `Trainer`.
    `paths`: padded, sorted and unpadded batches.
    `scaling`: one process beside several.
    `balance`: how evenly tokens are shared among ranks, simulated.
    `evaluation`: from questions to scores beside the Hugging Face way.
    `qa_dist_side`: this package's part of a comparison, taken apart into phases.
    `hugging_face`: the other part: the usual scripts at their best.
    `nested_loops`: decoding and scoring as those scripts write it.
    `flops`: operations that a step needs, and how many a second the device can do.
    `counted`: the table of what a step asks of a GPU, counted without one.

One thing each, for figures in docs/:
    `answering`: questions a second beside other readers.
    `answering_sides`: one of these readers, in a process and environment of its own.
    `budgets`: what a token costs on a CPU, by tokens in a pass.
    `checkpoints`: what saving costs the training loop.
    `decoding`: logits to scores for a data set of SQuAD's size.
    `memory`: peaks measured beside what was estimated.
    `long_run`: how memory grows over a long run, by allocator.

`gpu`: is everything right on a GPU, and how fast is it?
"""
