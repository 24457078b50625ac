"""The model: vision encoder, Q-Former, language model, and the projection that joins them."""
