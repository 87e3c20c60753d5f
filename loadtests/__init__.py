"""Load: the benchmark and the swarms that drive it."""
