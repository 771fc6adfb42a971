"""Image tokens without a network: the nearest of k k-means centres of raw patches.

This is the tokenizer of small runs. Like every tokenizer it has `encode(images) -> ids`,
`decode(ids) -> images` and `num_codes`. It is frozen: its arrays are `Frozen` variables, which the
train step takes as an argument and neither optimises nor saves. `make` builds this tokenizer or a
VQGAN, whichever the config names.
"""

import os
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from supmim_jax.config import DataConfig, PatchCodesConfig, VQGANConfig
from supmim_jax.errors import SetupError
from supmim_jax.models import Frozen
from supmim_jax.models.vit import patchify, pixels, unpatchify
from supmim_jax.models.vqgan import VQGAN, nearest

EPSILON = 1e-2  # added to a patch's standard deviation before dividing; pixels are in [-1, 1]
MOST_RATIO = 100  # arrays to file, in bytes; weights do not compress so well, bombs do


def read(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays of a file.

    Raises:
      ValueError: it cannot be read, or is no .npz of plain arrays; the message says why.
    """
    try:
        with path.open("rb") as file:
            claimed = sum(member.file_size for member in zipfile.ZipFile(file).infolist())
            if claimed > MOST_RATIO * file.seek(0, os.SEEK_END) + 2**20:
                raise ValueError(f"it would unpack to {claimed} bytes")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy and zipfile raise all kinds for a damaged file
        raise ValueError(str(error) or type(error).__name__) from None


class PatchCodes(nnx.Module):
    """k-means over patches, as bags of visual words use it; codes are the centres."""

    def __init__(self, cfg: PatchCodesConfig, patch: int, data: DataConfig):
        self.normalize = cfg.normalize
        self.patch = patch
        self.side = data.image_size // patch
        self.num_codes = cfg.codes
        self.channels = data.channels
        self.codes = Frozen(jnp.zeros(shape(cfg, patch, data.channels), jnp.float32))

    @jax.named_scope("tokenizer")
    def encode(self, images) -> jax.Array:
        """int32 ids BxL of float BxHxWxC images in [-1, 1]."""
        return nearest(described(images, self.patch, self.normalize), self.codes[...])

    def decode(self, ids_BxL) -> jax.Array:
        """Images BxHxWxC that show each id's code; with `luminance` grey, at zero mean."""
        images = unpatchify(self.codes[...][ids_BxL], self.patch, self.side)
        return jnp.broadcast_to(images, (*images.shape[:3], self.channels))


def is_fitted(cfg: PatchCodesConfig | VQGANConfig) -> bool:
    """Whether the tokenizer is one that a run fits for itself."""
    return isinstance(cfg, PatchCodesConfig)


def shape(cfg: PatchCodesConfig, patch: int, channels: int) -> tuple[int, int]:
    """Of the codes: their number, and the values that describe a patch."""
    return cfg.codes, patch * patch * (channels if cfg.normalize == "raw" else 1)


def described(images, patch: int, normalize: str) -> jax.Array:
    """What k-means sees of each patch, BxLxP.

    `raw`: its pixels. `luminance`: its luma (ITU-R 601) less the mean, by the standard deviation:
    neither colour nor brightness is left, which matters where they say nothing about the class.
    """
    if normalize == "raw":
        return patchify(images, patch)
    if images.shape[-1] == 3:
        images = images @ jnp.array([[0.299], [0.587], [0.114]])
    patches = patchify(images, patch)
    mean = patches.mean(-1, keepdims=True)
    return (patches - mean) / (patches.std(-1, keepdims=True) + EPSILON)


def fit(cfg: PatchCodesConfig, patch: int, images_uint8: np.ndarray, seed: int) -> dict:
    """Codes {"codes": float32 KxP} fitted to BxHxWxC images by scikit-learn's MiniBatchKMeans.

    Raises:
      SetupError: there are fewer distinct patches than codes.
    """
    from sklearn.cluster import MiniBatchKMeans

    # NumPy does this where `normalize` is "raw": JAX would compile a program for each operation.
    patches = np.asarray(described(pixels(images_uint8), patch, cfg.normalize))
    patches = patches.reshape(-1, patches.shape[-1])
    distinct = len(np.unique(patches, axis=0))
    if distinct < cfg.codes:
        raise SetupError(
            f"The tokenizer cannot be fitted: {len(images_uint8)} images have {distinct} distinct "
            f"patches, and objective.target.codes is {cfg.codes}. Lower it or give more images."
        )
    kmeans = MiniBatchKMeans(cfg.codes, random_state=seed, batch_size=4096, n_init=3)
    codes = kmeans.fit(patches).cluster_centers_
    return {"codes": np.asarray(codes, np.float32)}


def load(path: epath.Path, cfg: PatchCodesConfig, patch: int, channels: int) -> dict:
    """Reads a codebook, an .npz with one array `codes`, without pickle.

    Raises:
      SetupError: the file is missing, unreadable, or of another shape.
    """
    expected = shape(cfg, patch, channels)
    try:
        codes = read(path)["codes"]
    except (ValueError, KeyError) as error:
        raise SetupError(
            f"The codebook {path} cannot be read ({error}). It must be an .npz with one array "
            f"`codes`; leave objective.target.path empty to fit a new one."
        ) from None
    if codes.shape != expected or codes.dtype != np.float32:
        raise SetupError(
            f"The codebook {path} is {codes.dtype} of shape {codes.shape}; the config needs "
            f"float32 of shape {expected} (codes, values per patch)."
        )
    return {"codes": codes}


def make(
    cfg: PatchCodesConfig | VQGANConfig, patch: int, data: DataConfig, rngs: nnx.Rngs
) -> PatchCodes | VQGAN:
    """A tokenizer that gives one token for each patch of `patch` pixels of the data's images."""
    if is_fitted(cfg):
        return PatchCodes(cfg, patch, data)
    side = data.image_size // patch
    return VQGAN(cfg, channels=data.channels, side=side, size=data.image_size, rngs=rngs)
