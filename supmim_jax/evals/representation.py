"""What frozen features are good for: the evaluations of `cfg.eval.which`, in its order.

Each takes the subject and gives its metrics in per cent, with what else is worth keeping. kNN, the
linear probe and few-shot learn from the training split; retrieval knows the evaluation split alone.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from supmim_jax.config import Config
from supmim_jax.data import pipeline
from supmim_jax.evals import confusion, features, few_shot, knn, linear_probe, retrieval
from supmim_jax.evals import segmentation as heads
from supmim_jax.evals.results import CannotEvaluate, Results
from supmim_jax.types import Encoder


@dataclass(frozen=True)
class Subject:
    """An encoder with the data to judge it by; features are extracted when first asked for."""

    encoder: Encoder
    cfg: Config
    split: str
    mesh: Mesh

    @functools.cached_property
    def train(self) -> features.Extracted:
        return self._extracted(self.cfg.data.train_split)

    @functools.cached_property
    def test(self) -> features.Extracted:
        return self._extracted(self.split)

    def _extracted(self, split: str) -> features.Extracted:
        return features.extract(self.encoder, pipeline.eval_dataset(self.cfg, split, self.mesh))

    def masked(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens float16 NxHxWxD and masks NxYxX of classes or IGNORED, batch by batch."""
        batches = pipeline.masked_dataset(self.cfg, split, self.mesh)
        for tokens, masks in features.extract_tokens(self.encoder, batches):
            if not np.isfinite(tokens).all():
                raise CannotEvaluate(f"Tokens of {split!r} have NaN or infinity. Has it diverged?")
            yield tokens, masks


def measure(encoder: Encoder, cfg: Config, split: str, mesh: Mesh) -> Results:
    """All evaluations of `cfg.eval.which`; one that cannot be made leaves the others alone."""
    subject = Subject(encoder, cfg, split, mesh)
    metrics, details, errors = {}, {}, {}
    for name in cfg.eval.which:
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
    for batch in pipeline.masked_dataset(subject.cfg, subject.split, subject.mesh):
        predicted = subject.encoder.features(batch.views[0]).masks
        if predicted is None:
            return Results({}, {})
        truth, predicted, weight = features.on_host((batch.masks, predicted, batch.weight))
        matrix += confusion.count(truth[weight > 0], predicted[weight > 0], classes)
    score = confusion.score(matrix)
    metrics = {"miou": score.miou, "pixel_accuracy": score.pixel_accuracy}
    return Results(metrics, {"iou": per_class(score)})


def segmented(subject: Subject) -> Results:
    """Each head learns from the first `max_examples`; all of the split is then read once."""
    cfg = subject.cfg.eval.segmentation
    segmenters, count = fitted(subject, cfg.heads)
    matrices = dict.fromkeys(cfg.heads, 0)
    for batch in subject.masked(subject.split):
        for head, segmenter in segmenters.items():
            matrices[head] += heads.confusions(
                segmenter, *batch, batch_size=cfg.training.batch_size
            )
    scores = {head: confusion.score(matrix) for head, matrix in matrices.items()}
    metrics = {}
    for head, score in scores.items():
        metrics |= {f"miou/{head}": score.miou, f"pixel_accuracy/{head}": score.pixel_accuracy}
    iou = {head: per_class(score) for head, score in scores.items()}
    return Results(metrics, {"iou": iou, "trained_on": count})


def fitted(subject: Subject, names: Sequence[str]) -> tuple[dict[str, heads.Segmenter], int]:
    """Heads on frozen tokens by name, and how many training images they learned from."""
    cfg = subject.cfg.eval.segmentation
    training_split = subject.masked(subject.cfg.data.train_split)
    tokens, masks = features.first_rows(training_split, cfg.max_examples)
    segmenters = {
        head: heads.fit(
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


def per_class(score: confusion.Scores) -> list[float | None]:
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
