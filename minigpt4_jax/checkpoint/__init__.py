"""The model directory: reading and writing weights."""
