"""A data set of a folder of images: features image, label and file_name, version 1.0.0.

The image files below a directory, and whether they are images.

Which files of a folder are in which split, with which label.

  train/<class>/**/*.jpg      and val/<class>/ or validation/<class>/, perhaps test/<class>/
  train/<wnid>/images/*.JPEG  and val/images/, val/val_annotations.txt, wnids.txt: the published
                              Tiny-ImageNet, whose test split has no labels and is left out

A class has one name, in whichever of Unicode's forms a system wrote it (macOS takes letters with
accents apart). Classes are sorted by name, and within a split files by class, then path: neighbours
are of one class. That is no harm in training, which shuffles all records anew in each epoch; a part
of a split such as train[:1000] has the first classes alone."""

import dataclasses
import errno
import functools
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_serializer, naming
from tensorflow_datasets.core.proto import dataset_info_pb2

from supmim_jax import storage
from supmim_jax.data import decode as decode_module
from supmim_jax.data import fractals
from supmim_jax.data.decode import Shown, Unclear, nobody_said, pixels
from supmim_jax.data.prepare import shards
from supmim_jax.errors import SetupError

# All that OpenCV decodes and header.py knows; what a file is, its first bytes say.
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
BEGINNING = 2**12  # bytes, where files are not decoded
# What the system says of a file, and not of a disk or of this process.
OF_THE_FILE = (
    *(errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
)


@dataclass(frozen=True, slots=True)
class File:
    """An image file of a folder."""

    name: str  # its path relative to the folder, with forward slashes
    label: int
    size: int  # bytes
    changed: int  # seconds since 1970
    wrong: str = ""  # what keeps it from being read, as far as its directory tells


def check_name(name: str, what: str) -> str:
    """The name, if it may be that of a class.

    Raises:
      SetupError: it has a path separator, "..", a control character, a space around it, or is
      not Unicode; `what` says whose name it is.
    """
    if not name or name != name.strip() or ".." in name or set(name) & set("/\\"):
        raise SetupError(
            f"{what} is named {name!r}. The name of a class has no /, \\, '..' or space around it; "
            f"rename it."
        )
    return _check_characters(name, what)


def _check_characters(name: str, what: str) -> str:
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        raise SetupError(
            f"{what} is named {name!r}, which has control characters or is not Unicode; rename it."
        )
    return name


@dataclass(frozen=True)
class Tree:
    """A folder that is looked through, and what is in it that is no image by its ending."""

    root: epath.Path
    follow_links: bool = False  # also those that lead out of it
    others: list[str] = field(default_factory=list)

    def entries(self, directory: epath.Path) -> list[epath.Path]:
        """What is in a directory, sorted by name; hidden files are left out.

        Raises:
          SetupError: a name cannot be stored, or a symbolic link leaves the folder or leads up.
        """
        found = sorted(
            (path for path in directory.iterdir() if not path.name.startswith(".")),
            key=lambda path: path.name,
        )
        for path in found:
            _check_characters(path.name, f"A file or directory in {directory}")
            self.check_link(path)
        return found

    def check_link(self, path: epath.Path) -> None:
        """Raises SetupError if it is a symbolic link that leaves the folder or leads up.

        One that leads nowhere is no such link, but a broken file.
        """
        if not storage.is_local(path) or not os.path.islink(path) or not os.path.exists(path):
            return
        end, top = os.path.realpath(path), os.path.realpath(self.root)
        if os.path.commonpath([end, os.path.realpath(path.parent)]) == end:
            raise SetupError(
                f"{path} is a symbolic link to {end}, a directory above it. Remove that link."
            )
        if os.path.commonpath([end, top]) != top and not self.follow_links:
            raise SetupError(
                f"{path} is a symbolic link to {end}, which is outside {self.root}. If what is "
                f"there belongs to the data set, give --follow_links; else put the files "
                f"themselves there, or give the directory that they are in."
            )

    def images(
        self, directory: epath.Path, label: int, above: tuple[str, ...] = ()
    ) -> Iterator[File]:
        """The image files below a directory, sorted by path; names of all others go to `others`.

        Args:
          directory: where to look.
          label: of what is there.
          above: real paths of the directories that lead to it.

        Raises:
          SetupError: as `entries`, or links lead in a circle.
        """
        here = os.path.realpath(directory) if storage.is_local(directory) else str(directory)
        if here in above:
            raise SetupError(f"{directory} is {here} again: links lead in a circle. Remove one.")
        for path in self.entries(directory):
            name = path.relative_to(self.root).as_posix()
            is_directory, size, changed, wrong = _look(path)
            if is_directory:
                yield from self.images(path, label, (*above, here))
            elif name.lower().endswith(ENDINGS):
                yield File(name, label, size, changed, wrong)
            else:
                self.others.append(name)


def _look(path: epath.Path) -> tuple[bool, int, int, str]:
    """Whether it is a directory, its bytes, when it was changed, and what is wrong with it."""
    if not storage.is_local(path):
        found = path.stat()
        return found.is_directory, found.length, int(found.mtime), ""
    try:
        status = os.stat(path)
    except OSError as error:
        return False, 0, 0, _refused(path, error)
    kind = status.st_mode
    if stat.S_ISDIR(kind) or stat.S_ISREG(kind):
        return stat.S_ISDIR(kind), status.st_size, int(status.st_mtime), ""
    return False, 0, 0, "is neither a file nor a directory, but a pipe, socket or device"


def _refused(path: epath.Path, error: OSError) -> str:
    """What the system says of a file; an error of the disk or of this process is raised again."""
    if error.errno not in OF_THE_FILE:
        raise error
    if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR) and os.path.islink(path):
        wrong = "leads in a circle" if error.errno == errno.ELOOP else "is not there"
        return f"is a symbolic link to {os.readlink(path)}, which {wrong}"
    return f"cannot be read: {error.strerror or error}"


def fault(path: epath.Path, decode: bool, shown: Shown) -> str:
    """What keeps a file from being an image; "" for nothing. Without `decode`, its first bytes.

    Raises:
      Unclear: as `decode.pixels`.
    """
    try:
        if decode:
            encoded = path.read_bytes()
        else:
            with path.open("rb") as file:
                encoded = file.read(BEGINNING)
    except OSError as error:
        return _refused(path, error)
    if not decode_module.kind(encoded):
        return decode_module.fault(encoded)
    if decode:
        return "" if pixels(encoded, 3, shown) is not None else decode_module.fault(encoded)
    found = decode_module.read(encoded)
    if found and found.bits > 8 and not found.white and not shown.max_value:
        raise nobody_said(f"has values of {found.bits} bits", shown)
    return ""


def faults(
    root: epath.Path, files: Sequence[File], decode: bool, shown: Shown
) -> tuple[dict[str, str], dict[str, Unclear]]:
    """What is wrong with which file, by name, and what is unclear about which."""

    def one(file: File) -> str | Unclear:
        try:
            return file.wrong or fault(root / file.name, decode, shown)
        except Unclear as error:
            return error

    with shards.progress_bar("checking", len(files), "files") as bar:
        found = dict(
            zip(
                (file.name for file in files),
                shards.counted(shards.ahead(one, files), bar),
                strict=True,
            )
        )
    unclear = {name: wrong for name, wrong in found.items() if isinstance(wrong, Unclear)}
    return {name: wrong for name, wrong in found.items() if wrong and name not in unclear}, unclear


def fingerprint(splits: dict[str, list[File]], *options: object) -> str:
    """SHA-256 of every file's split, name, label, size and time, and of the options."""
    digest = hashlib.sha256(repr(options).encode())
    for split, files in splits.items():
        for file in files:
            row = f"{split}\0{file.name}\0{file.label}\0{file.size}\0{file.changed}\n"
            digest.update(row.encode())
    return digest.hexdigest()


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
    return f" {shards.ignored(names)} Convert what is an image." if names else ""


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


VERSION = "1.0.0"
EXAMPLE_BYTES = 72  # of a record beside its image and file name, at most


def prepare(
    root: epath.Path,
    name: str,
    data_dir: str,
    val_fraction: float = 0.0,
    decode: bool = True,
    skip_broken: bool = False,
    dry_run: bool = False,
    follow_links: bool = False,
    max_value: float = 0.0,
) -> str:
    """Writes the data set, going on where an earlier run stopped; what to say at the end.

    Records are in the order of classes, then paths: training shuffles them (see `layout`).

    Args:
      root: the folder, in one of the layouts of `layout`.
      name: of the data set; one that tfds does not have.
      data_dir: of tfds; "" is its default.
      val_fraction: of each class, for validation, where the folder has none.
      decode: whether all of an image is tested, or its first bytes alone.
      skip_broken: leaves out what is no image, where otherwise nothing would be written.
      dry_run: writes nothing and says what would be.
      follow_links: symbolic links may lead out of the folder.
      max_value: white, of images of more than 8 bits a channel; 0: they are refused.

    Raises:
      SetupError: the folder, the name or the disk must be changed first.
    """
    final = shards.data_dir(data_dir) / check_free_name(name) / VERSION
    found = read(root.expanduser(), val_fraction, follow_links)
    made_of = {"source": str(root), "fingerprint": _fingerprint(found, decode, skip_broken)}
    if max_value:
        made_of["max_value"] = max_value
        made_of["fingerprint"] += f" white={max_value:.10g}"
    if shards.is_done(final, made_of):
        return _finished(final, name, data_dir, shards.manifest(final), shards.AGAIN, found)
    earlier = shards.manifest(shards.unfinished(final))
    if earlier.get("fingerprint") == made_of["fingerprint"]:
        made_of = earlier  # with the files that it found broken
    else:
        shown = Shown(max_value=max_value, setting="--max_value")
        made_of["left_out"] = _broken(found, decode, skip_broken, shown)
    jobs = _jobs(found, made_of["left_out"], name)
    needed = shards.missing_bytes(final, jobs, made_of["fingerprint"])
    if dry_run:
        planned = shards.planned(final, shards.splits_of(jobs), needed)
        return _not_in_it(made_of, found) + planned
    shards.check_space(final, needed)
    with shards.writing(final, made_of) as directory:
        shards.write_all(directory, [job for of in jobs.values() for job in of])
        _write_info(directory, name, found.classes, jobs)
    return _finished(final, name, data_dir, made_of, "Prepared", found)


def _fingerprint(found: Folder, decode: bool, skip_broken: bool) -> str:
    """What a data set is made of; the same as long as nothing that matters to it changes."""
    return fingerprint(
        found.splits,
        found.classes,
        decode,
        skip_broken,
        shards.WRITER,
        shards.RECORDS_PER_SHARD,
        shards.BYTES_PER_SHARD,
    )


def check_free_name(name: str) -> str:
    """The name, if a data set of a folder may have it.

    Raises:
      SetupError: it is not letters, digits and underscores, or is that of a data set of tfds.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise SetupError(
            f"--as is {name!r}; give letters a-z, digits and single underscores, as birds_200."
        )
    try:
        if name != fractals.Fractals.name:
            tfds.builder_cls(name)
    except tfds.core.DatasetNotFoundError:
        return name
    raise SetupError(
        f"--as is {name!r}, which is a data set of its own in tfds: opening it would look for "
        f"that. Choose another name, such as my_{name}."
    )


def features(classes: Sequence[str]) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=list(classes)),
            "file_name": tfds.features.Text(doc="Relative to the folder."),
        }
    )


def examples(classes: Sequence[str]) -> Callable[[dict], bytes]:
    """Makes records: the same bytes in any process, unlike those of tfds's own serialization."""
    form = features(classes)
    serializer = example_serializer.ExampleSerializer(form.get_serialized_info())

    def as_example(values: dict) -> bytes:
        found = serializer.get_tf_example(form.encode_example(values))
        return found.SerializeToString(deterministic=True)

    return as_example


def _broken(found: Folder, decode: bool, skip: bool, shown: Shown) -> dict[str, str]:
    """What is wrong with which files.

    Raises:
      SetupError: something is, and they are not to be skipped; or too much would be; or what is
      seen in one of them only --max_value can say.
    """
    every = [file for of in found.splits.values() for file in of]
    broken, unclear = faults(found.root, every, decode, shown)
    if unclear:
        rows = [f"{name} {error.found}" for name, error in unclear.items()]
        cures = " ".join(dict.fromkeys(error.cure for error in unclear.values()))
        raise SetupError(
            f"What is seen in {len(unclear)} of {len(every)} files in {found.root} is not clear:"
            f"{shards.named(rows)}\n{cures} Nothing was written."
        )
    if broken and not skip:
        rows = [f"{name} {wrong}" for name, wrong in broken.items()]
        raise SetupError(
            f"{len(broken)} of {len(every)} files in {found.root} are no images:"
            f"{shards.named(rows)}\nRepair or remove them, or leave them out with --skip_broken. "
            f"Nothing was written."
        )
    for split, of in found.splits.items():
        left = {file.label for file in of if file.name not in broken}
        empty = [found.classes[label] for label in {file.label for file in of} - left]
        if empty and (split == "train" or not left):
            raise SetupError(
                f"Without its broken files {split} has no images of {', '.join(sorted(empty)[:5])}."
            )
    return broken


def _jobs(found: Folder, broken: dict[str, str], name: str) -> dict[str, list[shards.Job]]:
    """The shards of each split."""
    as_example = examples(found.classes)
    jobs = {}
    for split, every in found.splits.items():
        of = [file for file in every if file.name not in broken]
        sizes = [file.size + len(file.name.encode()) + EXAMPLE_BYTES for file in of]
        parts = shards.cut(sizes)
        template = _template(name, split)
        jobs[split] = [
            shards.Job(
                template.sharded_filepath(shard_index=i, num_shards=len(parts)).name,
                len(part),
                sum(sizes[part.start : part.stop]),
                functools.partial(_records, found.root, of[part.start : part.stop], as_example),
            )
            for i, part in enumerate(parts)
        ]
    return jobs


def _records(
    root: epath.Path, of: Sequence[File], as_example: Callable[[dict], bytes]
) -> Iterator[bytes]:
    def record(file: File) -> bytes:
        try:
            encoded = (root / file.name).read_bytes()
        except FileNotFoundError:
            raise SetupError(
                f"{root / file.name} was there when the command began, and is gone. Run it again "
                f"when nothing writes to the folder."
            ) from None
        if len(encoded) != file.size:
            raise SetupError(
                f"{root / file.name} has {len(encoded)} bytes now and had {file.size} when the "
                f"command began. Run it again when nothing writes to the folder."
            )
        return as_example({"image": encoded, "label": file.label, "file_name": file.name})

    return shards.ahead(record, of)


def _template(name: str, split: str) -> naming.ShardedFileTemplate:
    return naming.ShardedFileTemplate(
        data_dir=epath.Path(), dataset_name=name, split=split, filetype_suffix="array_record"
    )


def _write_info(directory: epath.Path, name: str, classes: Sequence[str], jobs: dict) -> None:
    """What tfds reads to open a data set: features.json, the class names, dataset_info.json."""
    features(classes).save_config(directory)
    info = dataset_info_pb2.DatasetInfo(
        name=name,
        version=VERSION,
        description="A folder of images; what it was is in prepared.json.",
        file_format="array_record",
    )
    info.supervised_keys.tuple.items.add(feature_key="image")
    info.supervised_keys.tuple.items.add(feature_key="label")
    for split in shards.splits_of(jobs):
        info.splits.add(
            name=split.name,
            shard_lengths=[job.records for job in jobs[split.name]],
            num_bytes=split.bytes,
            filepath_template=naming.DEFAULT_FILENAME_TEMPLATE,
        )
    tfds.core.dataset_info.write_dataset_info_proto(info, directory)


def _not_in_it(made_of: dict, found: Folder) -> str:
    """Which files of the folder are left out, and why."""
    rows = [f"{name} {wrong}" for name, wrong in made_of["left_out"].items()]
    said = f"Left out, being no images: {len(rows)}{shards.named(rows)}\n" if rows else ""
    return said + (f"{shards.ignored(found.others)}\n" if found.others else "")


def _finished(
    final: epath.Path, name: str, data_dir: str, made_of: dict, done: str, found: Folder
) -> str:
    builder = tfds.builder_from_directory(final)
    white = made_of.get("max_value", 0.0)
    return _not_in_it(made_of, found) + shards.finished(builder, name, data_dir, done, white)
