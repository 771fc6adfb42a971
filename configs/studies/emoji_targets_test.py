"""The targets of configs/studies/emoji_targets.py on the test designers, beside supervised runs.

  python -m supmim_jax.train --config configs/vqgan_emoji.py --workdir runs/vqgan_emoji
  python -m supmim_jax.study --study configs/studies/emoji_targets_test.py --out runs/targets_test \
      --jobs 2

Hardware: 2 CPU cores. Its runs are those of that file and of configs/studies/emoji_headline.py.
Where their workdirs are copied to --out, they are probed and not trained again. Pixels and VQGAN
have run with three seeds. Results: docs/study.md.
"""

from configs.studies import emoji_targets
from configs.studies.emoji import SUPERVISED, SUPMIM, compared
from supmim_jax.study import Study, as_costly


def study() -> Study:
    runs = {"supervised": SUPERVISED, "supervised-longer": as_costly(SUPERVISED, SUPMIM)}
    runs |= emoji_targets.study().runs
    question = "Targets of the masked patches, beside supervised runs."
    return compared(question, runs, "test", seeds=5)
