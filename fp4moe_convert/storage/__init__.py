"""Bytes in and out. Nothing here knows a model."""
