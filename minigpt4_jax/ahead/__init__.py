"""Programs for TPU slices that are not there: compiled from shapes, and what they would cost."""
