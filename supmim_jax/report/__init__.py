"""A run as one self-contained page: python -m supmim_jax.report --checkpoint runs/supmim."""
