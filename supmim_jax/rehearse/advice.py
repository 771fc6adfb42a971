"""What to change when a step doesn't fit, or wastes the hardware; with the numbers it rests on."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh

from supmim_jax.config import Config
from supmim_jax.models.masking import num_masked
from supmim_jax.rehearse.chips import Slice
from supmim_jax.rehearse.estimate import GIB, ROWS, rows_per_shard, state_gib


@dataclass(frozen=True)
class Need:
    """GiB of one chip; `temporaries` is all but the state where the compiler gave up.

    `permutations` are the collective-permutes of a step.
    """

    total: float
    temporaries: float
    available: float
    permutations: int = 0


def advise(cfg: Config, mesh: Mesh, part: Slice, need: Need) -> list[str]:
    """Sentences, the most urgent first; [] if there is nothing to say."""
    sentences = []
    rows = rows_per_shard(cfg, mesh) // cfg.optim.accumulate
    if need.total > need.available:
        sentences.append(smaller(cfg, mesh, part, need))
    if rows % ROWS:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        sentences.append(
            f"A chip works on {rows} rows at once, not a multiple of {ROWS}: TPU pads them, and "
            f"XLA may emulate all-gathers by all-reduces. With {shards} shards take a batch_size "
            f"that is a multiple of {ROWS * shards * cfg.optim.accumulate}, or a smaller slice."
        )
    if need.permutations >= cfg.model.depth:
        fsdp, width = mesh.shape["fsdp"], cfg.model.width
        sentences.append(
            f"{need.permutations} permutations: mesh.fsdp={fsdp} leaves {width // fsdp} of a width "
            f"of {width} to a chip, which XLA pads for its reduce-scatters and then mends. Compare "
            f"other mesh.fsdp (--sweep)."
        )
    return sentences


def smaller(cfg: Config, mesh: Mesh, part: Slice, need: Need) -> str:
    """The first change that should make a step fit, by the size of what it removes."""
    over = f"It needs {need.total:.2f} GiB of {need.available:.2f}."
    if cfg.model.remat == "none":
        return (
            f"{over} First set model.remat='names': it stores "
            f"{saved_gib(cfg, mesh, 'names'):.2f} GiB of activations and recomputes attention's "
            f"logits only."
        )
    for change, saves in changes(cfg, mesh, part, need):
        if need.total - saves <= need.available:
            return f"{over} First set {change}: about {need.total - saves:.2f} GiB."
    together = ", ".join(change for change, _ in changes(cfg, mesh, part, need))
    return f"{over} No single change mends that: take more chips, or together {together}."


def changes(cfg: Config, mesh: Mesh, part: Slice, need: Need) -> list[tuple[str, float]]:
    """Changes and the GiB that each should save, the cheapest in time first."""
    found = []
    fsdp, data = mesh.shape["fsdp"], mesh.shape["data"]
    if data > 1:
        state = state_gib(cfg, mesh)
        found.append((f"mesh.fsdp={fsdp * data}, mesh.data=1", state * (1 - 1 / data)))
    rows = rows_per_shard(cfg, mesh)
    parts = next((n for n in (2, 4, 8, 16) if rows % (n * ROWS) == 0 and over_by(need, n) <= 0), 0)
    if parts > cfg.optim.accumulate:
        found.append((f"optim.accumulate={parts}", need.temporaries * (1 - 1 / parts)))
    if cfg.model.remat == "names":
        saves = saved_gib(cfg, mesh, "names") - saved_gib(cfg, mesh, "full")
        found.append(("model.remat='full'", saves))
    return found


def over_by(need: Need, parts: int) -> float:
    """GiB too much if temporaries were of one of `parts` micro-batches."""
    return need.total - need.temporaries * (1 - 1 / parts) - need.available


def saved_gib(cfg: Config, mesh: Mesh, remat: str) -> float:
    """What rematerialization stores of encoder and decoder on one chip, by arithmetic.

    "names" keeps qkv, attention, mid and fc1 of each block; both keep its input.
    """
    rows = rows_per_shard(cfg, mesh) // cfg.optim.accumulate
    patches = (cfg.data.image_size // cfg.model.patch) ** 2
    tokens, stacks = patches, []
    if cfg.objective.name == "supmim":
        visible = cfg.objective.encoder_input == "visible"
        masked = num_masked(patches, cfg.objective.mask_ratio) if visible else 0
        tokens += patches - masked
        stacks.append((cfg.objective.decoder, patches))
    values = 0
    for stack, count in [(cfg.model, tokens), *stacks]:
        width = {"names": 6 * stack.width + stack.mlp_dim, "full": stack.width}[remat]
        values += count * stack.depth * width
    return rows * values * jnp.dtype(cfg.model.dtype).itemsize / GIB
