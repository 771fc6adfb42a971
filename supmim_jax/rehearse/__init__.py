"""Compiles the real train step for TPU slices that aren't here, and reads what it would cost."""
