"""Configurations of training runs: one `get_config(arg="")` a file."""
