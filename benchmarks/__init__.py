"""What is measured: `pytest benchmarks/`."""
