# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # 8. My own module
#
# The other notebooks quantize language models that the package knows. Here is a module that it
# knows nothing of: a small vision transformer, written with flax nnx as anybody writes one.
# `quantize` finds its linears, runs it on a few batches, and gives back a module that is called in
# the same way. Then what rounding has cost is trained back with optax.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from duquantpp_jax import MXFP4, convert, fake_quantize, quantize, recipe
from experiments import figures

# %matplotlib inline
# %config InlineBackend.print_figure_kwargs = {"dpi": 100}


class Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class ViT(nnx.Module):
    """Images [rows, 16, 16], cut into patches of 4 x 4, to logits of 8 classes."""

    def __init__(self, rngs: nnx.Rngs, width: int = 64):
        self.patches = nnx.Linear(16, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (16, width)))
        self.blocks = nnx.List([Block(width, rngs) for _ in range(1)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 8, rngs=rngs)

    def __call__(self, images):
        x = images.reshape(-1, 4, 4, 4, 4).swapaxes(2, 3).reshape(-1, 16, 16)
        x = self.patches(x) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


# %% [markdown]
# The task: stripes in one of eight directions, of random width and place, under noise as strong as
# they are. The images come from NumPy, so there are always fresh ones. A few seconds of Adam teach
# it.


# %%
def batch(seed, rows=64):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 8, rows)
    angle, phase = np.pi * labels / 8, random.uniform(0, 2 * np.pi, rows)
    y, x = np.mgrid[:16, :16]
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    stripes = np.sin(random.uniform(0.6, 1.2, rows)[:, None, None] * along + phase[:, None, None])
    noise = random.standard_normal(stripes.shape)
    return (stripes + noise).astype(np.float32), labels.astype(np.int32)


def loss(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def step(model, optimizer, images, labels):
    value, gradient = nnx.value_and_grad(loss)(model, images, labels)
    optimizer.update(model, gradient)
    return value


@nnx.jit
def judge(model, images, labels):
    return loss(model, images, labels), jnp.mean(jnp.argmax(model(images), axis=1) == labels)


HELD_OUT = batch(10_000, 512)
model = ViT(nnx.Rngs(0))
rate = optax.cosine_decay_schedule(5e-3, 150)
optimizer = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)
for number in range(150):
    step(model, optimizer, *batch(number))
print("held out: loss {:.3f}, accuracy {:.1%}".format(*judge(model, *HELD_OUT)))

# %% [markdown]
# ## One call
#
# `quantize` takes the module, a recipe (by name, or as `recipe` makes it), and batches to calibrate
# on. What it leaves in float it lists, with the reason. We keep the head in float ourselves, as is
# usual; the patches have 16 numbers each, which blocks of 32 do not divide.

# %%
batches = [batch(seed)[0] for seed in range(20_000, 20_004)]
quantized, report = quantize(model, recipe("rtn", "mxfp4:even"), batches, exclude="head")
print(report)

# %% [markdown]
# q, k and v are called with the same array; they share what moves it. "SQNR of W" is that of the
# rounded weight alone, "of y" that of the linear's output when its input is rounded, too: two
# roundings of about 19 dB each leave 16. What does that cost the whole module, and does GPTQ, which
# lets later columns make up for the error of earlier ones, cost less?

# %%
second, _ = quantize(model, recipe("rtn", "mxfp4:even", "gptq"), batches, exclude="head")
for name, made in {"float": model, "rtn": quantized, "gptq": second}.items():
    print("{:6s} loss {:.3f}, accuracy {:.1%}".format(name, *judge(made, *HELD_OUT)))

# %% [markdown]
# Little, on this easy task: .007 nats, of which GPTQ saves more than half. The accuracies do not
# differ (of 512 images, one standard error is 1.3 %).
#
# ## Train it back
#
# With `qat=True` the moved weights stay parameters (nnx.Param) that are rounded anew at each call.
# Gradients pass straight through both roundings, so the training loop is the one from above, and
# only the module is another. `convert` then stores the trained weights as codes. We expect the loss
# to fall: what rounding has cost is little here, and there are fresh images to learn from.

# %%
trained, _ = quantize(model, recipe("rtn", "mxfp4:even"), batches, exclude="head", qat=True)
rate = optax.cosine_decay_schedule(1e-3, 100)
optimizer = nnx.Optimizer(trained, optax.adam(rate), wrt=nnx.Param)
losses, judged = [], [judge(trained, *HELD_OUT)[0]]
for number in range(100):
    losses.append(step(trained, optimizer, *batch(30_000 + number)))
    if number % 10 == 9:
        judged.append(judge(trained, *HELD_OUT)[0])

stored = convert(trained)
weight = stored.blocks[0].up.weight.get_value()
print("trained: loss {:.3f}, accuracy {:.1%}".format(*judge(trained, *HELD_OUT)))
print("stored:  loss {:.3f}, accuracy {:.1%}".format(*judge(stored, *HELD_OUT)))
print(f"up is stored as {weight.element} codes {weight.shape} and {weight.scales.shape} scales")

# %%
seen = np.array([np.mean(losses[max(0, 10 * n - 10) : max(10 * n, 1)]) for n in range(11)])
lines = {
    "training batches": seen,
    "held out": np.array(judged),
    "held out, float": np.full(11, judge(model, *HELD_OUT)[0]),
}
figures.loss_curves(10 * np.arange(11), lines, loss="cross entropy", title="training in MXFP4")

# %% [markdown]
# Held out, the loss falls from .268 to .248, and the module with codes computes what the trained
# one does. It ends below the float module because it has seen 100 batches more, and not because
# rounding helps; that the loss falls at all is the point: gradients reach the weights.
#
# ## Any array
#
# `fake_quantize` rounds an array, or a pytree of them, along any axis, and keeps types; it is what
# a module of your own may call on anything. Beside it lies a trap: quantizing to codes and back
# gives the same numbers, and a gradient that is zero, for codes are integers.

# %%
kernel = model.blocks[0].up.kernel[...]


def straight_through(w):
    return jnp.sum(fake_quantize(w, "mxfp4:even", axis=0) ** 2)


def through_codes(w):
    return jnp.sum(MXFP4(scale_rule="even").quantize(w.T).dequantize() ** 2)


for rounded in (straight_through, through_codes):
    value, gradient = jax.value_and_grad(rounded)(kernel)
    print(
        f"{rounded.__name__:17s} {value:.4f}   norm of the gradient {jnp.linalg.norm(gradient):.3f}"
    )
