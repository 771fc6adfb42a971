"""Trains an encoder: python -m supmim_jax.train --config configs/debug.py --workdir runs/supmim.

Run again with the same workdir, it continues from the newest checkpoint, bit for bit on the same
devices.
"""

import json

import jax
from absl import flags
from etils import epath

from supmim_jax import (
    checkpoint,
    commands,
    config_file,
    distributed,
    evals,
    frozen,
    inference,
    preemption,
    program,
    run_directory,
    sharding,
    start,
    storage,
)
from supmim_jax.config import Config
from supmim_jax.configdict import from_configdict
from supmim_jax.data import feed
from supmim_jax.evals import ERRORS
from supmim_jax.loop import Loop
from supmim_jax.metrics import ProgressLine, write_json


def train(
    cfg: Config,
    workdir: str | epath.Path,
    stop_at: int | None = None,
    devices: list[jax.Device] | None = None,
    use_older_checkpoint: bool = False,
) -> dict:
    """Trains to the end, evaluates, and returns the results.

    Args:
      cfg: the experiment.
      workdir: is given config.json, environment.json, metrics.jsonl, checkpoints/, results.json,
        and of its tokenizer the identity and a codebook that was fitted.
      stop_at: saves and returns after this step, as if interrupted; the schedule is that of cfg.
      devices: what to train on; default: all of this run's.
      use_older_checkpoint: goes on from the newest whole checkpoint; damaged ones are set aside.

    Raises:
      SetupError: the config, the data, the devices or the workdir don't fit together.
      Diverged: a loss term or gradient is not finite.
    """
    mesh = sharding.make_mesh(cfg.mesh, devices)
    prog = program.build(cfg, mesh)
    subject = inference.build_evaluation(cfg, cfg.eval.batch_size, mesh)
    feed.check(cfg)
    workdir = storage.location(workdir)
    run_directory.check(workdir, cfg)
    if (workdir / "results.json").exists():  # written last, so the run is complete
        results = run_directory.results(workdir)
        if not results.get(ERRORS):  # or what could not be measured may be now
            ProgressLine(cfg).say(f"{workdir} is complete; these are its results.")
            return results
    if not checkpoint.steps(workdir):
        start.check(cfg, prog.state.params)
    evals.check(cfg, cfg.data.eval_split)
    frozen.check_cache(cfg, workdir, mesh)
    host_arrays = frozen.arrays(cfg, workdir, prog.frozen)
    frozen.check_kept(host_arrays, cfg, workdir)
    distributed.agree("frozen arrays", {"sha256": frozen.digests(host_arrays)})
    with run_directory.taken(workdir, cfg):
        run_directory.make(workdir, cfg, host_arrays)
        run_directory.check_shared(workdir)
        checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint, cfg.saves_after)
        newest = checkpoints.newest(use_older_checkpoint)
        checkpoints.check_room(prog.state)
        run_directory.record_environment(workdir, newest or 0, mesh)
        fixed = sharding.put(host_arrays, prog.frozen)
        run = Loop(cfg, workdir, mesh, prog, subject, fixed, checkpoints)
        last, state = run.to(min(stop_at or cfg.total_steps, cfg.total_steps))
        results = {}
        if last == cfg.total_steps:
            found = run.evaluate(last, state)
            results = {
                "objective": cfg.objective.name,
                "epochs": cfg.epochs,
                "seconds": run.numbers["seconds"],
                "split": cfg.data.eval_split,
                **({"skipped_batches": x} if (x := run.numbers["skipped_batches"]) else {}),
                **found.metrics,
                **({ERRORS: found.errors} if found.errors else {}),
            }
            if jax.process_index() == 0:
                write_json(workdir / "results.json", results)
        checkpoints.close()
    return results


def main() -> None:
    commands.join()
    cfg = from_configdict(CONFIG.value)
    command = {"workdir": WORKDIR.value, "use_older_checkpoint": USE_OLDER.value}
    commands.agree(cfg, command)
    results = train(cfg, WORKDIR.value, use_older_checkpoint=USE_OLDER.value)
    if not results:
        message, code = preemption.stopped()
        commands.fail(f"{message} ({WORKDIR.value})", code)
    if jax.process_index() == 0:
        print(f"{WORKDIR.value}: {json.dumps(results)}")
    if errors := results.get(ERRORS):
        commands.fail(evals.told(errors, WORKDIR.value), preemption.EXIT_SETUP)


if __name__ == "__main__":
    CONFIG = config_file.define("Experiment: configs/<name>.py")
    WORKDIR = storage.define("workdir", None, "Directory of this run; it resumes if it can.")
    USE_OLDER = flags.DEFINE_bool(
        "use_older_checkpoint", False, "If the newest is damaged, set it aside; use one before it."
    )
    commands.define_process_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    commands.start(main)
