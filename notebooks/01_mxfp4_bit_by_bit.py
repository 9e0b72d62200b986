# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 1. MXFP4, bit by bit
#
# MXFP4 stores a number in four bits. Four bits name sixteen values, far too few for the activations
# of a language model, so every 32 neighbours share one *scale*, a power of two:
#
# $$x_i \approx \text{element}_i \cdot 2^E, \qquad i = 1, \dots, 32.$$
#
# That is 4 + 8/32 = 4.25 bits a number. This notebook takes the format apart: the sixteen elements,
# the scale, one block by hand, the rules by which scales are chosen, and what one large number does
# to its 31 neighbours. The other six notebooks are about the last point.
#
# Needed: the package with its extra `notebook`. Everything runs on a CPU in a few seconds.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import treescope

from duquantpp_jax import MXFP4, ScaleRule
from duquantpp_jax.analysis import figures
from duquantpp_jax.formats import E2M1, FP32Scale, Log256

# %matplotlib inline
# %config InlineBackend.print_figure_kwargs = {"dpi": 100}

# %% [markdown]
# ## The sixteen elements
#
# An element is called E2M1: one sign bit, two exponent bits, one mantissa bit, read as IEEE 754
# reads its larger formats, but without infinities and NaN. We expect eight magnitudes with gaps
# that grow as the magnitudes do, and each once more with a minus sign.

# %%
codes = jnp.arange(16, dtype=jnp.uint8)
print("code  bits    value")
for code, value in zip(np.asarray(codes), np.asarray(E2M1.decode(codes)), strict=True):
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    print(f"{code:4d}  {sign} {exponent:02b} {mantissa}  {value:5.1f}")

# %% [markdown]
# The magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6. Near zero the gap is 0.5, at the top it is 2: a
# number close to 5 can be off by 1, a fifth of itself. Codes are ordered like the magnitudes they
# stand for, and there is a zero of each sign.
#
# ## One block by hand
#
# The OCP specification chooses the scale from the largest magnitude of the block, *amax*, so that
# it falls into [4, 8), where the elements 4 and 6 are:
#
# $$E = \lfloor \log_2 \text{amax} \rfloor - 2.$$
#
# The exponent is stored as the byte $E + 127$ (E8M0: eight exponent bits, no sign, no mantissa).
# Take 32 numbers from a normal distribution. For an amax between 2 and 4 we expect $E = -1$.

# %%
x = jax.random.normal(jax.random.key(0), (32,))
amax = float(jnp.max(jnp.abs(x)))
exponent = int(np.frexp(amax)[1]) - 1 - E2M1.emax  # frexp is exact where log2 is not
print(f"amax {amax:.4f}   E = {exponent}   scale 2^E = {2.0**exponent}   byte {exponent + 127}")

# %% [markdown]
# Now divide by the scale, go to the nearest element (of two equally near, the one with the even
# code), and multiply back. The package does all three steps; doing them here by a search over the
# sixteen values must give the same.

# %%
elements = np.asarray(E2M1.decode(codes))
scaled = np.asarray(x) / 2.0**exponent
nearest = elements[np.argmin(np.abs(scaled[:, None] - elements), axis=1)]
by_hand = nearest * 2.0**exponent

q = MXFP4().quantize(x)
print("      x   x / scale  element  code      x^     error")
for i in range(8):
    print(
        f"{x[i]:7.3f} {scaled[i]:10.3f} {nearest[i]:8.1f} {int(q.codes()[i]):5d} "
        f"{by_hand[i]:8.3f} {by_hand[i] - x[i]:9.3f}"
    )
print("...\nby hand and by the package alike:", bool(np.all(by_hand == q.dequantize())))

# %% [markdown]
# The fourth number shows the zero of the other sign: -0.079 becomes -0, whose code is 8.
#
# `quantize` returns an `MXArray`, a pytree of two arrays: elements in JAX's `float4_e2m1fn` and
# scales in `float8_e8m0fnu`. Treescope shows what it is made of; the colours are the dequantized
# values of sixteen blocks, a row each. We expect few distinct colours in a row.

# %%
rows = jax.random.normal(jax.random.key(1), (16, 32))
treescope.display(MXFP4().quantize(rows), streaming=False)
treescope.render_array(MXFP4().quantize(rows).dequantize(), around_zero=True)

# %% [markdown]
# In memory two elements share a byte, the lower index in the low half, so a matrix of a thousand by
# a thousand is half a megabyte of elements and 31 KB of scales.
#
# ## Where the scale comes from matters
#
# The specification gives one rule, `floor`; libraries use others. With amax = 7, `floor` keeps the
# scale 1 and cuts 7 down to 6; `even` and `rceil` double the scale, so that 7 becomes 8, and every
# small neighbour is rounded twice as coarsely. The table shows the byte and what becomes of amax.
# We expect the rules to agree at powers of two and to differ just below the next one.

# %%
rules = [ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.EVEN, ScaleRule.RCEIL]
print("amax    " + "".join(f"{rule.value:>12s}" for rule in rules))
for amax in (4.0, 5.0, 6.0, 6.5, 7.0, 7.9):
    block = jnp.zeros(32).at[0].set(amax)
    held = [MXFP4(scale_rule=rule).quantize(block) for rule in rules]
    cells = [f"{int(q.scale_bytes()[0])}: {float(q.dequantize()[0]):g}" for q in held]
    print(f"{amax:<8g}" + "".join(f"{cell:>12s}" for cell in cells))

# %% [markdown]
# At amax = 7 four libraries that all say "MXFP4, round to nearest" give two different answers (the
# page [docs/numerics.md](../docs/numerics.md) names them). How good is each rule on average? The
# usual measure is the signal-to-quantization-noise ratio, $\text{SQNR} = 10 \log_{10} \left( \sum
# x^2 / \sum (x - \hat x)^2 \right)$, in decibels. Two scales that are *not* MXFP4 stand below for
# comparison: `fp32`, which may be any number, and `log256`, the 256-step scale that the released
# code of DuQuant++ computes. We expect a scale with no restriction to be ahead of every power of
# two.


# %%
def sqnr(x, held):
    return 10 * np.log10(float(jnp.sum(x**2) / jnp.sum((x - held) ** 2)))


gaussian = jax.random.normal(jax.random.key(2), (4096, 32))
formats = {rule.value: MXFP4(scale_rule=rule) for rule in (*rules, ScaleRule.MSE)}
formats |= {"log256 (not MX)": Log256(), "fp32 (not MX)": FP32Scale()}
for name, format in formats.items():
    print(f"{name:16s} {sqnr(gaussian, format.fake_quantize(gaussian)):6.2f} dB")

# %% [markdown]
# `ceil` loses 2 dB to `floor`, `rceil` equals it, `even` gains a quarter of a decibel; `mse`, which
# tries three scales for each block and takes the best, is hardly better than `even`. Scales that
# are not powers of two are ahead by about 1 dB. A method must therefore be compared with another
# under the same rule, and a result under `log256` says little about MXFP4. That is the first of two
# reasons why published numbers need care; notebook 4 measures it on a language model.
#
# ## One outlier
#
# Now make one of the 32 numbers larger and larger, and look at the other 31, whose values do not
# change. Every doubling of the outlier doubles the scale. We expect their error to grow about
# fourfold with each doubling, until they are all rounded to zero and there is nothing left to lose.

# %%
print("outlier   scale   SQNR of the other 31   of them zero")
for size in (1, 2, 4, 8, 16, 32, 64):
    block = x.at[0].set(3.0 * size)
    q = MXFP4().quantize(block)
    others, held = block[1:], q.dequantize()[1:]
    zeros = int(jnp.sum(held == 0))
    print(
        f"{3 * size:7d} {float(q.scales[0].astype(jnp.float32)):7g} "
        f"{sqnr(others, held):17.2f} dB {zeros:12d}"
    )

# %% [markdown]
# An outlier of 3 or 6 does little harm. From there each doubling costs 6 dB, a factor of four in
# the error. At 24 the neighbours keep some 6 dB, about one bit; at 96 all of them are zero: the
# block says that there is an outlier, and nothing else. Activations of language models hold such
# channels, always in the same places (notebook 2).
#
# The same as a picture: the share of elements that have each code, in blocks without an outlier and
# in the same blocks after one channel was multiplied by 16. We expect the second to crowd around
# zero.

# %%
with_outlier = gaussian.at[:, 0].multiply(16.0)
held = {
    "no outlier": MXFP4().quantize(gaussian).codes(),
    "one of 32 is 16 times as large": MXFP4().quantize(with_outlier).codes(),
}
figures.code_occupancy(held, title="MXFP4, floor: 4,096 blocks of 32", columns=2)

# %% [markdown]
# With outliers seven elements in ten are 0 or $\pm 0.5$, where it was a quarter before, and the
# large codes go mostly to the outlier itself: of the format's sixteen values a few do the work.
#
# ## The edges
#
# What the specification leaves open has to be decided once. Here a block with a NaN or an infinity
# is NaN as a whole (byte 255), so that it cannot pass unseen; a block of zeros has byte 0; the sign
# of a zero is kept.

# %%
edges = jnp.zeros((3, 32)).at[0, 3].set(jnp.nan).at[1, 0].set(-0.0).at[2, 0].set(2.0**-126)
q = MXFP4().quantize(edges)
for name, byte, values in zip(
    ("a NaN", "zeros, the first -0", "2^-126"), q.scale_bytes(), q.dequantize(), strict=True
):
    print(f"{name:20s} byte {int(byte[0]):3d}   first values {np.asarray(values[:3])}")

# %% [markdown]
# A last warning for those who write such a format themselves: JAX has the storage types, but a
# *cast* to the scale's type is not the rule of the specification. It rounds to the nearest power of
# two where the rule rounds down.

# %%
cast = jnp.array([1.0, 1.5, 3.0, 3.9]).astype(jnp.float8_e8m0fnu)
print("cast of 1, 1.5, 3, 3.9 to E8M0:", cast.astype(jnp.float32))

# %% [markdown]
# 1.5 became 2 and 3 became 4, where the rule has 1 and 2. The package computes scales from the bits
# of amax and never with floating-point logarithms.
#
# **What to take along.** Sixteen values and a shared power of two; the scale follows the largest
# magnitude; the rule that chooses it is part of the result; and one outlier costs its 31 neighbours
# their precision. Next: [where outliers sit in a language model](02_outliers.ipynb).
