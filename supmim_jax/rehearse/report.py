"""Rehearsals as text for people."""

LOWER_BOUND = (
    "Seconds, hours and MFU assume that nothing takes longer than its FLOPs or bytes and that\n"
    "traffic between chips is hidden entirely: no run will be faster."
)


def report(result: dict) -> str:
    """One rehearsal, as a block of lines."""
    if "needed_gib" in result:
        return "\n".join([*head(result), refused(result), *result["advice"]])
    memory = result["hbm_gib"]
    lines = [
        *head(result),
        f"{'fits' if result['fits'] else 'DOES NOT FIT'}: {memory['total']:.2f} GiB of "
        f"{memory['of']} per chip (arguments {memory['arguments']:.2f}, outputs beside them "
        f"{memory['outputs']:.2f}, temporaries {memory['temporaries']:.2f}, code "
        f"{memory['code']:.2f})",
        f"FLOPs per chip: {result['flops'] / 1e12:.3f} T{ratios(result)}",
        f"HBM traffic per chip: {result['hbm_bytes'] / 1e9:.2f} GB",
        f"{'collectives per step':24}{'count':>7}{'MB':>9}{'/ bf16 params':>15}{'ms':>8}  dtypes",
    ]
    for kind, entry in result["collectives"].items():
        dtypes = ", ".join(k.removeprefix("count_") for k in entry if k.startswith("count_"))
        lines.append(
            f"{kind:24}{entry['count']:7}{entry['bytes'] / 1e6:9.1f}{entry['of_parameters']:15.3f}"
            f"{entry['seconds'] * 1e3:8.2f}  {dtypes}"
        )
    lines += [
        f"step at least {result['step_seconds'] * 1e3:.1f} ms: computing "
        f"{result['roofline_seconds'] * 1e3:.1f} ms (roofline), between chips "
        f"{result['ici_seconds'] * 1e3:.1f} ms; MFU at most {result['mfu']:.1%}",
        f"{result['steps']} steps: at least {result['hours']:.1f} h, "
        f"{result['chip_hours']:.0f} chip-hours",
        f"compiled in {result['compile_seconds']:.0f} s",
        LOWER_BOUND,
        *result["advice"],
    ]
    return "\n".join(lines)


def head(result: dict) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    return [
        f"{result['topology']}, {result['chips']} chips: {mesh}",
        f"{result['objective']}, batch {result['batch_size']} ({result['rows_per_shard']} per "
        f"shard), remat {result['remat']}, tokens: {result['tokens']}",
    ]


def refused(result: dict) -> str:
    return (
        f"DOES NOT FIT: the compiler needs {result['needed_gib']} GiB of "
        f"{result['available_gib']} per chip"
    )


def ratios(result: dict) -> str:
    if result["flops_ratio"] is None:
        return " (no arithmetic for this objective)"
    return (
        f", {result['flops_ratio']:.4f} of the model's {result['model_flops'] / 1e12:.3f} T by "
        f"arithmetic, {result['flops_ratio_with_recomputed']:.4f} with what is recomputed"
    )


COLUMNS = {
    "chips": lambda r: r["topology"],
    "mesh": lambda r: "x".join(str(n) for n in r["mesh"].values()),
    "remat": lambda r: r["remat"],
    "tokens": lambda r: r["tokens"],
    "GiB": lambda r: f"{r['hbm_gib']['total']:.2f}",
    "FLOPs/model": lambda r: f"{r['flops_ratio_with_recomputed'] or 0:.4f}",
    "HBM GB": lambda r: f"{r['hbm_bytes'] / 1e9:.1f}",
    "gather": lambda r: _share(r, "all-gather"),
    "scatter": lambda r: _share(r, "reduce-scatter"),
    "reduce": lambda r: _share(r, "all-reduce"),
    "roofline ms": lambda r: f"{r['roofline_seconds'] * 1e3:.1f}",
    "ICI ms": lambda r: f"{r['ici_seconds'] * 1e3:.1f}",
    "MFU %": lambda r: f"{100 * r['mfu']:.1f}",
    "chip-hours": lambda r: f"{r['chip_hours']:.0f}",
    "compile s": lambda r: f"{r['compile_seconds']:.0f}",
}


def _share(result: dict, kind: str) -> str:
    entry = result["collectives"].get(kind)
    return f"{entry['of_parameters']:.3f}" if entry else "0"


def row(result: dict) -> str:
    """A row of a Markdown table with COLUMNS."""
    return f"| {' | '.join(cell(result) for cell in COLUMNS.values())} |"


def table(results: list[dict]) -> str:
    """A Markdown table; rehearsals that don't fit come after it."""
    fitting = [result for result in results if "needed_gib" not in result]
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(row, fitting)]
    for result in results:
        if "needed_gib" in result:
            lines.append(f"{' '.join(head(result))}: {refused(result)}")
    return "\n".join(lines)
