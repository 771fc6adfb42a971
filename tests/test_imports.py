"""Imports point down, and heavy libraries are loaded where they are needed."""

import ast
from pathlib import Path

from conftest import REPOSITORY

PACKAGE, RIVALS = Path(REPOSITORY, "supmim_jax"), Path(REPOSITORY, "tests", "rivals")
LAYERS = [
    {"errors", "batch", "environment"},
    {"storage"},
    {"config"},
    {"sharding", "multihost", "metrics"},
    {"models", "data", "optim", "watchdog"},
    {"objectives", "formats", "cli"},
    {"checkpoint", "evals"},
    {"encoder"},
    {"train_step"},
    {"tokenizers", "init_from", "contrastive_boxes"},
    {"workdir"},
    {
        "train",
        "probe",
        "visualize",
        "cache_tokens",
        "import_weights",
        "data.prepare",
        "rehearse",
    },
    {"report", "bench", "inference"},
    {"embed", "study", "export"},
]
APART = {("evals", "objectives"), ("evals", "encoder")}


def part(parts: tuple[str, ...]) -> str:
    """The layer's member that a module is in: its first name; data.prepare is a command."""
    return "data.prepare" if parts[:2] == ("data", "prepare") else parts[0]


def imports(path: Path) -> set[str]:
    """What a file imports of supmim_jax, by the names in LAYERS."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "supmim_jax":
            module = tuple(node.module.split(".")[1:])
            found |= {part((*module, alias.name)) for alias in node.names}
    return found


def test_imports_point_down():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        user = part(parts)
        for used in imports(path) - {user}:
            assert used in level, f"{path.name} imports {used}, which no layer of this test names"
            down = level[used] < level[user]
            assert down and (user, used) not in APART, f"{path} must not import {used}"


def test_tensorflow_is_imported_only_to_write_events_to_prepare_data_and_as_a_rival():
    for path in [*PACKAGE.rglob("*.py"), *RIVALS.glob("*.py")]:
        tree = ast.parse(path.read_text())
        prepares = path.parent == PACKAGE / "data" / "prepare"
        for node in ast.walk(tree):
            allowed = (prepares and node not in tree.body) or path.name == "tfdata_reference.py"
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert allowed or name.split(".")[0] != "tensorflow", path
                assert not name.startswith("clu") or path.name == "metrics.py", path


def test_torch_is_imported_only_in_the_rivals_process():
    """What any other process imports must load where PyTorch is not installed."""
    rival = {"torch_reference", "torch_model"}
    for path in [*PACKAGE.rglob("*.py"), *RIVALS.glob("*.py")]:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {x.name.split(".")[0] for x in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {(node.module or "").split(".")[0], (node.module or "").split(".")[-1]}
                names |= {x.name for x in node.names}
        assert path.stem in rival or not names & {"torch", *rival}, path
