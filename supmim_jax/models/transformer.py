"""The pre-norm transformer that encoder and decoder share, with stacked, scanned layers.

XLA's attention writes the logits of every head and pair of tokens to memory and reads them back. On
a GPU, cuDNN's kernel (flash attention, arXiv 2205.14135) keeps them on the chip. On most TPUs, XLA
keeps them there only if there are few, so attention takes one group of rows at a time, and the
gradient recomputes each group's logits. On a v5p it never does, and JAX's own kernel takes its
place (splash attention). Tracing the step chooses the form by platform, dtype and shape. On one CPU
device, attention and matmuls have hand-written gradients, because those that JAX derives take
longer there (docs/speed.md).
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from supmim_jax.config import DecoderConfig, ViTConfig
from supmim_jax.sharding import ROWS, by_rows

# Of cuDNN (jax/_src/cudnn/fused_attention_stablehlo.py); Hopper would take heads of up to 256.
MAX_HEAD_DIM, HEAD_DIM_STEP = 128, 8
FUSED_DTYPES = (jnp.bfloat16, jnp.float16)
KERNEL = "dot_product_attention_fwd_wrapper"  # the kernel's equation in a trace
# Logits of a group on a TPU: 16 MiB in bfloat16. XLA keeps them in VMEM, gradients included, in the
# programs that `rehearse` compiles for v5e.
GROUP_LOGITS = 2**23
# XLA's programs for a v5p write attention's logits to HBM, however few they are.
V5P = ("TPU v5", "TPU v5p")
SPLASH_STEP = 128  # tokens
UNROLLED_ON_CPU = 12  # layers at most, so that compiling stays short
EMBEDDED = 2**16  # folded into the key for dropout of the input: above the number of any block


def implementation(
    dtype, tokens: int, head_dim: int, kind: tuple[str, str]
) -> Literal["cudnn", "grouped", "splash", "cpu", "xla"]:
    """The form for `tokens` activations of `dtype` on a device of `kind`, as `device` gives it.

    JAX refuses the gradient of cuDNN's for an odd number of tokens, such as 256 and a CLS token.
    cuDNN needs NVIDIA's Ampere or later. Names of older data-centre cards begin with "Tesla", and
    AMD's don't with "NVIDIA"; a GeForce of before 2020 must train in float32. Splash attention
    takes a multiple of 128 tokens, and here no mesh that splits heads.
    """
    platform, name = kind
    if platform == "tpu":
        splash = name in V5P and tokens % SPLASH_STEP == 0 and not _splits_heads()
        return "splash" if splash else "grouped"
    if platform == "cpu" and on_one_cpu():
        return "cpu"
    nvidia = platform == "gpu" and name.startswith("NVIDIA")
    fits = head_dim <= MAX_HEAD_DIM and head_dim % HEAD_DIM_STEP == 0
    fits = fits and tokens % 2 == 0 and jnp.dtype(dtype) in FUSED_DTYPES
    return "cudnn" if nvidia and fits else "xla"


def device() -> tuple[str, str]:
    """Platform and kind of the devices that this is traced for; ("", "") where nothing says.

    Of the mesh that `TrainStep.build` and `encoder.build_encoder` trace for, which need not be
    of this process's devices: `rehearse` compiles for TPUs on a CPU.
    """
    found = jax.sharding.get_abstract_mesh().abstract_device
    return (found.platform, found.device_kind) if found else ("", "")


def on_one_cpu() -> bool:
    """Whether this is traced for a single CPU device."""
    return device()[0] == "cpu" and jax.sharding.get_abstract_mesh().size == 1


def _splits_heads() -> bool:
    """Whether this is traced for a mesh that splits layers, and so the heads of attention."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1


def attention(qkv_BxNxE, segments: tuple[int, ...], heads: int, forms=None) -> jax.Array:
    """Multi-head attention within each segment, BxNxD; E is 3 D, queries, keys and values.

    `forms` has one for each segment, as `implementation` gives them; None is XLA's for all.
    """
    shape, parts = qkv_BxNxE.shape[:2], []
    forms = forms or ["xla"] * len(segments)
    if set(forms) == {"cpu"} and len(set(segments)) == 1:  # rows need no split and concatenation
        qkv_BxNxE, segments = qkv_BxNxE.reshape(-1, segments[0], qkv_BxNxE.shape[2]), segments[:1]
    qkv = qkv_BxNxE.reshape(*qkv_BxNxE.shape[:2], 3, heads, -1)
    for form, part in zip(forms, jnp.split(qkv, np.cumsum(segments)[:-1], axis=1)):
        if form == "cpu":
            parts.append(cpu_attention(part))
            continue
        q, k, v = part[:, :, 0], part[:, :, 1], part[:, :, 2]
        parts.append(jax.nn.dot_product_attention(q, k, v, implementation=form))
    return jnp.concatenate(parts, axis=1).reshape(*shape, -1)


def grouped_attention(qkv_BxNxE, segments: tuple[int, ...], heads: int) -> jax.Array:
    """As `attention` to rounding, each device's rows by groups of few logits, one after another."""
    run = functools.partial(_by_groups, segments, heads)
    return _on_each_device(run, axis_names=set(ROWS))(qkv_BxNxE)


def _on_each_device(run, **options):
    """`run` of the rows of each device by themselves; axes that are not named stay XLA's."""
    mesh, rows = jax.sharding.get_abstract_mesh(), PartitionSpec(ROWS)
    return jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows, **options)


def splash_attention(qkv_BxNxE, segments: tuple[int, ...], heads: int) -> jax.Array:
    """As `attention` to rounding, by JAX's Pallas kernel. It keeps logits on the chip."""
    run = functools.partial(_by_splash, segments, heads)
    return _on_each_device(run, check_vma=False)(qkv_BxNxE)


def _by_splash(segments: tuple[int, ...], heads: int, qkv_BxNxE) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    parts = []
    for part in jnp.split(qkv_BxNxE, np.cumsum(segments)[:-1], axis=1):
        rows, tokens, _ = part.shape
        block = max(size for size in (128, 256, 512) if tokens % size == 0)
        # Contiguous tokens, as XLA prefers them, too: fewer copies.
        layouts = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR)
        gradient = {"block_q_dkv": block, "block_kv_dkv": block, "use_fused_bwd_kernel": True}
        sizes = splash.BlockSizes(block, block, **gradient, **layouts)
        attend = splash.make_splash_mha_single_device(
            masks.MultiHeadMask([masks.FullMask((tokens, tokens))] * heads),
            block_sizes=sizes,
            residual_checkpoint_name="attention",
        )
        q, k, v = part.reshape(rows, tokens, 3, heads, -1).transpose(2, 0, 3, 1, 4)
        out = jax.vmap(attend)(q * q.shape[-1] ** -0.5, k, v)
        parts.append(out.transpose(0, 2, 1, 3).reshape(rows, tokens, -1))
    return jnp.concatenate(parts, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_groups(segments: tuple[int, ...], heads: int, qkv_BxNxE) -> jax.Array:
    grouped = jax.lax.map(
        lambda x: _row_major(attention(_row_major(x), segments, heads)),
        _groups(qkv_BxNxE, segments, heads),
    )
    return grouped.reshape(*qkv_BxNxE.shape[:2], -1)


def _row_major(x_BxNxE) -> jax.Array:
    """`x` with its last axis contiguous, as the matmuls around attention leave and read it.

    Attention itself prefers contiguous tokens. Without this constraint XLA would transpose the
    arrays of all groups in HBM. With it, each group is transposed by itself: in VMEM on a v5e or
    v6e.
    """
    return with_layout_constraint(x_BxNxE, Layout((0, 1, 2)))


def _groups(x_BxNxE, segments: tuple[int, ...], heads: int) -> jax.Array:
    """Rows in groups of as many as GROUP_LOGITS allows: GxBxNxE."""
    most = max(1, GROUP_LOGITS // (heads * max(segments) ** 2))
    count = x_BxNxE.shape[0]
    size = max(n for n in range(1, min(most, count) + 1) if count % n == 0)
    return x_BxNxE.reshape(count // size, size, *x_BxNxE.shape[1:])


def _by_groups_forward(segments, heads, qkv):
    return _by_groups(segments, heads, qkv), qkv


def _by_groups_backward(segments, heads, qkv, gradient):
    def of_group(x):
        qkv, gradient = map(_row_major, x)
        _, pull_back = jax.vjp(lambda qkv: attention(qkv, segments, heads), qkv)
        return _row_major(pull_back(gradient)[0])

    both = tuple(_groups(x, segments, heads) for x in (qkv, gradient))
    return (jax.lax.map(of_group, both).reshape(qkv.shape),)


_by_groups.defvjp(_by_groups_forward, _by_groups_backward)


@jax.custom_vjp
def cpu_attention(qkv_BxNx3xHxD) -> jax.Array:
    """Multi-head attention, BxNxHxD, as JAX's to rounding; the gradient reads no logits."""
    return _cpu_attention_forward(qkv_BxNx3xHxD)[0]


def _cpu_attention_forward(qkv):
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits).astype(qkv.dtype)
    return (weights @ v).transpose(0, 2, 1, 3), (q, k, v, weights)


def _cpu_attention_backward(saved, gradient):
    q, k, v, weights = saved
    gradient = gradient.transpose(0, 2, 1, 3)
    of_weights = gradient @ v.swapaxes(2, 3)
    of_logits = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True))
    of_q = of_logits @ k * q.shape[-1] ** -0.5
    of_k, of_v = of_logits.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ gradient
    return (jnp.stack([of_q, of_k, of_v]).transpose(1, 3, 0, 2, 4),)


cpu_attention.defvjp(_cpu_attention_forward, _cpu_attention_backward)


def keeps_kernel(primitive, *_, **__) -> bool:
    """A policy of jax.checkpoint: keep the kernel's output and its sums of each row's softmax."""
    return primitive.name == KERNEL


XAVIER = nnx.initializers.xavier_uniform()
# The flat kernel of three square ones: Xavier of each of them, not of their concatenation.
XAVIER_QKV = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")

NAMED = jax.checkpoint_policies.save_only_these_names("qkv", "attention", "mid", "fc1")
REMAT_POLICIES = {
    "names": jax.checkpoint_policies.save_from_both_policies(NAMED, keeps_kernel),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def linear(inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, init=XAVIER) -> nnx.Linear:
    """Linear layer with float32 parameters, Xavier-uniform and zero as in ViT's and MAE's codes."""
    return nnx.Linear(
        inputs, outputs, dtype=dtype, kernel_init=init, rngs=rngs, dot_general=dot_general
    )


def dot_general(x, kernel, dimensions, **options) -> jax.Array:
    """The product of a linear layer, over the last axis of `x` and the first of the kernel."""
    if not on_one_cpu():
        return jax.lax.dot_general(x, kernel, dimensions, **options)
    return cpu_matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def cpu_matmul(x_NxI, kernel_IxO) -> jax.Array:
    """Their product. The kernel's gradient has the form that XLA's CPU backend is fastest at.

    Where `x` has more than two axes, XLA makes a transposed copy for it. Where that gradient has
    more rows than columns, its transpose takes half the time.
    """
    return x_NxI @ kernel_IxO


def _cpu_matmul_backward(operands, gradient):
    (x, kernel), over_rows = operands, (((0,), (0,)), ((), ()))
    if x.shape[1] > gradient.shape[1]:
        transposed = jax.lax.dot_general(gradient, x, over_rows)
        of_kernel = jax.lax.optimization_barrier(transposed).T  # or XLA merges the two
    else:
        of_kernel = jax.lax.dot_general(x, gradient, over_rows)
    return gradient @ kernel.T, of_kernel


cpu_matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _cpu_matmul_backward)


def gelu(x, form: str) -> jax.Array:
    """GELU, exact or by tanh."""
    return jax.nn.gelu(x, approximate=True) if form == "tanh" else exact_gelu(x)


@jax.custom_vjp
def exact_gelu(x) -> jax.Array:
    """GELU by erf in float32. The gradient keeps nothing but `x`.

    JAX's is by erfc in the dtype of `x`, which takes more arithmetic. So much that on a TPU XLA
    writes erfc to HBM, to read it again in two matmuls of the gradient.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


def _exact_gelu_backward(x, gradient):
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (2 * np.pi) ** -0.5
    return ((gradient * (_normal_cdf(wide) + wide * density)).astype(x.dtype),)


exact_gelu.defvjp(lambda x: (exact_gelu(x), x), _exact_gelu_backward)


def embedding(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    """Learned vectors that are added to tokens or take their place, float32."""
    return nnx.Param(nnx.initializers.truncated_normal(0.02)(rngs.params(), shape, jnp.float32))


def layer_norm(width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with float32 statistics; epsilon 1e-6 as in ViT."""
    return nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, use_fast_variance=False, rngs=rngs)


def dropout(x, rate: float, key: jax.Array | None):
    """Each value 0 with this probability, the others larger by as much; without a key as it is."""
    if not rate or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0)


@jax.custom_vjp
def own_gradient(x):
    """`x`; its gradient is an array of its own, which XLA's CPU backend does not fuse into others.

    XLA would otherwise compute the sum over all later layers anew wherever it is read. The CPU
    backend drops optimization_barrier, but it does not fuse through a conditional; both branches
    give the same, but for the sign of zeros.
    """
    return x


def _own_gradient_backward(_, gradient):
    first = gradient.reshape(-1)[0]
    same, normalized = (lambda g: g), (lambda g: jnp.where(g == 0, 0, g))
    return (jax.lax.cond(first < 0, same, normalized, gradient),)


own_gradient.defvjp(lambda x: (x, None), _own_gradient_backward)


class Block(nnx.Module):
    """Self-attention and MLP, each behind a LayerNorm and, if asked for, LayerScale."""

    def __init__(
        self,
        cfg: ViTConfig | DecoderConfig,
        *,
        layer_scale: float,
        gelu: str,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        dropout: float = 0.0,
    ):
        width, self.heads, self.dropout, self.gelu = cfg.width, cfg.heads, dropout, gelu
        self.norm1 = layer_norm(width, dtype, rngs)
        self.qkv = linear(width, 3 * width, dtype, rngs, XAVIER_QKV)
        self.out = linear(width, width, dtype, rngs)
        self.norm2 = layer_norm(width, dtype, rngs)
        self.fc1 = linear(width, cfg.mlp_dim, dtype, rngs)
        self.fc2 = linear(cfg.mlp_dim, width, dtype, rngs)

        def scale() -> nnx.Param | None:
            return nnx.Param(jnp.full((width,), layer_scale, jnp.float32)) if layer_scale else None

        self.scale1, self.scale2 = scale(), scale()

    @jax.named_scope("MLP")
    def __call__(self, x_BxNxD, segments: tuple[int, ...], keep_2xBxNx1, key=None):
        """Tokens after this block; attention stays within each run of `segments` tokens.

        keep_2xBxNx1 multiplies the two residual branches (DropPath); None keeps them whole. `key`
        draws dropout; None leaves it out.
        """

        def dropped(x, number: int):
            drawn = None if key is None else jax.random.fold_in(key, number)
            return dropout(x, self.dropout, drawn)

        def kept(branch, which: int):
            if keep_2xBxNx1 is None:
                return branch
            return branch * keep_2xBxNx1[which].astype(branch.dtype)

        x = by_rows(x_BxNxD)
        x = x + kept(dropped(self.attend(self.norm1(x), segments), 0), 0)
        x = checkpoint_name(x, "mid")
        hidden = checkpoint_name(self.fc1(self.norm2(x)), "fc1")
        hidden = dropped(gelu(hidden, self.gelu), 1)
        return x + kept(dropped(self.project(self.fc2, hidden, self.scale2), 2), 1)

    @jax.named_scope("attention")
    def attend(self, x_BxNxD, segments: tuple[int, ...]):
        """Multi-head self-attention within each segment of the packed sequence."""
        qkv = checkpoint_name(self.qkv(x_BxNxD), "qkv")
        head_dim, kind = qkv.shape[-1] // 3 // self.heads, device()
        forms = [implementation(qkv.dtype, n, head_dim, kind) for n in segments]
        if set(forms) == {"splash"}:
            mixed = splash_attention(qkv, segments, self.heads)
        elif kind[0] == "tpu":
            mixed = grouped_attention(qkv, segments, self.heads)
        else:
            mixed = attention(qkv, segments, self.heads, forms)
        if set(forms) not in ({"cudnn"}, {"splash"}):  # whose parts are kept by themselves
            mixed = checkpoint_name(mixed, "attention")
        return self.project(self.out, mixed, self.scale1)

    def project(self, layer: nnx.Linear, x, scale: nnx.Param | None):
        """What a residual branch ends with: a linear layer, its outputs times LayerScale.

        The scale multiplies the weights: the gradient of a scale of the outputs would need the
        outputs again, and rematerialization would repeat two matmuls of every block for it.
        """
        if scale is None:
            return layer(x)
        kernel, bias = layer.kernel[...] * scale[...], layer.bias[...] * scale[...]  # float32
        dimensions = (((x.ndim - 1,), (0,)), ((), ()))
        return dot_general(x, kernel.astype(layer.dtype), dimensions) + bias.astype(layer.dtype)


class Transformer(nnx.Module):
    """Blocks whose parameters are stacked along a leading axis and run by lax.scan.

    `drop_path` is the rate of the first block and that of the last.
    """

    def __init__(
        self,
        cfg: ViTConfig | DecoderConfig,
        remat: str,
        rngs: nnx.Rngs,
        drop_path: tuple[float, float] = (0.0, 0.0),
        **block,
    ):
        self.depth, self.drop_path, self.remat = cfg.depth, drop_path, remat
        make = nnx.vmap(lambda rngs: Block(cfg, rngs=rngs, **block), in_axes=0, out_axes=0)
        self.blocks = make(rngs.split(cfg.depth))

    def __call__(self, x_BxNxD, segments: tuple[int, ...], key: jax.Array | None = None):
        """Tokens after all blocks; `key` draws DropPath and dropout, None (inference) neither.

        DropPath (stochastic depth, arXiv 1603.09382) drops a residual branch per example and
        segment, at a rate that goes linearly from the first block's to the last one's.
        """
        graph, params = nnx.split(self.blocks)
        if key is not None:
            embedded = jax.random.fold_in(key, EMBEDDED)
            x_BxNxD = dropout(x_BxNxD, self.blocks.dropout, embedded)
        if self.blocks.scale1 is not None:  # whose first values bfloat16 would round away
            x_BxNxD = x_BxNxD.astype(jnp.float32)
        drop = key is not None and max(self.drop_path) > 0
        rates = jnp.linspace(*self.drop_path, self.depth, dtype=jnp.float32)
        keys = jax.random.split(key, self.depth) if drop else jnp.zeros((self.depth, 0))
        drops = key is not None and self.blocks.dropout > 0
        other = jax.random.fold_in(key, self.depth) if drops else None  # a stream of its own

        # A loop on a CPU copies what each layer leaves for its gradient (docs/speed.md). With remat
        # nothing would keep XLA from merging what is to be computed again.
        unroll = on_one_cpu() and self.depth <= UNROLLED_ON_CPU and self.remat == "none"

        def body(x, layer):
            params, rate, key, number = layer
            x = own_gradient(x) if unroll else x
            keep = _keep(key, rate, x.shape[0], segments) if drop else None
            drawn = jax.random.fold_in(other, number) if drops else None
            return nnx.merge(graph, params)(x, segments, keep, drawn), None

        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        layers = params, rates, keys, jnp.arange(self.depth)
        return jax.lax.scan(body, x_BxNxD, layers, unroll=unroll or 1)[0]


def _keep(key, rate, examples: int, segments: tuple[int, ...]):
    """0 or 1 / (1 - rate) for each residual branch, example and token: 2xBxNx1."""
    kept = jax.random.bernoulli(key, 1.0 - rate, (2, examples, len(segments))) / (1.0 - rate)
    per_token = jnp.repeat(kept, np.array(segments), axis=2, total_repeat_length=sum(segments))
    return per_token[..., None]


def sincos2d(
    height: int, width: int, dim: int, grid: int = 0, frequencies: np.ndarray | None = None
) -> np.ndarray:
    """Fixed 2-D sine-cosine position embeddings, float32 (height*width)xdim.

    As in MAE (arXiv 2111.06377, reference code): the first half encodes the column, the second
    the row; each as [sin, cos] over dim/4 frequencies, by default 10000^(-i / (dim/4)).

    With a `grid`, the coordinates are those of a grid x grid image at the same relative places
    (of patch centres), so that an encoder trained there finds every place where it was.
    """
    if frequencies is None:
        frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim / 4.0))
    at = [(np.arange(n) + 0.5) * (grid or n) / n - 0.5 for n in (height, width)]
    rows, columns = np.meshgrid(*at, indexing="ij")
    halves = []
    for positions in (columns, rows):
        angles = positions.reshape(-1, 1) * frequencies
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1).astype(np.float32)
