"""What a training run leaves for use, an encoder or a tokenizer, as jitted functions.

Built from the run's config alone, whatever its objective; weights are bound to it afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from supmim_jax import sharding
from supmim_jax.batch import Features
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config
from supmim_jax.models import kmeans
from supmim_jax.models.segmentation import Segmenter
from supmim_jax.models.vit import Backbone, Classifier, pixels


def abstract_images(cfg: Config, batch_size: int, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A global batch of the run's images, uint8 BxHxWxC.

    Raises:
      ConfigError: the mesh does not divide it.
    """
    sharding.check_batch(batch_size, mesh, "config.eval.batch_size")
    shape = (batch_size, cfg.data.image_size, cfg.data.image_size, cfg.data.channels)
    return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=NamedSharding(mesh, sharding.BATCH))


@dataclass(frozen=True)
class EncoderProgram:
    """Evaluation: `features(params, images) -> Features`.

    The encoder and the head that was trained with it, nothing else of the training objective:
    `params` are abstract, and `images` (abstract) is a global batch of uint8 images.
    """

    features: Callable[[Any, jax.Array], Features]
    params: Any
    images: jax.ShapeDtypeStruct

    def bind(self, params: Any) -> "BoundEncoder":
        """The encoder with the inference part of a train state's `params`."""
        return BoundEncoder(self, {name: params[name] for name in self.params})


def build_encoder(cfg: Config, batch_size: int, mesh: Mesh) -> EncoderProgram:
    """The inference program of the encoder that `cfg` trains."""

    def split():
        with nnx.use_eager_sharding(False):
            graph, params = nnx.split(inference_model(cfg), nnx.Param)
        return graph, nnx.to_pure_dict(params)

    graph, params = jax.eval_shape(split)

    def features(params, images) -> Features:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # sharding.by_rows asks for it
            return nnx.merge(graph, params).features(images)

    return EncoderProgram(
        features=jax.jit(features),
        params=sharding.shard_like_params(params, mesh),
        images=abstract_images(cfg, batch_size, mesh),
    )


def inference_model(cfg: Config) -> Classifier | Backbone | Segmenter:
    """What the objective leaves for inference, with any weights."""
    if cfg.objective.leaves == "segmenter":
        return Segmenter(cfg, rngs=nnx.Rngs(0))
    kind = {"classifier": Classifier, "encoder": Backbone}[cfg.objective.leaves]
    return kind(cfg.model, cfg.data, rngs=nnx.Rngs(0))


@dataclass(frozen=True)
class BoundEncoder:
    """An inference program with its weights: the `Encoder` that evaluators are given."""

    program: EncoderProgram
    params: Any

    def features(self, images: jax.Array) -> Features:
        return self.program.features(self.params, images)


@dataclass(frozen=True)
class TokenizerProgram:
    """An image tokenizer as jitted functions of its arrays; `arrays` and `images` are abstract.

    encode(arrays, uint8 images) -> int32 ids BxL; decode(arrays, ids) -> float images in [-1, 1].
    """

    encode: Callable[[Any, jax.Array], jax.Array]
    decode: Callable[[Any, jax.Array], jax.Array]
    num_codes: int
    arrays: Any
    images: jax.ShapeDtypeStruct

    @property
    def params(self) -> dict:
        """The part of a train state's `params` that `bind` takes, abstract."""
        return {"tokenizer": self.arrays}

    def bind(self, params: Any) -> "BoundTokenizer":
        """The tokenizer with the weights of a train state's `params`."""
        return BoundTokenizer(self, params["tokenizer"])


@dataclass(frozen=True)
class BoundTokenizer:
    """A tokenizer program with its arrays: the `Tokenizer` that evaluators are given."""

    program: TokenizerProgram
    arrays: Any

    @property
    def num_codes(self) -> int:
        return self.program.num_codes

    def encode(self, images: jax.Array) -> jax.Array:
        return self.program.encode(self.arrays, images)

    def decode(self, ids: jax.Array) -> jax.Array:
        return self.program.decode(self.arrays, ids)


def build_tokenizer(cfg: Config, batch_size: int, mesh: Mesh) -> TokenizerProgram:
    """The tokenizer whose tokens are the target of `cfg`, or which `cfg` trains."""
    section, patch = cfg.objective.tokenizer_for(cfg.model.patch)

    def split():
        with nnx.use_eager_sharding(False):
            graph, arrays = nnx.split(kmeans.make(section, patch, cfg.data, nnx.Rngs(0)))
        return graph, nnx.to_pure_dict(arrays)

    graph, arrays = jax.eval_shape(split)
    return TokenizerProgram(
        encode=jax.jit(lambda arrays, images: nnx.merge(graph, arrays).encode(pixels(images))),
        decode=jax.jit(lambda arrays, ids: nnx.merge(graph, arrays).decode(ids)),
        num_codes=section.codes,
        images=abstract_images(cfg, batch_size, mesh),
        arrays=sharding.replicated(arrays, mesh),
    )


def build_evaluation(cfg: Config, batch_size: int, mesh: Mesh) -> EncoderProgram | TokenizerProgram:
    """What evaluations of a run of `cfg` need: its encoder, or the tokenizer that it trains."""
    build_it = build_tokenizer if cfg.objective.leaves == "tokenizer" else build_encoder
    return build_it(cfg, batch_size, mesh)


def restore(
    checkpoint: Checkpoint, mesh: Mesh, batch_size: int | None = None
) -> BoundEncoder | BoundTokenizer:
    """What the run of a checkpoint leaves, with its weights, on `mesh`.

    Args:
      checkpoint: of any objective and any mesh.
      mesh: where it is to compute.
      batch_size: of the global batches of images; default: that of the run's evaluations.

    Raises:
      SetupError: the checkpoint's parameters are not those of its config.
    """
    cfg = checkpoint.config
    program = build_evaluation(cfg, batch_size or cfg.eval.batch_size, mesh)
    return program.bind(checkpoint.restore_params(program.params))
