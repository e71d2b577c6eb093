"""A training run: its loop, its steps, its folder, its checkpoints."""
