"""The page of a run: what it shows, that it needs nothing else, and that it is safe to open."""

import base64
import dataclasses
import hashlib
import json
import math
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import save_initial
from etils import epath

from supmim_jax import encoder
from supmim_jax.checkpoint import Checkpoint, checksums
from supmim_jax.config import (
    CheckpointConfig,
    CMAEConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    HeadTrainingConfig,
    LogConfig,
    MasksConfig,
    PatchCodesConfig,
    SegmentationConfig,
    SegmentationObjectiveConfig,
    SupMIMConfig,
    ViTConfig,
    VQGANConfig,
    VQGANObjectiveConfig,
    changed,
)
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.report import page as pages
from supmim_jax.report.__main__ import gather, write
from supmim_jax.report.measure import Segmented, curves, environments, evaluations
from supmim_jax.report.page import overlaid, picture, render
from supmim_jax.train import train

HOSTILE = '<script>alert(1)</script>"><img src=http://evil.example/ onerror=alert(1)>'
QUICK = HeadTrainingConfig(steps=20)
MASKS, NO_MASKS = MasksConfig(field="segmentation"), MasksConfig()
VOID = {"img", "link", "meta"}
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """Elements of a document in order, as (name, attributes, text inside)."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)
        assert not self.open, "elements that are not closed"

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(self.found[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, texts in self.open:
            texts.append(data)

    def all(self, tag: str, class_: str = "") -> list[tuple[dict, str]]:
        return [
            (attributes, "".join(texts))
            for name, attributes, texts in self.found
            if name == tag and class_ in attributes.get("class", "")
        ]

    def sections(self) -> dict[str, str]:
        """Their texts by anchor, in order."""
        return {attributes["id"]: text for attributes, text in self.all("section")}

    def pictures(self) -> list[str]:
        """The images that are not charts."""
        found = [attributes["src"] for attributes, _ in self.all("img")]
        return [src for src in found if src.startswith("data:image/png")]


def config(data_dir: str, objective, masks=NO_MASKS, **evaluation) -> Config:
    data = DataConfig(data_dir=data_dir, train_split="train[:64]", train_examples=64, masks=masks)
    model = ViTConfig(width=16, depth=1, mlp_dim=32)
    evals = EvalConfig(batch_size=64, **evaluation)
    return Config(batch_size=16, data=data, model=model, objective=objective, eval=evals)


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory) -> Path:
    """A SupMIM run of 4 steps with its page, and a file of further evaluations."""
    decoder, target = DecoderConfig(width=16, mlp_dim=32), PatchCodesConfig(codes=16, fit_images=64)
    cfg = dataclasses.replace(
        config(
            data_dir,
            SupMIMConfig(decoder=decoder, target=target),
            MASKS,
            every=2,
            segmentation=SegmentationConfig(heads=("linear",), training=QUICK),
        ),
        log=LogConfig(every=1),
        checkpoint=CheckpointConfig(every=2),
    )
    workdir = tmp_path_factory.mktemp("runs") / "a run"
    train(cfg, workdir, devices=jax.devices()[:1])
    (workdir / "evals").mkdir()
    values = {"metrics": {"map@r": 12.345678}, "step": 4, "data": {"name": "d", "eval_split": "t"}}
    (workdir / "evals" / "probe-4.json").write_text(json.dumps(values))
    assert str(write(str(workdir))) == str(workdir / "report.html")
    return workdir


@pytest.fixture(scope="module")
def report(run):
    return gather(str(run))


@pytest.fixture(scope="module")
def html(run) -> str:
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(html, page):
    assert len(html) < 3_000_000 and not re.search(r"https?:|@import|url\(", html)
    for name, attributes, _ in page.found:
        assert name not in ("script", "iframe", "object", "base", "form", "use"), name
        assert not {key for key in attributes if key.startswith("on") or key == "style"}
        target = attributes.get("src", attributes.get("href", "#"))
        assert target.startswith("#" if name == "a" else ("data:", "#"))
    policies = [a["content"] for a, _ in page.all("meta") if "http-equiv" in a]
    digest = base64.b64encode(hashlib.sha256(page.all("style")[0][1].encode()).digest()).decode()
    assert policies == [
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    ]


def test_sections_are_there_and_can_be_reached_and_read(page):
    anchors = [a["href"].removeprefix("#") for a, _ in page.all("a")]
    assert anchors == list(page.sections())
    assert anchors == [
        *("curves", "evaluations", "neighbours", "predictions", "tokens", "segmentation"),
        *("config", "environment"),
    ]
    assert [text for _, text in page.all("h1")] == ["a run"]
    assert all(len(a["alt"]) > 5 for a, _ in page.all("img"))
    assert all(a["scope"] in ("row", "col") for a, _ in page.all("th"))
    assert all(text for a, text in page.all("caption")) and len(page.all("h3")) >= 6
    titles = [text for _, text in page.all("h3")]
    assert {"Loss and its terms", "Learning rate", "Images per second"} <= set(titles)


def test_the_numbers_are_those_of_the_files(run, page):
    results = json.loads((run / "results.json").read_text())
    values = [float(a["value"]) for a, _ in page.all("data")]
    top = [results["top1"], results["knn"]]
    assert values == [*top, *top, 12.345678]
    assert [text for _, text in page.all("data")] == [f"{value:.2f}" for value in values]
    rows = [text for _, text in page.all("tr")]
    assert f"map@r{12.345678:.2f}evals/probe-4.jsonstep 4, d, split t" in rows


def test_frames_of_neighbours_agree_with_a_plain_search(run, report, page, one_device):
    model = encoder.restore(Checkpoint.open(str(run)), one_device)
    splits = [next(Dataset(report.cfg).eval(s, one_device)) for s in ("validation", "train[:64]")]
    queries, bank = (np.asarray(model.features(x.views[0]).pooled, np.float64) for x in splits)
    queries, bank = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries[:8], bank))
    index = np.argsort(-(queries @ bank.T), axis=1)[:, :6]
    same = (index % 30 == np.arange(8)[:, None]).ravel()  # record i of fractals has class i % 30
    frames = [a["class"] for a, _ in page.all("div", "frame ")]
    frames = [name == "frame same" for name in frames if name != "frame query"]
    assert frames == same.tolist() and 0 < sum(frames) < 48
    signs = [text for a, text in page.all("span") if a["class"] in ("tick", "cross")]
    assert signs == ["✓" if x else "✗" for x in same]
    assert f"{same.sum()} of 48" in page.sections()["neighbours"]
    source = np.asarray(splits[1].views[0])
    shown = [a["src"] for a, _ in page.all("img") if a["alt"].startswith("neighbour, ")]
    assert shown == [picture(source[i])["uri"] for i in index.ravel()]


def test_whatever_comes_from_outside_is_text(run, html, tmp_path):
    """All that the report reads of a workdir, its name too; half characters and controls."""
    hostile = f"{HOSTILE}]]>&amp;'`\x00\x1b\ud800\u202e"
    name = HOSTILE.replace("/", "")
    workdir = shutil.copytree(run, tmp_path / name / "run@<svg onload=x>'\"")
    (step,) = [p for p in (workdir / "checkpoints").iterdir() if p.name == "4"]
    saved = json.loads((step / "config" / "metadata").read_text())
    saved["objective"]["target"]["path"] = ""
    saved["init"]["checkpoint"] = HOSTILE
    (step / "config" / "metadata").write_text(json.dumps(saved))
    checksums.write(epath.Path(step))  # whoever writes the one can write the other
    (workdir / "config.json").write_text(json.dumps(saved))
    parts = json.loads((workdir / "environment.json").read_text())
    parts = [{**parts[0], hostile: hostile, **dict.fromkeys(list(parts[0])[:4], hostile)}, *parts]
    (workdir / "environment.json").write_text(json.dumps(parts))
    lines = [{"step": i, hostile: i, f"eval/{hostile}": 2.0, "loss": math.nan} for i in range(3)]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    results = {"split": hostile, "top1": 1.0, hostile: 1e300, "knn": -math.inf}
    (workdir / "results.json").write_text(json.dumps(results))
    values = {"metrics": {hostile: 1}, "step": hostile, "data": {"name": hostile}}
    (workdir / "evals" / f"{name}.json").write_text(json.dumps(values))

    report = gather(f"{epath.Path(workdir)}@4")
    page = Page(
        render(
            dataclasses.replace(
                report,
                cfg=changed(report.cfg, data={"data_dir": HOSTILE, "name": HOSTILE}),
                split=HOSTILE,
                made_on={key: HOSTILE for key in report.made_on},
                measured=report.measured._replace(classes=[HOSTILE] * 30),
            )
        )
    )
    tags = {tag for tag, _, _ in Page(html).found}
    for tag, attributes, _ in page.found:
        assert tag in tags and not {x for x in attributes if x.startswith("on")}
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith(("#", "data:"))
    assert len(page.all("style")) == 1 and not page.all("script")
    assert len(page.pictures()) == len(Page(html).pictures())
    shown = hostile.replace("\x00\x1b\ud800", "\ufffd" * 3)
    text = page.all("body")[0][1]
    assert text.count(shown) >= 8 and name in text
    assert page.all("h1")[0][1] == workdir.name and HOSTILE in [x for _, x in page.all("mark")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"step": 1}\n' + 200_000 * "[" + '\n{"step": 2}\n'),
        ("metrics.jsonl", '{"step": 1' + 400 * "0" + ', "loss": 1}\n{"step": 2}\n'),
        ("metrics.jsonl", b"\xff\xfe\n{}"),
        ("results.json", 200_000 * "["),
        ("results.json", '{"top1": 1' + 400 * "0" + "}"),
        ("environment.json", '[{"from_step": [], "x": 1}]'),
    ],
)
def test_a_file_that_no_run_wrote_is_refused(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SetupError, match=f"{name} cannot be (used|read)"):
        for read in (curves, evaluations, environments):
            read(epath.Path(tmp_path))


def test_a_tokenizer_run_has_its_reconstructions(data_dir, tmp_path):
    tokenizer = VQGANConfig(
        filters=4, multipliers=(1, 1, 1), res_blocks=1, groups=2, codes=8, code_dim=4
    )
    cfg = config(data_dir, VQGANObjectiveConfig(tokenizer=tokenizer))
    cfg = dataclasses.replace(cfg, batch_size=64, eval=EvalConfig())
    train(cfg, tmp_path, devices=jax.devices()[:1])
    page = Page(Path(write(str(tmp_path), out=str(tmp_path / "x.html"))).read_text())
    expected = ["curves", "evaluations", "predictions", "config", "environment"]
    assert list(page.sections()) == expected
    psnr = json.loads((tmp_path / "results.json").read_text())["psnr"]
    assert float(page.all("data")[0][0]["value"]) == psnr and len(page.pictures()) == 16


def test_a_run_of_cmae_has_its_reconstructions_and_the_curves_of_its_terms(data_dir, tmp_path):
    workdir = Path(save_initial(config(data_dir, CMAEConfig(), which=("knn",)), tmp_path / "run"))
    terms = ("loss", "reconstruction", "position", "contrastive")
    shares = ("position_accuracy", "contrastive_accuracy")
    lines = [{"step": i, **dict.fromkeys((*terms, *shares), 0.1 + i)} for i in (0, 1)]
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    report = gather(str(workdir))
    page = Page(render(report))
    assert list(page.sections()) == [
        *("curves", "evaluations", "neighbours", "predictions", "tokens", "config", "environment")
    ]
    titles = [text for _, text in page.all("h3")]
    assert titles == ["Loss and its terms", "Accuracy on training batches, share"]
    assert list(report.measured.panels) == ["image", "masked", "reconstruction"]
    assert (report.measured.panels["image"] == report.measured.examples.images).all()
    assert "tokens" not in page.sections()["predictions"]


def test_a_run_on_masks_shows_what_its_own_head_predicts(data_dir, one_device, tmp_path):
    """Every picture of a prediction is the class that the restored model names, over the image."""
    cfg = config(data_dir, SegmentationObjectiveConfig(head="linear"), MASKS, which=("miou",))
    train(cfg, tmp_path, devices=jax.devices()[:1])
    report = gather(str(tmp_path))
    page = Page(render(report))
    assert list(page.sections()) == [
        *("curves", "evaluations", "tokens", "segmentation", "config", "environment")
    ]
    found = report.measured.segmented
    model = encoder.restore(Checkpoint.open(str(tmp_path)), one_device)
    batch = next(Dataset(cfg).masked("validation", one_device))
    predicted = np.asarray(model.features(batch.views[0]).masks)[:8]
    assert (found.predictions == predicted).all() and len(found.masks) == 8
    assert (found.masks == np.asarray(batch.masks)[:8]).all()
    assert found.head in page.sections()["segmentation"]
    for image, mask in zip(found.images, predicted, strict=True):
        assert picture(overlaid(image[None], mask[None], 0)[0])["uri"] in page.pictures()


def test_what_is_missing_or_broken_is_refused_and_the_page_left_as_it_was(run, html, tmp_path):
    with pytest.raises(SetupError, match=str(tmp_path)):
        write(str(tmp_path))
    with pytest.raises(SetupError, match=r"--out .*none"):
        write(str(run), out=str(tmp_path / "none" / "report.html"))
    assert list(tmp_path.iterdir()) == []
    copy = shutil.copytree(run, tmp_path / "run")
    for name, text in (
        ("metrics.jsonl", '{"step": 1}\n{"loss": 2}\n{"step": 2}\n'),
        ("results.json", '{"top1": "good"}'),
        ("evals/probe-4.json", "[]"),
        ("environment.json", "{}"),
    ):
        before = (copy / name).read_text()
        (copy / name).write_text(text)
        with pytest.raises(SetupError, match=name):
            write(str(copy))
        (copy / name).write_text(before)
    assert (copy / "report.html").read_text() == html and not list(copy.glob("*.part"))
    (copy / "report.html.part").mkdir()
    with pytest.raises(SetupError, match=r"report\.html cannot be written"):
        write(str(copy))
    assert (copy / "report.html").read_text() == html


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_a_browser_has_nothing_to_complain_about_and_a_phone_nothing_to_scroll(html, tmp_path):
    def chromium(text: str, *arguments: str) -> subprocess.CompletedProcess:
        (tmp_path / "page.html").write_text(text)
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
        command = (CHROMIUM, *options, f"--user-data-dir={tmp_path}/profile", *arguments)
        page = (tmp_path / "page.html").as_uri()
        return subprocess.run((*command, page), capture_output=True, text=True, timeout=120)

    shot = ("--window-size=390,844", f"--screenshot={tmp_path}/shot.png")
    out = chromium(html, *shot)
    assert out.returncode == 0 and (tmp_path / "shot.png").stat().st_size > 10_000
    assert "CONSOLE" not in out.stderr, out.stderr
    assert "CONSOLE" in chromium(html.replace("</main>", "<script>1</script></main>"), *shot).stderr
    measure = "<script>parent.document.title = document.documentElement.scrollWidth</script></main>"
    free = re.sub("<meta http-equiv[^>]*>", "", html).replace("</main>", measure)
    phone = f'<title></title><iframe width=360 srcdoc="{escape(free)}"></iframe>'
    assert "<title>360</title>" in chromium(phone, "--hide-scrollbars", "--dump-dom").stdout


# --- what the page is made of, one by one


def test_components_are_those_of_the_covariance_with_fixed_signs():
    tokens = np.random.default_rng(0).normal(size=(2, 3, 4, 8)) * np.arange(1, 9)
    rows = tokens.reshape(-1, 8) - tokens.reshape(-1, 8).mean(0)
    axes = np.linalg.eigh(rows.T @ rows)[1][:, :-4:-1]
    axes *= np.sign([axis[np.abs(axis).argmax()] for axis in axes.T])
    scores = rows @ axes
    scores = (scores - scores.min(0)) / (scores.max(0) - scores.min(0))
    found = pages.components(tokens)
    np.testing.assert_allclose(found.reshape(-1, 3), 255 * scores, atol=0.51)
    assert np.array_equal(found, pages.components(tokens.copy()))
    assert not pages.components(np.ones((1, 2, 2, 8))).any()


def test_segmentation_is_drawn_from_arrays():
    masks = np.array([[[0, 1], [2, -1]]])
    images = np.full((1, 2, 2, 3), 100, np.uint8)
    found = Segmented(images, masks, np.array([[[0, 1], [1, 0]]]), ["ground", "<a>", "b"], "it")
    assert pages.agreements(found, 0) == ["67 % of pixels agree; <a>, b"]
    drawn = pages.overlaid(images, masks, 0)[0]
    assert (drawn[0, 0] == 100).all() and (drawn[1, 1] == 100).all()
    assert (drawn[0, 1] != drawn[1, 0]).any() and (drawn[0, 1] != 100).any()


def test_a_chart_is_the_same_each_time_and_shows_any_name():
    points = [(i, float(i)) for i in range(5)]
    for name in ("loss", "$\\frac$ <b>\x00\ud800"):
        first, again = (pages.chart({name: points}, 3, dots=False) for _ in range(2))
        assert first == again and first.startswith("data:image/svg+xml;base64,")


def marked(cfg: Config) -> list[tuple[str, str, str]]:
    found = pages.grouped(cfg, Config(), "config")
    return [
        (path, name, usual) for path, rows in found for name, _, usual in rows if usual is not None
    ]


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
