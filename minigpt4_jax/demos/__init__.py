"""The two demonstrations, and the training of their vision encoders."""
