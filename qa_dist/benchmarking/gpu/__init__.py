"""One command for a machine with a GPU: is everything right there, and how fast is it?

How items are run:
    `command`: reads the words of the command line, and has the list of all items.
    `items`: runs one after another, each under its own limit, and keeps each result at once.
    `scene`: where they run, how large things are there, and small models and data for them.
    `packing`: one archive of what a machine without a network needs.
    `page`: writes results into docs/gpu.md.

Part A, is it right:
    `numerics`: attention, every family, the loss and the search for spans against slow, sure ways.
    `steps`: whole steps against the CPU; float16 that overflows, full memory, compiled layers, 4 and 8 bits.
    `lora`: adapters in groups against peft.
    `graphs`: training passes replayed as CUDA graphs, and recordings that fail.
    `evaluation_graphs`: the same for evaluations, and the time it saves.
    `processes`: whole commands: stopped and resumed, FSDP2 and ZeRO, two ranks, the unit tests.
    `two_ranks`: a process that is one of two ranks on the same GPU.

Part B, how fast:
    `speed`: training, an epoch, and transformers' `Trainer` on a model of BERT base's size.
    `squad`: SQuAD through training and evaluation, with its scores.
"""
