"""The evaluations of config.eval.which, and what each needs of the data.

Each takes the subject and gives its metrics in per cent, with what else is worth keeping. kNN, the
linear probe and few-shot learn from the training split; retrieval knows the evaluation split alone.
A tokenizer is judged by how well images come back from their tokens. `check` looks at the data
before a run's first step, so that no run ends in an evaluation that could never be made.
"""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from supmim_jax.batch import Encoder, Tokenizer
from supmim_jax.config import Config
from supmim_jax.data.decode import BrokenRecord
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.evals import features, few_shot, knn, linear_probe, retrieval, segmentation
from supmim_jax.evals.features import CannotEvaluate, Results, on_host

COUNTED = 20_000  # labels are counted in splits of so many records or fewer
GLANCE = 256  # records of which the label is read in any case
THREADS = 16
TRAINING = {"knn", "linear", "few_shot"}  # also learn from the training split


def check(dataset: Dataset, split: str) -> None:
    """Returns if nothing is known that an evaluation of `cfg` on `split` would fail by.

    No image is decoded. In a split of more than COUNTED records, whose labels would take long to
    read, a class may still have too few: then that evaluation alone fails.

    Raises:
      SetupError: a split is empty or has no labels or masks, or a class has too few examples.
    """
    cfg = dataset.cfg
    if cfg.objective.leaves == "tokenizer":
        return
    which = set(cfg.eval.which)
    if "segmentation" in which:
        dataset.records(cfg.data.train_split, masks=True)
    if not which - {"segmentation", "miou"}:
        return
    counts = _counts(dataset, split, "retrieval" in which)
    if counts is not None and counts.max() < 2:
        raise SetupError(
            f"config.eval.which has 'retrieval', but no two examples of {split!r} share a label: "
            f"there is nothing to find. Leave it out, or choose another config.data.eval_split."
        )
    if not which & TRAINING:
        return
    train, shots = cfg.data.train_split, cfg.eval.few_shot.shots
    counts = _counts(dataset, train, bool(which & {"linear", "few_shot"}))
    if "linear" in which and counts is not None and counts.max() < 2:
        raise SetupError(
            f"config.eval.which has 'linear', but no two examples of {train!r} share a label, and "
            f"none can be held out. Leave it out, or choose another config.data.train_split."
        )
    if "few_shot" not in which:
        return
    if counts is not None and counts.min() < shots:
        raise SetupError(
            f"config.eval.few_shot.shots is {shots}, but class {counts.argmin()} has "
            f"{counts.min()} examples in {train!r}. Set it to {counts.min()} or fewer, or leave "
            f"'few_shot' out of config.eval.which."
        )
    examples, classes = len(dataset.records(train)), cfg.data.num_classes
    if examples < shots * classes:
        raise SetupError(
            f"config.eval.few_shot.shots is {shots}, but {train!r} has {examples} examples of "
            f"{classes} classes. Set fewer, or leave 'few_shot' out of config.eval.which."
        )


def _counts(dataset: Dataset, split: str, wanted: bool) -> np.ndarray | None:
    """Examples of each class, if wanted and the split is small; some labels are looked at anyway.

    Raises:
      SetupError: the split is empty, or a label is no class.
    """
    cfg, source = dataset.cfg, dataset.records(split)
    whole = wanted and len(source) <= COUNTED

    def label(index: int) -> int | None:
        try:
            return int(source[index]["label"])
        except BrokenRecord:
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(label, range(len(source) if whole else min(len(source), GLANCE))))
    labels = np.array([x for x in found if x is not None], np.int64)
    classes = cfg.data.num_classes
    if not len(source) or (len(labels) and not 0 <= labels.min() <= labels.max() < classes):
        odd = f"a label {labels.min()} or {labels.max()}" if len(source) else "no examples"
        raise SetupError(
            f"{split!r} of {cfg.data.name!r} has {odd}; {', '.join(cfg.eval.which)} need labels "
            f"from 0 to {classes - 1}. Choose another config.data.eval_split or train_split."
        )
    return np.bincount(labels, minlength=classes) if whole else None


def reconstruction(
    tokenizer: Tokenizer, dataset: Dataset, split: str, mesh: Mesh
) -> dict[str, float]:
    """PSNR in dB (mean over images), per cent of the codes that occur, and perplexity on `split`.

    Reconstructions are clipped to the range of images and compared in 8 bits, as they would be
    saved. Perplexity is exp of the entropy of the codes' shares.
    """
    psnr, counts = [], np.zeros(tokenizer.num_codes, np.int64)
    for batch in dataset.eval(split, mesh):
        ids = tokenizer.encode(batch.views[0])
        images, ids, weight, again = on_host(
            (batch.views[0], ids, batch.weight, _uint8(tokenizer.decode(ids)))
        )
        error = images[weight > 0].astype(np.float64) - again[weight > 0]
        psnr.append(peak_signal_to_noise((error**2).mean((1, 2, 3))))
        counts += np.bincount(ids[weight > 0].ravel(), minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return {
        "psnr": float(np.concatenate(psnr).mean()),
        "codes_used": 100.0 * len(share) / len(counts),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


def peak_signal_to_noise(mse_N: np.ndarray) -> np.ndarray:
    """dB of mean squared errors of 8-bit images; at most 100, for images that are equal."""
    return 10.0 * np.log10(255.0**2 / np.maximum(mse_N, 255.0**2 * 1e-10))


@jax.jit
def _uint8(images) -> jax.Array:
    return jax.numpy.round((images.clip(-1.0, 1.0) + 1.0) * 127.5).astype("uint8")


def told(errors: dict[str, str], where: str) -> str:
    """What a command says at its end of evaluations that could not be made."""
    reasons = " ".join(f"{name}: {reason}" for name, reason in errors.items())
    return (
        f"{where} has all other results, but not {', '.join(errors)}. {reasons} The same command "
        f"measures again once the data or config.eval are changed."
    )


def run_all(model: Encoder | Tokenizer, dataset: Dataset, split: str, mesh: Mesh) -> Results:
    """What a run is judged by on `split`, with every example counted once, on any mesh.

    Raises:
      SetupError: the data are not what an evaluation of `config.eval.which` needs.
    """
    if dataset.cfg.objective.leaves == "tokenizer":
        return Results(reconstruction(model, dataset, split, mesh), {})
    return _measure(model, dataset, split, mesh)


@dataclass(frozen=True)
class Subject:
    """An encoder with the data to judge it by; features are extracted when first asked for."""

    encoder: Encoder
    dataset: Dataset
    split: str
    mesh: Mesh

    @property
    def cfg(self) -> Config:
        return self.dataset.cfg

    @functools.cached_property
    def train(self) -> features.Extracted:
        return self._extracted(self.cfg.data.train_split)

    @functools.cached_property
    def test(self) -> features.Extracted:
        return self._extracted(self.split)

    def _extracted(self, split: str) -> features.Extracted:
        return features.extract(self.encoder, self.dataset.eval(split, self.mesh))

    def masked(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens float16 NxHxWxD and masks NxYxX of classes or IGNORED, batch by batch."""
        batches = self.dataset.masked(split, self.mesh)
        for tokens, masks in features.extract_tokens(self.encoder, batches):
            if not np.isfinite(tokens).all():
                raise CannotEvaluate(f"Tokens of {split!r} have NaN or infinity. Has it diverged?")
            yield tokens, masks


def _measure(encoder: Encoder, dataset: Dataset, split: str, mesh: Mesh) -> Results:
    """All evaluations of `cfg.eval.which`; one that cannot be made leaves the others alone."""
    subject = Subject(encoder, dataset, split, mesh)
    metrics, details, errors = {}, {}, {}
    for name in dataset.cfg.eval.which:
        try:
            found = EVALUATIONS[name](subject)
        except CannotEvaluate as error:
            errors[name] = str(error)
            continue
        metrics |= found.metrics
        details |= {name: found.details} if found.details else {}
    return Results(metrics, details, errors)


def top1(subject: Subject) -> Results:
    """Nothing where the encoder has no classifier of these data."""
    test = subject.test
    if test.prediction is None:
        return Results({}, {})
    return Results({"top1": 100.0 * float((test.prediction == test.label).mean())}, {})


def nearest(subject: Subject) -> Results:
    cfg, train, test = subject.cfg.eval.knn, subject.train, subject.test
    report_k = min(cfg.report_k, len(train.label))
    ks = sorted({report_k, *(k for k in cfg.ks if k <= len(train.label))})
    similarity, index = knn.neighbours(test.pooled, train.pooled, ks[-1], mesh=subject.mesh)
    classes = subject.cfg.data.num_classes
    votes = knn.vote(similarity, train.label[index], ks, cfg.temperature, classes)
    right = {k: 100.0 * float((votes[k] == test.label).mean()) for k in ks}
    sweep = {f"knn/k={k}": right[k] for k in ks} if len(cfg.ks) > 1 else {}
    return Results({"knn": right[report_k], **sweep}, {"k": report_k, "bank": len(train.label)})


def retrieved(subject: Subject) -> Results:
    test, recalls = subject.test, subject.cfg.eval.retrieval.recalls
    options = {"leave_one_out": True, "recalls": recalls}
    k = retrieval.depth(test.label, test.label, **options)
    found = knn.neighbours(test.pooled, test.pooled, k, mesh=subject.mesh, leave_one_out=True)
    return Results(retrieval.score(found.index_QxK, test.label, test.label, **options), {})


def linear(subject: Subject) -> Results:
    cfg, train, test = subject.cfg.eval.linear, subject.train, subject.test
    found = linear_probe.evaluate(
        train.pooled,
        train.label,
        test.pooled,
        test.label,
        classes=subject.cfg.data.num_classes,
        strengths=cfg.strengths,
        held_out=cfg.held_out,
        seed=cfg.seed,
        mesh=subject.mesh,
    )
    held_out = {f"{c:g}": score for c, score in found.held_out.items()}
    details = {"c": found.c, "held_out": held_out, "gradient": found.probe.gradient}
    return Results({"linear": found.accuracy}, details)


def least_squares(subject: Subject) -> Results:
    cfg, train, test = subject.cfg.eval.few_shot, subject.train, subject.test
    found = few_shot.evaluate(
        train.pooled,
        train.label,
        test.pooled,
        test.label,
        classes=subject.cfg.data.num_classes,
        shots=cfg.shots,
        draws=cfg.draws,
        penalty=cfg.penalty,
        seed=cfg.seed,
    )
    return Results({"few_shot": found["mean"]}, {"std": found["std"]})


def own_masks(subject: Subject) -> Results:
    """Of the head that was trained with the encoder; nothing where there is none."""
    classes = subject.cfg.data.masks.num_classes
    matrix = np.zeros((classes, classes), np.int64)
    for batch in subject.dataset.masked(subject.split, subject.mesh):
        predicted = subject.encoder.features(batch.views[0]).masks
        if predicted is None:
            return Results({}, {})
        truth, predicted, weight = features.on_host((batch.masks, predicted, batch.weight))
        matrix += segmentation.count(truth[weight > 0], predicted[weight > 0], classes)
    score = segmentation.score(matrix)
    metrics = {"miou": score.miou, "pixel_accuracy": score.pixel_accuracy}
    return Results(metrics, {"iou": per_class(score)})


def segmented(subject: Subject) -> Results:
    """Each head learns from the first `max_examples`; all of the split is then read once."""
    cfg = subject.cfg.eval.segmentation
    segmenters, count = fitted(subject, cfg.heads)
    matrices = dict.fromkeys(cfg.heads, 0)
    for batch in subject.masked(subject.split):
        for head, segmenter in segmenters.items():
            matrices[head] += segmentation.confusions(
                segmenter, *batch, batch_size=cfg.training.batch_size
            )
    scores = {head: segmentation.score(matrix) for head, matrix in matrices.items()}
    metrics = {}
    for head, score in scores.items():
        metrics |= {f"miou/{head}": score.miou, f"pixel_accuracy/{head}": score.pixel_accuracy}
    iou = {head: per_class(score) for head, score in scores.items()}
    return Results(metrics, {"iou": iou, "trained_on": count})


def fitted(subject: Subject, names: Sequence[str]) -> tuple[dict[str, segmentation.Segmenter], int]:
    """Heads on frozen tokens by name, and how many training images they learned from."""
    cfg = subject.cfg.eval.segmentation
    training_split = subject.masked(subject.cfg.data.train_split)
    tokens, masks = features.first_rows(training_split, cfg.max_examples)
    segmenters = {
        head: segmentation.fit(
            tokens,
            masks,
            classes=subject.cfg.data.masks.num_classes,
            head=head,
            training=cfg.training,
            mesh=subject.mesh,
        )
        for head in names
    }
    return segmenters, len(masks)


def per_class(score: segmentation.Scores) -> list[float | None]:
    """IoU by class; None: neither the masks nor the predictions have the class."""
    return [None if np.isnan(x) else float(x) for x in score.iou_V]


EVALUATIONS = {
    "top1": top1,
    "miou": own_masks,
    "knn": nearest,
    "retrieval": retrieved,
    "linear": linear,
    "few_shot": least_squares,
    "segmentation": segmented,
}
