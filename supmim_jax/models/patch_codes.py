"""Image tokens without a network: the nearest of k k-means centres of raw patches.

The tokenizer of small runs. Like every tokenizer it has `encode(images) -> ids` and
`decode(ids) -> images`, and it is frozen: its arrays are `Frozen` variables, which the train step
takes as an argument and neither optimises nor checkpoints.
"""

import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from supmim_jax.config import DataConfig, PatchCodesConfig, SetupError
from supmim_jax.models.vit import patchify, pixels, unpatchify

EPSILON = 1e-2  # added to a patch's standard deviation before dividing; pixels are in [-1, 1]


class Frozen(nnx.Variable):
    """A value that training uses but does not change."""


class PatchCodes(nnx.Module):
    """k-means over patches, as bags of visual words use it; codes are the centres."""

    def __init__(self, cfg: PatchCodesConfig, patch: int, data: DataConfig):
        self.normalize = cfg.normalize
        self.patch = patch
        self.side = data.image_size // patch
        self.num_codes = cfg.codes
        self.codes = Frozen(jnp.zeros((cfg.codes, patch * patch * data.channels)))

    def encode(self, images) -> jax.Array:
        """int32 ids BxL of float BxHxWxC images in [-1, 1]."""
        x = normalized(patchify(images, self.patch), self.normalize)
        codes = self.codes[...]
        # |x - c|^2 without |x|^2, which is the same for every code.
        precision = jax.lax.Precision.HIGHEST
        dots = jnp.einsum("blp,kp->blk", x, codes, precision=precision)
        return jnp.argmin((codes**2).sum(-1) - 2.0 * dots, axis=-1).astype(jnp.int32)

    def decode(self, ids_BxL) -> jax.Array:
        """Images BxHxWxC that show each id's code; with `luminance`, at zero mean and its scale."""
        return unpatchify(self.codes[...][ids_BxL], self.patch, self.side)


def normalized(patches_BxLxP, normalize: str) -> jax.Array:
    """Patches as k-means sees them: raw, or with each patch's own mean and contrast removed."""
    if normalize == "raw":
        return patches_BxLxP
    mean = patches_BxLxP.mean(-1, keepdims=True)
    return (patches_BxLxP - mean) / (patches_BxLxP.std(-1, keepdims=True) + EPSILON)


def fit(cfg: PatchCodesConfig, patch: int, images_uint8: np.ndarray, seed: int) -> dict:
    """Codes {"codes": float32 KxP} fitted to BxHxWxC images by scikit-learn's MiniBatchKMeans.

    Raises:
      SetupError: there are fewer distinct patches than codes.
    """
    from sklearn.cluster import MiniBatchKMeans

    patches = np.asarray(
        normalized(patchify(pixels(jnp.asarray(images_uint8)), patch), cfg.normalize)
    )
    patches = patches.reshape(-1, patches.shape[-1])
    distinct = len(np.unique(patches, axis=0))
    if distinct < cfg.codes:
        raise SetupError(
            f"The tokenizer cannot be fitted: {len(images_uint8)} images have {distinct} distinct "
            f"patches, and objective.tokenizer.codes is {cfg.codes}. Lower it or give more images."
        )
    kmeans = MiniBatchKMeans(cfg.codes, random_state=seed, batch_size=4096, n_init=3)
    codes = kmeans.fit(patches).cluster_centers_
    return {"codes": np.asarray(codes, np.float32)}


def save(path: epath.Path, arrays: dict) -> None:
    """Writes the codebook so that a reader sees all of it or none."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)
    part.replace(path)


def load(path: epath.Path, cfg: PatchCodesConfig, patch: int, channels: int) -> dict:
    """Reads a codebook that `save` wrote, without pickle.

    Raises:
      SetupError: the file is missing, unreadable, or of another shape.
    """
    shape = (cfg.codes, patch * patch * channels)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            codes = arrays["codes"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SetupError(
            f"The codebook {path} cannot be read ({error}). It must be an .npz with one array "
            f"`codes`; leave objective.tokenizer.path empty to fit a new one."
        ) from None
    if codes.shape != shape or codes.dtype != np.float32:
        raise SetupError(
            f"The codebook {path} is {codes.dtype} of shape {codes.shape}; the config needs "
            f"float32 of shape {shape} (codes, patch * patch * channels)."
        )
    return {"codes": codes}
