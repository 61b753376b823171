"""The parts of the GPU report; ``benchmarks.bench_gpu`` puts them together."""
