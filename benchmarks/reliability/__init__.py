"""What happens under faults, hostile input and long runs; docs/reliability.md has the results."""
