"""Reads the tokenizer that MaskGIT published: a Flax linen parameter tree in msgpack.

Its file is `tokenizer_imagenet256_checkpoint`, linked from github.com/google-research/maskgit.
"""

import re

import numpy as np
from etils import epath
from flax import serialization, traverse_util

from supmim_jax.config import VQGANConfig
from supmim_jax.errors import SetupError, first_few

# Our path in models/vqgan.py, and MaskGIT's. Linen numbers the modules of a class in the order in
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


def their_name(path: str, cfg: VQGANConfig) -> str:
    """MaskGIT's name of our parameter, without the leading `params/`."""
    if match := re.fullmatch(r"decoder/upsample/(\d+)/(\w+)", path):
        return f"decoder/Conv_{int(match[1]) + 1}/{match[2]}"
    if match := re.fullmatch(r"decoder/conv_out/(\w+)", path):
        return f"decoder/Conv_{len(cfg.multipliers)}/{match[1]}"
    return next(re.sub(ours, theirs, path) for ours, theirs in NAMES if re.search(ours, path))


def load(path: epath.Path, cfg: VQGANConfig, like: dict) -> dict:
    """The parameters of the VQGAN `like` (nested dict of shapes) from the file, on the host.

    Raises:
      SetupError: the file is missing or cut, or a parameter is missing, left over or misshapen.
    """
    stored, like = _read(path), traverse_util.flatten_dict(like, sep="/")
    names = {ours: their_name(ours, cfg) for ours in like}
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
