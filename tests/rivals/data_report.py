"""The result of the input pipeline's bench as tables for people."""


def report(result: dict) -> str:
    """Tables of whatever was measured, in markdown."""
    kb, plan, parts = result["kb"], result["plan"], []
    parts.append(
        f"{result['images']} JPEGs of 500x375, quality 95, 4:2:0, {kb['mean']:.1f} kB in the mean "
        f"({kb['min']:.0f} to {kb['max']:.0f}); to 224 px, augment {plan['augment']}; "
        f"{result['cpus']} CPUs, load {result['load']:.1f}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    )
    if "one_core" in result:
        parts += [rates(result), stages(result), exactness(result["quality"])]
    return "\n\n".join(parts)


def rates(result: dict) -> str:
    """Ours and tf.data, on one core and on all that were asked for."""
    columns = "images/s of wall clock | CPU s per 1000 images | CPU time / ours (range of rounds)"
    lines = [f"| one thread | {columns} |", "|---|---|---|---|"]
    lines += [_rate(name, row) for name, row in result["one_core"].items()]
    workers, threads = result["plan"]["workers"], result["plan"]["threads"]
    where = f"{workers} processes" if workers else f"{threads} threads"
    lines += ["", f"| whole pipeline, {where} | {columns} |", "|---|---|---|---|"]
    lines += [_rate(name, row) for name, row in result["host"].items()]
    return "\n".join(lines)


def _rate(name: str, row: dict) -> str:
    ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
    return f"| {name} | {row['images_per_s']:.0f} | {row['cpu_s_per_1000']:.2f} | {ratio} |"


def stages(result: dict) -> str:
    """Where the CPU time of an image goes."""
    total = sum(result["stages_us"].values())
    lines = ["| stage | us per image | share |", "|---|---|---|"]
    lines += [f"| {n} | {us:.0f} | {us / total:.1%} |" for n, us in result["stages_us"].items()]
    return "\n".join([*lines, f"| all | {total:.0f} | 100 % |"])


def exactness(found: dict) -> str:
    return (
        f"PSNR against float64 over {found['images']} boxes: least {found['min_db']:.1f} dB, "
        f"median {found['median_db']:.1f}, mean {found['mean_db']:.1f}."
    )
