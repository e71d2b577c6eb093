"""SQuAD v1.1 and v2.0 scores as a metric module."""
