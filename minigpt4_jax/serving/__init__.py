"""Serving: a scheduler over the generation engine, and an OpenAI-compatible HTTP server."""
