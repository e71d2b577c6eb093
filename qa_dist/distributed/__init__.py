"""The ranks of a run: how they meet, agree, hold a model together and fail."""
