"""How well images come back from their tokens, and how many codes take part."""

import jax
import numpy as np
from jax.sharding import Mesh

from supmim_jax.config import Config
from supmim_jax.data import pipeline
from supmim_jax.evals.features import on_host
from supmim_jax.types import Tokenizer


def measure(tokenizer: Tokenizer, cfg: Config, split: str, mesh: Mesh) -> dict[str, float]:
    """PSNR in dB (mean over images), per cent of the codes that occur, and perplexity on `split`.

    Reconstructions are clipped to the range of images and compared in 8 bits, as they would be
    saved. Perplexity is exp of the entropy of the codes' shares.
    """
    psnr, counts = [], np.zeros(tokenizer.num_codes, np.int64)
    for batch in pipeline.eval_dataset(cfg, split, mesh):
        ids = tokenizer.encode(batch.views[0])
        images, ids, weight, again = on_host(
            (batch.views[0], ids, batch.weight, _uint8(tokenizer.decode(ids)))
        )
        error = images[weight > 0].astype(np.float64) - again[weight > 0]
        psnr.append(peak_signal_to_noise((error**2).mean((1, 2, 3))))
        counts += np.bincount(ids[weight > 0].ravel(), minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return {
        "psnr": float(np.concatenate(psnr).mean()),
        "codes_used": 100.0 * len(share) / len(counts),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def peak_signal_to_noise(mse_N: np.ndarray) -> np.ndarray:
    """dB of mean squared errors of 8-bit images; at most 100, for images that are equal."""
    return 10.0 * np.log10(255.0**2 / np.maximum(mse_N, 255.0**2 * 1e-10))


@jax.jit
def _uint8(images) -> jax.Array:
    return jax.numpy.round((images.clip(-1.0, 1.0) + 1.0) * 127.5).astype("uint8")
