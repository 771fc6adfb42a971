"""Making data sets that the training pipeline can open: ArrayRecord in the layout of tfds."""
