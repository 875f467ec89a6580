"""What a rank is to its machine: ranks and their messages, devices, signals, locks, the log."""
