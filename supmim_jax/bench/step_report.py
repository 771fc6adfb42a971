"""The result of the bench of the train step as tables for people."""

GIGA, MIB = 1e9, 2**20


def report(result: dict) -> str:
    """Lines of Markdown: what was measured, the tables, and what their numbers mean."""
    lines = [
        f"{result['objective']}, batch {result['batch_size']}, {result['dtype']}, remat "
        f"{result['remat']}, tokens {result['tokens']}; {result['devices']}, {result['threads']} "
        f"CPU threads, load {result['load']:.1f}; jax {result['versions']['jax']}",
        "",
        *numbers(result),
    ]
    if "rival" in result:
        lines += ["", *rival(result)]
    if "where" in result:
        lines += ["", *where(result)]
    return "\n".join(lines)


def numbers(result: dict) -> list[str]:
    """The step's own table."""
    step, count, memory = result["step"], result["counts"], result["memory"]
    shape, peak = max(result["peak"].items(), key=lambda item: item[1])
    model = count["model_flops"] / result["batch_size"] / GIGA
    cached = ", from the compilation cache where it was there" * result["compilation_cache"]
    rows = {
        "images/s": f"{step['images_per_s']:.1f}",
        "step, ms": f"{1e3 * step['median_s']:.1f} ({1e3 * step['min_s']:.1f} to "
        f"{1e3 * step['max_s']:.1f}; {step['rounds']} rounds of {step['steps']})",
        "GF per image by arithmetic": f"{model:.3f}",
        "FLOPs of the program / arithmetic": f"{count['ratio']:.4f}"
        if "ratio" in count
        else f"not counted: {count['uncounted']}",
        "matmul peak here, GF/s": f"{peak / GIGA:.0f} (MxKxN {shape})",
        "MFU, of that peak": f"{result['mfu']:.1%}",
        "peak memory of a device, MiB": f"{memory['bytes'] / MIB:.0f} (says {memory['by']})",
        "tracing, s": f"{result['trace_s']:.1f}",
        "compiling, s": f"{result['compile_s']:.1f}{cached}",
    }
    if data := result.get("data"):
        rows["step fed by the input pipeline, ms"] = (
            f"{1e3 * data['step_s']:.1f} (mean of {data['steps']} steps in one go)"
        )
        rows["data wait"] = f"{data['wait_share']:.1%} of that, {1e3 * data['wait_s']:.2f} ms"
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def rival(result: dict) -> list[str]:
    """Ours beside PyTorch's."""
    found, batch, ours = result["rival"], result["batch_size"], result["step"]
    lines = [
        "| by turns | images/s | step, ms | CPU ms | time / ours (rounds) | CPU time / ours |",
        "|---|---|---|---|---|---|",
        f"| supmim_jax | {ours['images_per_s']:.1f} | {1e3 * ours['median_s']:.1f} | "
        f"{1e3 * ours['cpu_s']:.1f} | 1 | 1 |",
    ]
    for how, row in found["times"].items():
        ratios = ["{:.2f} ({:.2f} to {:.2f})".format(*row[x]) for x in ("ratio", "cpu_ratio")]
        lines.append(
            f"| PyTorch {found['version']}, {how} | {batch / row['median_s']:.1f} | "
            f"{1e3 * row['median_s']:.1f} | {1e3 * row['cpu_s']:.1f} | {' | '.join(ratios)} |"
        )
    least = min(row["ratio"][0] for row in found["times"].values())
    told = f"Above 1 ours is faster: {least:.2f} times PyTorch's best. {found['threads']} threads "
    told += f"each; PyTorch compiled and warmed up in {found['compile_s']:.0f} s."
    if found["not_compiled"]:
        told += f" Without torch.compile: {found['not_compiled']}"
    return [*lines, "", told]


def where(result: dict) -> list[str]:
    """Shares of time from the profile, beside those of counted FLOPs."""
    if not result["where"]:
        return ["Where time goes: the profile of this device names no operations."]
    work = result["counts"].get("gf_per_image", {})
    total = sum(work.values())
    lines = ["| part | share of operation time |", "|---|---|"]
    lines += [f"| {name} | {share:.1%} |" for name, share in result["where"].items()]
    lines += ["", "| part | GF per image | share of FLOPs |", "|---|---|---|"]
    lines += [f"| {name} | {gf:.3f} | {gf / total:.1%} |" for name, gf in work.items()]
    return [
        *lines,
        "",
        "Time is by a profile of a round: of all threads or streams together, waiting included. "
        "Its batch stays on the device: what a run waits for data is measured by --data, and is "
        "data_wait in its metrics.jsonl.",
    ]
