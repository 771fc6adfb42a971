"""The rival's networks in PyTorch. Sizes come from `torch_rival.shapes`; nothing else is shared.

One pass of the encoder over images and masked twins where both are of one length; scaled dot
product attention; logits only for masked patches, as in BEiT's code. Nothing is rematerialized.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm attention and MLP, BxNxD -> BxNxD."""

    def __init__(self, width, mlp_dim, heads, gelu, scale=0.0, drop=0.0):
        super().__init__()
        self.heads, self.gelu, self.drop = heads, {"exact": "none"}.get(gelu, gelu), drop
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp_dim), nn.Linear(mlp_dim, width)
        if scale:
            self.scale1 = nn.Parameter(torch.full((width,), scale))
            self.scale2 = nn.Parameter(torch.full((width,), scale))

    def forward(self, x):
        b, n, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        x = x + self.kept(self.out(mixed.transpose(1, 2).reshape(b, n, d)), "scale1")
        hidden = F.gelu(self.fc1(self.norm2(x)), approximate=self.gelu)
        return x + self.kept(self.fc2(hidden), "scale2")

    def kept(self, branch, scale):
        """LayerScale, and DropPath by example."""
        if hasattr(self, scale):
            branch = branch * getattr(self, scale)
        if not self.drop:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop
        return branch * (keep / (1 - self.drop)).to(branch.dtype)


class Encoder(nn.Module):
    """Patches, BxNx(patch*patch*channels), to normalised tokens."""

    def __init__(self, s):
        super().__init__()
        self.patches = nn.Linear(s["patch"] ** 2 * s["channels"], s["width"])
        count = (s["image_size"] // s["patch"]) ** 2
        positions = 0.02 * torch.randn(count, s["width"])
        if s["learned_positions"]:
            self.positions = nn.Parameter(positions)
        else:
            self.register_buffer("positions", positions)
        if s["cls"]:
            self.cls = nn.Parameter(torch.zeros(s["width"]))
        rates = torch.linspace(0, s["drop_path"], s["depth"]).tolist()
        block = (s["width"], s["mlp_dim"], s["heads"], s["gelu"], s["layer_scale"])
        self.blocks = nn.ModuleList(Block(*block, drop) for drop in rates)
        self.norm = nn.LayerNorm(s["width"], 1e-6)

    def placed(self, x, at=None):
        """Embedded patches with their positions, after the CLS token if there is one."""
        x = x + (self.positions if at is None else self.positions[at])
        return torch.cat([self.cls.expand(len(x), 1, -1), x], 1) if hasattr(self, "cls") else x

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """Encoder tokens to logits of the masked patches, BxMx(codes)."""

    def __init__(self, s):
        super().__init__()
        mim, sizes = s["mim"], s["mim"]["decoder"]
        width, self.cls = sizes["width"], s["cls"]
        self.embed = nn.Linear(s["width"], width)
        if mim["visible"]:
            self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        count = (s["image_size"] // s["patch"]) ** 2
        self.register_buffer("positions", 0.02 * torch.randn(count, width))
        block = (width, sizes["mlp_dim"], sizes["heads"], s["gelu"])
        self.blocks = nn.ModuleList(Block(*block) for _ in range(sizes["depth"]))
        self.norm = nn.LayerNorm(width, 1e-6)
        self.output = nn.Linear(width, mim["codes"])

    def forward(self, tokens, order, masked):
        """order: BxL, kept patches first; masked: how many of the last are."""
        x, patches = self.embed(tokens), order.shape[1]
        first, x = x[:, : int(self.cls)], x[:, int(self.cls) :]
        if hasattr(self, "mask_token"):
            holes = self.mask_token.to(x.dtype).expand(len(x), patches - x.shape[1], -1)
            x = gathered(torch.cat([x, holes], 1), order.argsort(1))
        x = torch.cat([first, x + self.positions], 1)
        for block in self.blocks:
            x = block(x)
        x = gathered(x[:, int(self.cls) :], order[:, patches - masked :])
        return self.output(self.norm(x))


class Model(nn.Module):
    """Both branches of a step, or the supervised one alone."""

    def __init__(self, s):
        super().__init__()
        self.s = s
        self.encoder, self.head = Encoder(s), nn.Linear(s["width"], s["classes"])
        if s["mim"]:
            self.decoder = Decoder(s)
            if not s["mim"]["visible"]:
                self.mask_embedding = nn.Parameter(0.02 * torch.randn(s["width"]))

    def forward(self, images, labels, ids, share):
        """The loss of uint8 images BxHxWxC; `share` of each is its own, the rest its mirror's."""
        s, p = self.s, self.s["patch"]
        b, side = len(images), s["image_size"] // p
        x = (images.float() / 127.5 - 1).view(b, side, p, side, p, s["channels"])
        x = x.transpose(2, 3).reshape(b, side * side, -1)
        targets = F.one_hot(labels, s["classes"]).float()
        targets = targets * (1 - s["smoothing"]) + s["smoothing"] / s["classes"]
        mixed = x
        if s["mixup"]:
            mixed = x * share + x.flip(0) * (1 - share)
            targets = targets * share + targets.flip(0) * (1 - share)
        embedded = self.encoder.patches(mixed)
        if not s["mim"]:
            return self.classified(self.encoder(self.encoder.placed(embedded)), targets)
        masked = s["mim"]["masked"]
        order = torch.rand(b, side * side, device=x.device).argsort(1)
        if s["mim"]["visible"]:
            keep = order[:, : side * side - masked]
            twin = self.encoder.placed(self.encoder.patches(gathered(x, keep)), keep)
            tokens = self.encoder(self.encoder.placed(embedded))
            twin = self.encoder(twin)
        else:
            own = self.encoder.patches(x) if s["mixup"] else embedded
            hidden = torch.zeros(b, side * side, dtype=torch.bool, device=x.device)
            hidden.scatter_(1, order[:, side * side - masked :], True)
            twin = torch.where(hidden[..., None], self.mask_embedding.to(own.dtype), own)
            both = torch.cat([self.encoder.placed(embedded), self.encoder.placed(twin)])
            tokens, twin = self.encoder(both).chunk(2)
        logits = self.decoder(twin, order, masked)
        wanted = ids.gather(1, order[:, side * side - masked :])
        mim = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())
        return self.classified(tokens, targets) + s["mim"]["weight"] * mim

    def classified(self, tokens, targets):
        pooled = tokens[:, 0].float() if self.s["cls"] else tokens.float().mean(1)
        logits = self.head(pooled).float()
        if self.s["loss"] == "softmax":
            return F.cross_entropy(logits, targets)
        targets = (targets > 0).float() if self.s["loss"] == "bce" else targets
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()


def gathered(x, at):
    """The rows `at`, BxK, of x, BxLxD."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))
