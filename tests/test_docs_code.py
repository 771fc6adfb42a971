"""The pages that show code for encoders keep what they promise: their blocks are run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from conftest import FAST, REPOSITORY, save_initial
from PIL import Image

from supmim_jax import cli
from supmim_jax.config.configdict import from_configdict

ROOT = Path(REPOSITORY)


def blocks(page: str, *languages: str) -> list[tuple[str, str]]:
    """Language and text of a page's code blocks, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    return [(language, text) for language, text in found if language in languages]


def make_photos(folder: Path) -> None:
    for shade, label in enumerate("abc", 1):
        (folder / label).mkdir(parents=True)
        for i in range(6):
            image = Image.radial_gradient("L").rotate(40 * i).resize((40 + i, 30))
            pixels = np.asarray(image)[..., None] * np.ones(3) * shade / 3
            Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{i}.png")


def test_the_tutorial_and_the_code_of_the_readme_run(tmp_path):
    """All but the training, which other tests run: here its first checkpoint has to do."""
    make_photos(tmp_path / "photos")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": REPOSITORY,
        "XLA_FLAGS": FAST,  # and one device
    }
    (_, training), *others = blocks("docs/encoders.md", "bash", "python")
    config, workdir = re.search(r"\.train --config (\S+) --workdir (\S+)\n$", training).groups()
    save_initial(from_configdict(cli.load(f"{ROOT}/{config}")), tmp_path / workdir)
    (tmp_path / "runs" / "b14").symlink_to("debug")
    commands = [
        subprocess.Popen(["bash", "-ec", text], cwd=tmp_path, env=environment)
        for language, text in others
        if language == "bash"
    ]
    assert commands and [x.wait(timeout=300) for x in commands] == [0] * len(commands)
    # The blocks go on from one another.
    python = [text for language, text in others if language == "python"]
    python += [text for _, text in blocks("README.md", "python")]
    command = [sys.executable, "-c", "\n".join(python)]
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "a/0.png is most like" in out.stdout and "accuracy" in out.stdout


def test_the_readme_names_no_flag_that_its_command_lacks():
    text = "".join(text for _, text in blocks("README.md", "bash")).replace("\\\n", " ")
    commands = re.findall(r"python -m supmim_jax\.([\w.]+)(.*)", text)
    assert len(commands) > 8
    for command, arguments in commands:
        path = ROOT / "supmim_jax" / command.replace(".", "/")
        path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__main__.py"
        source = path.read_text() + (ROOT / "supmim_jax/cli.py").read_text()
        for flag in set(re.findall(r"--(\w+)", arguments.split("#")[0])) - {"config"}:
            assert f'"{flag}"' in source, f"{command} --{flag}"
