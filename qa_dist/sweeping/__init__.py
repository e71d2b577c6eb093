"""Many runs that differ in some options, side by side: what learns most at a budget.

`plan` reads a sweep file into trials, or into a search (`space`). `running` brings trials to their ends, or from rung
to rung with the better half going on (`halving`); `searching` does so with the points that a `study` proposes.
`workers` are the processes that take one trial after the other, `jobs` runs each as a job of Slurm's, and `trials` is
what such a process or job does. `record` is what is kept of a trial and of a sweep, `table` shows it, and `page` writes
it into docs/results.md.
"""
