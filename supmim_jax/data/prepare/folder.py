"""Makes a data set of a folder of images: features image, label, file_name; version 1.0.0.

  train/<class>/**/*.jpg      and val/<class>/ or validation/<class>/, optionally test/<class>/
  train/<wnid>/images/*.JPEG  and val/images/, val/val_annotations.txt, wnids.txt: the published
                              Tiny-ImageNet, whose unlabelled test split is left out

Class names that differ only in their Unicode form are one class (macOS decomposes accented
letters). Classes are sorted by name, and the files of a split by class and then path, so
neighbouring records are of one class. Training shuffles all records anew in each epoch and does not
mind, but a part of a split such as train[:1000] has only the first classes.
"""

import errno
import functools
import hashlib
import itertools
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_serializer, naming
from tensorflow_datasets.core.proto import dataset_info_pb2

from supmim_jax import storage
from supmim_jax.data import decode, fractals, worker
from supmim_jax.data.decode import Shown, Unclear
from supmim_jax.data.prepare import output
from supmim_jax.errors import SetupError

VERSION = "1.0.0"
VALIDATION = ("val", "validation")
WNIDS, ANNOTATIONS = "wnids.txt", "val_annotations.txt"
UNPACK = "Unpack Tiny-ImageNet's archive again."
BEGINNING = 2**12  # bytes, where files are not decoded
EXAMPLE_BYTES = 72  # of a record beside its image and file name, at most
# What the system says of a file, and not of a disk or of this process.
LEADS_NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
OF_THE_FILE = (*LEADS_NOWHERE, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


@dataclass(frozen=True, slots=True)
class File:
    """An image file of a folder."""

    name: str  # its path relative to the folder, with forward slashes
    label: int
    size: int  # bytes
    changed: int  # seconds since 1970
    wrong: str = ""  # what keeps it from being read, as far as its directory tells


def prepare(
    root: epath.Path,
    name: str,
    data_dir: str,
    val_fraction: float = 0.0,
    no_decode: bool = False,
    skip_broken: bool = False,
    dry_run: bool = False,
    follow_links: bool = False,
    max_value: float = 0.0,
) -> str:
    """Writes the data set, continuing where an earlier run stopped; returns the final message.

    The arguments are the command's flags: `root` is --image_folder, and `name` is --as.

    Raises:
      SetupError: the folder, the name or the disk must be changed first.
    """
    # Cheap mistakes first: the folder may have a million files.
    final = output.root(data_dir) / check_free_name(name) / VERSION
    folder = Folder(root.expanduser(), val_fraction, follow_links)
    made_of = {"source": str(root), "fingerprint": folder.fingerprint(not no_decode, skip_broken)}
    if max_value:
        made_of["max_value"] = max_value
        made_of["fingerprint"] += f" white={max_value:.10g}"
    done = output.is_done(final, made_of)
    earlier = output.manifest(final if done else output.unfinished(final))
    if earlier.get("fingerprint") == made_of["fingerprint"]:
        made_of = earlier  # with the files that were found broken
    else:
        shown = Shown(max_value=max_value, setting="--max_value")
        made_of["left_out"] = find_broken(folder, no_decode, skip_broken, shown)
    rows = [f"{file} {wrong}" for file, wrong in made_of["left_out"].items()]
    text = f"Left out, being no images: {len(rows)}{output.listed(rows)}\n" if rows else ""
    text += f"{output.ignored(folder.others)}\n" if folder.others else ""
    if not done:
        features = features_of(folder.classes)
        splits = _shards(folder, made_of["left_out"], name, features)
        others = features.save_config
        plan = output.write(final, made_of, _info(name, splits), splits, features, others, dry_run)
        if dry_run:
            return text + plan
    builder, done = tfds.builder_from_directory(final), "Prepared already" if done else "Prepared"
    return text + output.report(builder, name, data_dir, done, max_value)


def check_free_name(name: str) -> str:
    """The name; raises SetupError if tfds could not open it, or has such a data set itself."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise SetupError(f"--as is {name!r}; give letters a-z, digits and single underscores.")
    try:
        if name != fractals.Fractals.name:
            tfds.builder_cls(name)
    except tfds.core.DatasetNotFoundError:
        return name
    raise SetupError(
        f"--as is {name!r}, a data set of its own in tfds, which would be opened in its place. "
        f"Choose another name, such as my_{name}."
    )


def check_name(name: str, what: str, is_class: bool = True) -> None:
    """Checks the name of a class, or of any file or directory; `what` says whose it is.

    Raises:
      SetupError: it has a control character or is not Unicode; or is that of a class and has a
        path separator, "..", or a space around it.
    """
    like_a_path = not name or name != name.strip() or re.search(r"[/\\]|\.\.", name)
    categories = {unicodedata.category(letter) for letter in name}
    if categories & {"Cc", "Cs", "Zl", "Zp"} or (is_class and like_a_path):
        without = "/, \\, '..', spaces around it, " if is_class else ""
        raise SetupError(
            f"{what} is named {name!r}. Rename it, in Unicode without {without}control characters."
        )


class Folder:
    """The images of a folder.

    Attributes:
      root: the folder.
      classes: their names; the place in it is the label.
      splits: the files of train, validation and perhaps test.
      others: names of files that are no images by their endings.

    Raises:
      SetupError: it has none of the layouts, or two, or is not complete; it says where.
    """

    def __init__(self, root: epath.Path, val_fraction: float = 0.0, follow_links: bool = False):
        self.root, self.follow_links = root, follow_links
        self.classes: tuple[str, ...] = ()
        self.others: list[str] = []
        if not root.is_dir():
            raise SetupError(f"--image_folder {root} is no directory.")
        train, test = root / "train", root / "test"
        for directory in (train, test, *(root / name for name in VALIDATION)):
            self._check_link(directory)
        if not train.is_dir():
            raise SetupError(
                f"--image_folder {root} has no directory train/. Expected train/<class>/*.jpg (or "
                f"another image), and val/<class>/ or --val_fraction."
            )
        held_out = [root / name for name in VALIDATION if (root / name).is_dir()]
        if len(held_out) == 2:
            raise SetupError(f"{root} has both val/ and validation/. Keep the one that counts.")
        if held_out and val_fraction:
            raise SetupError(
                f"{held_out[0]} is there, and --val_fraction is {val_fraction}. Leave out the "
                f"flag, or move the directory away."
            )
        if not held_out and not val_fraction:
            raise SetupError(
                f"{root} has no images for validation: neither val/ nor validation/. Give "
                f"--val_fraction=0.1 to take a tenth of each class of train/."
            )
        # Only the published Tiny-ImageNet keeps its validation labels in a file.
        tiny_imagenet = (root / "val" / ANNOTATIONS).exists()
        if tiny_imagenet:
            if not (root / WNIDS).exists():
                raise SetupError(f"{root} has val/{ANNOTATIONS} and no {WNIDS}. {UNPACK}")
            self.classes = tuple(sorted((root / WNIDS).read_text().split()))
        files = self._labelled(train)
        self._check_filled(files)
        if tiny_imagenet:
            self.splits = {"train": files, "validation": self._annotated()}
            return
        if held_out:
            self.splits = {"train": files, "validation": self._labelled(held_out[0])}
        else:
            self.splits = dict(zip(("train", "validation"), divided(files, val_fraction)))
            if not self.splits["validation"]:
                raise SetupError(f"{train} has one image a class, and none for --val_fraction.")
        if test.is_dir():
            self.splits["test"] = self._labelled(test)

    def fingerprint(self, decode: bool, skip_broken: bool) -> str:
        """SHA-256 of each file's split, name, label, size and time, of the classes and options."""
        sizes = output.WRITER, output.RECORDS_PER_SHARD, output.BYTES_PER_SHARD
        digest = hashlib.sha256(repr((self.classes, decode, skip_broken, *sizes)).encode())
        for split, files in self.splits.items():
            for file in files:
                row = f"{split}\0{file.name}\0{file.label}\0{file.size}\0{file.changed}\n"
                digest.update(row.encode())
        return digest.hexdigest()

    def _check_link(self, path: epath.Path, may_be_broken: bool = False) -> None:
        """Raises SetupError for a symbolic link that leaves the folder, or leads nowhere."""
        if not storage.is_local(path) or not os.path.islink(path):
            return
        if not os.path.exists(path):
            if may_be_broken:  # it is named with the other broken files, later
                return
            raise SetupError(
                f"{path} is a symbolic link to {os.readlink(path)}, which is not there. Mount or "
                f"copy that, or remove the link."
            )
        target = os.path.realpath(path)
        if not self.follow_links and not _is_in(target, os.path.realpath(self.root)):
            raise SetupError(
                f"{path} is a symbolic link to {target}, which is outside {self.root}. If that "
                f"belongs to the data set, give --follow_links; else remove the link."
            )

    def _entries(self, directory: epath.Path, may_be_broken: bool = True) -> list[epath.Path]:
        """The checked entries of a directory, sorted by name, without hidden files."""
        paths = [path for path in directory.iterdir() if not path.name.startswith(".")]
        for path in paths:
            check_name(path.name, f"A file or directory in {directory}", is_class=False)
            self._check_link(path, may_be_broken)
        return sorted(paths, key=lambda path: path.name)

    def _labelled(self, split: epath.Path) -> list[File]:
        """The files of a split with a directory per class, in order; train is read first."""
        directories: dict[str, epath.Path] = {}
        for path in self._entries(split, may_be_broken=False):
            if path.is_dir():
                check_name(path.name, f"A class in {split}")
                twin = directories.setdefault(_composed(path.name), path)
                if twin != path:
                    raise SetupError(
                        f"{split} has two directories of one name in two forms of Unicode: "
                        f"{twin.name!a} and {path.name!a}. Put the images of both in one."
                    )
            elif path.name.lower().endswith(decode.ENDINGS):
                raise SetupError(f"{path} is in no class. Expected {split}/<class>/{path.name}.")
            else:
                self.others.append(path.relative_to(self.root).as_posix())
        # As train spells them; wnids.txt, where there is one, was read before.
        self.classes = self.classes or tuple(path.name for path in directories.values())
        labels = {_composed(name): label for label, name in enumerate(self.classes)}
        if unknown := [path.name for name, path in directories.items() if name not in labels]:
            known = self.root / (WNIDS if split.name == "train" else "train")
            raise SetupError(
                f"{split} has {len(unknown)} classes that {known} lacks: {', '.join(unknown[:5])}."
            )
        files: list[File] = []
        for name, path in directories.items():
            files += self._images(path, labels[name], (os.path.realpath(split),))
        if not files:
            raise SetupError(
                f"{split} has no images: no file in a class directory ends in "
                f"{', '.join(decode.ENDINGS)}.{self._ignored('')}"
            )
        return files

    def _images(self, directory: epath.Path, label: int, above: tuple[str, ...]) -> Iterator[File]:
        """The image files below a directory, by path; names of all others go to `others`.

        `above` are the real paths of the directories that lead to it.
        """
        real = os.path.realpath(directory)
        if storage.is_local(directory) and any(_is_in(upper, real) for upper in above):
            raise SetupError(f"{directory} leads up to {real}: links go in a circle. Remove it.")
        for path in self._entries(directory):
            name = path.relative_to(self.root).as_posix()
            is_directory, size, changed, wrong = _look(path)
            if is_directory:
                yield from self._images(path, label, (*above, real))
            elif name.lower().endswith(decode.ENDINGS):
                yield File(name, label, size, changed, wrong)
            else:
                self.others.append(name)

    def _check_filled(self, files: list[File]) -> None:
        """Raises SetupError unless there are training images of two classes and of each class."""
        filled = {file.label for file in files}
        empty = [name for label, name in enumerate(self.classes) if label not in filled]
        if empty:
            raise SetupError(
                f"{self.root}/train has no images of {len(empty)} of {len(self.classes)} classes: "
                f"{', '.join(empty[:5])}. Fill or remove {self.root}/train/{empty[0]}."
                f"{self._ignored(f'train/{empty[0]}/')}"
            )
        if len(self.classes) < 2:
            raise SetupError(
                f"{self.root}/train has one class, {self.classes[0]!r}: two are needed."
            )

    def _ignored(self, below: str) -> str:
        names = [name for name in self.others if name.startswith(below)]
        return f" {output.ignored(names)} Convert what is an image." if names else ""

    def _annotated(self) -> list[File]:
        """Tiny-ImageNet's validation files, labelled by the lines of val_annotations.txt."""
        split = self.root / "val"
        images, annotations = split / "images", split / ANNOTATIONS
        directories = [path.name for path in self._entries(split) if path.is_dir()]
        if directories != ["images"]:
            raise SetupError(
                f"{annotations} is of val/images/ alone, and {split} has the directories "
                f"{', '.join(directories) or 'none'}: two layouts at once. Keep one."
            )
        labels = {name: label for label, name in enumerate(self.classes)}
        left = {file.name: file for file in self._images(images, -1, ())}
        files = []
        for number, line in enumerate(annotations.read_text().splitlines(), start=1):
            name, wnid = [*line.split("\t"), "", ""][:2]
            file = left.pop(f"val/images/{name}", None)
            if file is None or wnid not in labels:
                wrong = f"{wnid!r}, which {WNIDS} lacks" if file else f"{name!r}, not in {images}"
                raise SetupError(f"{annotations}, line {number} names {wrong}. {UNPACK}")
            files.append(replace(file, label=labels[wnid]))
        if left:
            raise SetupError(f"{annotations} has no line for {len(left)} files: {min(left)} ...")
        return sorted(files, key=lambda file: (file.label, file.name))


def _composed(name: str) -> str:
    """A name in the Unicode form in which names are compared."""
    return unicodedata.normalize("NFC", name)


def _is_in(path: str, directory: str) -> bool:
    return os.path.commonpath([path, directory]) == directory


def divided(files: list[File], fraction: float) -> tuple[list[File], list[File]]:
    """Training and validation files: of each class, the share whose names have the lowest hashes.

    At least one for each, of a class with two files or more; a single one is for training. What
    happens to a file does not depend on other classes.
    """
    chosen: set[str] = set()
    for _, of_class in itertools.groupby(files, key=lambda file: file.label):  # they are in order
        names = [file.name for file in of_class]
        count = min(max(1, round(fraction * len(names))), len(names) - 1)
        # Hashes, as neighbours by name are often alike: frames of a film, shots of a burst.
        names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        chosen.update(names[:count])
    train = [file for file in files if file.name not in chosen]
    return train, [file for file in files if file.name in chosen]


def _look(path: epath.Path) -> tuple[bool, int, int, str]:
    """Whether it is a directory, its bytes, when it was changed, and what is wrong with it."""
    if not storage.is_local(path):
        status = path.stat()
        return status.is_directory, status.length, int(status.mtime), ""
    try:
        status = os.stat(path)
    except OSError as error:
        return False, 0, 0, _refused(path, error)
    is_directory = stat.S_ISDIR(status.st_mode)
    if is_directory or stat.S_ISREG(status.st_mode):
        return is_directory, status.st_size, int(status.st_mtime), ""
    return False, 0, 0, "is neither a file nor a directory, but a pipe, socket or device"


def _refused(path: epath.Path, error: OSError) -> str:
    """What the system says of a file; an error of the disk or of this process is raised again."""
    if error.errno not in OF_THE_FILE:
        raise error
    if error.errno in LEADS_NOWHERE and os.path.islink(path):
        wrong = "leads in a circle" if error.errno == errno.ELOOP else "is not there"
        return f"is a symbolic link to {os.readlink(path)}, which {wrong}"
    return f"cannot be read: {error.strerror or error}"


def fault(path: epath.Path, no_decode: bool, shown: Shown) -> str:
    """What keeps a file from being an image; "" for nothing. Raises Unclear as `decode.pixels`."""
    try:
        with path.open("rb") as file:
            encoded = file.read(BEGINNING if no_decode else -1)
    except OSError as error:
        return _refused(path, error)
    # OpenCV decodes more formats than decode.py knows the headers of; those are refused.
    if not decode.kind(encoded):
        return decode.fault(encoded)
    if not no_decode:
        return decode.fault(encoded) if decode.pixels(encoded, 3, shown) is None else ""
    header = decode.read(encoded)
    if header.bits > 8 and not header.white and not shown.max_value:
        raise decode.nobody_said(f"has values of {header.bits} bits", shown)
    return ""


def find_broken(folder: Folder, no_decode: bool, skip: bool, shown: Shown) -> dict[str, str]:
    """The broken files by name, with what is wrong with each.

    Raises:
      SetupError: they are not to be skipped, or are too many, or a file needs --max_value.
    """
    files = [file for split in folder.splits.values() for file in split]

    def look(file: File) -> str | Unclear:
        try:
            return file.wrong or fault(folder.root / file.name, no_decode, shown)
        except Unclear as error:
            return error

    broken: dict[str, str] = {}
    rows, cures = [], {}  # of an error
    with output.progress("checking", len(files), "files") as bar:
        for file, wrong in zip(files, worker.prefetched(look, files)):
            bar.update()
            if isinstance(wrong, Unclear):
                rows.append(f"{file.name} {wrong.found}")
                cures[wrong.cure] = None
            elif wrong:
                broken[file.name] = wrong
    if broken and not skip:
        rows += [f"{name} {wrong}" for name, wrong in broken.items()]
        cures["Repair or remove what is no image, or leave it out with --skip_broken."] = None
    if rows:
        raise SetupError(
            f"{len(rows)} of {len(files)} files in {folder.root} cannot be used:"
            f"{output.listed(rows)}\n{' '.join(cures)} Nothing was written."
        )
    for split, of in folder.splits.items():
        left = {file.label for file in of if file.name not in broken}
        empty = {folder.classes[file.label] for file in of if file.label not in left}
        if empty and (split == "train" or not left):
            raise SetupError(
                f"Without its broken files {split} has no images of {', '.join(sorted(empty)[:5])}."
            )
    return broken


def features_of(classes: Sequence[str]) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=list(classes)),
            "file_name": tfds.features.Text(doc="Relative to the folder."),
        }
    )


def _shards(
    folder: Folder, broken: dict[str, str], name: str, features: tfds.features.FeaturesDict
) -> dict[str, list[output.Shard]]:
    """The shards of each split."""
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def record(file: File) -> bytes:
        path = folder.root / file.name
        try:
            encoded = path.read_bytes()
        except FileNotFoundError:
            encoded = b""
        # The shards were cut by these sizes, and the disk space was checked for them.
        if not encoded or len(encoded) != file.size:
            raise SetupError(
                f"{path} has {len(encoded)} bytes now and had {file.size} when the command began. "
                f"Run it again when nothing writes to the folder."
            )
        values = {"image": encoded, "label": file.label, "file_name": file.name}
        example = serializer.get_tf_example(features.encode_example(values))
        # The same bytes in any process, unlike those of tfds's own serialization.
        return example.SerializeToString(deterministic=True)

    splits = {}
    for split, every in folder.splits.items():
        files = [file for file in every if file.name not in broken]
        sizes = [file.size + len(file.name.encode()) + EXAMPLE_BYTES for file in files]
        parts = output.cut(sizes)
        template = naming.ShardedFileTemplate(
            data_dir=epath.Path(), dataset_name=name, split=split, filetype_suffix="array_record"
        )
        splits[split] = [
            output.Shard(
                path.name,
                len(part),
                sum(sizes[part.start : part.stop]),
                functools.partial(worker.prefetched, record, files[part.start : part.stop]),
            )
            for part, path in zip(parts, template.sharded_filepaths(len(parts)))
        ]
    return splits


def _info(name: str, splits: dict[str, list[output.Shard]]) -> dataset_info_pb2.DatasetInfo:
    info = dataset_info_pb2.DatasetInfo(
        name=name,
        version=VERSION,
        description="A folder of images; what it was is in prepared.json.",
    )
    for key in ("image", "label"):
        info.supervised_keys.tuple.items.add(feature_key=key)
    for split, shards in splits.items():
        info.splits.add(
            name=split,
            num_bytes=sum(shard.bytes for shard in shards),
            filepath_template=naming.DEFAULT_FILENAME_TEMPLATE,
        )
    return info
