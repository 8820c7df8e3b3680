"""Sections of the READMEs, and plots, from the files in benchmarks/results/."""
