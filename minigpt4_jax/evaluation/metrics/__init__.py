"""Metrics, from texts to numbers; none of them reads a file or knows a benchmark."""
