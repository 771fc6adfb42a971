"""What the page of a run is made of, one by one."""

import numpy as np
import pytest
from etils import epath

from supmim_jax.config import (
    Config,
    DataConfig,
    PatchCodesConfig,
    SupMIMConfig,
    VQGANObjectiveConfig,
)
from supmim_jax.errors import SetupError
from supmim_jax.report import files, markup, page
from supmim_jax.report import images as images_module
from supmim_jax.report.images import Segmented
from supmim_jax.report.markup import Markup, element


def test_only_markup_is_not_escaped():
    inner = element("b", "a < b")
    assert element("p", inner, "<", class_='"') == '<p class="&quot;"><b>a &lt; b</b>&lt;</p>'
    assert isinstance(inner, Markup) and not isinstance(inner + "<", Markup)


def test_components_are_those_of_the_covariance_with_fixed_signs():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 4, 8)) * np.arange(1, 9)
    rows = tokens.reshape(-1, 8) - tokens.reshape(-1, 8).mean(0)
    axes = np.linalg.eigh(rows.T @ rows)[1][:, :-4:-1]
    axes *= np.sign([axis[np.abs(axis).argmax()] for axis in axes.T])
    scores = rows @ axes
    scores = (scores - scores.min(0)) / (scores.max(0) - scores.min(0))
    found = images_module.components(tokens)
    np.testing.assert_allclose(found.reshape(-1, 3), 255 * scores, atol=0.51)
    assert np.array_equal(found, images_module.components(tokens.copy()))
    assert not images_module.components(np.ones((1, 2, 2, 8))).any()


def test_segmentation_is_drawn_from_arrays():
    masks = np.array([[[0, 1], [2, -1]]])
    images = np.full((1, 2, 2, 3), 100, np.uint8)
    found = Segmented(images, masks, np.array([[[0, 1], [1, 0]]]), ["ground", "<a>", "b"], "it")
    text = images_module.segmentation(found).content
    assert "67 % of pixels agree; &lt;a&gt;, b" in text and text.count("data:image/png") == 3
    drawn = images_module.overlaid(images, masks, 0)[0]
    assert (drawn[0, 0] == 100).all() and (drawn[1, 1] == 100).all()
    assert (drawn[0, 1] != drawn[1, 0]).any() and (drawn[0, 1] != 100).any()


def test_ticks_are_round_and_span_the_values_and_curves_keep_their_end():
    assert markup.ticks(0, 2400) == [0, 1000, 2000, 3000] and markup.ticks(5, 5) == [5]
    assert markup.ticks(-0.04, 0.33) == [-0.1, 0, 0.1, 0.2, 0.3, 0.4]
    points = [(i, float(i)) for i in range(1000)]
    assert len(markup.thinned(points)) <= 300 and markup.thinned(points)[-1] == points[-1]


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
    return [(path, name, usual) for path, rows in found for name, _, usual in rows if usual]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = epath.Path(tmp_path) / "report.html"
    files.write(path, "old")
    assert [x.name for x in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "report.html.part").mkdir()
    with pytest.raises(SetupError, match=r"report\.html cannot be written.*Choose another"):
        files.write(path, "new")
    assert path.read_text() == "old"
