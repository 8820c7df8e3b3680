"""Commands that measure the package, and what they share. Run as `python -m benchmarks.NAME` in a checkout."""
