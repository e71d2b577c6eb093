"""The ranks of a run; the only room that imports torch.distributed, accelerate and DeepSpeed.

Ranks at work:
    `ranks`: who is there and what they tell each other: all that a loop may ask of the others.
    `engine`: what a training step asks of model and optimiser, however the ranks hold them.
    `strategies`: the engines: data parallel, FSDP2 and ZeRO.
    `graph_choice`: whether all ranks replay passes as CUDA graphs.
    `lora_choice`: whether all ranks compute LoRA layers in groups.

How they come together:
    `launch_variables`: whether the environment describes one process among others, before it waits for them.
    `slurm_step`: a process that srun started without a launcher, made a rank.
    `launch_config`: which strategy the launcher asks for, and where that contradicts the recipe.
    `zero_section`: the keys of DeepSpeed's zero_optimization: which there are, and which act here.
    `launcher_file`: the environment that `accelerate launch` would make of a configuration file.
    `rendezvous`: processes meet at a store and form a group, within a bounded time.
    `roll_call`: who is missing there, and what is not the same on all machines; in words.
    `agreement`: whether all would train the same model on the same data with the same program.

When something goes wrong, and measurements:
    `failures`: names the rank that failed, and ends it without waiting for others.
    `watchdog`: a thread that ends a rank which hangs, and says where.
    `bandwidth`: how fast ranks add up data.
    `sharing`: two ranks on one GPU, or one process as the only rank of several runs: for checks.
"""
