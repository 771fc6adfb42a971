"""The files of a workdir as plain values. What reads one raises SetupError if its form is wrong."""

import json
from typing import Any, NamedTuple

from etils import epath

from supmim_jax import environment, storage
from supmim_jax.errors import SetupError
from supmim_jax.evals import ERRORS

CURE = "Repair it, or move it away."
LARGEST_INT = 2**53  # that a float holds
LARGEST_DRAWN = 1e100
# Of results.json; the rest was measured.
ABOUT = ("objective", "epochs", "seconds", "split", ERRORS)


class Evaluation(NamedTuple):
    """Numbers from one file."""

    source: str  # the file's name
    about: str  # the split and the like, as far as the file tells
    metrics: dict[str, float]


def curves(workdir: epath.Path) -> dict[str, list[tuple[int, float]]]:
    """Points (step, value) by name, from metrics.jsonl; {} where there is none.

    A line is {"step": s, name: value}; the last one may have been cut.
    """
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise _refused(path, str(error)) from None
    found: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            step = values.pop("step")
            if not (_is_numbers(values) and type(step) is int and 0 <= step < LARGEST_INT):
                raise ValueError
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            if number == len(lines):
                break
            raise _refused(path, f"line {number} is no object of numbers with a step") from None
        for name, value in values.items():
            if abs(value) < LARGEST_DRAWN:  # and so no NaN
                found.setdefault(name, []).append((step, value))
    return found


def evaluations(workdir: epath.Path) -> list[Evaluation]:
    """Everything that was measured: results.json, then evals/*.json by name, where there."""
    results, evals = workdir / "results.json", workdir / "evals"
    paths = [results] if results.exists() else []
    paths += sorted(evals.glob("*.json")) if evals.exists() else []
    found = []
    for path in paths:
        values = storage.read_json(path, CURE)
        if not isinstance(values, dict):
            raise _refused(path, "it is no object")
        if path == results:
            source, about = path.name, ["end of training", _told(values, "split", "split ")]
            metrics = {name: value for name, value in values.items() if name not in ABOUT}
        else:
            source, data, metrics = f"evals/{path.name}", values.get("data"), values.get("metrics")
            about = [_told(values, "step", "step "), _told(data, "name")]
            about.append(_told(data, "eval_split", "split "))
        if not isinstance(metrics, dict) or not _is_numbers(metrics):
            raise _refused(path, "its metrics are no object of numbers")
        found.append(Evaluation(source, ", ".join(filter(None, about)), metrics))
    return found


def environments(workdir: epath.Path) -> list[dict]:
    """What the run was trained on, a dict per part; [] for runs that did not note it."""
    path = workdir / "environment.json"
    parts = storage.read_json(path, CURE) if path.exists() else []
    plain = (str, int, bool, type(None))
    if not isinstance(parts, list) or not all(
        isinstance(part, dict)
        and environment.FROM_STEP in part
        and all(type(x) in plain for x in part.values())
        for part in parts
    ):
        reason = "it is no list of objects of texts and numbers, each with its from_step"
        raise _refused(path, reason)
    return parts


def _told(values: Any, name: str, before: str = "") -> str:
    """The text or whole number of this name after `before`; "" where the file has none."""
    value = values.get(name) if isinstance(values, dict) else None
    return f"{before}{value}" if isinstance(value, str | int) else ""


def _is_numbers(values: dict) -> bool:
    return all(
        type(x) is float or (type(x) is int and abs(x) < LARGEST_INT) for x in values.values()
    )


def _refused(path: epath.Path, reason: str) -> SetupError:
    return SetupError(f"{path} cannot be used: {reason}. {CURE}")
