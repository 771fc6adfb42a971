"""What the probes share; not a probe itself.

A probe says what a trained encoder is measured by and on which data; the encoder, its image size
and channels are those of the checkpoint. Any value can be overridden, as in
--config.eval.linear.held_out=0.1.
"""

from supmim_jax.config import KNNConfig

KNN_SWEEP = KNNConfig(ks=(1, 5, 10, 20, 50, 100, 200))
