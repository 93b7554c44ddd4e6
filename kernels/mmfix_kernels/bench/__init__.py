"""How fast the attention backends are beside their peers, on any device. ``python -m mmfix_kernels.bench --help``."""
