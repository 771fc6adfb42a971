"""Two, four or all drawings of each class to learn from, in as many steps.

  python -m supmim_jax.study --study configs/studies/emoji_labels.py --out runs/labels --jobs 2

Hardware: 2 CPU cores. All drawings are in configs/studies/emoji_headline.py.
Results: docs/study.md.
"""

from configs.studies.emoji import COLOUR, SUPERVISED, SUPMIM, compared
from supmim_jax import config as c
from supmim_jax.study import Study, as_costly


def study() -> Study:
    runs = {}
    for drawings, examples in ((2, 1824), (4, 3648)):
        data = {"train_split": f"train_{drawings}", "train_examples": examples}
        epochs = SUPERVISED.epochs * SUPERVISED.data.train_examples / examples
        supervised, supmim, colour = (
            c.changed(run, epochs=epochs, data=data) for run in (SUPERVISED, SUPMIM, COLOUR)
        )
        runs |= {
            f"supervised-{drawings}": supervised,
            f"supmim-{drawings}": supmim,
            f"colour-{drawings}": colour,
            f"supervised-longer-{drawings}": as_costly(supervised, supmim),
        }
    question = "SupMIM and supervised, with fewer drawings of each class."
    return compared(question, runs, "test", shots=2)
