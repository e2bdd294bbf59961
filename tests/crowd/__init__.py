"""Many silos on one machine: what a process holds after each round, and whether it becomes more."""
