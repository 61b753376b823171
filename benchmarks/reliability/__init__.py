"""What the package does under faults, hostile input and long runs."""
