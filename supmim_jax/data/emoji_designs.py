"""The tfds data set `emoji_designs`: the same emoji as ten designers drew them.

A class is an emoji that at least eight of them drew. A split holds designers, not images: a model
learns from six of them and is tested on the drawings of others. The two fluent sets come from the
same company, so both are in the test split. `train_2` and `train_4` are parts of `train`: two and
four drawings of each class, of designers by lot.

The drawings are SVG in npm packages of Iconify, which must lie in tfds's manual directory as
`npm pack` leaves them. Licences and authors are in docs/data.md.
"""

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from supmim_jax.errors import SetupError

SIZE = 64  # pixels
LEAST = 8  # designs of a class


class Package(NamedTuple):
    """One designer's drawings, in the package @iconify-json/<name> of npm."""

    version: str
    sha256: str

    def file(self, name: str) -> str:
        return f"iconify-json-{name}-{self.version}.tgz"


PACKAGES = {
    "noto": Package("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": Package("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "fxemoji": Package("1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "emojione": Package(
        "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "emojione-v1": Package(
        "1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"
    ),
    "streamline-emojis": Package(
        "1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"
    ),
    "twemoji": Package("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "openmoji": Package(
        "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"
    ),
    "fluent-emoji": Package(
        "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"
    ),
    "fluent-emoji-flat": Package(
        "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
}
DESIGNERS = {
    "train": ("noto", "noto-v1", "fxemoji", "emojione", "emojione-v1", "streamline-emojis"),
    "validation": ("twemoji",),
    "test": ("openmoji", "fluent-emoji", "fluent-emoji-flat"),
}
FEWER = (2, 4)
CLASSES = 912
GET = "\n".join(f"npm pack @iconify-json/{name}@{x.version}" for name, x in PACKAGES.items())


class EmojiDesigns(tfds.core.GeneratorBasedBuilder):
    """Emoji as ten designers drew them; splits hold designers."""

    VERSION = tfds.core.Version("1.1.0")  # goes up with every change to images or splits
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"In the manual directory:\n{GET}"

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Scalar(np.int64, doc="Index within the split."),
            "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
            "name": tfds.features.Text(doc="Of the emoji: that of the label."),
            "design": tfds.features.Text(doc="Whose drawing it is: a package of Iconify."),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=EmojiDesigns.__doc__,
            homepage="https://iconify.design",
            license="Apache-2.0, MIT, CC BY 4.0 or CC BY-SA 4.0, by design",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        drawings = {name: svgs(epath.Path(dl_manager.manual_dir), name) for name in PACKAGES}
        names = classes(drawings)
        self.info.features["label"].names = names
        splits = {
            split: self._generate_examples({x: drawings[x] for x in designers}, names)
            for split, designers in DESIGNERS.items()
        }
        learned = {design: drawings[design] for design in DESIGNERS["train"]}
        return splits | {
            f"train_{most}": self._generate_examples(learned, names, most) for most in FEWER
        }

    def _generate_examples(
        self, drawings: dict[str, dict[str, str]], names: list[str], most: int = len(PACKAGES)
    ) -> Iterator[tuple[int, dict]]:
        present = []
        for name in names:
            drawn = [(design, name) for design in drawings if name in drawings[design]]
            chosen = sorted(drawn, key=lot)[:most]
            present += [pair for pair in drawn if pair in chosen]
        for index, (design, name) in enumerate(present):
            image = io.BytesIO(rendered(drawings[design][name]))
            yield (
                index,
                {"id": index, "image": image, "label": name, "name": name, "design": design},
            )


def lot(pair: tuple[str, str]) -> str:
    """What orders the designers of an emoji at random, the same way everywhere."""
    return hashlib.sha256("/".join(pair).encode()).hexdigest()


def svgs(directory: epath.Path, name: str) -> dict[str, str]:
    """A package's drawings as SVG, by each name of an emoji.

    Raises:
      SetupError: the package is missing or another one.
    """
    package = PACKAGES[name]
    path = directory / package.file(name)
    get = f"In {directory}: npm pack @iconify-json/{name}@{package.version}"
    if not path.exists():
        raise SetupError(f"{path} is missing. {get}")
    data = path.read_bytes()
    if (sha256 := hashlib.sha256(data).hexdigest()) != package.sha256:
        raise SetupError(f"{path} has the SHA-256 {sha256}, expected {package.sha256}. {get}")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        content = json.load(tar.extractfile("package/icons.json"))
    found = {icon: svg(content, entry, False) for icon, entry in content["icons"].items()}
    for alias, entry in content.get("aliases", {}).items():
        original = content["icons"][entry["parent"]]
        found[alias] = svg(content, original, bool(entry.get("hFlip")))
    return found


def svg(package: dict, icon: dict, mirrored: bool) -> str:
    """One of Iconify's entries as a file that fills a square, in its own proportions."""
    width, height = (icon.get(side, package[side]) for side in ("width", "height"))
    flip = f'transform="translate({width} 0) scale(-1 1)"' if mirrored else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {width} {height}"><g {flip}>{icon["body"]}'
        f"</g></svg>"
    )


def classes(drawings: dict[str, dict[str, str]]) -> list[str]:
    """Names of LEAST designs or more, in order; of two for the same drawing the first."""
    designs = Counter(name for found in drawings.values() for name in found)
    taken: dict[str, set[str]] = {design: set() for design in drawings}
    names = []
    for name in sorted(name for name, count in designs.items() if count >= LEAST):
        own = {design: found[name] for design, found in drawings.items() if name in found}
        if not any(text in taken[design] for design, text in own.items()):
            names.append(name)
            for design, text in own.items():
                taken[design].add(text)
    return names


def rendered(text: str) -> bytes:
    """A PNG of SIZE x SIZE pixels, on white; without fonts, so the same on every machine.

    Raises:
      SetupError: the renderer is not installed.
    """
    try:
        import resvg_py
    except ImportError:
        raise SetupError(
            "emoji_designs is rendered by resvg-py, which is missing: pip install -e '.[designs]'"
        ) from None
    png = resvg_py.svg_to_bytes(svg_string=text, background="white", skip_system_fonts=True)
    image = cv2.imdecode(np.frombuffer(bytes(png), np.uint8), cv2.IMREAD_COLOR)  # without alpha
    return cv2.imencode(".png", image)[1].tobytes()
