"""Which files of a folder are in which split, with which label.

  train/<class>/**/*.jpg      and val/<class>/ or validation/<class>/, perhaps test/<class>/
  train/<wnid>/images/*.JPEG  and val/images/, val/val_annotations.txt, wnids.txt: the published
                              Tiny-ImageNet, whose test split has no labels and is left out

Classes are sorted by name, and within a split files by class, then path: neighbours are of one
class. That is no harm in training, which shuffles all records anew in each epoch; a part of a split
such as train[:1000] has the first classes alone.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from etils import epath

from supmim_jax.config import SetupError
from supmim_jax.data.prepare.files import ENDINGS, File, check_link, check_name, entries, images

VALIDATION = ("val", "validation")
WNIDS, ANNOTATIONS = "wnids.txt", "val_annotations.txt"


@dataclass(frozen=True)
class Folder:
    root: epath.Path
    classes: tuple[str, ...]  # the place in it is the label
    splits: dict[str, list[File]]  # train, validation, perhaps test
    others: list[str] = field(default_factory=list)  # files that are no images, by their endings


def read(root: epath.Path, val_fraction: float = 0.0) -> Folder:
    """The folder's images. With `val_fraction` validation is taken from the training images.

    Raises:
      SetupError: it has none of the layouts, or two, or is not complete; it says where.
    """
    if not root.is_dir():
        raise SetupError(f"--image_folder {root} is no directory.")
    for name in ("train", *VALIDATION, "test"):
        check_link(root / name, root)
    train = root / "train"
    if not train.is_dir():
        raise SetupError(
            f"--image_folder {root} has no directory train/. Expected train/<class>/*.jpg (or "
            f".jpeg, .png), and val/<class>/ or --val_fraction."
        )
    held_out = _held_out(root, val_fraction)
    tiny = (root / "val" / ANNOTATIONS).exists()
    others: list[str] = []
    classes = _wnids(root) if tiny else _class_names(train, root)
    splits = {"train": list(_labelled(train, root, classes, others))}
    _check_classes_filled(splits["train"], classes, train)
    if tiny:
        splits["validation"] = sorted(_annotated(root, classes), key=_order)
        return Folder(root, classes, splits, others)
    if held_out:
        splits["validation"] = list(_labelled(held_out, root, classes, others))
        _check_not_empty(splits["validation"], held_out)
    else:
        splits["train"], splits["validation"] = divided(splits["train"], val_fraction)
        _check_not_empty(splits["validation"], train)
    if (root / "test").is_dir():
        splits["test"] = list(_labelled(root / "test", root, classes, others))
        _check_not_empty(splits["test"], root / "test")
    return Folder(root, classes, splits, others)


def divided(files: list[File], fraction: float) -> tuple[list[File], list[File]]:
    """Training and validation files: of each class, the share whose names have the lowest hashes.

    At least one for each, of a class with two files or more; a single one is for training. What
    happens to a file does not depend on other classes.
    """
    chosen = set()
    by_label: dict[int, list[File]] = {}
    for file in files:
        by_label.setdefault(file.label, []).append(file)
    for of_class in by_label.values():
        count = min(max(1, round(fraction * len(of_class))), len(of_class) - 1)
        of_class.sort(key=lambda file: hashlib.sha256(file.name.encode()).digest())
        chosen |= {file.name for file in of_class[:count]}
    kept = [file for file in files if file.name not in chosen]
    return kept, [file for file in files if file.name in chosen]


def _held_out(root: epath.Path, val_fraction: float) -> epath.Path | None:
    """The validation directory; None where it is a fraction of train."""
    found = [root / name for name in VALIDATION if (root / name).is_dir()]
    if len(found) == 2:
        raise SetupError(f"{root} has both val/ and validation/. Keep the one that counts.")
    if found and val_fraction:
        raise SetupError(
            f"{found[0]} is there, and --val_fraction is {val_fraction}. Leave out the flag to use "
            f"the directory, or move the directory away."
        )
    if not found and not val_fraction:
        raise SetupError(
            f"{root} has no images for validation: neither val/ nor validation/. Give "
            f"--val_fraction=0.1 to take a tenth of each class of train/."
        )
    return found[0] if found else None


def _class_names(directory: epath.Path, root: epath.Path) -> tuple[str, ...]:
    """The names of a split's directories."""
    found = entries(directory, root)
    directories = [path for path in found if path.is_dir()]
    loose = [p for p in found if p.name.lower().endswith(ENDINGS) and p not in set(directories)]
    if loose:
        raise SetupError(
            f"{loose[0]} is in no class ({len(loose)} such files). Expected "
            f"{directory}/<class>/{loose[0].name}."
        )
    return tuple(check_name(path.name, f"A class in {directory}") for path in directories)


def _labelled(
    directory: epath.Path, root: epath.Path, classes: tuple[str, ...], others: list[str]
) -> Iterable[File]:
    """The files of a split with a directory per class."""
    here = _class_names(directory, root)
    unknown = sorted(set(here) - set(classes))
    if unknown:
        known = f"{root}/{WNIDS}" if directory.name == "train" else f"{root}/train"
        raise SetupError(
            f"{directory} has {len(unknown)} classes that {known} lacks: {', '.join(unknown[:5])}. "
            f"A class needs training images."
        )
    labels = {name: label for label, name in enumerate(classes)}
    for name in here:
        yield from images(directory / name, root, labels[name], others)


def _check_classes_filled(files: list[File], classes: tuple[str, ...], train: epath.Path) -> None:
    _check_not_empty(files, train)
    filled = {file.label for file in files}
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise SetupError(
            f"{train} has no images of {len(empty)} of {len(classes)} classes: "
            f"{', '.join(empty[:5])}. Fill or remove {train / empty[0]}."
        )
    if len(classes) < 2:
        raise SetupError(f"{train} has one class, {classes[0]!r}; two are needed to tell apart.")


def _check_not_empty(files: list[File], directory: epath.Path) -> None:
    if not files:
        raise SetupError(
            f"{directory} has no images: no file in a class directory ends in .jpg, .jpeg or .png "
            f"(or, for --val_fraction, every class has but one)."
        )


def _wnids(root: epath.Path) -> tuple[str, ...]:
    """Tiny-ImageNet's classes."""
    path = root / WNIDS
    if not path.exists():
        raise SetupError(
            f"{root} has val/{ANNOTATIONS}, as Tiny-ImageNet has, but no {WNIDS}. Unpack the "
            f"archive again."
        )
    lines = path.read_text().splitlines()
    names = [
        check_name(line.strip(), f"The class in line {i + 1} of {path}")
        for i, line in enumerate(lines)
        if line.strip()
    ]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SetupError(f"{path} names {twice!r} twice. Unpack the archive again.")
    return tuple(sorted(names))


def _annotated(root: epath.Path, classes: tuple[str, ...]) -> Iterable[File]:
    """Tiny-ImageNet's validation files, by the lines of val_annotations.txt."""
    directory, path = root / "val" / "images", root / "val" / ANNOTATIONS
    mixed = [p.name for p in entries(root / "val", root) if p.is_dir() and p.name != "images"]
    if mixed or not directory.is_dir():
        raise SetupError(
            f"{path} belongs to val/images/, and {root / 'val'} has "
            f"{', '.join(f'{name}/' for name in mixed) or 'no images/'}: two layouts at once. Keep "
            f"the one that counts."
        )
    labels = {name: label for label, name in enumerate(classes)}
    left = {file.name: file for file in images(directory, root, -1, [])}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        name, wnid = [*line.split("\t"), "", ""][:2]
        file = left.pop(f"val/images/{name}", None)
        if file is None or wnid not in labels:
            found = (
                f"{wnid!r}, which {WNIDS} lacks"
                if file
                else (f"{name!r}, which {directory} lacks or an earlier line names")
            )
            raise SetupError(f"{path}, line {number} names {found}. Unpack the archive again.")
        yield File(file.name, labels[wnid], file.size, file.changed)
    if left:
        raise SetupError(
            f"{path} has no line for {len(left)} files of {directory}: {', '.join(list(left)[:3])}."
        )


def _order(file: File) -> tuple[int, str]:
    return file.label, file.name
