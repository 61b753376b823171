"""Faults and hostile input: what they do, counted."""
