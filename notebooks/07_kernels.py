# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 7. Kernels: from JAX to UTCOMMA
#
# Simulation tells what MXFP4 does to a model. Speed comes from hardware that multiplies it: the
# tensor cores of NVIDIA's Blackwell take E2M1 elements and E8M0 scales as they are, by the
# instruction `tcgen05.mma.kind::mxf4`, which is `UTCOMMA` in machine code. This notebook follows a
# linear layer from JAX arrays to that instruction. No GPU is needed, and none is here: what runs
# below are reference implementations on a CPU, and a compiler for a chip that is not in this
# machine. **Nothing here has been timed on a Blackwell GPU**; what is known and how is in
# docs/blackwell.md.

# %%
import jax
import jax.numpy as jnp

from duquantpp_jax import MXFP4, ScaleRule
from duquantpp_jax.kernels import Operand, quantized_linear, rotate_quantize, scaled_matmul, target
from duquantpp_jax.kernels.proof import Options, prove
from duquantpp_jax.kernels.specifications import BYTES_PER_SECOND, FLOPS_PER_SECOND
from duquantpp_jax.transforms.block import BlockRotation
from duquantpp_jax.transforms.hadamard import hadamard
from experiments import figures

# %matplotlib inline
# %config InlineBackend.print_figure_kwargs = {"dpi": 100}

# %% [markdown]
# ## Two kernels
#
# A quantized linear is two steps. `rotate_quantize` reads activations once, multiplies every block
# of 32 by its rotation, chooses scales, rounds, packs, and writes codes and scales in the layout
# that tensor cores read. `scaled_matmul` multiplies two such operands. Weights are laid out once,
# offline. We expect the two steps to equal `quantized_linear`, and that to equal the plain formula
# up to the order of float32 additions.

# %%
x = jax.random.normal(jax.random.key(0), (256, 512), jnp.bfloat16)
w = jax.random.normal(jax.random.key(1), (384, 512)) / 512**0.5
transform = BlockRotation(hadamard(32)[None])

weights = Operand.from_mx(MXFP4().quantize(transform.weights(w)))
moved = rotate_quantize(x, hadamard(32)[None], scale_rule=ScaleRule.FLOOR)
two_steps = scaled_matmul(moved, weights, out_dtype=jnp.float32)
one_call = quantized_linear(x, weights, transform)
print("one call is the two steps:", bool(jnp.all(one_call == two_steps.astype(one_call.dtype))))

held = [MXFP4().fake_quantize(a) for a in (transform.activations(x.astype(jnp.float32)),
                                           transform.weights(w))]  # fmt: skip
plain = held[0].astype(jnp.float32) @ held[1].T
exact = x.astype(jnp.float32) @ w.T
print(f"from the plain formula: {float(jnp.max(jnp.abs(two_steps - plain))):.0e}")
signal, noise = jnp.sum(exact**2), jnp.sum((two_steps - exact) ** 2)
print(f"from the float product: SQNR {float(10 * jnp.log10(signal / noise)):.1f} dB")

# %% [markdown]
# Equal here to the last bit: products of E2M1 numbers and powers of two are exact in float32, and
# on this machine both sums have one order. 16 dB is the error of two roundings to four bits.
#
# ## What an operand holds
#
# Two codes a byte, and scales in tiles of 128 rows by 4 columns, 512 bytes each, in the order in
# which a warp copies them to tensor memory. We expect 256 x 512 numbers in 65,536 + 4,096 bytes.

# %%
for name, leaf in zip(("codes", "scales"), jax.tree.leaves(moved), strict=False):
    bits = (
        4 if leaf.dtype == jnp.float4_e2m1fn else 8
    )  # a CPU gives each element a byte all the same
    print(f"{name:7s} {leaf.shape} {leaf.dtype}, {leaf.size * bits // 8:,} bytes")

# %% [markdown]
# ## Why bother: the roofline
#
# A matmul of m x n x k does 2mnk operations and moves each operand once, so its intensity grows
# with its size. Below the ridge memory is the bound, above it the tensor cores; the numbers are
# NVIDIA's (docs/blackwell.md has the sources). For a decoding step with few tokens weights must be
# read from memory in any case, and 4.25 bits a weight instead of 16 is the whole gain: 3.8 times.
# For long prompts it is the tensor cores: 4 times. The points are the *least* time that these
# numbers allow, not measurements.


# %%
def point(m, n, k, bits, peak):
    operations, moved_bytes = 2 * m * n * k, (m * k + n * k) * bits / 8 + 2 * m * n
    seconds = max(operations / peak, moved_bytes / BYTES_PER_SECOND)
    return operations / moved_bytes, operations / seconds


fp4, bf16 = FLOPS_PER_SECOND["mxfp4"], FLOPS_PER_SECOND["bfloat16"]
figures.roofline(
    {"MXFP4": fp4, "bfloat16": bf16},
    BYTES_PER_SECOND,
    {
        "MXFP4, 16 tokens": point(16, 8192, 8192, 4.25, fp4),
        "bfloat16, 16 tokens": point(16, 8192, 8192, 16, bf16),
        "MXFP4, 8192 tokens": point(8192, 8192, 8192, 4.25, fp4),
        "bfloat16, 8192 tokens": point(8192, 8192, 8192, 16, bf16),
    },
    title="B200: least time by NVIDIA's numbers",
    columns=2,
)

# %% [markdown]
# With 16 tokens both points are on the slope: memory bounds them, and MXFP4 is 3.8 times higher
# since it reads fewer bytes. With 8192 both are on their roofs, a factor of 4 apart.
#
# ## Down to the instruction
#
# `duquantpp kernels` compiles every kernel for a B200 with the wheels of the extra `blackwell` and
# reads the machine code. A kernel is proved when the tensor-core instruction of its format stands
# in its inner loop as often as the tile's shape implies and no register spills. Below, the cases of
# `scaled_matmul` at 8192. Without the wheels the cell says what to install.

# %%
if missing := target.missing_wheels():
    print(f"{', '.join(missing)} missing: {target.INSTALL}")
else:
    for one in prove(Options(only="8192x8192x8192")):
        print(
            f"{one.case:22s} {one.label:21s} {one.instruction:11s} in loop {one.found} "
            f"(implied {one.implied}), registers {one.registers}, spilled {one.spill_bytes}"
        )

# %% [markdown]
# `UTCOMMA` is the block-scaled product of four-bit elements, `.4X` the form with a scale for every
# 16 (NVFP4), `UTCQMMA` that of eight bits; each stands in the loop as often as its tile implies,
# and no register spills. `duquantpp kernels` does this for all 54 cases, the two-CTA form
# `UTCOMMA.2CTA` among them. Whoever has a B200: docs/blackwell.md has the one command that checks
# numbers and times.
