"""The finite check, the progress line and the clock."""

import io
import time

import jax.numpy as jnp
import pytest
from conftest import make_batch
from etils import epath

from supmim_jax import metrics, watchdog

VALUES = {
    "loss": 1.5,
    "ce": 1.0,
    "mim": 0.5,
    "accuracy": 0.25,
    "images_per_second": 64.0,
    "data_wait": 0.015,
}


def test_a_nan_is_found_one_step_later_with_its_ids(cfg):
    check, batch = watchdog.NanGuard(), make_batch(cfg)
    batch = batch.replace(id=jnp.asarray(batch.id))
    check(1, {"loss": jnp.float32(1.0)}, batch)
    check(2, {"loss": jnp.float32(jnp.nan), "ce": jnp.float32(2.0)}, batch)
    with pytest.raises(watchdog.Diverged, match=r"Step 2 .*loss=nan, ce=2.*batch: 0, 1, 2"):
        check(3, {"loss": jnp.float32(1.0)}, batch)
    check = watchdog.NanGuard()
    check(1, {"grad_norm": jnp.float32(jnp.inf)}, batch)
    with pytest.raises(watchdog.Diverged, match="grad_norm=inf"):
        check.flush()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_rewrites_itself_on_a_terminal_and_is_quiet_elsewhere(cfg):
    terminal, file = Terminal(), io.StringIO()
    lines = metrics.ProgressLine(cfg, terminal), metrics.ProgressLine(cfg, file)
    for step in range(1, 13):
        for line in lines:
            line.show(step, VALUES)
    terms = "loss 1.500 ce 1.000 mim 0.500 accuracy 0.250"
    shown = f"supmim 6/12  50% | {terms} | 64 img/s | data 2% | 0:02"
    assert terminal.getvalue().count("\r") == 12 and "\n" not in terminal.getvalue()
    assert shown in terminal.getvalue() and shown in file.getvalue()
    assert "\r" not in file.getvalue() and 9 <= file.getvalue().count("\n") <= 11


def test_the_clock_counts_training_and_waiting_only(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = metrics.Clock(100.0)
    for _ in range(2):
        with clock.waiting():
            now[0] += 1.0
        now[0] += 3.0
        clock.tick()
    with clock.stopped():
        now[0] += 50.0
    assert clock.seconds == 108.0
    assert clock.window(16) == {"images_per_second": 4.0, "data_wait": 0.25}
    now[0] += 2.0
    clock.tick()
    assert clock.window(16) == {"images_per_second": 8.0, "data_wait": 0.0}


def test_tensorboard_events_and_a_profile_are_written_when_asked_for(tmp_path):
    pytest.importorskip("tensorflow", reason="TensorBoard events need TensorFlow")
    writer = metrics.MetricsWriter(epath.Path(tmp_path), 0, 9, tensorboard=True)
    writer.write(3, {"loss": 1.25})
    for step in range(1, 30):
        writer.after_step(step)
        time.sleep(0.2)  # a profile lasts three seconds at least
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
    (events,) = tmp_path.glob("events.out.tfevents*")
    assert b"loss" in events.read_bytes()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "loss": 1.25}\n'
