"""What supmim_jax is measured against: PyTorch, tf.data, faiss; run by `supmim_jax.bench`."""
