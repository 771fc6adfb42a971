"""Exact kNN beside faiss's IndexFlatIP, and its cost at ImageNet size read from the program."""

import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from supmim_jax import sharding
from supmim_jax.config import MeshConfig
from supmim_jax.errors import SetupError
from supmim_jax.evals import features, knn
from supmim_jax.rehearse import aot, hlo

IMAGENET = (1_281_167, 50_000, 768)  # training images, validation images, width of a ViT-B


def command() -> Callable[[], None]:
    """Defines the flags of this bench; what it returns runs once they are parsed."""
    bank = flags.DEFINE_integer("bank", 100_000, "Rows searched.", lower_bound=1)
    queries = flags.DEFINE_integer("queries", 5_000, "Queries.", lower_bound=1)
    dim = flags.DEFINE_integer("dim", 768, "Dimensions.", lower_bound=1)
    k = flags.DEFINE_integer("k", 200, "Neighbours.", lower_bound=1)
    repeats = flags.DEFINE_integer("repeats", 3, "Turns of each; the best counts.", lower_bound=1)
    counts = flags.DEFINE_bool(
        "counts", False, "Only FLOPs and memory of the compiled program at ImageNet size."
    )

    def run() -> None:
        if counts.value:
            print(costs(k.value))
        else:
            print(compare(bank.value, queries.value, dim.value, k.value, repeats.value))

    return run


def compare(bank_rows: int, query_rows: int, dim: int, k: int, repeats: int) -> str:
    """A table of both searches of the same random features, taking turns in one process.

    Ours includes normalising the bank and sending it to the devices; faiss's includes adding
    (copying) it to the index. Both get unit rows.
    """
    try:
        import faiss
    except ImportError:
        raise SetupError(
            "This bench compares with faiss, which is not installed: pip install faiss-cpu. "
            "--counts needs no faiss."
        ) from None
    random = np.random.default_rng(0)
    random_rows = (random.standard_normal((n, dim), np.float32) for n in (bank_rows, query_rows))
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in random_rows)

    def rival():
        index = faiss.IndexFlatIP(dim)
        index.add(bank)
        return index.search(queries, k)

    mesh = sharding.make_mesh(MeshConfig())
    searches = {
        f"supmim_jax, {mesh.size} {jax.default_backend()} device(s)": (
            lambda: knn.neighbours(queries, bank, k, mesh=mesh)
        ),
        f"faiss {faiss.__version__} IndexFlatIP, {faiss.omp_get_max_threads()} threads": rival,
    }
    knn.neighbours(queries[:1024], bank, k, mesh=mesh)  # compiles
    seconds, found = {name: [] for name in searches}, {}
    for _ in range(repeats):
        for name, search in searches.items():
            start = time.perf_counter()
            found[name] = search()
            seconds[name].append(time.perf_counter() - start)
    ours, theirs = found.values()
    best = {name: min(times) for name, times in seconds.items()}
    rival_seconds = list(best.values())[1]
    lines = [
        f"{query_rows} queries, bank {bank_rows} x {dim} float32, k = {k}; best of {repeats}",
        "| | seconds | GFLOP/s | speed / faiss |",
        "|---|---|---|---|",
    ]
    for name, time_s in best.items():
        rate = 2e-9 * query_rows * bank_rows * dim / time_s
        lines.append(f"| {name} | {time_s:.2f} | {rate:.0f} | {rival_seconds / time_s:.2f} |")
    return "\n".join([*lines, agreement(ours, theirs)])


def agreement(ours: knn.Neighbours, theirs: tuple[np.ndarray, np.ndarray]) -> str:
    """How far two results of one search agree; similarities that nearly tie may swap places."""
    similarity, index = theirs
    same = 100.0 * (ours.index_QxK == index).mean()
    shared = [len(np.intersect1d(a, b)) for a, b in zip(ours.index_QxK, index)]
    gap = np.abs(ours.similarity_QxK - similarity).max()
    return (
        f"Same neighbour at the same rank: {same:.4f} %; same neighbours at any rank: "
        f"{100.0 * np.mean(shared) / index.shape[1]:.4f} %; similarities differ by {gap:.1e} at "
        f"most."
    )


def costs(k: int) -> str:
    """A table of FLOPs and memory per device at ImageNet size, compiled for 1 and 8 CPU devices.

    Nothing is allocated or run. The peak is what the compiler reserves: arguments (the bank), the
    result, and temporary memory.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    bank, queries, dim = IMAGENET
    analytic = 2e-12 * queries * bank * dim
    lines = [
        f"{queries} queries, bank {bank} x {dim} float32, k = {k}; analytic {analytic:.2f} TFLOP",
        "| devices | TFLOP per device | TFLOP in all | bank, GiB | peak, GiB per device |",
        "|---|---|---|---|---|",
    ]
    for devices in (1, 8):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
        lowered, calls = search_program(k, mesh)
        compiled = lowered.compile()
        each = calls * hlo.parse(compiled.as_text()).flops / 1e12
        memory = aot.memory(compiled)
        bank_gib, peak = memory["arguments"] / 2**30, sum(memory.values()) - memory["code"]
        row = (f"{each:.2f}", f"{devices * each:.2f}", f"{bank_gib:.2f}", f"{peak / 2**30:.2f}")
        lines.append(f"| {devices} | {' | '.join(row)} |")
    return "\n".join(lines)


def search_program(k: int, mesh: Mesh) -> tuple[jax.stages.Lowered, int]:
    """The program of `knn.neighbours` at ImageNet size, but for a single CPU; how often it runs."""
    size, queries, dim = IMAGENET
    query_chunk = knn._chunk(queries, knn.QUERY_CHUNK, knn.LEAST_QUERIES)
    chunk = knn._chunk(size, knn.BANK_CHUNK, knn.LEAST_CHUNK)
    one = (jax.ShapeDtypeStruct((query_chunk, dim), "float32"), jax.ShapeDtypeStruct((), "int32"))
    shape = (features.round_up(-(-size // chunk), mesh.size), chunk, dim)
    bank = jax.ShapeDtypeStruct(shape, "float32", sharding=features.by_rows(mesh))
    abstract = (*sharding.replicated(one, mesh), bank)
    lowered = knn._search.lower(*abstract, k=k, size=size, leave_one_out=False, mesh=mesh)
    return lowered, -(-queries // query_chunk)
