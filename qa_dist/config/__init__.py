"""Every option: its meaning, its range, what contradicts it; and flags and recipes read into one configuration."""
