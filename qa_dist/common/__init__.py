"""What every room may use: errors, exit codes, signals, secrets, strict JSON and YAML, atomic files, host names."""
