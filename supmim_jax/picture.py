"""The former name of supmim_jax.visualize, which this runs."""

import runpy

if __name__ == "__main__":
    runpy.run_module("supmim_jax.visualize", run_name="__main__", alter_sys=True)
