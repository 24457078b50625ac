"""Training: configuration, the step, checkpoints, logs, and the loop that joins them."""
