"""What the benchmark commands share: timing, memory, methods, formulas, result files."""
