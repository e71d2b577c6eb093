"""SQuAD v1.1 and v2.0 scores as a metric module.

`qa_dist_squad`: the metric; the evaluate library copies this file and runs the copy.
"""
