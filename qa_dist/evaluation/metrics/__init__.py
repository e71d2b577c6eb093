"""Metric modules for the evaluate library; `qa_dist.evaluation.scoring.metric_path` gives their folder.

`qa_dist_squad`: SQuAD v1.1 and v2.0 scores; a folder, as that library wants it.
"""
