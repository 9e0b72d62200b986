"""A Llama decoder that knows nothing of quantization: it calls a `linear` that is given to it.

A layer, with RMSNorm n(x) = x / sqrt(mean(x^2) + eps) * g, is

    q, k, v   = linear("attention_in", n1(x), (Wq, Wk, Wv))
    a         = softmax(R(q) R(k)^T / sqrt(d) + causal mask) v       (R: rotary positions)
    x        += linear("attention_out", a, (Wo,))
    up, gate  = linear("mlp_in", n2(x), (Wup, Wgate))
    x        += linear("mlp_out", silu(gate) * up, (Wdown,))

A *site* is one input that several weights may share; `linear` is called once a site. Calibration,
capture and quantized evaluation are other `linear`s, so the model never changes. All layers are
stacked on a leading axis and scanned: one compiled body, however deep the model.

Source: Touvron et al., LLaMA (arXiv:2302.13971); Su et al., RoFormer (arXiv:2104.09864), in the
half-rotation layout of Hugging Face checkpoints; Shazeer, GLU variants (arXiv:2002.05202);
Ainslie et al., GQA (arXiv:2305.13245).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Integer, PRNGKeyArray
from numpy.typing import DTypeLike

from duquantpp_jax.models.config import DecoderConfig

SITES = ("attention_in", "attention_out", "mlp_in", "mlp_out")
"""The sites of a layer in order of call."""

SITE_WEIGHTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention_out": ("self_attn.o_proj",),
        "mlp_in": ("mlp.up_proj", "mlp.gate_proj"),
        "mlp_out": ("mlp.down_proj",),
    }
)
"""The weights of each site in order, by their name inside a checkpoint's layer."""

_ATTENTION_NORM, _MLP_NORM = "input_layernorm", "post_attention_layernorm"
_EMBEDDING, _NORM, _HEAD, _LAYER = "model.embed_tokens", "model.norm", "lm_head", "model.layers.*."

# Without it a GPU multiplies float32 in TF32, whose 10-bit mantissa errs like a quantizer.
_HIGHEST = jax.lax.Precision.HIGHEST

Linear = Callable[[str, Array, tuple[Array, ...], Any], tuple[tuple[Array, ...], Any]]
"""`linear(site, x, weights, state) -> (one output per weight, out)`; see `Decoder.__call__`."""


def linear_names(site: str, layer: int) -> tuple[str, ...]:
    """Checkpoint names of a site's linears, e.g. `model.layers.3.mlp.down_proj`."""
    return tuple(_LAYER.replace("*", str(layer)) + name for name in SITE_WEIGHTS[site])


def dense(site: str, x: Array, weights: tuple[Array, ...], state: Any) -> tuple[Any, None]:
    """The float linear: x W^T for each weight W [out, in], at the highest matmul precision."""
    return tuple(jnp.einsum("...i,oi->...o", x, w, precision=_HIGHEST) for w in weights), None


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by checkpoint name without `.weight`.

    In `model.layers.*.NAME` the star stands for the layer, which is the leading axis of the shape.
    """
    layers, hidden, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    layer = {
        _ATTENTION_NORM: (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        _MLP_NORM: (hidden,),
        "mlp.up_proj": (ffn, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden)}
    shapes |= {_LAYER + name: (layers, *shape) for name, shape in layer.items()}
    shapes[_NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (config.vocab_size, hidden)
    return shapes


def random_parameters(config: DecoderConfig, key: PRNGKeyArray) -> dict[str, Float32[Array, "..."]]:
    """Parameters to start training from.

    Normal with standard deviation 0.02, divided by sqrt(2 layers) for the two matrices that write
    to the residual stream; norms are 1. Source: Radford et al., GPT-2 (2019), section 2.3.
    """
    shapes = parameter_shapes(config)
    parameters = {}
    for one, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
        if name.endswith("norm"):
            parameters[name] = jnp.ones(shape, jnp.float32)
            continue
        residual = name.endswith(("o_proj", "down_proj"))
        std = 0.02 / np.sqrt(2 * config.num_hidden_layers) if residual else 0.02
        parameters[name] = jnp.float32(std) * jax.random.normal(one, shape, jnp.float32)
    return parameters


def rms_norm(
    x: Float[Array, "*tokens k"], gain: Float32[Array, " k"], eps: float
) -> Float32[Array, "*tokens k"]:
    """x / sqrt(mean(x^2) + eps) * gain, in float32. Source: arXiv:1910.07467, equation 4."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def rotary(
    x: Float[Array, "rows length *heads head_dim"], theta: float
) -> Float32[Array, "rows length *heads head_dim"]:
    """Rotates the pair (x_i, x_{i + d/2}) at position p by the angle p theta^(-2i/d)."""
    length, half = x.shape[1], x.shape[-1] // 2
    frequency = np.float32(theta ** (-np.arange(half) / half))
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
    angle = angle.reshape(length, *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def causal_attention(
    q: Float[Array, "rows length kv_heads groups head_dim"],
    k: Float[Array, "rows length kv_heads head_dim"],
    v: Float[Array, "rows length kv_heads head_dim"],
) -> Float[Array, "rows length kv_heads groups head_dim"]:
    """softmax(q k^T / sqrt(d)) v over keys not after the query; softmax in float32."""
    length, dim = q.shape[1], q.shape[-1]
    scores = jnp.einsum(
        "rqhgd,rkhd->rhgqk", q, k, precision=_HIGHEST, preferred_element_type=jnp.float32
    )
    visible = jnp.tri(length, dtype=bool)
    weights = jax.nn.softmax(jnp.where(visible, scores / np.float32(dim**0.5), -jnp.inf))
    return jnp.einsum("rhgqk,rkhd->rqhgd", weights.astype(v.dtype), v, precision=_HIGHEST)


class Decoder(nnx.Module):
    """The decoder as a pytree: pass it to `jax.jit` and `jax.grad`, or `nnx.split` it.

    Attributes:
      config: Its sizes and constants; static.
      dtype: What the matrix products compute in; static. The residual stream, norms, rotary,
        softmax and logits are float32 whatever it is.
      embedding: [vocab, hidden]; also the head where the embeddings are tied.
      layers: Name inside a checkpoint's layer -> parameter with a leading layer axis.
      norm: Gain of the last norm, [hidden].
      head: [vocab, hidden], or None where the embeddings are tied.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parameters: Mapping[str, Float32[Array, "..."]],
        *,
        dtype: DTypeLike = jnp.float32,
    ):
        """Args:
          config: The sizes.
          parameters: Arrays named and shaped as `parameter_shapes(config)` says.
          dtype: What the matrix products compute in.

        Raises:
          ValueError: a parameter is missing, unknown or of another shape.
        """
        shapes = parameter_shapes(config)
        got = {name: jnp.shape(array) for name, array in parameters.items()}
        if got != shapes:
            wrong = next(name for name in shapes | got if got.get(name) != shapes.get(name))
            raise ValueError(
                f"parameter {wrong} has shape {got.get(wrong)}: "
                f"this configuration wants {shapes.get(wrong)}"
            )
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.embedding = nnx.Param(parameters[_EMBEDDING])
        self.layers = nnx.Dict(
            {
                name.removeprefix(_LAYER): nnx.Param(array)
                for name, array in parameters.items()
                if name.startswith(_LAYER)
            }
        )
        self.norm = nnx.Param(parameters[_NORM])
        self.head = None if config.tie_word_embeddings else nnx.Param(parameters[_HEAD])

    def parameters(self) -> dict[str, Float32[Array, "..."]]:
        """The arrays under the names of `parameter_shapes`; `Decoder(config, these)` is a copy."""
        named = {_EMBEDDING: self.embedding[...], _NORM: self.norm[...]}
        named |= {_LAYER + name: array[...] for name, array in self.layers.items()}
        if self.head is not None:
            named[_HEAD] = self.head[...]
        return {name: named[name] for name in parameter_shapes(self.config)}

    def weights(self, site: str) -> tuple[Float32[Array, "layers out in"], ...]:
        """The weights that share one site's input, all layers stacked."""
        return tuple(self.layers[name][...] for name in SITE_WEIGHTS[site])

    def __call__(
        self,
        tokens: Integer[Array, "rows length"],
        linear: Linear = dense,
        state: Mapping[str, Any] | None = None,
    ) -> tuple[Float32[Array, "rows length vocab"], dict[str, Any]]:
        """Logits of the next token at every position, and what `linear` gave out.

        Call it under jit: outside, every call traces and compiles the scan anew.

        Args:
          tokens: Token ids below vocab_size (others give NaN logits, as jnp.take fills).
          linear: Called once for each of `SITES` in a layer, in that order, as
            `linear(site, x, weights, state)` with x [rows, length, in] and weights [out, in];
            returns one output [rows, length, out] per weight, and any pytree `out`.
          state: For each site a pytree whose arrays have a leading layer axis; `linear` gets the
            slice of its layer. Sites left out get None.

        Returns:
          The logits, and `{site: out stacked over layers}`.

        Raises:
          ValueError: `state` has a key that is no site.
        """
        config = self.config
        if unknown := set(state or ()) - set(SITES):
            raise ValueError(
                f"state has {min(unknown)!r}, which is no site: use {', '.join(SITES)}"
            )
        states = dict.fromkeys(SITES) | dict(state or {})

        def body(x: Array, scanned: Any) -> tuple[Array, dict[str, Any]]:
            return self._layer(x, scanned[0], linear, scanned[1])

        x = jnp.take(self.embedding[...], tokens, axis=0, mode="fill").astype(jnp.float32)
        layers = {name: array[...] for name, array in self.layers.items()}
        x, outs = jax.lax.scan(body, x, (layers, states), length=config.num_hidden_layers)
        x = rms_norm(x, self.norm[...], config.rms_norm_eps).astype(self.dtype)
        head = self.embedding if self.head is None else self.head
        logits = jnp.einsum(
            "rlk,vk->rlv",
            x,
            head[...].astype(self.dtype),
            precision=_HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return logits, outs

    def _layer(
        self, x: Float32[Array, "rows length k"], layer: dict[str, Array], linear: Linear, state
    ) -> tuple[Float32[Array, "rows length k"], dict[str, Any]]:
        """One layer of the equations at the top of this file."""
        config, dtype = self.config, self.dtype
        rows, length, _ = x.shape
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        groups = config.num_attention_heads // kv_heads
        outs = {}

        def at(site: str, x: Array) -> tuple[Array, ...]:
            weights = tuple(layer[name].astype(dtype) for name in SITE_WEIGHTS[site])
            ys, outs[site] = linear(site, x.astype(dtype), weights, state[site])
            return ys

        q, k, v = at("attention_in", rms_norm(x, layer[_ATTENTION_NORM], config.rms_norm_eps))
        q = rotary(q.reshape(rows, length, kv_heads, groups, head_dim), config.rope_theta)
        k = rotary(k.reshape(rows, length, kv_heads, head_dim), config.rope_theta)
        v = v.reshape(rows, length, kv_heads, head_dim)
        a = causal_attention(q.astype(dtype), k.astype(dtype), v.astype(dtype))
        (y,) = at("attention_out", a.reshape(rows, length, -1))
        x = x + y.astype(jnp.float32)
        up, gate = at("mlp_in", rms_norm(x, layer[_MLP_NORM], config.rms_norm_eps))
        (y,) = at("mlp_out", jax.nn.silu(gate) * up)
        return x + y.astype(jnp.float32), outs
