"""Generation: choosing tokens (sampling) and the compiled prefill and decode loop (engine)."""
