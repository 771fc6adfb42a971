"""Trains an encoder: python -m supmim_jax.train --config configs/debug.py --workdir runs/supmim.

Run again with the same workdir, it continues from the newest checkpoint, bit for bit on the same
devices.
"""

import contextlib
import json

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from supmim_jax import (
    checkpoint,
    commands,
    distributed,
    evals,
    frozen,
    inference,
    localize,
    program,
    run_directory,
    sharding,
    start,
)
from supmim_jax.config import Config, SetupError
from supmim_jax.configdict import from_configdict
from supmim_jax.data import feed, pipeline
from supmim_jax.metrics import Clock, FiniteCheck, MetricsWriter, ProgressLine, write_json


def train(
    cfg: Config,
    workdir: str | epath.Path,
    stop_at: int | None = None,
    devices: list[jax.Device] | None = None,
) -> dict:
    """Trains to the end, evaluates, and returns the results.

    Args:
      cfg: the experiment.
      workdir: is given config.json, environment.json, metrics.jsonl, checkpoints/, results.json,
        and of its tokenizer the identity and a codebook that was fitted.
      stop_at: saves and returns after this step, as if interrupted; the schedule is that of cfg.
      devices: what to train on; default: all of this run's.

    Raises:
      SetupError: the config, the data, the devices or the workdir don't fit together.
      Diverged: a loss term or gradient is not finite.
    """
    mesh = sharding.make_mesh(cfg.mesh, devices)
    prog = program.build(cfg, mesh)
    subject = inference.build_evaluation(cfg, cfg.eval.batch_size, mesh)
    feed.check(cfg)
    workdir = epath.Path(workdir)
    run_directory.check(workdir, cfg)
    if (workdir / "results.json").exists():  # written last, so the run is complete
        ProgressLine(cfg).say(f"{workdir} is complete; these are its results.")
        return json.loads((workdir / "results.json").read_text())
    if not checkpoint.steps(workdir):
        start.check(cfg, prog.state.params)
    frozen.check_cache(cfg, workdir, mesh)
    host_arrays = frozen.arrays(cfg, workdir, prog.frozen)
    frozen.check_kept(host_arrays, cfg, workdir)
    distributed.agree("frozen arrays", {"sha256": frozen.digests(host_arrays)})
    run_directory.make(workdir, cfg, host_arrays)
    run_directory.check_shared(workdir)
    fixed = sharding.put(host_arrays, prog.frozen)

    checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    newest = checkpoints.latest()
    first = newest or 0
    if newest is not None:  # 0: imported weights
        state, run = checkpoints.restore(newest, prog.state)
    else:
        state, run = start.state(cfg, prog), checkpoint.BEGIN
    last = min(stop_at or cfg.total_steps, cfg.total_steps)

    run_directory.record_environment(workdir, first, mesh)
    writer = MetricsWriter(workdir, first, cfg.log.tensorboard)
    line, finite = ProgressLine(cfg), FiniteCheck()
    if first:
        line.say(f"Resuming {workdir} from step {first} of {cfg.total_steps}.")
    clock = Clock(run["seconds"])
    boxes = checkpoints.restore_boxes(first, cfg)
    batches = pipeline.train_dataset(cfg, mesh, first, run["broken_records"], boxes)
    with contextlib.closing(batches):
        for step in range(first + 1, last + 1):
            with clock.waiting():
                batch = next(batches)
            state, metrics = prog.step(state, batch, fixed)
            finite(step, metrics, batch)
            if step == first + 1:
                line.started(step, metrics)
            del batch  # here, where nothing waits: to give memory back takes its time
            clock.tick()
            writer.after_step(step)
            if step % cfg.log.every == 0 or step == last:
                finite.flush()
                values = {k: float(v) for k, v in metrics.items()} | clock.window(cfg.batch_size)
                values["broken_records"] = batches.broken(step)
                writer.write(step, values)
                line.show(step, values)
            if cfg.eval.every and step % cfg.eval.every == 0 and step < cfg.total_steps:
                with clock.stopped():
                    evaluate(subject, state, cfg, mesh, step, writer, line)
            if cfg.steps_per_boxes and step % cfg.steps_per_boxes == 0 and step < cfg.total_steps:
                boxes = localize.boxes(subject.bind(state.params), cfg, mesh)
                batches.restart(step, boxes)
            if distributed.told_to_stop(step):
                last = step
            if step % cfg.checkpoint.every == 0 or step == last:
                finite.flush()
                run = {
                    "position": step * cfg.batch_size,
                    "seconds": clock.seconds,
                    "broken_records": batches.broken(step),
                }
                checkpoints.save(state, cfg, run, boxes)
            if step == last:
                break
    checkpoints.close()
    if last < cfg.total_steps:
        return {}
    results = evaluate(subject, state, cfg, mesh, last, writer, line)
    results = {
        "objective": cfg.objective.name,
        "epochs": cfg.epochs,
        "seconds": clock.seconds,
        "split": cfg.data.eval_split,
        **results,
    }
    if jax.process_index() == 0:
        write_json(workdir / "results.json", results)
    return results


def evaluate(subject, state, cfg: Config, mesh, step: int, writer, line) -> dict[str, float]:
    """All evaluations of the encoder, or of the tokenizer, as it is; written and shown."""
    results = evals.run_all(subject.bind(state.params), cfg, cfg.data.eval_split, mesh).metrics
    writer.write(step, {f"eval/{name}": value for name, value in results.items()})
    shown = ", ".join(f"{name} {value:.2f}" for name, value in results.items())
    line.say(f"step {step}, {cfg.data.eval_split}: {shown}")
    return results


def main() -> None:
    if not isinstance(CONFIG.value, ConfigDict):
        raise SetupError("--config names no readable file; give the path of one in configs/.")
    commands.join()
    cfg = from_configdict(CONFIG.value)
    commands.agree(cfg, {"workdir": WORKDIR.value})
    results = train(cfg, WORKDIR.value)
    if not results:
        commands.fail(
            f"Stopped by SIGTERM; {WORKDIR.value} holds all so far. The same command goes on.",
            commands.EXIT_STOPPED,
        )
    if jax.process_index() == 0:
        print(f"{WORKDIR.value}: {json.dumps(results)}")


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: configs/<name>.py")
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory of this run; it resumes if it can.")
    commands.define_process_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    commands.start(main)
