"""The evaluations of config.eval.which, and what each of them needs of the data.

Each returns its metrics in per cent, and whatever else is worth keeping. kNN, the linear probe and
few-shot learn from the training split; retrieval uses only the evaluation split. A tokenizer is
judged by how well images are reconstructed from their tokens. `check` looks at the data before a
run's first step, so that no run ends in an evaluation that was impossible from the start.
"""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from supmim_jax.batch import Encoder, Tokenizer
from supmim_jax.config import EvalConfig
from supmim_jax.data.decode import BrokenRecord
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.evals import features, knn, linear_probe, segmentation
from supmim_jax.evals.features import CannotEvaluate, Results, on_host

COUNTED = 20_000  # labels are counted in splits of so many records or fewer
GLANCE = 256  # records of which the label is read in any case
THREADS = 16
TRAINING = {"knn", "linear", "few_shot"}  # also learn from the training split


def check(dataset: Dataset, split: str) -> None:
    """Returns if nothing is known that an evaluation on `split` would fail by.

    No image is decoded. In a split of more than COUNTED records, whose labels would take long to
    read, a class may still have too few: then that evaluation alone fails.

    Raises:
      SetupError: a split is empty or has no labels or masks, or a class has too few examples.
    """
    cfg, which = dataset.cfg, set(dataset.cfg.eval.which)
    if cfg.objective.leaves == "tokenizer":
        return
    train, shots = cfg.data.train_split, cfg.eval.few_shot.shots
    if "segmentation" in which:
        dataset.records(train, "mask")
    whole = {}  # by split, which may be one: whether all its labels are wanted
    if which - {"segmentation", "miou"}:
        whole[split] = "retrieval" in which
    if which & TRAINING:
        whole[train] = whole.get(train, False) or bool(which & {"linear", "few_shot"})
    counts_V = {name: _counts(dataset, name, wanted) for name, wanted in whole.items()}
    for name, searched in (("retrieval", split), ("linear", train)):
        if name in which and counts_V[searched] is not None and counts_V[searched].max() < 2:
            raise SetupError(
                f"config.eval.which has {name!r}, but no two examples of {searched!r} share a "
                f"label. Leave it out, or choose another split in config.data."
            )
    if "few_shot" not in which:
        return
    classes, examples = cfg.data.num_classes, len(dataset.records(train))
    counted_V = counts_V[train]
    if counted_V is not None:
        enough = counted_V.min() >= shots
        found = f"class {counted_V.argmin()} has {counted_V.min()} examples"
    else:
        enough, found = examples >= shots * classes, f"there are {examples} examples of {classes}"
    if not enough:
        raise SetupError(
            f"config.eval.few_shot.shots is {shots}, but {found} in {train!r}. Lower it, or leave "
            f"'few_shot' out of config.eval.which."
        )


def _counts(dataset: Dataset, split: str, wanted: bool) -> np.ndarray | None:
    """Examples of each class, if wanted and the split is small; some labels are read anyway."""
    cfg, source, classes = dataset.cfg, dataset.records(split), dataset.cfg.data.num_classes
    whole = wanted and len(source) <= COUNTED

    def label(index: int) -> int | None:
        try:
            return int(source[index]["label"])
        except BrokenRecord:
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(label, range(len(source) if whole else min(len(source), GLANCE))))
    labels = np.array([x for x in found if x is not None], np.int64)
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
    """Mean PSNR of the images in dB, per cent of the codes that occur, and perplexity on `split`.

    The PSNR of an image is at most 100. Reconstructions are clipped to the range of images and
    compared in 8 bits, as they would be saved. Perplexity is exp of the entropy of the codes'
    shares.
    """
    psnr, counts = [], np.zeros(tokenizer.num_codes, np.int64)
    for batch in dataset.eval(split, mesh):
        ids = tokenizer.encode(batch.views[0])
        images, ids, weight, again = on_host(
            (batch.views[0], ids, batch.weight, _uint8(tokenizer.decode(ids)))
        )
        error = images[weight > 0].astype(np.float64) - again[weight > 0]
        mse = (error**2).mean((1, 2, 3))
        psnr.append(10.0 * np.log10(255.0**2 / np.maximum(mse, 255.0**2 * 1e-10)))
        counts += np.bincount(ids[weight > 0].ravel(), minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return {
        "psnr": float(np.concatenate(psnr).mean()),
        "codes_used": 100.0 * len(share) / len(counts),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }


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


@dataclass(frozen=True)
class Subject:
    """An encoder with the data to judge it by; features are extracted when first asked for."""

    encoder: Encoder
    dataset: Dataset
    split: str
    mesh: Mesh

    @property
    def eval(self) -> EvalConfig:
        return self.dataset.cfg.eval

    @property
    def classes(self) -> int:
        return self.dataset.cfg.data.num_classes

    @functools.cached_property
    def train(self) -> features.Extracted:
        return self._extracted(self.dataset.cfg.data.train_split)

    @functools.cached_property
    def test(self) -> features.Extracted:
        return self._extracted(self.split)

    def _extracted(self, split: str) -> features.Extracted:
        found = features.extract(self.encoder, self.dataset.eval(split, self.mesh))
        low, high = found.label.min(), found.label.max()
        if low < 0 or high >= self.classes:
            raise CannotEvaluate(f"{split!r} has labels {low} to {high} of {self.classes} classes.")
        return found

    def masked(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens float16 NxHxWxD and masks NxYxX of classes or IGNORED, batch by batch.

        The tokens of an image are 256 times its pooled features.
        """
        for batch in self.dataset.masked(split, self.mesh):
            tokens = self.encoder.features(batch.views[0]).tokens
            tokens, masks, weight = on_host((tokens, batch.masks, batch.weight))
            tokens = tokens[weight > 0].astype(np.float16)
            if not np.isfinite(tokens).all():
                raise CannotEvaluate(f"Tokens of {split!r} have NaN or infinity. Has it diverged?")
            yield tokens, masks[weight > 0]


def run_all(model: Encoder | Tokenizer, dataset: Dataset, split: str, mesh: Mesh) -> Results:
    """What a run is judged by on `split`, with every example counted once, on any mesh.

    An evaluation of `config.eval.which` that cannot be made leaves the others alone.
    """
    if dataset.cfg.objective.leaves == "tokenizer":
        return Results(reconstruction(model, dataset, split, mesh), {})
    subject = Subject(model, dataset, split, mesh)
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
    cfg, train, test = subject.eval.knn, subject.train, subject.test
    bank = len(train.label)
    report_k = min(cfg.report_k, bank)
    ks = sorted({report_k, *(k for k in cfg.ks if k <= bank)})
    similarity, index = knn.neighbours(test.pooled, train.pooled, ks[-1], mesh=subject.mesh)
    votes = knn.vote(similarity, train.label[index], ks, cfg.temperature, subject.classes)
    right = {k: 100.0 * float((votes[k] == test.label).mean()) for k in ks}
    sweep = {f"knn/k={k}": right[k] for k in ks} if len(cfg.ks) > 1 else {}
    return Results({"knn": right[report_k], **sweep}, {"k": report_k, "bank": bank})


def retrieved(subject: Subject) -> Results:
    test, recalls = subject.test, subject.eval.retrieval.recalls
    k = knn.retrieval_depth(test.label, recalls)
    found = knn.neighbours(test.pooled, test.pooled, k, mesh=subject.mesh, leave_one_out=True)
    return Results(knn.recall_and_map(found.index_QxK, test.label, recalls), {})


def linear(subject: Subject) -> Results:
    cfg, train, test = subject.eval.linear, subject.train, subject.test
    found = linear_probe.evaluate(train, test, subject.classes, cfg, subject.mesh)
    held_out = {f"{c:g}": score for c, score in found.held_out.items()}
    details = {"c": found.c, "held_out": held_out, "gradient": found.probe.gradient}
    return Results({"linear": found.accuracy}, details)


def few_shot(subject: Subject) -> Results:
    cfg, train, test = subject.eval.few_shot, subject.train, subject.test
    mean, std = linear_probe.few_shot(train, test, subject.classes, cfg)
    return Results({"few_shot": mean}, {"std": std})


def own_masks(subject: Subject) -> Results:
    """Of the head that was trained with the encoder; nothing where there is none."""
    classes = subject.dataset.cfg.data.masks.num_classes
    matrix = np.zeros((classes, classes), np.int64)
    for batch in subject.dataset.masked(subject.split, subject.mesh):
        predicted = subject.encoder.features(batch.views[0]).masks
        if predicted is None:
            return Results({}, {})
        truth, predicted, weight = on_host((batch.masks, predicted, batch.weight))
        matrix += segmentation.count(truth[weight > 0], predicted[weight > 0], classes)
    miou, pixel_accuracy, iou = segmentation.score(matrix)
    return Results({"miou": miou, "pixel_accuracy": pixel_accuracy}, {"iou": iou})


def segmented(subject: Subject) -> Results:
    """Each head learns from the first `max_examples`; all of the split is then read once."""
    cfg = subject.eval.segmentation
    segmenters, count = fitted(subject, cfg.heads)
    size, classes = cfg.training.batch_size, subject.dataset.cfg.data.masks.num_classes
    matrices = dict.fromkeys(cfg.heads, 0)
    for tokens, masks in subject.masked(subject.split):
        for head, segmenter in segmenters.items():
            predicted = segmentation.predict(segmenter, tokens, masks.shape[1:], size)
            matrices[head] += segmentation.count(masks, predicted, classes)
    metrics, iou = {}, {}
    for head, matrix in matrices.items():
        scores = segmentation.score(matrix)
        metrics |= {f"miou/{head}": scores.miou, f"pixel_accuracy/{head}": scores.pixel_accuracy}
        iou[head] = scores.iou
    return Results(metrics, {"iou": iou, "trained_on": count})


def fitted(subject: Subject, names: Sequence[str]) -> tuple[dict[str, segmentation.Segmenter], int]:
    """Heads on frozen tokens by name, and how many training images they learned from."""
    cfg, data, kept, count = subject.eval.segmentation, subject.dataset.cfg.data, [], 0
    for batch in subject.masked(data.train_split):
        kept.append(batch)
        count += len(batch[0])
        if count >= cfg.max_examples:
            break
    tokens, masks = (np.concatenate(parts)[: cfg.max_examples] for parts in zip(*kept))
    options = {"classes": data.masks.num_classes, "training": cfg.training, "mesh": subject.mesh}
    heads = {head: segmentation.fit(tokens, masks, head=head, **options) for head in names}
    return heads, len(masks)


EVALUATIONS = {
    "top1": top1,
    "miou": own_masks,
    "knn": nearest,
    "retrieval": retrieved,
    "linear": linear,
    "few_shot": few_shot,
    "segmentation": segmented,
}
