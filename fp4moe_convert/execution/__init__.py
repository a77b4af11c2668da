"""Carrying out a plan: threads that move bytes, and the output folder that they fill."""
