"""Learning rates for the studies on emoji_designs, by the validation designer.

  python -m supmim_jax.study --study configs/studies/emoji_learning_rate.py --out runs/lr --jobs 2

Hardware: 2 CPU cores, an estimated hour. Both recipes get the same rates, half of the epochs of the
headline and one seed; each keeps its best. SupMIM at 8e-3 has not run.
"""

from configs.studies.emoji import SUPERVISED, SUPMIM
from supmim_jax import config as c
from supmim_jax.study import Study


def study() -> Study:
    runs = {}
    for rate in (1e-3, 2e-3, 4e-3, 8e-3):
        for name, recipe in (("supervised", SUPERVISED), ("supmim", SUPMIM)):
            optim = {"lr": rate, "warmup_epochs": 1}
            runs[f"{name}-lr{rate}"] = c.changed(recipe, epochs=10, optim=optim)
    return Study(
        question="Which learning rate suits each recipe?",
        runs=runs,
        baseline="supervised-lr0.002",
        seeds=(0,),
        probe=c.ProbeConfig(eval=c.EvalConfig(which=("top1", "knn"))),
        metrics={"top1": "top-1", "knn": "kNN"},
    )
