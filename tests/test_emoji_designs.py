"""The data set emoji_designs, from packages like the real ones but smaller."""

import hashlib
import io
import json
import tarfile
from collections import Counter

import cv2
import numpy as np
import pytest
from etils import epath

from supmim_jax.data import emoji_designs, source
from supmim_jax.data.emoji_designs import PACKAGES, Package
from supmim_jax.data.prepare import catalogue
from supmim_jax.errors import SetupError

RED_LEFT = '<path fill="red" d="M0 0h8v16h-8z"/>'


def packed(directory, name: str, icons: dict, aliases: dict) -> Package:
    """A package as `npm pack` leaves it, of icons 16 wide and high."""
    content = {"icons": icons, "aliases": aliases, "width": 16, "height": 16}
    data = json.dumps(content).encode()
    member = tarfile.TarInfo("package/icons.json")
    member.size = len(data)
    package = Package("1.0.0", "")
    path = directory / package.file(name)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(member, io.BytesIO(data))
    return package._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def manual(tmp_path, monkeypatch):
    """Ten designers who drew `left`, of which `right` is the mirror and `links` another name.

    Eight of them drew `wide`, twice as wide as high, and seven `rare`.
    """
    directory = tmp_path / "manual"
    directory.mkdir()
    packages = {}
    for i, name in enumerate(PACKAGES):
        icons = {"left": {"body": RED_LEFT}}
        if i >= 2:
            icons["wide"] = {"body": '<path d="M0 0h32v16h-32z"/>', "width": 32}
        if i >= 3:
            icons["rare"] = {"body": RED_LEFT.replace("red", "blue")}
        aliases = {"right": {"parent": "left", "hFlip": True}, "links": {"parent": "left"}}
        packages[name] = packed(directory, name, icons, aliases)
    monkeypatch.setattr(emoji_designs, "PACKAGES", packages)
    monkeypatch.setattr(emoji_designs, "CLASSES", 3)
    return directory


def test_it_is_prepared_like_any_other_and_split_by_designer(manual, tmp_path):
    pytest.importorskip("resvg_py")
    data_dir = tmp_path / "data"
    said = catalogue.prepare("emoji_designs", str(data_dir), str(manual))
    assert "num_classes=3" in said and "train_examples=16" in said
    directory = data_dir / "emoji_designs" / "1.1.0"
    builder = source.tfds.builder_from_directory(directory)
    assert builder.info.features["label"].names == ["left", "right", "wide"]
    drawn = {}
    for split, designers in emoji_designs.DESIGNERS.items():
        found = list(builder.as_data_source(split))
        assert [x["id"] for x in found] == list(range(len(found)))
        assert {x["design"].decode() for x in found} == set(designers)
        drawn |= {(x["name"].decode(), x["design"].decode()): x["image"] for x in found}
    assert len(drawn) == 10 + 10 + 8
    train = [(x["name"], x["design"]) for x in builder.as_data_source("train")]
    for most in emoji_designs.FEWER:
        fewer = [(x["name"], x["design"]) for x in builder.as_data_source(f"train_{most}")]
        assert Counter(name for name, _ in fewer) == {b"left": most, b"right": most, b"wide": most}
        assert set(fewer) < set(train)
    left, right, wide = (drawn[name, "twemoji"] for name in ("left", "right", "wide"))
    assert left.shape == (64, 64, 3) and (left[:, :32] == (255, 0, 0)).all()
    assert (left[:, 32:] == 255).all() and (right == left[:, ::-1]).all()
    assert (wide[16:48] == 0).all() and (wide[:16] == 255).all() and (wide[48:] == 255).all()


def test_a_package_that_is_missing_or_another_one_is_named_with_its_command(manual):
    path = manual / "iconify-json-noto-1.0.0.tgz"
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(SetupError, match=rf"{path} has .* npm pack @iconify-json/noto@1\.0\.0"):
        emoji_designs.svgs(epath.Path(manual), "noto")
    path.unlink()
    with pytest.raises(SetupError, match=rf"{path} is missing.* npm pack @iconify-json/noto@1\.0"):
        emoji_designs.svgs(epath.Path(manual), "noto")


def test_a_drawing_is_the_same_on_every_machine():
    pytest.importorskip("resvg_py")
    package = {"width": 16, "height": 16}
    text = emoji_designs.svg(package, {"body": '<circle cx="8" cy="8" r="6" fill="#08f"/>'}, False)
    image = cv2.imdecode(np.frombuffer(emoji_designs.rendered(text), np.uint8), cv2.IMREAD_COLOR)
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == "d8d91971629373b3"
