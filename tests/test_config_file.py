"""Config files: found with what they import from anywhere, and their mistakes are told by line."""

import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY, python

from supmim_jax import cli
from supmim_jax.errors import SetupError

ROOT = Path(REPOSITORY)
MISTAKES = {  # what a file holds, and the line that its error is in
    "name": ("x = undefined", 1),
    "syntax": ("\n\ndef get_config(:\n", 3),
    "indent": ("def get_config():\nreturn 1", 2),
    "module": ("import os\nimport nothing_of_this_name", 2),
    "import": ("from supmim_jax.config import Confg", 1),
    "zero": ("\nx = 1 / 0", 2),
    "key": ("def get_config():\n    return {}['a']", 2),
    "assertion": ("def get_config():\n    x = 1\n    assert x == 2", 3),
    "exit": ("import sys\nsys.exit(3)", 2),
    "interrupt": ("raise KeyboardInterrupt", 1),
    "endless": ("def get_config():\n    return get_config()", 2),
    "range": (
        "from supmim_jax.config import Config\n"
        "from supmim_jax.config.configdict import to_configdict\n"
        "def get_config():\n    return to_configdict(Config(batch_size=-1))",
        4,
    ),
}


@pytest.mark.parametrize(("text", "line"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_by_file_and_line(text, line, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(SetupError) as caught:
        cli.load(str(file))
    assert str(caught.value).startswith(f"{file}, line {line}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        *("", "def get_config():\n    pass", "def get_config():\n    return {'seed': 1}"),
        "from supmim_jax.config import Config as get_config",
        "get_config = 3",
    ],
)
def test_a_file_that_gives_no_config_is_told(text, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(SetupError, match=r"get_config|experiment|callable") as caught:
        cli.load(str(file))
    assert str(file) in str(caught.value)


def test_an_argument_that_it_does_not_take_and_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return 1")
    with pytest.raises(SetupError, match=str(file)):
        cli.load(f"{file}:debug")
    file.write_bytes(b"x = '\xff'")
    with pytest.raises(SetupError, match=str(file)):
        cli.load(str(file))


def test_a_mistake_in_a_file_that_it_imports_is_told_there(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "mine.py").write_text("from configs import helper")
    (folder / "helper.py").write_text("\nhelp_me()")
    with pytest.raises(SetupError, match=f"{folder / 'helper.py'}, line 2: NameError"):
        cli.load(str(folder / "mine.py"))


@pytest.mark.parametrize("path", ["nothing.py", ".", "", "a\0b"])
def test_a_file_that_cannot_be_read_is_told(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match="--config names no readable file"):
        cli.load(path)


def test_from_elsewhere_and_beside_other_configs(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    (tmp_path / "configs" / "base.py").write_text("raise RuntimeError('another project')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("debug.py:debug", "finetune_segmentation_debug.py", "probes/fractals.py"):
        assert cli.load(f"{ROOT}/configs/{name}").is_locked


def test_copied_configs_are_whole_by_themselves(tmp_path, monkeypatch):
    """As beside an installed wheel; also run from the root of a checkout."""
    copy = tmp_path / "configs"
    shutil.copytree(ROOT / "configs", copy)
    with (copy / "base.py").open("a") as file:
        file.write("FRACTALS = c.changed(FRACTALS, eval_split='mine')\n")
    monkeypatch.chdir(ROOT)
    assert cli.load(f"{copy}/debug.py").data.eval_split == "mine"
    assert cli.load("configs/debug.py").data.eval_split != "mine"


@pytest.mark.parametrize("own", ["configs/mine.py", "mine.py"])
def test_ones_own_file_may_build_on_the_checkouts(own, tmp_path, monkeypatch):
    file = tmp_path / own
    file.parent.mkdir(exist_ok=True)
    (file.parent / "__init__.py").write_text("SEED = 9")
    seed = "configs.SEED" if file.parent != tmp_path else "9"
    file.write_text(
        "import dataclasses\nimport configs\nfrom configs import debug_supervised\n"
        "def experiment():\n    config = debug_supervised.experiment()\n"
        f"    return dataclasses.replace(config, seed={seed})"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.load(own).seed == 9


COMMANDS = [
    ["train", "--workdir=run"],
    ["cache_tokens", "--cache=run", "--epochs=1"],
    ["probe", "--checkpoint=run"],
    ["rehearse", "--topology=v5e:2x2"],
    ["bench", "step"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda x: x[0])
def test_every_command_ends_with_2_and_a_paragraph(command, tmp_path):
    (tmp_path / "mine.py").write_text("x = undefined")
    name, *flags = command
    out = python("-m", f"supmim_jax.{name}", *flags, "--config=mine.py", cwd=tmp_path)
    assert out.returncode == 2 and "mine.py, line 1: NameError" in out.stderr
    there = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}  # Python's own, of mine.py
    assert "Traceback" not in out.stderr and there == {"mine.py"}
