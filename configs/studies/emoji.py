"""What the studies on emoji_designs share: recipes, the learning rate of each, how they are judged.

This file is no study. The learning rates are those of configs/studies/emoji_learning_rate.py.
SUPMIM predicts codes of luminance, as in all studies before that of the targets, and COLOUR codes
of colour.
"""

from configs import emoji_supervised, emoji_supmim
from supmim_jax import config as c
from supmim_jax.study import Study

SUPERVISED = emoji_supervised.experiment()
COLOUR = emoji_supmim.experiment()
SUPMIM = c.changed(COLOUR, objective={"target": {"normalize": "luminance"}})


def compared(
    question: str, runs: dict[str, c.Config], split: str, seeds: int = 3, shots: int = 4
) -> Study:
    """A study whose first run is the baseline, judged on a split that training has not seen.

    One neighbour among the training drawings is Recall@1 between designers. Some classes have no
    more than four training drawings, hence at most four shots. The penalty of the linear probe is
    fixed, not chosen: with 912 classes a fit with a weaker one takes minutes.
    """
    evaluations = c.EvalConfig(
        which=("top1", "knn", "linear", "few_shot"),
        knn=c.KNNConfig(ks=(1, 20)),
        linear=c.LinearProbeConfig(strengths=(1e-2,)),
        few_shot=c.FewShotConfig(shots=shots),
    )
    probe = c.ProbeConfig(data=c.ProbeDataConfig(eval_split=split), eval=evaluations)
    metrics = {"top1": "top-1", "knn": "kNN", "knn/k=1": "Recall@1", "linear": "linear"}
    metrics |= {"few_shot": f"{shots}-shot"}
    return Study(question, runs, next(iter(runs)), tuple(range(seeds)), probe, metrics)


def supmim(**objective) -> c.Config:
    """The SupMIM run with these fields of its objective."""
    return c.changed(SUPMIM, objective=objective)
