"""Counts the matmul and convolution FLOPs of a compiled program from its HLO text.

`cost_analysis()` counts the body of a loop once, whatever its trip count; this walks the program
from its entry and multiplies. A multiply-add is 2 FLOPs. In convolutions only multiply-adds with
an element of the input count, not those with padding or with the holes of a dilated input: so a
strided convolution and its gradients cost the same, and so do TPU's matmuls written as
convolutions. The text of a partitioned program is that of one device.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from supmim_jax.hlo.text import Computation, Instruction, Module, UnknownCost, parse
from supmim_jax.hlo.trips import trip_count

CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")
# cuDNN's attention: matmuls of queries x keys x head that the arithmetic asks for, and those that
# it repeats because it hasn't stored the logits.
FUSED_ATTENTION = {"__cudnn$fmhaSoftmax": (2, 0), "__cudnn$fmhaSoftmaxBackward": (4, 1)}
# Of custom calls whose work can't be read from the text: libraries' matmuls, and whole kernels.
OPAQUE = re.compile(
    r"gemm|matmul|dot|conv(?!ert)|blas|dnn|fmha|attention|triton|mosaic|tpu_custom", re.I
)
OPAQUE_OPS = ("ragged-dot", "scaled-dot")
CALLERS = ("fusion", "call", "async-start")  # run what they call once


@dataclass(frozen=True)
class Counts:
    """FLOPs of one execution.

    `by_scope` splits them by "forward", "backward" or "recomputed" (by jax.checkpoint), and by the
    Python functions that traced the matmul, outermost first: "forward: SupMIM.loss/ViT.encode/...".
    Local functions and lambdas are left out; where nothing is left, op_name stands in.
    """

    flops: int
    by_scope: dict[str, int]


def count(text: str) -> Counts:
    """The FLOPs of `compiled.as_text()`.

    Of a conditional the most expensive branch counts. A loop without matmuls costs nothing, so its
    trip count may be unknown.

    Raises:
      UnknownCost: a loop with matmuls whose trip count can't be found, or a call that looks like a
        matmul and isn't known here.
    """
    return count_module(parse(text))


def count_module(module: Module) -> Counts:
    """`count` of a text that is parsed."""
    by_scope = FlopWalk(module).computation_cost(module.entry)
    return Counts(sum(by_scope.values()), dict(sorted(by_scope.items())))


class FlopWalk:
    """Costs of computations, each a Counter of FLOPs by scope, worked out once."""

    def __init__(self, module: Module):
        self.module = module
        self.known: dict[str, Counter] = {}

    def computation_cost(self, name: str) -> Counter:
        if name not in self.known:
            computation = self.module.computations[name]
            total = Counter()
            for instruction in computation.instructions.values():
                total.update(self.instruction_cost(instruction, computation))
            self.known[name] = total
        return self.known[name]

    def instruction_cost(self, instruction: Instruction, computation: Computation) -> Counter:
        opcode = instruction.opcode
        if opcode == "while":
            return self.loop_cost(instruction, computation)
        called = [self.computation_cost(name) for name in instruction.called()]
        if opcode == "conditional":
            return max(called, key=Counter.total)
        if opcode in CALLERS:
            return sum(called, Counter())
        if any(called) and opcode not in ("async-update", "async-done"):
            raise UnknownCost(f"{instruction.name}: a matmul inside {opcode} runs unknown times.")
        if instruction.text("custom_call_target") in FUSED_ATTENTION:
            return attention_cost(instruction, computation, scope(instruction, self.module))
        flops = matmul_flops(instruction, computation)
        return Counter({scope(instruction, self.module): flops}) if flops else Counter()

    def loop_cost(self, loop: Instruction, computation: Computation) -> Counter:
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        condition_cost, body_cost = self.computation_cost(condition), self.computation_cost(body)
        if not condition_cost and not body_cost:
            return Counter()
        trips = trip_count(loop, computation, self.module)
        if trips is None:
            raise UnknownCost(
                f"The loop {loop.name} ({loop.op_name}) has matmuls, but neither its trip count "
                f"nor a condition that gives it."
            )
        times = Counter({name: flops * trips for name, flops in body_cost.items()})
        times.update({name: flops * (trips + 1) for name, flops in condition_cost.items()})
        return times


def attention_cost(call: Instruction, computation: Computation, where: str) -> Counter:
    """FLOPs of a kernel of cuDNN by scope; `where` is that of the call.

    Its first result, the output or the queries' gradient, is always batch x heads x queries x head.
    """
    needed, repeated = FUSED_ATTENTION[call.text("custom_call_target")]
    queries = call.dims[2]
    result, keys = (
        math.prod(x) for x in (call.dims, computation.instructions[call.operands[1]].dims)
    )
    matmul = 2 * result * (keys * queries // result)
    cost = Counter({where: needed * matmul})
    if repeated:
        cost[f"recomputed: {where.partition(': ')[2]}"] += repeated * matmul
    return cost


def matmul_flops(instruction: Instruction, computation: Computation) -> int:
    """FLOPs of one instruction by itself, 0 if it is no matmul or convolution."""

    def operand(i: int) -> tuple[int, ...]:
        return computation.instructions[instruction.operands[i]].dims

    target = instruction.text("custom_call_target")
    if instruction.opcode == "dot":
        contracted = instruction.ints("lhs_contracting_dims")
    elif instruction.opcode == "convolution":
        return convolution_flops(instruction, operand(0), operand(1))
    elif target in CUBLAS:
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        contracted = tuple(int(d) for d in re.findall(r"\d+", found[1]))
    elif instruction.opcode in OPAQUE_OPS or OPAQUE.search(target):
        raise UnknownCost(f"{instruction.name}: the FLOPs of {target or instruction.opcode}?")
    else:
        return 0
    return 2 * math.prod(instruction.dims) * math.prod(operand(0)[d] for d in contracted)


def convolution_flops(instruction: Instruction, inputs: tuple, kernel: tuple) -> int:
    """FLOPs of a convolution: each output, by the kernel's inputs, by the window's real elements.

    Groups of features are in the kernel's shape (inputs of one group), groups of the batch in the
    output's (the batch of one group).
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = re.search(r"window={([^}]*)}", instruction.attributes)  # none without spatial dims
    window = dict(re.findall(r"(\w+)=([\d_x-]+)", window[1] if window else ""))
    spatial = sum(label.isdigit() for label in labels[1])

    def option(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * spatial

    size = [int(n) for n in option("size", "1")]
    stride = [int(n) for n in option("stride", "1")]
    padding = [int(n.split("_")[0]) for n in option("pad", "0_0")]
    holes = [int(n) for n in option("lhs_dilate", "1")]
    spread = [int(n) for n in option("rhs_dilate", "1")]
    output = dict(zip(labels[3], instruction.dims))
    multiply_adds = output["b"] * output["f"] * kernel[labels[2].index("i")]
    for d in range(spatial):
        at = np.arange(output[str(d)])[:, None] * stride[d] + np.arange(size[d]) * spread[d]
        at -= padding[d]
        length = (inputs[labels[1].index(str(d))] - 1) * holes[d] + 1
        multiply_adds *= int(((at >= 0) & (at < length) & (at % holes[d] == 0)).sum())
    return 2 * multiply_adds


def scope(instruction: Instruction, module: Module) -> str:
    """As in `Counts.by_scope`."""
    name = instruction.op_name
    direction = "forward"
    if "rematted_computation" in name:
        direction = "recomputed"
    elif re.search(r"(^|/)transpose\(", name):
        direction = "backward"
    functions = [f for f in module.functions(instruction) if "<" not in f]
    return f"{direction}: {'/'.join(functions) or name or 'no metadata'}"
