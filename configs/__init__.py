"""Training configurations, one `get_config(arg="")` per file.

A file sets what differs from `minigpt4_jax.training.recipes` and from the defaults in
`minigpt4_jax.training.config`. Any value can be changed on the command line: `--config.KEY=VALUE`.
"""
