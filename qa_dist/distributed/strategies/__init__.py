"""How the ranks hold a model: a file for each strategy."""
