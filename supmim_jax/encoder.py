"""What a training run leaves for use, an encoder or a tokenizer, as jitted functions.

They are built from the run's config alone, whatever its objective, and weights are bound to them
afterwards.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from supmim_jax import sharding
from supmim_jax.batch import Features
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config
from supmim_jax.models import kmeans
from supmim_jax.models.segmentation import Segmenter
from supmim_jax.models.vit import Backbone, Classifier, pixels


@dataclass(frozen=True)
class EncoderProgram:
    """Evaluation: the encoder and the head that was trained with it, nothing else."""

    features: Callable[[Any, jax.Array], Features]  # of params, and of images as below
    params: Any  # abstract
    images: jax.ShapeDtypeStruct  # a global batch, uint8 BxHxWxC

    def bind(self, params: Any) -> "BoundEncoder":
        """The encoder with the inference part of a train state's `params`."""
        own = {name: params[name] for name in self.params}
        return BoundEncoder(own, functools.partial(self.features, own))


@dataclass(frozen=True)
class BoundEncoder:
    """An inference program with its weights: the `Encoder` that evaluators are given."""

    params: Any
    features: Callable[[jax.Array], Features]


@dataclass(frozen=True)
class TokenizerProgram:
    """An image tokenizer as jitted functions of its arrays; `arrays` and `images` are abstract."""

    encode: Callable[[Any, jax.Array], jax.Array]  # of arrays, uint8 images: int32 ids BxL
    decode: Callable[[Any, jax.Array], jax.Array]  # of arrays, ids: float images in [-1, 1]
    num_codes: int
    arrays: Any
    images: jax.ShapeDtypeStruct

    @property
    def params(self) -> dict:
        """The part of a train state's `params` that `bind` takes, abstract."""
        return {"tokenizer": self.arrays}

    def bind(self, params: Any) -> "BoundTokenizer":
        """The tokenizer with the weights of a train state's `params`."""
        arrays = params["tokenizer"]
        encode, decode = (functools.partial(x, arrays) for x in (self.encode, self.decode))
        return BoundTokenizer(self.num_codes, arrays, encode, decode)


@dataclass(frozen=True)
class BoundTokenizer:
    """A tokenizer program with its arrays: the `Tokenizer` that evaluators are given."""

    num_codes: int
    arrays: Any
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]


def build_encoder(cfg: Config, batch_size: int, mesh: Mesh) -> EncoderProgram:
    """The inference program of the encoder that `cfg` trains."""

    def make() -> Classifier | Backbone | Segmenter:
        if cfg.objective.leaves == "segmenter":
            return Segmenter(cfg, rngs=nnx.Rngs(0))
        kind = {"classifier": Classifier, "encoder": Backbone}[cfg.objective.leaves]
        return kind(cfg.model, cfg.data, rngs=nnx.Rngs(0))

    graph, params = _abstract(make)

    def features(params, images) -> Features:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # sharding.by_rows asks for it
            return nnx.merge(graph, params).features(images)

    return EncoderProgram(
        features=jax.jit(features),
        params=sharding.shard_like_params(params, mesh),
        images=sharding.image_batch(cfg, batch_size, mesh),
    )


def build_tokenizer(cfg: Config, batch_size: int, mesh: Mesh) -> TokenizerProgram:
    """The tokenizer whose tokens are the target of `cfg`, or which `cfg` trains."""
    section, patch = cfg.objective.tokenizer_for(cfg.model.patch)

    graph, arrays = _abstract(lambda: kmeans.make(section, patch, cfg.data, nnx.Rngs(0)))
    return TokenizerProgram(
        encode=jax.jit(lambda arrays, images: nnx.merge(graph, arrays).encode(pixels(images))),
        decode=jax.jit(lambda arrays, ids: nnx.merge(graph, arrays).decode(ids)),
        num_codes=section.codes,
        images=sharding.image_batch(cfg, batch_size, mesh),
        arrays=sharding.replicated(arrays, mesh),
    )


def _abstract(make: Callable[[], nnx.Module]) -> tuple[Any, dict]:
    """The graph of a module and its abstract variables."""

    def split():
        with nnx.use_eager_sharding(False):
            graph, variables = nnx.split(make())
        return graph, nnx.to_pure_dict(variables)

    return jax.eval_shape(split)


def build_evaluation(cfg: Config, batch_size: int, mesh: Mesh) -> EncoderProgram | TokenizerProgram:
    """The program that evaluations of `cfg` need: its encoder, or the tokenizer it trains."""
    build_it = build_tokenizer if cfg.objective.leaves == "tokenizer" else build_encoder
    return build_it(cfg, batch_size, mesh)


def restore(
    checkpoint: Checkpoint, mesh: Mesh, batch_size: int | None = None
) -> BoundEncoder | BoundTokenizer:
    """What a checkpoint's run leaves, with its weights on `mesh`, whatever its own mesh was.

    `batch_size` is that of the global batches of images; default: of the run's evaluations.

    Raises:
      SetupError: the checkpoint's parameters are not those of its config.
    """
    cfg = checkpoint.config
    program = build_evaluation(cfg, batch_size or cfg.eval.batch_size, mesh)
    return program.bind(checkpoint.restore_params(program.params))
