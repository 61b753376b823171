"""The papers' experiments: ``python -m benchmarks.paper`` lists them."""
