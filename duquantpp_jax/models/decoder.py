"""A decoder that knows nothing of quantization: it calls a `linear` that is given to it.

A layer, with RMSNorm n(x) = x / sqrt(mean(x^2) + eps) * g, is

    q, k, v   = linear("attention_in", n1(x), (Wq, Wk, Wv))
    a         = softmax(R(q) R(k)^T / sqrt(d) + mask) v              (R: rotary positions)
    x        += linear("attention_out", a, (Wo,))
    up, gate  = linear("mlp_in", n2(x), (Wup, Wgate))
    x        += linear("mlp_out", silu(gate) * up, (Wdown,))

and families add to it: a bias to what a `linear` gives out, a norm of each head's q and k before
R, a mask that hides all but the last positions. They are listed in families.py.

A *site* is one input that several weights may share; `linear` is called once a site. Calibration,
capture and quantized evaluation are other `linear`s, so the model never changes. All layers are
stacked on a leading axis and scanned: one compiled body, however deep the model.

Source: Touvron et al., LLaMA (arXiv:2302.13971); Shazeer, GLU variants (arXiv:2002.05202); Yang et
al., Qwen2 (arXiv:2407.10671) and Qwen3 (arXiv:2505.09388) technical reports for biases and norms.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Integer
from numpy.typing import DTypeLike

from duquantpp_jax.models.attention import causal_attention, rotary
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

# Without it a GPU multiplies float32 in TF32, whose 10-bit mantissa errs like a quantizer.
_HIGHEST = jax.lax.Precision.HIGHEST

Linear = Callable[[str, Array, tuple[Array, ...], Any], tuple[tuple[Array, ...], Any]]
"""`linear(site, x, weights, state) -> (one output per weight, out)`; see `Decoder.__call__`."""

State = Mapping[str, Any] | tuple[Mapping[str, Any], ...]
"""What `linear` gets at each site and layer; see `Decoder.__call__`."""


def dense(site: str, x: Array, weights: tuple[Array, ...], state: Any) -> tuple[Any, None]:
    """The float linear: x W^T for each weight W [out, in], at the highest matmul precision."""
    return tuple(jnp.einsum("...i,oi->...o", x, w, precision=_HIGHEST) for w in weights), None


def rms_norm(
    x: Float[Array, "*tokens k"], gain: Float32[Array, " k"], eps: float
) -> Float32[Array, "*tokens k"]:
    """x / sqrt(mean(x^2) + eps) * gain, in float32. Source: arXiv:1910.07467, equation 4."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * gain


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
        self.embedding = nnx.Param(parameters[EMBEDDING])
        self.layers = nnx.Dict(
            {
                name.removeprefix(LAYER): nnx.Param(array)
                for name, array in parameters.items()
                if name.startswith(LAYER)
            }
        )
        self.norm = nnx.Param(parameters[NORM])
        self.head = None if config.tie_word_embeddings else nnx.Param(parameters[HEAD])

    def parameters(self) -> dict[str, Float32[Array, "..."]]:
        """The arrays under the names of `parameter_shapes`; `Decoder(config, these)` is a copy."""
        named = {EMBEDDING: self.embedding[...], NORM: self.norm[...]}
        named |= {LAYER + name: array[...] for name, array in self.layers.items()}
        if self.head is not None:
            named[HEAD] = self.head[...]
        return {name: named[name] for name in parameter_shapes(self.config)}

    def weights(self, site: str) -> tuple[Float32[Array, "layers out in"], ...]:
        """The weights that share one site's input, all layers stacked."""
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
          tokens: Token ids below vocab_size (others give NaN logits, as jnp.take fills).
          linear: Called once for each of `SITES` in a layer, in that order, as
            `linear(site, x, weights, state)` with x [rows, length, in] and weights [out, in];
            returns one output [rows, length, out] per weight, and any pytree `out`.
          state: For each site a pytree whose arrays have a leading layer axis; `linear` gets the
            slice of its layer. Sites left out get None. Where the pytrees of layers differ, a
            tuple of such mappings, each for the next so many layers.
          store: Keys and values are seen as a cache of this kind would give them back, which is
            what decoding token by token with `extend` sees.

        Returns:
          The logits, and `{site: out stacked over layers}`.

        Raises:
          ValueError: `state` has a key that is no site.
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
        """Logits at further positions, and the cache with those positions in it.

        Args:
          tokens: What follows the positions that the cache holds: all of a prompt, or one token.
          cache: Must have room for them: beyond its capacity, what it holds is overwritten.
          linear, state: As for `__call__`.
        """
        start = cache.length
        logits, _, held = self._run(tokens, linear, state, start, cache.store, cache.held)
        return logits, Cache(held, start + tokens.shape[1], cache.store)

    def _run(
        self,
        tokens: Integer[Array, "rows length"],
        linear: Linear,
        state: State | None,
        start: Int32[Array, ""],
        store: Store | None,
        held: Any,
    ) -> tuple[Float32[Array, "rows length vocab"], dict[str, Any], Any]:
        """Logits at positions from `start` on, what `linear` gave out, what is held after it."""
        config = self.config
        runs = state if isinstance(state, tuple) else (state or {},)
        if unknown := set().union(*runs) - set(SITES):
            raise ValueError(
                f"state has {min(unknown)!r}, which is no site: use {', '.join(SITES)}"
            )
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)

        def body(x: Array, scanned: Any) -> tuple[Array, Any]:
            layer, states, window, held = scanned
            attend = functools.partial(
                self._attend, layer=layer, positions=positions, window=window, store=store
            )
            return self._layer(x, layer, linear, states, attend, held)

        x = jnp.take(self.embedding[...], tokens, axis=0, mode="fill").astype(jnp.float32)
        layers = {name: array[...] for name, array in self.layers.items()}
        scanned = (layers, layer_windows(config), held)
        given, first = [], 0
        for run in runs:
            count = config.num_hidden_layers
            if len(runs) > 1:
                count = jax.tree.leaves(run)[0].shape[0]
            part = jax.tree.map(lambda a: a[first : first + count], scanned)  # noqa: B023
            states = dict.fromkeys(SITES) | dict(run)
            x, out = jax.lax.scan(body, x, (part[0], states, *part[1:]), length=count)
            given.append(out)
            first += count
        outs, held = jax.tree.map(lambda *parts: jnp.concatenate(parts), *given)
        x = rms_norm(x, self.norm[...], config.rms_norm_eps).astype(self.dtype)
        head = self.embedding if self.head is None else self.head
        logits = jnp.einsum(
            "rlk,vk->rlv",
            x,
            head[...].astype(self.dtype),
            precision=_HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return logits, outs, held

    def _layer(
        self,
        x: Float32[Array, "rows length k"],
        layer: dict[str, Array],
        linear: Linear,
        state: Mapping[str, Any],
        attend: Callable[..., Any],
        held: Any,
    ) -> tuple[Float32[Array, "rows length k"], tuple[dict[str, Any], Any]]:
        """One layer of the equations at the top of this file."""
        config, dtype = self.config, self.dtype
        outs = {}

        def at(site: str, x: Array) -> list[Array]:
            names = SITE_WEIGHTS[site]
            weights = tuple(layer[name].astype(dtype) for name in names)
            ys, outs[site] = linear(site, x.astype(dtype), weights, state[site])
            biases = (layer.get(f"{name}.bias") for name in names)
            return [
                y if b is None else y + b.astype(y.dtype) for y, b in zip(ys, biases, strict=True)
            ]

        q, k, v = at("attention_in", rms_norm(x, layer[ATTENTION_NORM], config.rms_norm_eps))
        a, held = attend(q, k, v, held)
        (y,) = at("attention_out", a)
        x = x + y.astype(jnp.float32)
        up, gate = at("mlp_in", rms_norm(x, layer[MLP_NORM], config.rms_norm_eps))
        (y,) = at("mlp_out", jax.nn.silu(gate) * up)
        return x + y.astype(jnp.float32), (outs, held)

    def _attend(
        self,
        q: Float[Array, "rows length queries"],
        k: Float[Array, "rows length keys"],
        v: Float[Array, "rows length keys"],
        held: Any,
        *,
        layer: dict[str, Array],
        positions: Int32[Array, " length"],
        window: Int32[Array, ""] | None,
        store: Store | None,
    ) -> tuple[Float[Array, "rows length queries"], Any]:
        """Attention of all heads, and what is held with these positions written."""
        config, dtype = self.config, self.dtype
        rows, length, _ = q.shape
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        q = q.reshape(rows, length, kv_heads, -1, head_dim)
        k, v = (one.reshape(rows, length, kv_heads, head_dim) for one in (k, v))
        if config.qk_norm:
            q, k = (
                rms_norm(one, layer[name], config.rms_norm_eps)
                for one, name in zip((q, k), HEAD_NORMS, strict=True)
            )
        frequencies = rotary_frequencies(config.rope_theta, head_dim, config.rope_scaling)
        q, k = (rotary(one, positions, frequencies) for one in (q, k))
        if config.rope_scaling is not None:
            q, k = (np.float32(config.rope_scaling.magnitude()) * one for one in (q, k))
        if store is not None:
            q, k = store.move(q), store.move(k)
            new = store.hold(k), store.hold(v.astype(jnp.float32))
            held = None if held is None else written(held, new, positions[0])
            k, v = (store.read(one) for one in held or new)
        a = causal_attention(q.astype(dtype), k.astype(dtype), v.astype(dtype), positions, window)
        return a.reshape(rows, length, -1), held


def layer_windows(config: DecoderConfig) -> Int32[np.ndarray, " layers"] | None:
    """How far each layer sees back; None where all of them see everything."""
    if not any(config.windows):
        return None
    everything = np.iinfo(np.int32).max
    return np.asarray([window or everything for window in config.windows], np.int32)
