"""The networks, as nnx modules; here, the kinds of variables beside nnx.Param.

The optimizer trains nnx.Param only.
"""

from flax import nnx


class Frozen(nnx.Variable):
    """A value that training uses but does not change: an argument of the step, not of its state."""


class Moving(nnx.Variable):
    """A value that the loss itself overwrites, by a rule and not by gradients.

    It is part of the train state and of checkpoints: running averages, momentum encoders.
    """


def freeze(module: nnx.Module, kind: type[nnx.Variable] = Frozen) -> None:
    """Turns every parameter of the module into a variable of this kind, in place."""
    for _, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Param):
                    setattr(node, name, kind(value[...]))
