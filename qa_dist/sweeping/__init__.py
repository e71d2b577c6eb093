"""Many runs that differ in some options, side by side: what learns most at a budget.

`plan` reads a sweep file into trials. `running` brings them to their ends, or from rung to rung with the better half
going on (`halving`); `workers` are the processes that take one trial after the other, and `trials` is what such a
process does. `record` is what is kept of a trial and of a sweep, `table` shows it,
and `page` writes it into docs/results.md.
"""
