"""Which mesh and rematerialization: the same step compiled for several, compared."""

import dataclasses

from supmim_jax.config import Config, MeshConfig
from supmim_jax.rehearse.chips import Slice
from supmim_jax.rehearse.estimate import ROWS

TENSOR = (1, 2, 4)  # it did not pay for a ViT-B; beyond, heads and links are too few


def candidates(cfg: Config, part: Slice) -> list[Config]:
    """Configs worth compiling: every fsdp that divides, two policies.

    Left out are those with rows per shard that are no multiple of ROWS, which TPU handles badly,
    and those that don't divide heads or width.
    """
    found = []
    for tensor in TENSOR:
        for fsdp in _divisors(part.chips // tensor):
            data = part.chips // (tensor * fsdp)
            rows = cfg.batch_size / (data * fsdp * cfg.optim.accumulate)
            if rows % ROWS or cfg.model.heads % tensor or cfg.model.width % fsdp:
                continue
            mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
            for remat in ("names", "full"):
                model = dataclasses.replace(cfg.model, remat=remat)
                found.append(dataclasses.replace(cfg, mesh=mesh, model=model))
    return found


def subset(configs: list[Config], limit: int) -> list[Config]:
    """At most `limit` of them: "names" before "full", no tensor axis before one, balanced meshes
    before extreme ones."""

    def order(cfg: Config) -> tuple:
        mesh = cfg.mesh
        return cfg.model.remat == "full", mesh.tensor, abs(mesh.data - mesh.fsdp)

    return sorted(configs, key=order)[:limit]


def recommend(results: list[dict]) -> str:
    """The fastest that fits, and why; of those within 2 % of it the one with most HBM to spare."""
    fitting = [result for result in results if result.get("fits")]
    if not fitting:
        return "Nothing that was tried fits: take more chips, or optim.accumulate."
    fastest = min(result["step_seconds"] for result in fitting)
    close = [result for result in fitting if result["step_seconds"] <= 1.02 * fastest]
    best = min(close, key=lambda result: (result["hbm_gib"]["total"], result["ici_seconds"]))
    mesh = best["mesh"]
    return (
        f"Recommended: mesh.data={mesh['data']}, mesh.fsdp={mesh['fsdp']}, "
        f"mesh.tensor={mesh['tensor']}, model.remat={best['remat']!r}: "
        f"{best['step_seconds'] * 1e3:.1f} ms at least, within 2 % of the fastest "
        f"({fastest * 1e3:.1f} ms), and of those the least HBM "
        f"({best['hbm_gib']['total']:.2f} GiB)."
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
