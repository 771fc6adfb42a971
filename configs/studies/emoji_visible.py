"""The form that costs least: three quarters of the patches dropped, not half of them embedded.

  python -m supmim_jax.study --study configs/studies/emoji_visible.py --out runs/visible --jobs 2

Hardware: 2 CPU cores. The `masked` form and its equal in compute are in
configs/studies/emoji_headline.py; `visible-longer` has as much compute as that form. Results:
docs/study.md.
"""

from configs.studies.emoji import SUPERVISED, SUPMIM, compared, supmim
from supmim_jax.study import Study, as_costly


def study() -> Study:
    visible = supmim(encoder_input="visible", mask_ratio=0.75)
    runs = {
        "supervised": SUPERVISED,
        "visible": visible,
        "supervised-longer": as_costly(SUPERVISED, visible),
        "visible-longer": as_costly(visible, SUPMIM),
    }
    return compared("SupMIM on visible patches, at equal epochs and compute.", runs, "test")
