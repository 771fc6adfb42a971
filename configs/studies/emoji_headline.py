"""Does masked modelling help on drawings by designers whom training has not seen?

  python -m supmim_jax.study --study configs/studies/emoji_headline.py --out runs/emoji --jobs 2

Hardware: 2 CPU cores. Results, and the time of a cell: docs/study.md.
"""

from configs.studies.emoji import SUPERVISED, SUPMIM, compared
from supmim_jax.study import Study, as_costly


def study() -> Study:
    runs = {
        "supervised": SUPERVISED,
        "supmim": SUPMIM,
        "supervised-longer": as_costly(SUPERVISED, SUPMIM),
    }
    question = "Supervised against SupMIM, at equal epochs and at equal compute."
    return compared(question, runs, "test", seeds=5)
