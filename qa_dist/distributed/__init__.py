"""The ranks of a run; the only room that imports torch.distributed, accelerate and DeepSpeed.

`ranks` is who is there, and what they tell each other; `engine` is the model as all of them hold it, which `strategies`
implements. They meet in `rendezvous` by a `roll_call`, after `launch_config` has read what the launcher asks for
(`zero_section` knows DeepSpeed's keys) and `slurm_step` what Slurm says, and `agreement` makes sure that they train the
same. `watchdog` ends a rank that hangs, `failures` names one that fails, and `bandwidth` measures.
"""
