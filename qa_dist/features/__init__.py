"""Numbers: from examples through windows and the store to global batches of tensors."""
