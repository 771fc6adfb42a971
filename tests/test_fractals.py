"""The built-in dataset: reproducible, balanced, and its classes are shapes rather than colours."""

import dataclasses
import hashlib
import os

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from supmim_jax.data import fractals

TINY, SMALL = fractals.SPECS["tiny"], fractals.SPECS["small"]
ARRAYS = ("image", "segmentation", "label")
GOLDEN = {
    "tiny": "694d488c25af5430",
    "tiny_colour": "9d8452688a309a85",
    "small": "26d14d9ac7380de7",
}


def built(data_dir, spec: fractals.Spec, **changes) -> fractals.Fractals:
    """A builder of a config of its own."""
    config = fractals.FractalsConfig(dataclasses.replace(spec, name="odd", **changes))
    return fractals.Fractals(config=config, data_dir=data_dir, file_format="array_record")


def nearest_neighbour(features, train, test):
    """Top-1 accuracy of the label of the nearest training example, by cosine."""
    known, unknown = (features(part).reshape(len(part["label"]), -1) for part in (train, test))
    nearest = KNeighborsClassifier(1, metric="cosine").fit(known, train["label"])
    return nearest.score(unknown, test["label"])


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_an_image_does_not_depend_on_its_batch(name):
    spec = fractals.SPECS[name]
    together = fractals.render(spec, "train", range(70))
    for i in (69, 0, 31):
        alone = fractals.render(spec, "train", [i])
        assert all((alone[key][0] == together[key][i]).all() for key in ARRAYS)


def test_the_images_are_what_they_were():
    """Golden: SHA-256 of all arrays; where one changes, VERSION goes up."""
    for name, wanted in GOLDEN.items():
        digest = hashlib.sha256()
        for split in fractals.SPLITS:
            rendered = fractals.render(fractals.SPECS[name], split, range(0, 90, 7))
            for key in ARRAYS:
                digest.update(rendered[key].tobytes())
        assert digest.hexdigest()[:16] == wanted, name


def test_classes_are_interleaved_and_no_image_occurs_twice():
    parts = [fractals.render(TINY, split, range(240)) for split in fractals.SPLITS]
    for part in parts:
        np.testing.assert_array_equal(part["label"], np.arange(240) % 30)
    masks = np.concatenate([part["segmentation"] > 0 for part in parts])
    assert len(np.unique(masks.reshape(len(masks), -1), axis=0)) == len(masks)


def test_segmentation_is_the_figure_and_names_its_class():
    part = fractals.render(TINY, "train", range(240))
    inside, image = part["segmentation"] > 0, part["image"][..., 0].astype(float)
    np.testing.assert_array_equal(part["segmentation"].max((1, 2)), part["label"] + 1)
    assert all(len(np.unique(mask)) == 2 for mask in part["segmentation"])
    bright = (image * inside).sum((1, 2)) / inside.sum((1, 2))
    dark = (image * ~inside).sum((1, 2)) / (~inside).sum((1, 2))
    assert np.all(bright > dark + 25)
    assert part["segmentation"].dtype == np.uint16
    assert inside.mean((1, 2)).min() > 0.05 and inside.mean((1, 2)).max() < 0.5


def test_shape_tells_the_class_and_colour_does_not():
    def mean_colour(part):
        inside = (part["segmentation"] > 0)[..., None]
        colour = (part["image"] * inside).sum((1, 2)) / inside.sum((1, 2))
        return colour - colour.mean(1, keepdims=True)

    sizes, chance = (("train", 1000), ("validation", 500)), 1 / SMALL.num_classes
    parts = [fractals.render(SMALL, split, range(size)) for split, size in sizes]
    assert nearest_neighbour(mean_colour, *parts) < 2.5 * chance
    assert nearest_neighbour(lambda part: part["segmentation"] > 0.0, *parts) > 15 * chance


@pytest.mark.parametrize("parallel_from", [10**6, 300])
def test_prepared_data_read_back_as_rendered(tmp_path, monkeypatch, parallel_from):
    """Also by processes: enough examples for each of them to have some."""
    monkeypatch.setattr(fractals, "PARALLEL_FROM", parallel_from)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    builder = built(tmp_path, TINY, per_class=(20, 2, 1))
    builder.download_and_prepare()
    spec = builder.builder_config.spec
    for split in fractals.SPLITS:
        records = builder.as_data_source(split)
        rendered = fractals.render(spec, split, range(spec.num_examples(split)))
        assert len(records) == len(rendered["label"])
        for i, record in enumerate(records):
            assert record["id"] == i and record["label"] == rendered["label"][i]
            assert (record["image"] == rendered["image"][i]).all()
            assert (record["segmentation"][..., 0] == rendered["segmentation"][i]).all()


def test_what_goes_wrong_in_a_process_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(fractals, "PARALLEL_FROM", 0)
    builder = built(tmp_path, TINY)
    builder.builder_config.spec = dataclasses.replace(TINY, encoding="bmp")
    with pytest.raises(KeyError, match="bmp"):
        builder.download_and_prepare()


def test_data_are_complete_after_an_interruption_and_where_another_process_was_faster(
    tmp_path, monkeypatch
):
    encode = fractals._encode

    def fail_late(spec, split, start):
        if (split, start) == ("validation", 64):
            raise KeyboardInterrupt
        return encode(spec, split, start)

    def overtaken(spec, split, start):
        monkeypatch.setattr(fractals, "_encode", encode)
        fractals.prepare("tiny", str(tmp_path))
        return encode(spec, split, start)

    monkeypatch.setattr(fractals, "_encode", fail_late)
    with pytest.raises(KeyboardInterrupt):
        fractals.prepare("tiny", str(tmp_path))
    monkeypatch.setattr(fractals, "_encode", overtaken)
    builder = fractals.prepare("tiny", str(tmp_path))
    assert fractals.prepare("tiny", str(tmp_path)).data_path == builder.data_path
    assert [len(builder.as_data_source(x)) for x in fractals.SPLITS] == [240, 1200, 1200]


def test_jpeg_and_wide_labels_survive_the_record(tmp_path):
    builder = built(tmp_path, SMALL, num_classes=300, per_class=(1, 1, 1), encoding="jpeg")
    builder.download_and_prepare()
    record = builder.as_data_source("train")[299]
    rendered = fractals.render(builder.builder_config.spec, "train", [299])
    assert (record["segmentation"][..., 0] == rendered["segmentation"][0]).all()
    assert record["segmentation"].max() == 300
    assert np.abs(record["image"].astype(int) - rendered["image"][0]).mean() < 12


def test_errors_name_what_exists(tmp_path):
    with pytest.raises(ValueError, match=r"'huge'.*tiny, tiny_fresh, tiny_colour, small, base"):
        fractals.prepare("huge", str(tmp_path))
