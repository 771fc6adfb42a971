"""Learning rates for the studies on emoji_designs, by the validation designer.

  python -m supmim_jax.study --study configs/studies/emoji_learning_rate.py --out runs/lr --jobs 2

Hardware: 2 CPU cores, half an hour. Both recipes get the same three rates, half of the epochs of
the headline and one seed; each keeps its best.
"""

from configs import emoji_supervised, emoji_supmim
from supmim_jax import config as c
from supmim_jax.study import Study

RATES = (1e-3, 2e-3, 4e-3)


def study() -> Study:
    recipes = {"supervised": emoji_supervised, "supmim": emoji_supmim}
    return Study(
        question="Which learning rate suits each recipe?",
        runs={
            f"{name}-lr{rate}": c.changed(recipe.experiment(), epochs=10, optim={"lr": rate})
            for rate in RATES
            for name, recipe in recipes.items()
        },
        baseline="supervised-lr0.002",
        seeds=(0,),
        probe=c.ProbeConfig(eval=c.EvalConfig(which=("top1", "knn"))),
        metrics={"top1": "top-1", "knn": "kNN"},
    )
