"""What the page of a run is made of, one by one."""

import numpy as np

from supmim_jax.config import (
    Config,
    DataConfig,
    PatchCodesConfig,
    SupMIMConfig,
    VQGANObjectiveConfig,
)
from supmim_jax.report import page
from supmim_jax.report.measure import Segmented


def test_components_are_those_of_the_covariance_with_fixed_signs():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 4, 8)) * np.arange(1, 9)
    rows = tokens.reshape(-1, 8) - tokens.reshape(-1, 8).mean(0)
    axes = np.linalg.eigh(rows.T @ rows)[1][:, :-4:-1]
    axes *= np.sign([axis[np.abs(axis).argmax()] for axis in axes.T])
    scores = rows @ axes
    scores = (scores - scores.min(0)) / (scores.max(0) - scores.min(0))
    found = page.components(tokens)
    np.testing.assert_allclose(found.reshape(-1, 3), 255 * scores, atol=0.51)
    assert np.array_equal(found, page.components(tokens.copy()))
    assert not page.components(np.ones((1, 2, 2, 8))).any()


def test_segmentation_is_drawn_from_arrays():
    masks = np.array([[[0, 1], [2, -1]]])
    images = np.full((1, 2, 2, 3), 100, np.uint8)
    found = Segmented(images, masks, np.array([[[0, 1], [1, 0]]]), ["ground", "<a>", "b"], "it")
    assert page.agreements(found, 0) == ["67 % of pixels agree; <a>, b"]
    drawn = page.overlaid(images, masks, 0)[0]
    assert (drawn[0, 0] == 100).all() and (drawn[1, 1] == 100).all()
    assert (drawn[0, 1] != drawn[1, 0]).any() and (drawn[0, 1] != 100).any()


def test_a_chart_is_the_same_each_time_and_shows_any_name():
    points = [(i, float(i)) for i in range(5)]
    for name in ("loss", "$\\frac$ <b>\x00\ud800"):
        first, again = (page.chart({name: points}, 3, dots=False) for _ in range(2))
        assert first == again and first.startswith("data:image/svg+xml;base64,")


def test_marked_values_are_those_that_differ_from_the_schema():
    data = DataConfig(data_dir="here", num_classes=30)
    target = PatchCodesConfig(codes=16)
    cfg = Config(batch_size=16, data=data, objective=SupMIMConfig(target=target))
    assert marked(cfg) == [
        ("config", "batch_size", "64"),
        ("config.data", "data_dir", "''"),
        ("config.objective.target", "codes", "64"),
    ]
    other = Config(
        objective=VQGANObjectiveConfig(l1_weight=1.0),
        data=DataConfig(image_size=32, eval_resize=32),
    )
    assert marked(other) == [
        ("config.data", "image_size", "20"),
        ("config.data", "eval_resize", "24"),
        ("config.objective", "name", "supmim"),
        ("config.objective", "l1_weight", "0.0"),
    ]
    assert marked(Config()) == []


def marked(cfg: Config) -> list[tuple[str, str, str]]:
    found = page.grouped(cfg, Config(), "config")
    return [
        (path, name, usual) for path, rows in found for name, _, usual in rows if usual is not None
    ]
