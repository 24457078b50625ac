"""Inference: the public Model, the generation engine, sampling, beam search, conversations."""
