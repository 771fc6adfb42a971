"""Trains an encoder: python -m supmim_jax.train --config configs/debug.py --workdir runs/supmim.

Run again with the same workdir, it continues from the newest checkpoint, bit for bit on the same
devices.
"""

import json

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from supmim_jax import checkpoint, commands, evals, program, sharding, tokenizers
from supmim_jax.config import Config, SetupError
from supmim_jax.configdict import differences, from_configdict, to_configdict
from supmim_jax.data import pipeline
from supmim_jax.metrics import Clock, FiniteCheck, MetricsWriter, ProgressLine


def train(
    cfg: Config,
    workdir: str | epath.Path,
    stop_at: int | None = None,
    devices: list[jax.Device] | None = None,
) -> dict:
    """Trains to the end, evaluates, and returns the results.

    Args:
      cfg: the experiment.
      workdir: is given config.json, metrics.jsonl, checkpoints/, tokenizer.npz and results.json.
      stop_at: saves and returns after this step, as if interrupted; the schedule is that of cfg.
      devices: what to train on; default: all of this run's.

    Raises:
      SetupError: the config, the data, the devices or the workdir don't fit together.
      Diverged: a loss term or gradient is not finite.
    """
    mesh = sharding.make_mesh(cfg.mesh, devices)
    prog = program.build(cfg, mesh)
    inference = program.build_inference(cfg, cfg.eval.batch_size, mesh)
    pipeline.check(cfg)
    workdir = prepare_workdir(epath.Path(workdir), cfg)
    if (workdir / "results.json").exists():  # written last, so the run is complete
        return json.loads((workdir / "results.json").read_text())
    frozen = sharding.put(tokenizers.arrays(cfg, workdir), prog.frozen)

    checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    first = checkpoints.latest() or 0
    if first:
        state, run = checkpoints.restore(first, prog.state)
    else:
        state, run = prog.init(jax.random.key(cfg.seed)), {"seconds": 0.0}
    last = min(stop_at or cfg.total_steps, cfg.total_steps)

    writer = MetricsWriter(workdir, first, cfg.log.tensorboard)
    line, finite = ProgressLine(cfg), FiniteCheck()
    if first:
        line.say(f"Resuming {workdir} from step {first} of {cfg.total_steps}.")
    batches = pipeline.train_dataset(cfg, mesh, first)
    clock = Clock(run["seconds"])
    for step in range(first + 1, last + 1):
        with clock.waiting():
            batch = next(batches)
        state, metrics = prog.step(state, batch, frozen)
        finite(step, metrics, batch)
        clock.tick()
        writer.after_step(step)
        if step % cfg.log.every == 0 or step == last:
            finite.flush()
            values = {k: float(v) for k, v in metrics.items()} | clock.window(cfg.batch_size)
            writer.write(step, values)
            line.show(step, values)
        if step % cfg.checkpoint.every == 0 or step == last:
            finite.flush()
            run = {"position": step * cfg.batch_size, "seconds": clock.seconds}
            checkpoints.save(state, cfg, run)
        if cfg.eval.every and step % cfg.eval.every == 0 and step < last:
            with clock.stopped():
                evaluate(inference, state, cfg, mesh, step, writer, line)
    checkpoints.close()
    if last < cfg.total_steps:
        return {}
    results = evaluate(inference, state, cfg, mesh, last, writer, line)
    results = {
        "objective": cfg.objective.name,
        "epochs": cfg.epochs,
        "seconds": clock.seconds,
        "split": cfg.data.eval_split,
        **results,
    }
    write_json(workdir / "results.json", results)
    return results


def evaluate(inference, state, cfg: Config, mesh, step: int, writer, line) -> dict[str, float]:
    """All evaluations of the encoder as it is, written and shown."""
    encoder = program.bind(inference, state.params)
    results = evals.run_all(encoder, cfg, cfg.data.eval_split, mesh)
    writer.write(step, {f"eval/{name}": value for name, value in results.items()})
    shown = ", ".join(f"{name} {value:.2f} %" for name, value in results.items())
    line.say(f"step {step}, {cfg.data.eval_split}: {shown}")
    return results


def prepare_workdir(workdir: epath.Path, cfg: Config) -> epath.Path:
    """Makes the workdir and keeps the config in it.

    Raises:
      SetupError: it cannot be written, or holds a run of another config.
    """
    wanted = to_configdict(cfg).to_dict()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "config.json"
        if path.exists():
            found = to_configdict(from_configdict(json.loads(path.read_text()))).to_dict()
            if changed := differences(found, wanted):
                raise SetupError(
                    f"--workdir {workdir} holds a run of another config: {'; '.join(changed)} "
                    f"(there; here). Choose another --workdir, or the config that began it."
                )
        elif jax.process_index() == 0:
            write_json(path, wanted)
    except OSError as error:
        raise SetupError(
            f"--workdir {workdir} cannot be written: {error}. Choose a directory that you own."
        ) from None
    return workdir


def write_json(path: epath.Path, values: dict) -> None:
    """Writes the file so that a reader sees all of it or none."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1) + "\n")
    part.replace(path)


def main() -> None:
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    cfg = from_configdict(CONFIG.value)
    results = train(cfg, WORKDIR.value)
    if jax.process_index() == 0:
        print(f"{WORKDIR.value}: {json.dumps(results)}")


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: configs/<name>.py")
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory of this run; it resumes if it can.")
    DISTRIBUTED = flags.DEFINE_bool(
        "distributed", False, "One of several processes; TPU VM or Slurm tell it which."
    )
    flags.mark_flags_as_required(["config", "workdir"])
    commands.start(main)
