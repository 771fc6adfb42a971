"""The schema of an experiment: frozen dataclasses with their ranges.

Derived values are properties, so that an override on the command line changes everything that
follows from it. `configdict.py` is the door between these and ml_collections.
"""

from supmim_jax.config.data import (
    IGNORED,
    ContrastiveCropConfig,
    DataConfig,
    MasksConfig,
    ProbeDataConfig,
)
from supmim_jax.config.experiment import (
    CheckpointConfig,
    Config,
    EvalConfig,
    FewShotConfig,
    HeadTrainingConfig,
    InitConfig,
    KNNConfig,
    LinearProbeConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
    ProbeConfig,
    RetrievalConfig,
    SegmentationConfig,
    WatchConfig,
    changed,
    debug,
)
from supmim_jax.config.fields import INF, within
from supmim_jax.config.model import (
    VARIANTS,
    DecoderConfig,
    PatchCodesConfig,
    PixelsConfig,
    TokensConfig,
    ViTConfig,
    VQGANConfig,
)
from supmim_jax.config.objective import (
    AdversarialConfig,
    ClassificationConfig,
    CMAEConfig,
    ContrastiveConfig,
    MAEConfig,
    PerceptualConfig,
    PositionConfig,
    SegmentationObjectiveConfig,
    SupervisedConfig,
    SupMIMConfig,
    VQGANObjectiveConfig,
)
