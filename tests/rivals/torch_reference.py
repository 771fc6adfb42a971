"""The rival: the same train step in PyTorch, as a good user of it would write it today.

It shares nothing with the product but sizes (`torch_rival.shapes`). `main` is what runs in the
process that `torch_rival.Rival` starts: its standard input has a line of JSON with the sizes, then
one for each request; each is answered by another.

Fused AdamW, torch.compile, and autocast where the config is in bfloat16.
"""

import json
import os
import sys
import time

import torch
from torch import nn

from rivals.torch_model import Model


class Trainer:
    """Random weights and one random batch on the device, and the step on them."""

    def __init__(self, s):
        self.s, self.device = s, torch.device(s["device"])
        torch.manual_seed(0)
        self.model = Model(s).to(self.device)
        b, size, count = s["batch"], s["image_size"], (s["image_size"] // s["patch"]) ** 2
        shape = (b, size, size, s["channels"])
        codes = s["mim"]["codes"] if s["mim"] else 1
        batch = (torch.randint(0, 256, shape, dtype=torch.uint8),)
        batch += torch.randint(0, s["classes"], (b,)), torch.randint(0, codes, (b, count))
        self.batch = [x.to(self.device) for x in batch]
        matrices = [m.weight for m in self.model.modules() if isinstance(m, nn.Linear)]
        known = {id(p) for p in matrices}
        rest = [p for p in self.model.parameters() if id(p) not in known]
        groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, s["lr"], (s["b1"], s["b2"]), weight_decay=s["weight_decay"], fused=True
        )
        self.beta = torch.distributions.Beta(s["mixup"] or 1.0, s["mixup"] or 1.0)
        self.losses = {"eager": self.model}

    def step(self, how="eager"):
        """Forward, backward, clip and update; the loss, a scalar tensor."""
        self.optimizer.zero_grad(set_to_none=True)
        share = self.beta.sample().to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.s["bfloat16"]):
            loss = self.losses[how](*self.batch, share)
        loss.backward()
        if self.s["clip"]:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.s["clip"])
        self.optimizer.step()
        return loss.detach()

    def run(self, how, steps):
        """Seconds of a step, of `steps` one after the other: of wall clock, of CPU."""
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss = self.step(how)
        loss.item()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / steps, (time.process_time() - cpu) / steps

    def compile(self):
        """Adds "torch.compile" to the ways that a step can run; why not, if that fails here."""
        self.losses["torch.compile"] = torch.compile(self.model)
        try:
            self.step("torch.compile")
        except Exception as error:  # of the C++ compiler or of torch._dynamo, without a base class
            del self.losses["torch.compile"]
            return str(error).strip().splitlines()[0][:200]
        return ""

    def parameters(self):
        """How many there are, by part."""
        found = {}
        for name, p in self.model.named_parameters():
            part = name.split(".")[0]
            found[part] = found.get(part, 0) + p.numel()
        return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers may print
    shapes = json.loads(sys.stdin.readline())
    torch.set_num_threads(shapes["threads"])
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, as is JAX's default there
    trainer = Trainer(shapes)
    begin = time.perf_counter()
    trainer.step()
    failed = trainer.compile() if shapes["compile"] else "--nocompile_rival"
    answer = {"version": torch.__version__, "ways": list(trainer.losses), "not_compiled": failed}
    answer |= {"threads": torch.get_num_threads(), "parameters": trainer.parameters()}
    answer |= {"compile_s": time.perf_counter() - begin}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        how, steps = json.loads(line)
        print(json.dumps(trainer.run(how, steps)), file=answers, flush=True)


if __name__ == "__main__":
    main()
