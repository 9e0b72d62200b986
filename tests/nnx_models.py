"""An MLP-mixer, a ViT and a decoder, as a user of flax nnx writes them; nothing of them is ours."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH = HIDDEN = LENGTH = 64
"""All alike, so that few programs are compiled; test_modules.py has linears of other shapes."""


def drawn(key, shape, dtype=jnp.float32):
    """A kernel from NumPy: JAX compiles a program for every shape."""
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape, np.float32) / 8)


INIT = {"kernel_init": drawn}


class Mlp(nnx.Module):
    """Two linears, and dropout that only training has."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(width, hidden, rngs=rngs, **INIT)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(hidden, width, rngs=rngs, **INIT)

    def __call__(self, x):
        return self.second(self.dropout(nnx.gelu(self.first(x))))


class MixerBlock(nnx.Module):
    """Mixes tokens, then channels."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.tokens = Mlp(LENGTH, WIDTH, rngs)
        self.channels = Mlp(WIDTH, HIDDEN, rngs)

    def __call__(self, x):
        x = x + self.tokens(self.norms[0](x).swapaxes(1, 2)).swapaxes(1, 2)
        return x + self.channels(self.norms[1](x))


class Mixer(nnx.Module):
    """Patches of 4 x 16 numbers, embedded by a linear over both axes."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.LinearGeneral((4, 16), WIDTH, axis=(-2, -1), rngs=rngs, **INIT)
        self.blocks = nnx.List([MixerBlock(rngs)])
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs, **INIT)

    def __call__(self, images):
        x = self.embed(images.reshape(len(images), LENGTH, 4, 16))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=1))


class VitBlock(nnx.Module):
    """flax's attention, and an MLP."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs, **INIT)
        self.mlp = Mlp(WIDTH, HIDDEN, rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Vit(nnx.Module):
    """Patches by a convolution, learned positions, a mean over tokens."""

    def __init__(self, rngs: nnx.Rngs):
        self.patches = nnx.Conv(1, WIDTH, (4, 4), strides=(4, 4), rngs=rngs, **INIT)
        self.positions = nnx.Param(drawn(None, (LENGTH, WIDTH)))
        self.blocks = nnx.List([VitBlock(rngs)])
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs, **INIT)

    def __call__(self, images):
        x = self.patches(images.reshape(len(images), 32, 32, 1))
        x = x.reshape(len(images), LENGTH, WIDTH) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=1))


class DecoderBlock(nnx.Module):
    """Attention of einsums, k and v from a single kernel, and a gated MLP."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.q = nnx.Einsum("BTD,NDH->BTNH", (4, WIDTH, 16), rngs=rngs, **INIT)
        self.kv = nnx.Einsum("BSD,CKDH->CBSKH", (2, 4, WIDTH, 16), rngs=rngs, **INIT)
        self.out = nnx.Einsum("BTNH,NHD->BTD", (4, 16, WIDTH), rngs=rngs, **INIT)
        self.gate = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs, **INIT)
        self.up = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs, **INIT)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs, **INIT)

    def __call__(self, x):
        h = self.norms[0](x)
        q, (k, v) = self.q(h), self.kv(h)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))
        h = self.norms[1](x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


class DecoderOnly(nnx.Module):
    """Blocks under nnx.remat; the embedding is the head, too."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(50, WIDTH, embedding_init=drawn, rngs=rngs)
        self.blocks = nnx.List([DecoderBlock(rngs)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = nnx.remat(DecoderBlock.__call__)(block, x)
        return self.embed.attend(self.norm(x))


def batch_of(model: type[nnx.Module]) -> np.ndarray:
    """A row: token ids for a decoder, an image for the others."""
    random = np.random.default_rng(0)
    if model is DecoderOnly:
        return random.integers(0, 50, (1, LENGTH))
    return random.standard_normal((1, LENGTH * 64 if model is Mixer else 32 * 32), np.float32)
