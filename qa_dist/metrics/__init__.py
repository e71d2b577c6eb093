"""Metric modules for the `evaluate` library; see `qa_dist.scoring.metric_path`."""
