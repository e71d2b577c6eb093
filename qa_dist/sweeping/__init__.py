"""Many runs that differ in some options, side by side: what learns most at a budget.

`plan`: a sweep file read into trials: methods, seeds and rungs.
`running`: trials brought to their ends, rung by rung; what was done before is not done again.
`halving`: who goes on from a rung: the better half.
`space`: the part of a sweep file about a search: ranges, choices, sampler and pruner.
`searching`: a search from its first point to its last.
`study`: optuna's side of it: which point is next, and how to go on after a kill.
`trials`: one trial in this process; however it ends, its folder says so.
`workers`: processes that take one trial after another.
`jobs`: trials as jobs of Slurm's.
`record`: what is kept of a trial and of a sweep, as JSON.
`table`: a row for each method, with mean and deviation over seeds.
`page`: those tables in docs/results.md.
"""
