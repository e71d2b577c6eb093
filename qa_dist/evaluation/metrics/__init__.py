"""Metric modules for the `evaluate` library; see `qa_dist.evaluation.scoring.metric_path`."""
