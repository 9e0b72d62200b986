"""Post-training quantization: the one place where fit, transform, rounding and format meet.

For the weights W of the linears that share an input x,

    transform = fit(W, Stats of x),     W^ = round(transform.weights(W)),
    y = Q(transform.activations(x)) @ W^.T

with Q the activation format. `quantize_linear` does one site, the walk (walk.py) all of them, and
`QuantizedLinear` computes y where a model would compute x @ W.T.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeGuard

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Key

from duquantpp_jax.core import (
    ElementRounding,
    Exact,
    Fitted,
    Format,
    MXArray,
    Recipe,
    Rounding,
    Stats,
    Transform,
    Weights,
)
from duquantpp_jax.formats import MX, MXFP4
from duquantpp_jax.formats.mx import to_float32
from duquantpp_jax.formats.plain import BFloat16
from duquantpp_jax.kernels import Operand, rotate_quantize, scaled_matmul
from duquantpp_jax.kernels.block_scale import RAISED_ABOVE
from duquantpp_jax.kernels.float_matvec.api import float_matvec
from duquantpp_jax.kernels.implementation import why_not_nvidia
from duquantpp_jax.kernels.matvec.api import FEW, matvec, quantized_matvec, unpacked
from duquantpp_jax.kernels.matvec.rows import BLOCK
from duquantpp_jax.kernels.rotate_quantize import triton
from duquantpp_jax.models.experts import Routed
from duquantpp_jax.models.in_place import InPlace
from duquantpp_jax.models.products import as_factor, matmul
from duquantpp_jax.models.prologue import Prologue
from duquantpp_jax.ptq.packed_float import PackedFloat
from duquantpp_jax.transforms.basic import Identity
from duquantpp_jax.transforms.block import lower

Implementation = Literal["triton", "xla"]


@struct.dataclass
class QuantizedSite:
    """The quantized linears of one site, or of the sites of experts or of layers stacked.

    Attributes:
      transform: Moves the input.
      weights: Of each linear: moved and rounded, or as they are where it is left in float; while a
        model runs they may be decoded, or operands of tensor cores.
      clip, scale_offset, tensor_scale: As in `Format.quantize`, for the activations.
      packed: `PackedRows` of all layers, in place of weights, which are then (), or beside them for
        few tokens.
    """

    transform: Transform
    weights: tuple[MXArray | Exact | Operand | PackedFloat | Float[Array, "*layers _ _"], ...]
    clip: Float[Array, "*layers blocks"] | None = None
    scale_offset: Int[Array, "*layers blocks"] | None = None
    tensor_scale: Float32[Array, "*layers"] | None = None
    packed: InPlace | None = None


def pad_channels(x: Any, width: int) -> Any:
    """x with zeros appended to its last axis: x @ w.T = pad_channels(x) @ pad_channels(w).T."""
    if isinstance(x, Routed):
        return dataclasses.replace(x, x=pad_channels(x.x, width))
    missing = width - x.shape[-1]
    return x if missing == 0 else jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


def fit_linear(recipe: Recipe, weights: Weights, stats: Stats, key: Key[Array, ""]) -> Fitted:
    """The recipe's fit on the linears of one site, which may be of any float type.

    Its transform is lowered to the one form that block transforms share, where it has that form.

    >>> import jax, jax.numpy as jnp
    >>> from duquantpp_jax import Stats, recipe
    >>> method, weights = recipe("block_hadamard"), (jnp.ones((8, 64)),)
    >>> stats = Stats.init(64, 1, 2).update(jnp.ones((1, 2, 64)), jnp.int32(0))
    >>> fitted = fit_linear(method, weights, stats, jax.random.key(0))
    >>> fitted.transform.activations(jnp.ones((2, 64))).shape
    (2, 64)
    """
    width, size = stats.absmax.shape[-1], recipe.activation_format.block_size
    fitted = recipe.fit(_widened(weights, width), stats, recipe, key)
    return dataclasses.replace(fitted, transform=lower(fitted.transform, width, size))


def quantize_linear(
    recipe: Recipe, weights: Weights, stats: Stats, fitted: Fitted, moved: Stats | None = None
) -> QuantizedSite:
    """Moves and rounds the linears of one site.

    >>> import jax, jax.numpy as jnp
    >>> from duquantpp_jax import Stats, recipe
    >>> method, weights = recipe("block_hadamard"), (jnp.ones((8, 64)),)
    >>> stats = Stats.init(64, 1, 2).update(jnp.ones((1, 2, 64)), jnp.int32(0))
    >>> fitted = fit_linear(method, weights, stats, jax.random.key(0))
    >>> site = quantize_linear(method, weights, stats, fitted)
    >>> linear = QuantizedLinear(method.activation_format)  # as a model calls it
    >>> (y,), _ = linear("", jnp.ones((2, 64)), (), site)
    >>> y.shape
    (2, 8)

    Args:
      stats: Of the input, before it is moved.
      moved: Of the input as the linear will see it, moved and quantized (a second calibration),
        for roundings that need it; else what `stats` say of the moved input.
    """
    width, seen = stats.absmax.shape[-1], moved or stats.through(fitted.transform)
    rounded = _move_and_round(
        _widened(fitted.weights or weights, width),
        fitted.transform,
        seen,
        rounding=recipe.rounding,
        format=recipe.weight_format,
    )
    scale = recipe.activation_format.calibrated_scale(jnp.max(seen.absmax))
    return QuantizedSite(fitted.transform, rounded, fitted.clip, fitted.scale_offset, scale)


def _widened(weights: Weights, width: int) -> tuple[Float32[Array, "_ _"], ...]:
    """In float32, and to the input's width."""
    return tuple(pad_channels(w.astype(jnp.float32), width) for w in weights)


@functools.partial(jax.jit, static_argnames=("rounding", "format"))
def _move_and_round(
    weights: Weights, transform: Transform, moved: Stats, *, rounding: Rounding, format: Format
) -> tuple[MXArray, ...]:
    ws = tuple(transform.weights(w) for w in weights)
    if not rounding.needs or not isinstance(format, MX):
        return tuple(rounding(w, format, moved) for w in ws)
    # Each row of an MX format is rounded by itself: one factorization serves all linears.
    whole = rounding(jnp.concatenate(ws), format, moved)
    ends = itertools.pairwise(itertools.accumulate((w.shape[0] for w in ws), initial=0))
    return tuple(
        dataclasses.replace(whole, elements=whole.elements[a:b], scales=whole.scales[a:b])
        for a, b in ends
    )


def layer_of(stacked: Any, layer: int) -> Any:
    """One layer's slice of a pytree whose arrays have a leading layer axis."""
    return jax.tree.map(lambda leaf: leaf[layer], stacked)


@dataclasses.dataclass(frozen=True)
class QuantizedLinear:
    """The `linear` of a quantized model: y = Q(transform.activations(x)) @ W^.T.

    Attributes:
      activation_formats: Q, of all sites, or of each as (site, format); None to quantize none.
      implementation: Of Q(transform.activations(x)): "triton" is one kernel, for inputs in MXFP4
        moved within blocks; "xla" has derivatives; None is the first of these that the device runs.
    """

    activation_formats: Format | tuple[tuple[str, Format | None], ...] | None
    implementation: Implementation | None = None

    def __call__(
        self, site: str, x: Any, weights: tuple[Array, ...], state: QuantizedSite
    ) -> tuple[tuple[Array, ...], None]:
        dtype = (x.x if isinstance(x, Routed) else x).dtype
        format = self.format(site, dtype)
        if isinstance(x, Prologue):
            return self._few_tokens(x, state, format), None
        if (packed := state.packed) is not None and not isinstance(x, Routed):
            if math.prod(x.shape[:-1]) <= FEW:
                return self._few_tokens(Prologue((x,), dtype=dtype), state, format), None
            if not state.weights:
                return self._many_tokens(x, state, packed, format), None
        operands = [w for w in state.weights if isinstance(w, Operand)]
        if operands:
            return self._on_tensor_cores(x, state, operands, format), None
        quantized, seen = [isinstance(w, MXArray | Exact) for w in state.weights], None
        if any(quantized):
            width = state.weights[quantized.index(True)].shape[-1]
            seen = self.quantized(pad_channels(x, width), state, format)

        def output(weight: Any) -> Array:
            if isinstance(weight, MXArray | Exact):
                return matmul(seen, weight.exactly() if isinstance(weight, MXArray) else weight)
            return matmul(x, as_factor(weight, dtype)).astype(jnp.float32)

        return tuple(map(output, state.weights)), None

    def takes(self, site: str, x: Prologue, state: QuantizedSite) -> bool:
        """Whether kernels apply what precedes packed weights, as they do for few tokens."""
        if (packed := state.packed) is None or x.shape[-1] != packed.arrays.width:
            return False
        few, moved = math.prod(x.shape[:-1]) <= FEW, packed.arrays.matrices is not None
        format = self.format(site)
        moved |= is_in_float(format) and isinstance(state.transform, Identity)
        return few and moved and (is_in_kernels(format) or is_in_float(format))

    def _few_tokens(
        self, x: Prologue, state: QuantizedSite, format: Format | None
    ) -> tuple[Float32[Array, "*tokens _n"], ...]:
        """The outputs of packed weights, multiplied as they are."""
        packed: Any = state.packed
        rows, layer, given, shape = packed.arrays, packed.layer, x.flat(), x.shape[:-1]
        tokens = to_float32(pad_channels(given.applied(), rows.width))
        fits = given if given.shape == tokens.shape else Prologue((tokens,))
        if isinstance(format, MXFP4) and format.block_size == BLOCK:
            if rows.matrices is not None:
                ys = quantized_matvec(fits, rows, layer, scale_rule=format.scale_rule)
            else:
                moved, options = _moved(tokens, state)
                ys = matvec(format.encode(moved, **options), rows, layer)
        elif rows.matrices is not None or (
            is_in_float(format) and isinstance(state.transform, Identity)
        ):
            dtype = jnp.float32 if format is None else jnp.bfloat16
            ys = float_matvec(fits, rows, layer, dtype=dtype)
        else:
            seen = self._by_xla(tokens, state, format)
            ys = float_matvec(seen.whole() if isinstance(seen, Exact) else seen, rows, layer)
        return tuple(y.reshape(*shape, -1) for y in ys)

    def _many_tokens(
        self, x: Any, state: QuantizedSite, packed: InPlace, format: Format | None
    ) -> tuple[Float32[Array, "*tokens _n"], ...]:
        """The outputs of packed weights, decoded for all tokens."""
        rows, layer = packed.arrays, packed.layer
        seen = self.quantized(pad_channels(x, rows.width), state, format)
        return rows.split(matmul(seen, Exact(unpacked(rows, layer))))

    def _on_tensor_cores(
        self, x: Any, state: QuantizedSite, operands: Sequence[Operand], format: Any
    ) -> tuple[Float32[Array, "*tokens _n"], ...]:
        """The outputs of operands of tensor cores, by their kernels: the input in bfloat16."""
        width = operands[0].shape[1]
        tokens = pad_channels(x.reshape(-1, x.shape[-1]), width).astype(jnp.bfloat16)
        blocks: Any = state.transform.as_blocks(width, format.block_size)
        smooth, matrices, _ = blocks.whole(width, format.block_size)
        moved = rotate_quantize(tokens, matrices, smooth, scale_rule=format.scale_rule)
        ys = (scaled_matmul(moved, w, out_dtype=jnp.float32) for w in operands)
        return tuple(y.reshape(*x.shape[:-1], -1) for y in ys)

    def format(self, site: str, dtype: DTypeLike = jnp.float32) -> Format | None:
        """Q of a site, for inputs of a type: in bfloat16 none are left in float32."""
        formats = self.activation_formats
        found = dict(formats)[site] if isinstance(formats, tuple) else formats
        return BFloat16() if found is None and dtype == jnp.bfloat16 else found

    def quantized(self, x: Any, state: QuantizedSite, format: Format | None) -> Any:
        """Q(transform.activations(x)), x as wide as the weights, as an Exact where it is one."""
        by_xla = functools.partial(self._by_xla, state=state, format=format)
        named, move = self.implementation, None
        if named == "triton" or (named is None and why_not_nvidia() is None):
            move = _in_kernel(x, state, format)
        if move is None:
            return by_xla(x)
        if named == "triton":
            return move(x)
        return jax.lax.platform_dependent(x, cuda=move, default=by_xla)

    def _by_xla(self, x: Any, state: QuantizedSite, format: Format | None) -> Any:
        x = x.astype(jnp.float32)
        if format is None:
            return move_input(x, state.transform)
        moved, given = _moved(x, state)
        if not isinstance(moved, Routed):
            return format.exactly(moved, **given)
        rounded = format.exactly(moved.x, **given)
        if not isinstance(rounded, Exact) or rounded.factor is not None:
            whole = rounded.whole() if isinstance(rounded, Exact) else rounded
            return dataclasses.replace(moved, x=whole)
        return Exact(dataclasses.replace(moved, x=rounded.numbers))


def _in_kernel(
    x: Any, state: QuantizedSite, format: Format | None
) -> Callable[[Float[Array, "*tokens k"]], Exact] | None:
    """Q(transform.activations(x)) in one kernel; None where that is not for it."""
    if isinstance(x, Routed) or not is_in_kernels(format):
        return None
    if not (state.clip is state.scale_offset is None) or x.shape[-1] % BLOCK:
        return None
    try:
        blocks = state.transform.as_blocks(x.shape[-1], BLOCK)
    except ValueError:  # its arrays are traced, and it does not say what they are then
        return None
    if blocks is None:
        return None
    smooth, matrices, _ = blocks.whole(x.shape[-1], BLOCK)

    def move(x: Float[Array, "*tokens k"]) -> Exact:
        tokens = (x if x.dtype == jnp.bfloat16 else to_float32(x)).reshape(-1, x.shape[-1])
        numbers = triton.numbers(tokens, triton.joined(matrices, smooth), format.scale_rule)
        return Exact(numbers.astype(jnp.float32).reshape(x.shape))

    return move


def is_in_float(format: Format | None) -> bool:
    """Whether a format leaves inputs in float."""
    return format is None or isinstance(format, BFloat16)


def is_in_kernels(format: Format | None) -> TypeGuard[MXFP4]:
    """Whether kernels round to a format: MXFP4 in blocks of 32, to nearest, by some rules."""
    if not isinstance(format, MXFP4) or format.block_size != BLOCK:
        return False
    return format.rounding is ElementRounding.NEAREST_EVEN and format.scale_rule in RAISED_ABOVE


def move_input(x: Any, transform: Transform) -> Any:
    """The input after the transform; routed inputs after that of their expert."""
    if isinstance(x, Routed):
        return x.each(lambda own, x: own.activations(x), transform)
    return transform.activations(x)


def quantize_input(x: Any, site: QuantizedSite | Fitted, format: Format) -> Any:
    """The input as the quantized linears see it: moved and quantized, in float32."""
    moved, given = _moved(x, site)
    if not isinstance(moved, Routed):
        return format.fake_quantize(moved, **given)
    return dataclasses.replace(moved, x=format.fake_quantize(moved.x, **given))


def _moved(x: Any, site: QuantizedSite | Fitted) -> tuple[Any, dict[str, Any]]:
    """The moved input in float32, and the options of its format."""
    options = {"clip": site.clip, "scale_offset": site.scale_offset}
    if isinstance(site, QuantizedSite):
        options["tensor_scale"] = site.tensor_scale
    given = {name: v for name, v in options.items() if v is not None}
    moved = move_input(x, site.transform)
    if not isinstance(moved, Routed):
        return to_float32(moved), given
    given = {name: v[moved.expert] for name, v in given.items()}
    return dataclasses.replace(moved, x=to_float32(moved.x)), given
