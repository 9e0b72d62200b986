"""A layer of the decoder, whose linears the caller gives.

With RMSNorm n(x) = x / sqrt(mean(x^2) + eps) * gain, a layer is

    q, k, v   = linear("attention_in", n1(x), (Wq, Wk, Wv))
    a         = softmax(R(q) R(k)^T / sqrt(d) + mask) v              (R: rotary positions)
    x        += linear("attention_out", a, (Wo,))
    up, gate  = linear("mlp_in", n2(x), (Wup, Wgate))
    x        += linear("mlp_out", silu(gate) * up, (Wdown,))

Families (families/) add to it: biases of linears, a norm of each head's q and k before R, a mask
that hides all but the last positions, norms of what is added to x, sinks of attention, another
activation, and experts (experts.py), of whose linears each token meets a few.

Source: Touvron et al., LLaMA (arXiv:2302.13971); Shazeer, GLU variants (arXiv:2002.05202); Yang et
al., Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388) technical reports for biases and norms.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from duquantpp_jax.models import prologue
from duquantpp_jax.models.attention import HIGHEST, causal_attention, rotary
from duquantpp_jax.models.cache import Store, put
from duquantpp_jax.models.config import FULL, SLIDING, DecoderConfig
from duquantpp_jax.models.experts import Routed, route
from duquantpp_jax.models.families.gpt_oss import clamped_swiglu
from duquantpp_jax.models.in_place import InPlace
from duquantpp_jax.models.parameters import (
    HEAD_NORMS,
    ROUTER,
    SINKS,
    SITE_WEIGHTS,
    input_norms,
    output_norms,
)
from duquantpp_jax.models.products import as_factor, matmul
from duquantpp_jax.models.prologue import InKernels, Prologue
from duquantpp_jax.models.rope import rotary_frequencies

Linear = Callable[[str, Any, tuple[Array, ...], Any], tuple[tuple[Array, ...], Any]]
"""`linear(site, x, weights, state) -> (an output per weight, out)`; see `Decoder.__call__`."""

ACTIVATIONS: Mapping[str, Callable[[Array, Array], Array]] = {
    "silu": lambda gate, up: jax.nn.silu(gate) * up,
    "gelu_pytorch_tanh": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    "clamped_swiglu": clamped_swiglu,
}
"""The activations of an MLP, of (gate, up), by their names in a configuration."""


def dense(site: str, x: Array | Routed, weights: tuple[Array, ...], state: Any) -> tuple[Any, None]:
    """The float linear: x W^T for each weight W [out, in].

    >>> import jax.numpy as jnp
    >>> (y,), _ = dense("mlp_out", jnp.ones((2, 64)), (jnp.ones((8, 64)),), None)
    >>> y.shape
    (2, 8)
    """
    return tuple(matmul(x, w) for w in weights), None


def rms_norm(
    config: DecoderConfig, x: Float[Array, "*tokens k"], weight: Float[Array, " k"] | InPlace
) -> Float32[Array, "*tokens k"]:
    """x / sqrt(mean(x^2) + eps) * gain, where gain is weight + config.norm_offset, in float32."""
    return prologue.rms_norm(x, weight, config.rms_norm_eps, config.norm_offset)


def join_layers(layers: Iterable[Any]) -> Any:
    """Pytrees of single layers as one, their arrays with a leading layer axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


class Positional(NamedTuple):
    """How a layer treats positions, in arrays that the scan over layers reads.

    Attributes:
      window: Positions that a query sees, its own among them; None where all layers see everything.
      frequencies: By which queries and keys are rotated.
      magnitude: Factor on queries and on keys.
    """

    window: Int32[Array | np.ndarray, "*layers"] | None
    frequencies: Float32[Array | np.ndarray, "*layers pairs"]
    magnitude: Float32[Array | np.ndarray, "*layers"]


def positional(config: DecoderConfig) -> Positional:
    """That of all layers, stacked."""
    window, local = config.sliding_window, config.rope_local_base_freq
    every = FULL if window is None else SLIDING
    types = config.layer_types or (every,) * config.num_hidden_layers
    seen = {FULL: np.iinfo(np.int32).max, SLIDING: window}
    scaled = config.rope_theta, config.rope_scaling
    turns = {FULL: scaled, SLIDING: scaled if local is None else (local, None)}
    turned = [turns[kind] for kind in types]
    return Positional(
        None if window is None else np.asarray([seen[kind] for kind in types], np.int32),
        np.stack([rotary_frequencies(theta, config.head_dim, by) for theta, by in turned]),
        np.asarray([1.0 if by is None else by.magnitude() for _, by in turned], np.float32),
    )


def positional_of(config: DecoderConfig, number: int) -> Positional:
    """That of a single layer."""
    return jax.tree.map(lambda stacked: stacked[number], positional(config))


def layer(
    config: DecoderConfig,
    x: Float32[Array, "rows length k"],
    parameters: Mapping[str, Any],
    where: Positional,
    linear: Linear,
    state: Mapping[str, Any],
    *,
    start: Int32[Array, "*rows"] | int = 0,
    store: Store | None = None,
    entries: InPlace | None = None,
    dtype: DTypeLike = jnp.float32,
    attention: Callable[..., Array] = causal_attention,
) -> tuple[Float32[Array, "rows length k"], dict[str, Any], InPlace | None]:
    """The hidden states after a layer, what `linear` gave out, and the new entries of the cache.

    Args:
      x: The hidden states before the layer, from position `start` on, of all rows or of each.
      parameters: Arrays by their names; norms of inputs may be those of all layers, in place.
      linear, state, store: As in `Decoder.__call__`, for a single layer.
      entries: Those of a cache, of all layers.
      dtype: Of the matrix products. Matrices are cast where they are used, to save memory; those
        in bfloat16 stay so, as a product in float32 takes them (products.py).
      attention: Of keys that are in no cache.
    """
    outs, before, after = {}, input_norms(config), output_norms(config)
    positions = jnp.asarray(start)[..., None] + jnp.arange(x.shape[1], dtype=jnp.int32)

    norm = {"eps": config.rms_norm_eps, "offset": config.norm_offset, "dtype": dtype}
    activation = ACTIVATIONS[config.activation]

    def at(site: str, x: Any, *parts: Array, residual: Array | None = None) -> list[Array]:
        names = SITE_WEIGHTS[site]
        weights = tuple(as_factor(parameters[name], dtype) for name in names)
        biases = [parameters.get(f"{name}.bias") for name in names]
        alone = site not in after and all(bias is None for bias in biases)
        if isinstance(x, Routed):
            biases = [None if bias is None else bias[x.expert] for bias in biases]
            x = x.astype(dtype)
        else:
            gain, f = parameters.get(before.get(site, "")), activation if parts else None
            x = Prologue((x, *parts), gain, residual if alone else None, f, **norm)
            if isinstance(linear, InKernels) and linear.takes(site, x, state[site]):
                residual = None if alone else residual
            else:
                x = x.applied()
        ys, outs[site] = linear(site, x, weights, state[site])
        pairs = zip(ys, biases, strict=True)
        ys = [y if bias is None else y + bias.astype(y.dtype) for y, bias in pairs]
        ys = [rms_norm(config, y, parameters[after[site]]) for y in ys] if site in after else ys
        return ys if residual is None else [residual + y.astype(jnp.float32) for y in ys]

    q, k, v = _heads(config, parameters, where, positions, *at("attention_in", x))
    sinks = parameters[SINKS].reshape(q.shape[2:4]) if config.sinks else None
    scalar = float(config.query_pre_attn_scalar or config.head_dim)
    seen: dict[str, Any] = {"positions": positions, "window": where.window}
    seen |= {"scalar": scalar, "sinks": sinks}
    if store is not None:
        q, k = store.move(q), store.move(k)
        new = store.encode(k), store.encode(v.astype(jnp.float32))
        if entries is None:
            k, v = map(store.decode, new)
        else:
            entries = put(entries, new, start)
    if store is None or entries is None:
        q, k, v = (y.astype(dtype) for y in (q, k, v))
        a = attention(q, k, v, **seen)
    else:
        a = store.attend(q.astype(dtype), entries, **seen)
    (x,) = at("attention_out", a.reshape(*x.shape[:2], -1), residual=x)
    h: Any = x
    scores = None
    if config.num_experts:
        h = rms_norm(config, x, parameters[before["mlp_in"]])
        router = parameters[ROUTER], parameters.get(f"{ROUTER}.bias"), config.num_experts_per_tok
        h, scores = route(h, *router, renormalized=config.norm_topk_prob)
    up, gate = at("mlp_in", h)
    if scores is None:
        (x,) = at("mlp_out", gate, up, residual=x)
        return x, outs, entries
    (y,) = at("mlp_out", dataclasses.replace(h, x=activation(gate, up)))
    y = jnp.einsum("...ck,...c->...k", y.astype(jnp.float32), scores, precision=HIGHEST)
    return x + y, outs, entries


def _heads(
    config: DecoderConfig,
    parameters: Mapping[str, Any],
    where: Positional,
    positions: Int32[Array, "*rows length"],
    q: Float[Array, "rows length queries"],
    k: Float[Array, "rows length keys"],
    v: Float[Array, "rows length keys"],
) -> tuple[Float32[Array, "..."], Float32[Array, "..."], Float[Array, "..."]]:
    """q [rows, length, kv_heads, groups, head_dim], k and v; q and k normed and rotated."""
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    q = q.reshape(*q.shape[:2], kv_heads, -1, head_dim)
    k, v = (y.reshape(*y.shape[:2], kv_heads, head_dim) for y in (k, v))
    if config.qk_norm:
        gains = (parameters[name] for name in HEAD_NORMS)
        q, k = (rms_norm(config, *pair) for pair in zip((q, k), gains, strict=True))
    q, k = (rotary(y, positions, where.frequencies) * where.magnitude for y in (q, k))
    return q, k, v
