"""What encoders are judged by, in training (EvalConfig) and by `probe` (ProbeConfig)."""

from dataclasses import dataclass
from typing import Literal

from supmim_jax.config.data import ProbeDataConfig
from supmim_jax.config.fields import INF, within
from supmim_jax.config.training import MeshConfig
from supmim_jax.errors import ConfigError

# `top1` and `miou` ask the run's own heads; the others see frozen features.
Evaluation = Literal["top1", "miou", "knn", "retrieval", "linear", "few_shot", "segmentation"]


@dataclass(frozen=True)
class KNNConfig:
    """Votes of the nearest training images; more ks than are there to vote are left out."""

    ks: tuple[int, ...] = within((20,), 1, INF)  # if several, each is reported as `knn/k=<k>`
    report_k: int = within(20, 1, INF)  # reported as `knn`; at most the training images
    temperature: float = within(0.07, 1e-6, INF)  # a neighbour's vote is exp(cosine / temperature)


@dataclass(frozen=True)
class RetrievalConfig:
    """Each image of the evaluation split searches the others of it."""

    recalls: tuple[int, ...] = within((1, 10, 100), 1, INF)


@dataclass(frozen=True)
class LinearProbeConfig:
    """Logistic regression; its strength is chosen on a held-out part of the training split."""

    strengths: tuple[float, ...] = within(  # scikit-learn's C: a small one is a strong penalty
        (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0), 1e-12, 1e12
    )
    held_out: float = within(0.2, 0.01, 0.5)
    seed: int = within(0, 0, 2**31 - 1)


@dataclass(frozen=True)
class FewShotConfig:
    """Least squares on a few images of each class, as in big_vision; the mean over draws."""

    shots: int = within(10, 1, INF)
    draws: int = within(5, 1, INF)
    penalty: float = within(1024.0, 1e-12, INF)
    seed: int = within(0, 0, 2**31 - 1)


@dataclass(frozen=True)
class HeadTrainingConfig:
    """AdamW with decay on matrices only; warm-up over a tenth of the steps, cosine to zero."""

    steps: int = within(600, 1, INF)
    batch_size: int = within(32, 1, INF)
    learning_rate: float = within(3e-3, 0.0, INF)
    weight_decay: float = within(1e-4, 0.0, INF)
    seed: int = within(0, 0, 2**31 - 1)


@dataclass(frozen=True)
class SegmentationConfig:
    """Heads on frozen tokens, learning from the masks of the data section."""

    heads: tuple[Literal["linear", "conv"], ...] = ("linear", "conv")
    # First images of the training split that the heads learn from. Their tokens stay in the host's
    # memory as float16: 0.4 MB an image for ViT-B/14 at 224 pixels.
    max_examples: int = within(20_000, 1, INF)
    training: HeadTrainingConfig = HeadTrainingConfig()


@dataclass(frozen=True)
class EvalConfig:
    every: int = within(0, 0, INF)  # steps; 0 evaluates at the end only
    batch_size: int = within(256, 1, INF)
    which: tuple[Evaluation, ...] = ("top1", "knn")  # the others take a while: see configs/probes
    knn: KNNConfig = KNNConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    linear: LinearProbeConfig = LinearProbeConfig()
    few_shot: FewShotConfig = FewShotConfig()
    segmentation: SegmentationConfig = SegmentationConfig()

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `which` may give, by name; more is better of each."""
        ks = sorted({*self.knn.ks, self.knn.report_k}) if len(self.knn.ks) > 1 else []
        names = {
            "top1": ["top1"],
            "miou": ["miou", "pixel_accuracy"],
            "knn": ["knn", *(f"knn/k={k}" for k in ks)],
            "retrieval": [*(f"recall@{k}" for k in self.retrieval.recalls), "map@r"],
            "linear": ["linear"],
            "few_shot": ["few_shot"],
            "segmentation": [
                f"{name}/{head}"
                for head in self.segmentation.heads
                for name in ("miou", "pixel_accuracy")
            ],
        }
        return tuple(name for evaluation in self.which for name in names[evaluation])


@dataclass(frozen=True)
class ProbeConfig:
    """What to measure trained encoders by. The encoder itself is that of its own run's config."""

    data: ProbeDataConfig = ProbeDataConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.eval.every:
            raise ConfigError(f"eval.every is {self.eval.every}; only training evaluates again.")
