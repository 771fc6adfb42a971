"""Does masked modelling help on drawings by designers whom training has not seen?

  python -m supmim_jax.study --study configs/studies/emoji_headline.py --out runs/emoji --jobs 2

Hardware: 2 CPU cores, hours. Judged on the three designers of the test split; values that differ
from the configs' own were chosen on the validation designer.
"""

from configs import emoji_supervised, emoji_supmim
from supmim_jax import config as c
from supmim_jax.study import Study


def study() -> Study:
    supervised, supmim = emoji_supervised.experiment(), emoji_supmim.experiment()
    return Study(
        question="Supervised against SupMIM, at equal epochs and at equal compute.",
        runs={
            "supervised": supervised,
            "supmim": supmim,
            "supervised-longer": c.changed(supervised, epochs=2.1 * supervised.epochs),
        },
        baseline="supervised",
        seeds=(0, 1, 2, 3, 4),
        probe=c.ProbeConfig(
            data=c.ProbeDataConfig(eval_split="test"),
            eval=c.EvalConfig(
                which=("top1", "knn", "linear"),
                knn=c.KNNConfig(ks=(1, 20)),  # one neighbour: Recall@1 between designers
            ),
        ),
        metrics={"top1": "top-1", "knn": "kNN", "knn/k=1": "Recall@1", "linear": "linear"},
    )
