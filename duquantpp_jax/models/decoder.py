"""A decoder whose linears the caller gives, so that it knows nothing of quantization.

A layer, with RMSNorm n(x) = x / sqrt(mean(x^2) + eps) * g, is

    q, k, v   = linear("attention_in", n1(x), (Wq, Wk, Wv))
    a         = softmax(R(q) R(k)^T / sqrt(d) + mask) v              (R: rotary positions)
    x        += linear("attention_out", a, (Wo,))
    up, gate  = linear("mlp_in", n2(x), (Wup, Wgate))
    x        += linear("mlp_out", silu(gate) * up, (Wdown,))

Families (families.py) add to it: biases of linears, a norm of each head's q and k before R, a mask
that hides all but the last positions.

A *site* is an input of linears; several weights may share it, and `linear` is called once a site.
Calibration and quantized evaluation pass another `linear` to the same model. All layers are stacked
on a leading axis and scanned, so that a model of any depth compiles a single layer.

Source: Touvron et al., LLaMA (arXiv:2302.13971); Shazeer, GLU variants (arXiv:2002.05202); Yang et
al., Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388) technical reports for biases and norms.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Integer
from numpy.typing import DTypeLike

from duquantpp_jax.models.attention import HIGHEST, causal_attention, rotary
from duquantpp_jax.models.cache import Cache, Store, written
from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.parameters import (
    ATTENTION_NORM,
    EMBEDDING,
    HEAD,
    HEAD_NORMS,
    LAYER,
    MLP_NORM,
    NORM,
    SITE_WEIGHTS,
    SITES,
    parameter_shapes,
)
from duquantpp_jax.models.rope import rotary_frequencies

Linear = Callable[[str, Array, tuple[Array, ...], Any], tuple[tuple[Array, ...], Any]]
"""`linear(site, x, weights, state) -> (an output per weight, out)`; see `Decoder.__call__`."""

State = Mapping[str, Any] | tuple[Mapping[str, Any], ...]
"""The state of `linear` at each site, stacked over layers; see `Decoder.__call__`."""


def dense(site: str, x: Array, weights: tuple[Array, ...], state: Any) -> tuple[Any, None]:
    """The float linear: x W^T for each weight W [out, in], at the highest matmul precision."""
    return tuple(jnp.einsum("...i,oi->...o", x, w, precision=HIGHEST) for w in weights), None


def rms_norm(
    x: Float[Array, "*tokens k"], gain: Float32[Array, " k"], eps: float
) -> Float32[Array, "*tokens k"]:
    """x / sqrt(mean(x^2) + eps) * gain, in float32. Source: arXiv:1910.07467, equation 4."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * gain


class Decoder(nnx.Module):
    """The decoder as a pytree: pass it to `jax.jit` and `jax.grad`, or `nnx.split` it.

    Attributes:
      dtype: Of the matrix products; static. The residual stream, norms, rotary positions, softmax
        and logits are always float32.
      embedding: [vocab, hidden]; also the head where the embeddings are tied.
      layers: Parameters with a leading layer axis, by their names inside a layer of a checkpoint.
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
          parameters: Arrays with the names and shapes of `parameter_shapes(config)`.

        Raises:
          ValueError: A parameter is missing, unknown or of another shape.
        """
        shapes = parameter_shapes(config)
        got = {name: jnp.shape(array) for name, array in parameters.items()}
        if got != shapes:
            wrong = next(name for name in shapes | got if got.get(name) != shapes.get(name))
            has, wants = got.get(wrong), shapes.get(wrong)
            raise ValueError(f"parameter {wrong} has shape {has}: this configuration wants {wants}")
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.embedding = nnx.Param(parameters[EMBEDDING])
        layers = {n.removeprefix(LAYER): a for n, a in parameters.items() if n.startswith(LAYER)}
        self.layers = nnx.Dict({name: nnx.Param(array) for name, array in layers.items()})
        self.norm = nnx.Param(parameters[NORM])
        self.head = None if config.tie_word_embeddings else nnx.Param(parameters[HEAD])

    def parameters(self) -> dict[str, Float32[Array, "..."]]:
        """The arrays by the names of `parameter_shapes`, as `Decoder` takes them."""
        named = {EMBEDDING: self.embedding[...], NORM: self.norm[...]}
        named |= {LAYER + name: array[...] for name, array in self.layers.items()}
        if self.head is not None:
            named[HEAD] = self.head[...]
        return {name: named[name] for name in parameter_shapes(self.config)}

    def weights(self, site: str) -> tuple[Float32[Array, "layers out in"], ...]:
        """The weights that share the input of a site, all layers stacked."""
        return tuple(self.layers[name][...] for name in SITE_WEIGHTS[site])

    def __call__(
        self,
        tokens: Integer[Array, "rows length"],
        linear: Linear = dense,
        state: State | None = None,
        *,
        store: Store | None = None,
    ) -> tuple[Float32[Array, "rows length vocab"], dict[str, Any]]:
        """Logits of the next token at every position, and what `linear` gave out.

        Call it under jit: outside, every call traces and compiles the scan anew.

        Args:
          tokens: Token ids below vocab_size; others give NaN logits.
          linear: Called for each of `SITES` in a layer, in this order, as
            `linear(site, x, weights, state)` with x [rows, length, in] and weights [out, in].
            It returns an output [rows, length, out] per weight, and any pytree `out`.
          state: For each site a pytree of arrays with a leading layer axis; `linear` gets the
            slice of its layer, and None where the site has no state. If the pytrees differ from
            layer to layer: a tuple of such mappings, each for a run of layers.
          store: Attention sees keys and values as this format of a cache encodes them, as it does
            in `extend`.

        Returns:
          The logits, and `{site: out stacked over layers}`.

        Raises:
          ValueError: `state` has a key that is not a site.
        """
        logits, outs, _ = self._run(tokens, linear, state, jnp.int32(0), store, None)
        return logits, outs

    def extend(
        self,
        tokens: Integer[Array, "rows length"],
        cache: Cache,
        linear: Linear = dense,
        state: State | None = None,
    ) -> tuple[Float32[Array, "rows length vocab"], Cache]:
        """Logits at further positions, and the cache with these positions in it.

        Args:
          tokens: The tokens after those in the cache: all of a prompt, or a single token.
          cache: Must have room for them; beyond its capacity older entries are overwritten.
          linear, state: As for `__call__`.
        """
        start = cache.length
        logits, _, entries = self._run(tokens, linear, state, start, cache.store, cache.entries)
        return logits, Cache(entries, start + tokens.shape[1], cache.store)

    def _run(
        self,
        tokens: Integer[Array, "rows length"],
        linear: Linear,
        state: State | None,
        start: Int32[Array, ""],
        store: Store | None,
        entries: Any,
    ) -> tuple[Float32[Array, "rows length vocab"], dict[str, Any], Any]:
        """Logits at positions from `start` on, what `linear` gave out, and the new entries."""
        config = self.config
        runs = state if isinstance(state, tuple) else (state or {},)
        if unknown := set().union(*runs) - set(SITES):
            raise ValueError(f"state has {min(unknown)!r}, not a site: use {', '.join(SITES)}")
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)

        def body(x: Array, scanned: Any) -> tuple[Array, Any]:
            layer, states, window, entries = scanned
            return self._layer(x, layer, linear, states, window, entries, positions, store)

        x = jnp.take(self.embedding[...], tokens, axis=0, mode="fill").astype(jnp.float32)
        layers = {name: array[...] for name, array in self.layers.items()}
        scanned = (layers, layer_windows(config), entries)
        given, first = [], 0
        for run in runs:
            whole = len(runs) == 1
            count = config.num_hidden_layers if whole else jax.tree.leaves(run)[0].shape[0]
            part = jax.tree.map(lambda a: a[first : first + count], scanned)  # noqa: B023
            states = dict.fromkeys(SITES) | dict(run)
            x, out = jax.lax.scan(body, x, (part[0], states, *part[1:]), length=count)
            given.append(out)
            first += count
        outs, entries = jax.tree.map(lambda *parts: jnp.concatenate(parts), *given)
        x = rms_norm(x, self.norm[...], config.rms_norm_eps).astype(self.dtype)
        head = (self.embedding if self.head is None else self.head)[...].astype(self.dtype)
        logits = jnp.einsum(
            "rlk,vk->rlv", x, head, precision=HIGHEST, preferred_element_type=jnp.float32
        )
        return logits, outs, entries

    def _layer(
        self,
        x: Float32[Array, "rows length k"],
        layer: dict[str, Array],
        linear: Linear,
        state: Mapping[str, Any],
        window: Int32[Array, ""] | None,
        entries: Any,
        positions: Int32[Array, " length"],
        store: Store | None,
    ) -> tuple[Float32[Array, "rows length k"], tuple[dict[str, Any], Any]]:
        """A layer, by the equations at the top of this file."""
        config, dtype = self.config, self.dtype
        outs = {}

        def at(site: str, x: Array) -> list[Array]:
            names = SITE_WEIGHTS[site]
            weights = tuple(layer[name].astype(dtype) for name in names)
            ys, outs[site] = linear(site, x.astype(dtype), weights, state[site])
            pairs = zip(ys, (layer.get(f"{name}.bias") for name in names), strict=True)
            return [y if bias is None else y + bias.astype(y.dtype) for y, bias in pairs]

        q, k, v = at("attention_in", rms_norm(x, layer[ATTENTION_NORM], config.rms_norm_eps))
        a, entries = self._attend(q, k, v, layer, window, entries, positions, store)
        (y,) = at("attention_out", a)
        x = x + y.astype(jnp.float32)
        up, gate = at("mlp_in", rms_norm(x, layer[MLP_NORM], config.rms_norm_eps))
        (y,) = at("mlp_out", jax.nn.silu(gate) * up)
        return x + y.astype(jnp.float32), (outs, entries)

    def _attend(
        self,
        q: Float[Array, "rows length queries"],
        k: Float[Array, "rows length keys"],
        v: Float[Array, "rows length keys"],
        layer: dict[str, Array],
        window: Int32[Array, ""] | None,
        entries: Any,
        positions: Int32[Array, " length"],
        store: Store | None,
    ) -> tuple[Float[Array, "rows length queries"], Any]:
        """Attention of all heads, and the entries with these positions written."""
        config, dtype = self.config, self.dtype
        rows, length, _ = q.shape
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        q = q.reshape(rows, length, kv_heads, -1, head_dim)
        k, v = (heads.reshape(rows, length, kv_heads, head_dim) for heads in (k, v))
        if config.qk_norm:
            q_gain, k_gain = (layer[name] for name in HEAD_NORMS)
            q, k = (rms_norm(*pair, config.rms_norm_eps) for pair in ((q, q_gain), (k, k_gain)))
        frequencies = rotary_frequencies(config.rope_theta, head_dim, config.rope_scaling)
        q, k = (rotary(heads, positions, frequencies) for heads in (q, k))
        if config.rope_scaling is not None:
            q, k = (np.float32(config.rope_scaling.magnitude()) * heads for heads in (q, k))
        if store is not None:
            q, k = store.move(q), store.move(k)
            new = store.encode(k), store.encode(v.astype(jnp.float32))
            entries = None if entries is None else written(entries, new, positions[0])
            k, v = map(store.decode, entries or new)
        a = causal_attention(q.astype(dtype), k.astype(dtype), v.astype(dtype), positions, window)
        return a.reshape(rows, length, -1), entries


def layer_windows(config: DecoderConfig) -> Int32[np.ndarray, " layers"] | None:
    """Positions that each layer sees; None where all layers see everything."""
    if not any(config.windows):
        return None
    everything = np.iinfo(np.int32).max
    return np.asarray([window or everything for window in config.windows], np.int32)
