"""What a converted checkpoint is: names, JSON and sizes. No I/O, no weights.

The prose is docs/format.md.
"""
