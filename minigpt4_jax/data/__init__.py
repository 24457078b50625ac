"""From dataset files to training batches."""
