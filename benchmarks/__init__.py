"""What conversion, resuming and loading cost. Run from the repository root: python -m
benchmarks.convert"""
