"""Files from elsewhere are data: nothing in them is run, or unpacked without bound or elsewhere."""

import ast
import dataclasses
import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import msgpack
import numpy as np
import pytest
from conftest import REPOSITORY, python
from etils import epath
from pictures import contents, png

from supmim_jax import storage
from supmim_jax.config import DataConfig, PatchCodesConfig, VQGANConfig
from supmim_jax.data import decode, source
from supmim_jax.data.prepare import catalogue, folder, tfrecords
from supmim_jax.errors import SetupError
from supmim_jax.formats.files import read_npz, read_safetensors
from supmim_jax.models import kmeans, vqgan

PACKAGE = Path(REPOSITORY, "supmim_jax")
BARRED_MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("yaml", "xml", "runpy", "code", "imp"),
}
BARRED_CALLS = {"eval", "exec", "compile", "__import__"}
BARRED_METHODS = {
    *("extractall", "extract", "unpack_archive", "system", "popen", "import_module"),
    *("read_pickle", "unsafe_load", "full_load"),
}
# File of the package, what it uses, and why that reads nothing from elsewhere.
ALLOWED = {
    ("bench.py", ".import_module"): "one of four modules of the checkout",
}


def uses(tree: ast.AST):
    """The barred things in a file, by name."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (x.split(".")[0] for x in names if x.split(".")[0] in BARRED_MODULES)
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", "")
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        owner = getattr(node.func.value, "id", "") if method else ""
        given = {keyword.arg: getattr(keyword.value, "value", "?") for keyword in node.keywords}
        if name in BARRED_CALLS or (method in BARRED_METHODS and owner != "features"):
            yield name or f".{method}"
        if given.get("shell"):
            yield "shell=True"
        if (owner, method) == ("np", "load") and given.get("allow_pickle") is not False:
            yield "np.load without allow_pickle=False"
        if (owner, method) == ("torch", "load") and given.get("weights_only") is not True:
            yield "torch.load without weights_only=True"
        if given.get("allow_pickle"):
            yield "allow_pickle"


def test_nothing_that_runs_what_it_reads_is_used():
    found = {
        (path.relative_to(PACKAGE).as_posix(), use)
        for path in PACKAGE.rglob("*.py")
        for use in uses(ast.parse(path.read_text()))
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("import pickle", "pickle"),
        ("from joblib import load", "joblib"),
        ("import xml.etree.ElementTree", "xml"),
        ("np.load(path)", "np.load without allow_pickle=False"),
        ("np.load(path, allow_pickle=flag)", "np.load without allow_pickle=False"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("subprocess.run(text, shell=True)", "shell=True"),
        ("tarfile.open(path).extractall(there)", ".extractall"),
        ("eval(text)", "eval"),
        ("importlib.import_module(name)", ".import_module"),
    ],
)
def test_what_is_barred_is_found(text, use):
    assert use in set(uses(ast.parse(text)))


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_a_weights_file_is_not_run(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, codes=np.array([Bomb(tmp_path / "made")], object))
    with pytest.raises(SetupError, match=r"weights\.npz cannot be read as \.npz: .*allow_pickle"):
        read_npz(path)
    with pytest.raises(SetupError, match=r"codebook .*weights\.npz cannot be read .*allow_pickle"):
        kmeans.load(epath.Path(path), PatchCodesConfig(), 4, 1)
    assert not (tmp_path / "made").exists()


def test_an_archive_that_unpacks_to_far_more_than_it_has_is_refused(tmp_path):
    path, header = tmp_path / "bomb.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (2**26,)}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("codes.npy", header.getvalue() + bytes(2**28))
    with pytest.raises(SetupError, match=r"bomb\.npz cannot .* would unpack to 2684\d+ bytes"):
        read_npz(path)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_weights_are_refused_or_read_whatever_is_wrong_with_them(tmp_path, seed):
    """40 random changes of each kind of file; no other exception than SetupError."""
    random, one = np.random.default_rng(seed), np.ones((2, 3), np.float32)
    array = msgpack.ExtType(1, msgpack.packb([[2, 3], "float32", one.tobytes()]))
    np.savez(tmp_path / "x.npz", codes=one)
    (tmp_path / "x.msgpack").write_bytes(msgpack.packb({"params": {"a": {"b": array}}}))
    (tmp_path / "x.json").write_text(json.dumps({"a": [1, {"b": "text"}]}))
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    whole = struct.pack("<Q", len(header)) + header + one.tobytes()
    (tmp_path / "x.safetensors").write_bytes(whole)
    readers = {
        "x.npz": read_npz,
        "x.json": lambda path: storage.read_json(path, ""),
        "x.safetensors": read_safetensors,
        "x.msgpack": lambda path: vqgan.load_maskgit(epath.Path(path), VQGANConfig(), {}),
    }
    for name, read in readers.items():
        before = (tmp_path / name).read_bytes()
        for _ in range(40):
            content = bytearray(before)
            for at in random.integers(0, len(content), random.integers(1, 4)):
                content[at] = random.integers(0, 256)
            cut = len(content) if random.random() < 0.8 else random.integers(0, len(content))
            (tmp_path / name).write_bytes(bytes(content[:cut]))
            try:
                read(tmp_path / name)
            except SetupError as error:
                assert name in str(error)


def test_json_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(200_000 * "[")
    with pytest.raises(SetupError, match=r"config\.json cannot be read"):
        storage.read_json(tmp_path / "config.json", "")


def test_an_image_of_a_huge_size_takes_no_memory_and_is_no_image(tmp_path):
    """In a process of its own: OpenCV reads its limit when it is loaded."""
    side = 12_000  # and whole, so that nothing but its size is wrong with it
    (tmp_path / "whole.png").write_bytes(png(side, bytes(side * (side + 1))))
    (tmp_path / "header.png").write_bytes(png(60_000, bytes(1000)))
    program = """if True:
        import resource, sys
        from supmim_jax.data.decode import pixels
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sys.argv[1:]:
            assert pixels(open(path, "rb").read(), 3) is None, path
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 50_000, grown
    """
    out = python("-c", program, *sorted(tmp_path.iterdir()))
    assert out.returncode == 0, out.stderr
    head = b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", 60_000, 60_000) + b"\x03"
    assert decode.jpeg_size(head + bytes(20) + b"\xff\xd9") is None


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc", "..", "a/..", "a/../b", "a\nb", "a b", "", "ns:name", "a/b/c", "é", "a:b"],
)
def test_a_name_of_a_data_set_leads_nowhere_else(name, tmp_path):
    with pytest.raises(SetupError, match=r"config\.data\.name is .*no name of a data set"):
        source.Source(DataConfig(name=name, data_dir=str(tmp_path))).records("train")
    with pytest.raises(SetupError, match=r"--name is .*no name of a data set"):
        catalogue.prepare(name, str(tmp_path / "x"), "")
    for as_ in (name, f"{name}\n", "\u202ea"):
        with pytest.raises(SetupError, match="--as is"):
            folder.check_free_name(as_)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["..", "a/b", "a\\b", "a\nb", "\x00", " a", "a..b", "\ud800", ""])
def test_a_class_whose_name_could_be_a_path_or_a_line_is_refused(name):
    with pytest.raises(SetupError, match="is named"):
        folder.check_name(name, "A class")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../../x"}, r"dataset_info.json: name is '\.\./\.\./x'"),
        ({"version": ".."}, r"version is '\.\.'"),
        ({"configName": "../x"}, "configName is"),
        ({"configName": "a\nb"}, "configName is"),
        ({"splits": [{"name": "../train", "shardLengths": ["1"]}]}, r"splits\[0\]\.name is"),
    ],
)
def test_a_copy_cannot_say_to_write_elsewhere(toy, tmp_path, change, message):
    values = json.loads((toy / "dataset_info.json").read_text())
    (toy / "dataset_info.json").write_text(json.dumps(values | change))
    before = contents(tmp_path)
    with pytest.raises(SetupError, match=message):
        tfrecords.prepare(toy, str(tmp_path / "deep" / "data"))
    assert contents(tmp_path) == before


def test_shards_outside_the_directory_are_not_read(toy, tmp_path):
    values = json.loads((toy / "dataset_info.json").read_text())
    for split in values["splits"]:
        split["filepathTemplate"] = "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (toy / "dataset_info.json").write_text(json.dumps(values))
    with pytest.raises(SetupError, match=r"which is outside"):
        tfrecords.prepare(toy, str(tmp_path / "data"))


@pytest.fixture
def beasts(photos, tmp_path):
    folder.prepare(epath.Path(photos), "beasts", str(tmp_path / "data"))
    return tmp_path / "data" / "beasts" / "1.0.0"


def test_a_features_file_cannot_have_a_module_imported(beasts, tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil_feature.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (beasts / source.CHECKSUMS).unlink()
    path = beasts / "features.json"
    text = path.read_text()
    name = "tensorflow_datasets.core.features.text_feature.Text"
    assert name in text
    path.write_text(text.replace(name, "evil_feature.Text"))
    cfg = DataConfig(name="beasts", data_dir=str(tmp_path / "data"), num_classes=3)
    # tfds writes names in its own way, and finds a config that metadata name.
    root = beasts.parent
    within = root / "one"
    within.mkdir()
    shutil.copytree(beasts, within / beasts.name)
    (root / ".config").mkdir()
    (root / ".config" / "metadata.json").write_text('{"default_config_name": "one"}')
    for name, removed in (
        *(("beasts", None), ("Beasts", None)),
        *(("beasts", beasts), ("Beasts/one", None)),
    ):
        if removed:
            shutil.rmtree(removed)
        other = dataclasses.replace(cfg, name=name)
        with pytest.raises(SetupError, match=r"names the class 'evil_feature\.Text'.*run code"):
            source.Source(other).records("train")


def test_seals_name_files_of_the_directory_alone(beasts, tmp_path):
    (beasts / source.CHECKSUMS).write_text('{"../../../etc/passwd": "1-2"}')
    cfg = DataConfig(name="beasts", data_dir=str(tmp_path / "data"), num_classes=3)
    with pytest.raises(SetupError, match=r"seals\.json cannot be used: it names '\.\./"):
        source.Source(cfg).records("train")


def test_links_in_an_archive_are_not_followed(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "x.tar")
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("n01440764.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        tar.addfile(link)
    size = path.stat().length
    archive = catalogue.Archive("train", 1, "x.tar", size, "", r"n\d{8}\.tar", classes=1)
    monkeypatch.setattr(catalogue, "ARCHIVES", (archive,))
    with pytest.raises(SetupError, match=r"x\.tar: holds 'n01440764\.tar', expected plain files"):
        catalogue.check_archives(epath.Path(tmp_path), verify=False)
