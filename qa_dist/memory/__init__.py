"""What a rank will hold in memory, before it does."""
