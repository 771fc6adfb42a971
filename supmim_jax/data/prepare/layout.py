"""Which files of a folder are in which split, with which label.

  train/<class>/**/*.jpg      and val/<class>/ or validation/<class>/, perhaps test/<class>/
  train/<wnid>/images/*.JPEG  and val/images/, val/val_annotations.txt, wnids.txt: the published
                              Tiny-ImageNet, whose test split has no labels and is left out

A class has one name, in whichever of Unicode's forms a system wrote it (macOS takes letters with
accents apart). Classes are sorted by name, and within a split files by class, then path: neighbours
are of one class. That is no harm in training, which shuffles all records anew in each epoch; a part
of a split such as train[:1000] has the first classes alone.
"""

import dataclasses
import hashlib
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

from etils import epath

from supmim_jax import storage
from supmim_jax.config import SetupError
from supmim_jax.data.prepare import report
from supmim_jax.data.prepare.files import ENDINGS, File, Tree, check_name

VALIDATION = ("val", "validation")
WNIDS, ANNOTATIONS = "wnids.txt", "val_annotations.txt"


@dataclass(frozen=True)
class Folder:
    root: epath.Path
    classes: tuple[str, ...]  # the place in it is the label
    splits: dict[str, list[File]]  # train, validation, perhaps test
    others: list[str] = field(default_factory=list)  # files that are no images, by their endings


def read(root: epath.Path, val_fraction: float = 0.0, follow_links: bool = False) -> Folder:
    """The folder's images. With `val_fraction` validation is taken from the training images.

    With `follow_links` symbolic links may lead out of the folder.

    Raises:
      SetupError: it has none of the layouts, or two, or is not complete; it says where.
    """
    if not root.is_dir():
        raise SetupError(f"--image_folder {root} is no directory.")
    tree = Tree(root, follow_links)
    for name in ("train", *VALIDATION, "test"):
        tree.check_link(root / name)
        _check_leads_somewhere(root / name)
    train = root / "train"
    if not train.is_dir():
        raise SetupError(
            f"--image_folder {root} has no directory train/. Expected train/<class>/*.jpg (or "
            f"another image), and val/<class>/ or --val_fraction."
        )
    held_out = _held_out(root, val_fraction)
    tiny = (root / "val" / ANNOTATIONS).exists()
    here = _class_names(train, tree)
    classes = _wnids(root) if tiny else here
    splits = {"train": list(_labelled(train, here, tree, classes))}
    _check_classes_filled(splits["train"], classes, train, tree)
    if tiny:
        splits["validation"] = sorted(_annotated(tree, classes), key=_order)
        return Folder(root, classes, splits, tree.others)
    if held_out:
        splits["validation"] = list(
            _labelled(held_out, _class_names(held_out, tree), tree, classes)
        )
        _check_not_empty(splits["validation"], held_out, tree)
    else:
        splits["train"], splits["validation"] = divided(splits["train"], val_fraction)
        _check_not_empty(splits["validation"], train, tree)
    if (root / "test").is_dir():
        test = root / "test"
        splits["test"] = list(_labelled(test, _class_names(test, tree), tree, classes))
        _check_not_empty(splits["test"], test, tree)
    return Folder(root, classes, splits, tree.others)


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


def _check_leads_somewhere(path: epath.Path) -> None:
    if storage.is_local(path) and os.path.islink(path) and not os.path.exists(path):
        raise SetupError(
            f"{path} is a symbolic link to {os.readlink(path)}, which is not there. Mount or copy "
            f"that, or remove the link."
        )


def _class_names(directory: epath.Path, tree: Tree) -> tuple[str, ...]:
    """The names of a split's directories."""
    found = tree.entries(directory)
    directories = [path for path in found if path.is_dir()]
    files = [path for path in found if path not in set(directories)]
    loose = [path for path in files if path.name.lower().endswith(ENDINGS)]
    if loose:
        raise SetupError(
            f"{loose[0]} is in no class ({len(loose)} such files). Expected "
            f"{directory}/<class>/{loose[0].name}."
        )
    for path in files:
        _check_leads_somewhere(path)
    tree.others.extend(path.relative_to(tree.root).as_posix() for path in files)
    names: dict[str, str] = {}
    for path in directories:
        name = check_name(path.name, f"A class in {directory}")
        if names.setdefault(_composed(name), name) != name:
            raise SetupError(
                f"{directory} has two directories whose names look alike and differ in the form of "
                f"their letters: {names[_composed(name)]!a} and {name!a}. Put the images "
                f"of both in one."
            )
    return tuple(names.values())


def _composed(name: str) -> str:
    """A name in the one of its Unicode forms that names are compared in."""
    return unicodedata.normalize("NFC", name)


def _labelled(
    directory: epath.Path, here: tuple[str, ...], tree: Tree, classes: tuple[str, ...]
) -> Iterable[File]:
    """The files of a split with a directory per class; `here` are the names of these."""
    labels = {_composed(name): label for label, name in enumerate(classes)}
    unknown = sorted(name for name in here if _composed(name) not in labels)
    if unknown:
        known = f"{tree.root}/{WNIDS}" if directory.name == "train" else f"{tree.root}/train"
        raise SetupError(
            f"{directory} has {len(unknown)} classes that {known} lacks: {', '.join(unknown[:5])}. "
            f"A class needs training images."
        )
    for name in here:
        yield from tree.images(directory / name, labels[_composed(name)])


def _check_classes_filled(
    files: list[File], classes: tuple[str, ...], train: epath.Path, tree: Tree
) -> None:
    _check_not_empty(files, train, tree)
    filled = {file.label for file in files}
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        ignored = [name for name in tree.others if name.startswith(f"train/{empty[0]}/")]
        raise SetupError(
            f"{train} has no images of {len(empty)} of {len(classes)} classes: "
            f"{', '.join(empty[:5])}. Fill or remove {train / empty[0]}.{_ignored(ignored)}"
        )
    if len(classes) < 2:
        raise SetupError(f"{train} has one class, {classes[0]!r}; two are needed to tell apart.")


def _check_not_empty(files: list[File], directory: epath.Path, tree: Tree) -> None:
    if not files:
        raise SetupError(
            f"{directory} has no images: no file in a class directory ends in "
            f"{', '.join(ENDINGS)} (or, for --val_fraction, every class has but one)."
            f"{_ignored(tree.others)}"
        )


def _ignored(names: list[str]) -> str:
    return f" {report.ignored(names)} Convert what is an image." if names else ""


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


def _annotated(tree: Tree, classes: tuple[str, ...]) -> Iterable[File]:
    """Tiny-ImageNet's validation files, by the lines of val_annotations.txt."""
    root = tree.root
    directory, path = root / "val" / "images", root / "val" / ANNOTATIONS
    mixed = [p.name for p in tree.entries(root / "val") if p.is_dir() and p.name != "images"]
    if mixed or not directory.is_dir():
        raise SetupError(
            f"{path} belongs to val/images/, and {root / 'val'} has "
            f"{', '.join(f'{name}/' for name in mixed) or 'no images/'}: two layouts at once. Keep "
            f"the one that counts."
        )
    labels = {name: label for label, name in enumerate(classes)}
    left = {file.name: file for file in tree.images(directory, -1)}
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
        yield dataclasses.replace(file, label=labels[wnid])
    if left:
        raise SetupError(
            f"{path} has no line for {len(left)} files of {directory}: {', '.join(list(left)[:3])}."
        )


def _order(file: File) -> tuple[int, str]:
    return file.label, file.name
