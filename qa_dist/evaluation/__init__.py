"""From logits through candidates and answers to scores and result files."""
