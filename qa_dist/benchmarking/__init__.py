"""The parts of `python -m qa_dist.bench`.

Every measurement is a `Job`, done by a fresh process (`worker`), or several, so that peaks of memory and warm caches
are its own; the subcommands (`paths`, `trainer`, `scaling`, `evaluation`) say what is measured and in which
alternation, and `report` turns the results into files.
"""
