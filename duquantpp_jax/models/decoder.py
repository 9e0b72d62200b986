"""A decoder whose linears the caller gives, so that it knows nothing of quantization.

    x = embedding[tokens];   x = layer(x) for every layer (layers.py);    logits = n(x) head^T

A *site* is an input of linears; several weights may share it, and `linear` is called once a site.
Calibration and quantized evaluation pass another `linear` to the same model. All layers are stacked
on a leading axis and scanned, so that a model of any depth compiles a single layer.
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

from duquantpp_jax.models.attention import (
    causal_attention,
    fused_attention,
    fused_attention_runs,
    product,
)
from duquantpp_jax.models.cache import Cache, Store
from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.in_place import InPlace, any_in_place, apart
from duquantpp_jax.models.layers import Linear, dense, layer, positional, rms_norm
from duquantpp_jax.models.parameters import (
    EMBEDDING,
    HEAD,
    LAYER,
    LINEARS,
    NORM,
    SITE_WEIGHTS,
    SITES,
    input_norms,
    parameter_shapes,
)
from duquantpp_jax.models.products import as_factor, exact, float_product, is_one
from duquantpp_jax.models.prologue import InKernels

State = Mapping[str, Any] | tuple[Mapping[str, Any], ...]
"""The state of `linear` at each site, stacked over layers; see `Decoder.__call__`."""

COMPUTE = {"float32": jnp.float32, "bf16": jnp.bfloat16}
"""Types of matrix products by their names in commands."""


TOGETHER = 4
"""Layers that a token passes in a single step of the scan, where kernels read their weights in
place: a GPU is given the kernels of a step at once, and waits between steps."""


def fuses_attention(config: DecoderConfig) -> bool:
    """Whether `fused_attention` runs here, in bfloat16, and is this model's attention."""
    plain = positional(config).window is None and not config.sinks
    return plain and fused_attention_runs(config.head_dim)


class Decoder(nnx.Module):
    """The decoder as a pytree: pass it to `jax.jit` and `jax.grad`, or `nnx.split` it.

    Attributes:
      dtype: Of the matrix products; static. The residual stream, norms, rotary positions, softmax
        and logits are always float32. Parameters may be of any float type: those of a layer are
        converted while it runs, so that a model in bfloat16 takes two bytes for each.
      rematerialized: Whether gradients run each layer again rather than keep what it made; static.
      attention: Of keys that are in no cache; static.
      embedding: [vocab, hidden]; also the head where the embeddings are tied.
      layers: Parameters with a leading layer axis, by their names inside a layer of a checkpoint.
      head: [vocab, hidden], or None where the embeddings are tied.
    """

    def __init__(
        self,
        config: DecoderConfig,
        parameters: Mapping[str, Float[Array, "..."]],
        *,
        dtype: DTypeLike = jnp.float32,
        linears: bool = True,
    ):
        """Args:
          parameters: Arrays with the names and shapes of `parameter_shapes(config)`.
          linears: False if the weights of linears are left out, for a `linear` that has its own.

        Raises:
          ValueError: A parameter is missing, unknown or of another shape.
        """
        shapes = parameter_shapes(config)
        if not linears:
            names = [LAYER + name for name in LINEARS]
            empty = jnp.zeros((config.num_hidden_layers, 0), jnp.float32)
            shapes |= dict.fromkeys(names, empty.shape)
            parameters = {**parameters, **dict.fromkeys(names, empty)}
        got = {name: jnp.shape(array) for name, array in parameters.items()}
        if got != shapes:
            wrong = next(name for name in shapes | got if got.get(name) != shapes.get(name))
            has, wants = got.get(wrong), shapes.get(wrong)
            raise ValueError(f"parameter {wrong} has shape {has}: this configuration wants {wants}")
        self.config, self.dtype, self.rematerialized = config, jnp.dtype(dtype), False
        self.attention = causal_attention
        self.embedding = nnx.Param(parameters[EMBEDDING])
        layers = {n.removeprefix(LAYER): a for n, a in parameters.items() if n.startswith(LAYER)}
        self.layers = nnx.Dict({name: nnx.Param(array) for name, array in layers.items()})
        self.norm = nnx.Param(parameters[NORM])
        self.head = None if config.tie_word_embeddings else nnx.Param(parameters[HEAD])

    def computing(self, dtype: DTypeLike) -> "Decoder":
        """The same decoder with matrix products of this type."""
        moved = jax.tree.map(lambda leaf: leaf, self)
        moved.dtype = jnp.dtype(dtype)
        return moved

    def rematerializing(self) -> "Decoder":
        """The same decoder whose gradients take the memory of one layer, and a third more time.

        Source: Chen et al., arXiv:1604.06174.
        """
        moved = jax.tree.map(lambda leaf: leaf, self)
        moved.rematerialized = True
        return moved

    def with_fused_attention(self) -> "Decoder":
        """The same decoder with `fused_attention` where it runs and is the same; else as it is."""
        if self.dtype != jnp.bfloat16 or not fuses_attention(self.config):
            return self
        return self.with_attention(fused_attention)

    def with_attention(self, attention: Callable[..., Array]) -> "Decoder":
        """The same decoder with this function in place of `causal_attention`."""
        moved = jax.tree.map(lambda leaf: leaf, self)
        moved.attention = attention
        return moved

    def parameters(self) -> dict[str, Float[Array, "..."]]:
        """The arrays by the names of `parameter_shapes`, as `Decoder` takes them."""
        named = {EMBEDDING: self.embedding[...], NORM: self.norm[...]}
        named |= {LAYER + name: array[...] for name, array in self.layers.items()}
        if self.head is not None:
            named[HEAD] = self.head[...]
        return {name: named[name] for name in parameter_shapes(self.config)}

    def weights(self, site: str) -> tuple[Float[Array, "layers *experts out in"], ...]:
        """The weights that share the input of a site, all layers stacked, in their own types."""
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
            slice of its layer, of an `InPlace` the whole with the layer's number, and None where
            the site has no state. If the pytrees differ from layer to layer: a tuple of such
            mappings, each for a run of layers.
          store: Attention sees keys and values as this format of a cache encodes them.

        Returns:
          The logits, and `{site: out stacked over layers}`.

        Raises:
          ValueError: `state` has a key that is not a site.
        """
        hidden, outs, _ = self._run(tokens, linear, state, jnp.int32(0), store, None)
        return self.logits(hidden), outs

    def hidden(
        self,
        tokens: Integer[Array, "rows length"],
        linear: Linear = dense,
        state: State | None = None,
    ) -> Float[Array, "rows length k"]:
        """What the head reads at every position, in the type of the matrix products."""
        return self._run(tokens, linear, state, jnp.int32(0), None, None)[0]

    def logits(self, hidden: Float[Array, "rows length k"]) -> Float32[Array, "rows length vocab"]:
        """The product of the head with what `hidden` gives."""
        head = as_factor((self.embedding if self.head is None else self.head)[...], self.dtype)
        if hidden.dtype == jnp.float32:
            return float_product(hidden, head)
        if is_one(hidden):
            return exact(hidden, head, parts=1)
        return product("rlk,vk->rlv", hidden, head)

    def extend(
        self,
        tokens: Integer[Array, "rows length"],
        cache: Cache,
        linear: Linear = dense,
        state: State | None = None,
        at: Int32[Array, " rows"] | None = None,
    ) -> tuple[Float32[Array, "rows logits vocab"], Cache]:
        """Logits at further positions, and the cache with these positions in it.

        Args:
          tokens: The tokens after those in the cache: all of a prompt, or a single token.
          cache: Must have room for them; beyond its capacity older entries are overwritten.
          linear, state: As for `__call__`.
          at: Which of these tokens of each row gives logits; None for all of them.
        """
        start = cache.length
        cached = cache.store, cache.entries
        hidden, _, entries = self._run(tokens, linear, state, start, *cached, at)
        return self.logits(hidden), Cache(entries, start + tokens.shape[1], cache.store)

    def _run(
        self,
        tokens: Integer[Array, "rows length"],
        linear: Linear,
        state: State | None,
        start: Int32[Array, "*rows"],
        store: Store | None,
        entries: Any,
        at: Int32[Array, " rows"] | None = None,
    ) -> tuple[Float[Array, "rows logits k"], dict[str, Any], Any]:
        """What the head reads from position `start` on, what `linear` gave out, new entries."""
        config = self.config
        runs = state if isinstance(state, tuple) else (state or {},)
        if unknown := set().union(*runs) - set(SITES):
            raise ValueError(f"state has {min(unknown)!r}, not a site: use {', '.join(SITES)}")

        options: dict[str, Any] = {"start": start, "store": store, "dtype": self.dtype}
        options["attention"] = self.attention

        def body(join: Any, first: int, before: Any, sliced: Any) -> tuple[Any, Any]:
            x, entries, number = before
            own, states, where = join(sliced, number)
            kept = None if entries is None else InPlace(entries, number + first)
            x, out, kept = layer(config, x, own, where, linear, states, entries=kept, **options)
            return (x, None if kept is None else kept.arrays, number + 1), out

        x = jnp.take(self.embedding[...], tokens, axis=0, mode="fill").astype(jnp.float32)
        x = x * np.float32(config.embedding_scale)
        parameters: dict[str, Any] = {name: array[...] for name, array in self.layers.items()}
        if entries is not None and isinstance(linear, InKernels):
            norms = input_norms(config).values()
            parameters |= {name: InPlace(parameters[name]) for name in norms}
        scanned = (parameters, positional(config))
        outs, first = [], 0
        for run in runs:
            whole = len(runs) == 1
            count = config.num_hidden_layers if whole else jax.tree.leaves(run)[0].shape[0]
            own, where = jax.tree.map(lambda a: a[first : first + count], scanned)  # noqa: B023
            sliced, join = apart((own, dict.fromkeys(SITES) | dict(run), where))
            step = functools.partial(body, join, first)
            if self.rematerialized:
                step = jax.checkpoint(step, prevent_cse=False)  # pyright: ignore
            together = TOGETHER if tokens.shape[1] == 1 and any_in_place(run) else 1
            before = x, entries, jnp.int32(0)
            (x, entries, _), out = jax.lax.scan(step, before, sliced, count, unroll=together)
            outs.append(out)
            first += count
        outs = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outs)
        if at is not None:
            x = jnp.take_along_axis(x, at[:, None, None], axis=1, mode="clip")
        return rms_norm(config, x, self.norm[...]).astype(self.dtype), outs, entries
