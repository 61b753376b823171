"""What the benchmark of the methods runs, and what it makes of the numbers."""
