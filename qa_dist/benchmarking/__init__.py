"""Speed and memory, measured beside others: the parts of `python -m qa_dist.bench`.

Every measurement is a `job`, done by one or several fresh processes (`worker`), so that peaks of memory and warm caches
are its own. `paths`, `trainer`, `scaling` and `evaluation` say what is compared and in which alternation;
`qa_dist_side` and `hugging_face` are the two sides, `measuring` and `synthetic` what both use; `neighbours` notes what
others used meanwhile. `report` turns results into files. `budgets`, `checkpoints`, `decoding` and `memory` measure one
thing each, for the figures in docs/.
"""
