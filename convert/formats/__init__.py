"""Checkpoint file formats: safetensors, PyTorch and GGUF, read as lazy tensors."""
