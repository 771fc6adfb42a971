"""A data set of a folder of images: features image, label and file_name, version 1.0.0."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import example_serializer, naming
from tensorflow_datasets.core.proto import dataset_info_pb2

from supmim_jax.config import SetupError
from supmim_jax.data import fractals
from supmim_jax.data.decode import Shown
from supmim_jax.data.prepare import files, layout, report, shards, target

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
    final = target.data_dir(data_dir) / check_free_name(name) / VERSION
    found = layout.read(root.expanduser(), val_fraction, follow_links)
    made_of = {"source": str(root), "fingerprint": _fingerprint(found, decode, skip_broken)}
    if max_value:
        made_of["max_value"] = max_value
        made_of["fingerprint"] += f" white={max_value:.10g}"
    if target.is_done(final, made_of):
        return _finished(final, name, data_dir, target.manifest(final), report.AGAIN, found)
    earlier = target.manifest(target.unfinished(final))
    if earlier.get("fingerprint") == made_of["fingerprint"]:
        made_of = earlier  # with the files that it found broken
    else:
        shown = Shown(max_value=max_value, setting="--max_value")
        made_of["left_out"] = _broken(found, decode, skip_broken, shown)
    jobs = _jobs(found, made_of["left_out"], name)
    needed = report.missing_bytes(final, jobs, made_of["fingerprint"])
    if dry_run:
        planned = report.planned(final, report.splits_of(jobs), needed)
        return _not_in_it(made_of, found) + planned
    target.check_space(final, needed)
    with target.writing(final, made_of) as directory:
        shards.write_all(directory, [job for of in jobs.values() for job in of])
        _write_info(directory, name, found.classes, jobs)
    return _finished(final, name, data_dir, made_of, "Prepared", found)


def _fingerprint(found: layout.Folder, decode: bool, skip_broken: bool) -> str:
    """What a data set is made of; the same as long as nothing that matters to it changes."""
    return files.fingerprint(
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


def _broken(found: layout.Folder, decode: bool, skip: bool, shown: Shown) -> dict[str, str]:
    """What is wrong with which files.

    Raises:
      SetupError: something is, and they are not to be skipped; or too much would be; or what is
      seen in one of them only --max_value can say.
    """
    every = [file for of in found.splits.values() for file in of]
    broken, unclear = files.faults(found.root, every, decode, shown)
    if unclear:
        rows = [f"{name} {error.found}" for name, error in unclear.items()]
        cures = " ".join(dict.fromkeys(error.cure for error in unclear.values()))
        raise SetupError(
            f"What is seen in {len(unclear)} of {len(every)} files in {found.root} is not clear:"
            f"{report.named(rows)}\n{cures} Nothing was written."
        )
    if broken and not skip:
        rows = [f"{name} {wrong}" for name, wrong in broken.items()]
        raise SetupError(
            f"{len(broken)} of {len(every)} files in {found.root} are no images:"
            f"{report.named(rows)}\nRepair or remove them, or leave them out with --skip_broken. "
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


def _jobs(found: layout.Folder, broken: dict[str, str], name: str) -> dict[str, list[shards.Job]]:
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
    root: epath.Path, of: Sequence[files.File], as_example: Callable[[dict], bytes]
) -> Iterator[bytes]:
    def record(file: files.File) -> bytes:
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
    for split in report.splits_of(jobs):
        info.splits.add(
            name=split.name,
            shard_lengths=[job.records for job in jobs[split.name]],
            num_bytes=split.bytes,
            filepath_template=naming.DEFAULT_FILENAME_TEMPLATE,
        )
    tfds.core.dataset_info.write_dataset_info_proto(info, directory)


def _not_in_it(made_of: dict, found: layout.Folder) -> str:
    """Which files of the folder are left out, and why."""
    rows = [f"{name} {wrong}" for name, wrong in made_of["left_out"].items()]
    said = f"Left out, being no images: {len(rows)}{report.named(rows)}\n" if rows else ""
    return said + (f"{report.ignored(found.others)}\n" if found.others else "")


def _finished(
    final: epath.Path, name: str, data_dir: str, made_of: dict, done: str, found: layout.Folder
) -> str:
    builder = tfds.builder_from_directory(final)
    white = made_of.get("max_value", 0.0)
    return _not_in_it(made_of, found) + report.finished(builder, name, data_dir, done, white)
