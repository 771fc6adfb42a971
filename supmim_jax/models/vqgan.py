"""A convolutional image tokenizer (VQGAN, arXiv 2012.09841) in the form that MaskGIT published.

As in MaskGIT (arXiv 2202.04200) there is no attention, resolution is halved by averaging and
doubled by repetition, and pixels are in [0, 1] inside. `load_maskgit` reads its checkpoint. The
patch discriminator (after arXiv 1611.07004) serves adversarial training.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx, serialization, traverse_util

from supmim_jax.config import AdversarialConfig, VQGANConfig
from supmim_jax.errors import SetupError, first_few


class ResBlock(nnx.Module):
    """Norm, swish, 3x3 convolution, twice, and a shortcut.

    Where the width changes, MaskGIT's shortcut is a 1x1 convolution of the block's *output*, not of
    its input; the published weights want it so.
    """

    def __init__(self, inputs: int, filters: int, cfg: VQGANConfig, rngs: nnx.Rngs):
        self.norm1 = group_norm(inputs, cfg, rngs)
        self.conv1 = conv(inputs, filters, 3, cfg, rngs, bias=False)
        self.norm2 = group_norm(filters, cfg, rngs)
        self.conv2 = conv(filters, filters, 3, cfg, rngs, bias=False)
        wider = inputs != filters
        self.shortcut = conv(filters, filters, 1, cfg, rngs, bias=False) if wider else None

    def __call__(self, x_BxHxWxC) -> jax.Array:
        y = self.conv1(nnx.swish(self.norm1(x_BxHxWxC)))
        y = self.conv2(nnx.swish(self.norm2(y)))
        return y + (x_BxHxWxC if self.shortcut is None else self.shortcut(y))


class Encoder(nnx.Module):
    """Images BxHxWxC to latents Bx(H/d)x(W/d)x(code_dim), d the downsampling."""

    def __init__(self, cfg: VQGANConfig, channels: int, rngs: nnx.Rngs):
        self.res_blocks = cfg.res_blocks
        self.conv_in = conv(channels, cfg.filters, 3, cfg, rngs, bias=False)
        widths = [cfg.filters * multiplier for multiplier in cfg.multipliers]
        self.blocks = res_blocks(cfg.filters, [*widths, widths[-1]], cfg, rngs)
        self.norm = group_norm(widths[-1], cfg, rngs)
        self.conv_out = conv(widths[-1], cfg.code_dim, 1, cfg, rngs)

    def __call__(self, x) -> jax.Array:
        x = self.conv_in(x)
        levels = len(self.blocks) // self.res_blocks - 1
        for i in range(len(self.blocks)):
            x = self.blocks[str(i)](x)
            level, place = divmod(i + 1, self.res_blocks)
            if place == 0 and level < levels:
                x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        return self.conv_out(nnx.swish(self.norm(x)))


class Decoder(nnx.Module):
    """Latents Bxhxwx(code_dim) to images Bx(hd)x(wd)xC."""

    def __init__(self, cfg: VQGANConfig, channels: int, rngs: nnx.Rngs):
        self.res_blocks = cfg.res_blocks
        widths = [cfg.filters * multiplier for multiplier in reversed(cfg.multipliers)]
        self.conv_in = conv(cfg.code_dim, widths[0], 3, cfg, rngs)
        self.blocks = res_blocks(widths[0], [widths[0], *widths], cfg, rngs)
        self.upsample = numbered([conv(w, w, 3, cfg, rngs) for w in widths[:-1]])
        self.norm = group_norm(widths[-1], cfg, rngs)
        self.conv_out = conv(widths[-1], channels, 3, cfg, rngs)

    def __call__(self, x) -> jax.Array:
        x = self.conv_in(x)
        for i in range(len(self.blocks)):
            x = self.blocks[str(i)](x)
            level, place = divmod(i + 1, self.res_blocks)
            if place == 0 and 2 <= level <= len(self.upsample) + 1:
                x = self.upsample[str(level - 2)](x.repeat(2, axis=1).repeat(2, axis=2))
        return self.conv_out(nnx.swish(self.norm(x)))


class VQGAN(nnx.Module):
    """Images to ids of the nearest codes, and back.

    Images are float BxHxWxC in [-1, 1], of `side` patches each way. Where a patch is not as large
    as a token (ViT-B/14 at 224 px, tokens of 16 px at 256 px), `encode` enlarges the image so that
    one patch is one token, and `decode` brings it back to `size`.
    """

    def __init__(self, cfg: VQGANConfig, *, channels: int, side: int, size: int, rngs: nnx.Rngs):
        self.side, self.size, self.inner = side, size, side * cfg.downsampling
        self.num_codes = cfg.codes
        self.encoder = Encoder(cfg, channels, rngs)
        self.decoder = Decoder(cfg, channels, rngs)
        draw = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")
        self.codebook = nnx.Param(draw(rngs.params(), (cfg.codes, cfg.code_dim), jnp.float32))

    @jax.named_scope("tokenizer")
    def encode(self, images) -> jax.Array:
        """int32 ids BxL of the nearest codes; of equally near ones the first."""
        latents = self.latents(images)
        return nearest(latents.reshape(latents.shape[0], -1, latents.shape[-1]), self.codebook[...])

    def decode(self, ids_BxL) -> jax.Array:
        """Images of the codes; ids must be below num_codes."""
        codes = self.codebook[...][ids_BxL]
        return self.render(codes.reshape(codes.shape[0], self.side, self.side, -1))

    def latents(self, images) -> jax.Array:
        """What is quantised: float32 Bx(side)x(side)x(code_dim)."""
        return self.encoder(_resize(images, self.inner) * 0.5 + 0.5)

    def render(self, latents) -> jax.Array:
        """Images of (quantised) latents."""
        return _resize(self.decoder(latents) * 2.0 - 1.0, self.size)


def nearest(x_BxLxD, codes_VxD) -> jax.Array:
    """int32 BxL: for each vector the code at the least Euclidean distance."""
    return jnp.argmin(_relative_distances(x_BxLxD, codes_VxD), axis=-1).astype(jnp.int32)


def squared_distances(x_BxLxD, codes_VxD) -> jax.Array:
    """Squared Euclidean distances to every code, BxLxV."""
    return (x_BxLxD**2).sum(-1, keepdims=True) + _relative_distances(x_BxLxD, codes_VxD)


def _relative_distances(x_BxLxD, codes_VxD) -> jax.Array:
    """|x - c|^2 - |x|^2: what is left out is the same for every code."""
    dots = jnp.einsum("bld,vd->blv", x_BxLxD, codes_VxD, precision=jax.lax.Precision.HIGHEST)
    return (codes_VxD**2).sum(-1) - 2.0 * dots


def res_blocks(inputs: int, widths: list[int], cfg: VQGANConfig, rngs: nnx.Rngs) -> nnx.Dict:
    """`cfg.res_blocks` blocks of each width, one after another."""
    outputs = [width for width in widths for _ in range(cfg.res_blocks)]
    before = [inputs, *outputs]
    return numbered([ResBlock(i, o, cfg, rngs) for i, o in zip(before, outputs)])


def numbered(modules: list[nnx.Module]) -> nnx.Dict:
    """Modules under the names "0", "1" ...: nnx.List would have integers in memory only."""
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def conv(inputs: int, outputs: int, size: int, cfg: VQGANConfig, rngs, bias: bool = True):
    """A convolution that keeps the resolution."""
    precision = {"highest": jax.lax.Precision.HIGHEST, "default": None}[cfg.precision]
    return nnx.Conv(inputs, outputs, (size, size), use_bias=bias, precision=precision, rngs=rngs)


def group_norm(channels: int, cfg: VQGANConfig, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(channels, num_groups=cfg.groups, epsilon=1e-6, rngs=rngs)


def _resize(images, size: int) -> jax.Array:
    b, height, width, c = images.shape
    if (height, width) == (size, size):
        return images
    return jax.image.resize(images, (b, size, size, c), "cubic")


class Discriminator(nnx.Module):
    """Images BxHxWxC to one logit per patch, Bxhxw: real where it is positive.

    No normalisation: with R1 it isn't needed (arXiv 1801.04406), and logits of an image then do not
    depend on the rest of the batch.
    """

    def __init__(self, cfg: AdversarialConfig, channels: int, *, rngs: nnx.Rngs):
        widths = [min(cfg.filters * 2**i, 8 * cfg.filters) for i in range(cfg.layers)]
        pairs = zip([channels, *widths], widths)
        self.layers = numbered([nnx.Conv(i, o, (4, 4), strides=2, rngs=rngs) for i, o in pairs])
        self.logit = nnx.Conv(widths[-1], 1, (3, 3), rngs=rngs)

    def __call__(self, x) -> jax.Array:
        for i in range(len(self.layers)):
            x = nnx.leaky_relu(self.layers[str(i)](x), 0.2)
        return self.logit(x)[..., 0]


# --- MaskGIT's checkpoint

# Our path, and MaskGIT's. Linen numbers the modules of a class in the order in
# which they are called: in a block norm, conv, norm, conv, shortcut.
NAMES = (
    (r"^codebook$", "quantizer/codebook"),
    (r"^(encoder|decoder)/blocks/(\d+)/norm1/", r"\1/ResBlock_\2/GroupNorm_0/"),
    (r"^(encoder|decoder)/blocks/(\d+)/conv1/", r"\1/ResBlock_\2/Conv_0/"),
    (r"^(encoder|decoder)/blocks/(\d+)/norm2/", r"\1/ResBlock_\2/GroupNorm_1/"),
    (r"^(encoder|decoder)/blocks/(\d+)/conv2/", r"\1/ResBlock_\2/Conv_1/"),
    (r"^(encoder|decoder)/blocks/(\d+)/shortcut/", r"\1/ResBlock_\2/Conv_2/"),
    (r"^(encoder|decoder)/conv_in/", r"\1/Conv_0/"),
    (r"^(encoder|decoder)/norm/", r"\1/GroupNorm_0/"),
    (r"^encoder/conv_out/", "encoder/Conv_1/"),
)


def maskgit_name(path: str, cfg: VQGANConfig) -> str:
    """MaskGIT's name of our parameter, without the leading `params/`."""
    if match := re.fullmatch(r"decoder/upsample/(\d+)/(\w+)", path):
        return f"decoder/Conv_{int(match[1]) + 1}/{match[2]}"
    if match := re.fullmatch(r"decoder/conv_out/(\w+)", path):
        return f"decoder/Conv_{len(cfg.multipliers)}/{match[1]}"
    return next(re.sub(ours, theirs, path) for ours, theirs in NAMES if re.search(ours, path))


def load_maskgit(path: epath.Path, cfg: VQGANConfig, like: dict) -> dict:
    """The parameters of the VQGAN `like` (nested dict of shapes) from MaskGIT's file, on the host.

    The file is a Flax linen parameter tree in msgpack, as `tokenizer_imagenet256_checkpoint`, which
    github.com/google-research/maskgit links to.

    Raises:
      SetupError: the file is missing or cut, or a parameter is missing, left over or misshapen.
    """
    stored, like = _read(path), traverse_util.flatten_dict(like, sep="/")
    names = {ours: maskgit_name(ours, cfg) for ours in like}
    wanted = {names[ours]: f"float32{list(x.shape)}" for ours, x in like.items()}
    problems = [f"{name} {x} is missing" for name, x in wanted.items() if name not in stored]
    problems += [f"{name} is not of this model" for name in stored if name not in wanted]
    problems += [
        f"{name} is {_kind(stored[name])}, expected {kind}"
        for name, kind in wanted.items()
        if name in stored and _kind(stored[name]) != kind
    ]
    if problems:
        raise SetupError(
            f"{path} is not the tokenizer that the config describes: {first_few(problems)}. The "
            f"defaults of VQGANConfig are MaskGIT's ImageNet tokenizer at 256 px."
        )
    return traverse_util.unflatten_dict({ours: stored[names[ours]] for ours in names}, sep="/")


def _kind(x) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__


def _read(path: epath.Path) -> dict:
    """What the file holds, by its path in the tree; half precision is widened to float32."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SetupError(f"The tokenizer {path} cannot be read: {error}") from None
    try:
        tree = serialization.msgpack_restore(data)  # no pickle: arrays are bytes, shape and dtype
        tree = tree.get("params", tree)  # beside it may be other collections, of training
        flat = traverse_util.flatten_dict(tree, sep="/")
        half = [k for k, x in flat.items() if _kind(x).startswith(("float16", "bfloat16"))]
        return flat | {name: flat[name].astype(np.float32) for name in half}
    except Exception as error:  # msgpack and Flax raise all kinds for a damaged file
        raise SetupError(
            f"The tokenizer {path} ({len(data)} bytes) is not a whole msgpack file of parameters "
            f"({error}). Fetch it again; MaskGIT's is a Flax checkpoint in msgpack."
        ) from None
