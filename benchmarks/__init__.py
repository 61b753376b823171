"""Benchmarks and the demonstration of wsam_fused."""
