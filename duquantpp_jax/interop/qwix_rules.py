"""qwix's rules with the formats and the rotations of this package; MXFP4 arrays there and back.

    y = Q_act(transform.activations(x)) @ Q_weight(transform.weights(W)).T

for every product with a matrix whose module a rule matches. The arithmetic is that of `quantize`
(ptq/modules.py) with weights rounded to nearest at each call, so gradients pass straight through
and a model trains as under qwix's own QtProvider.

A quantized array of qwix stands in the layout of the matrix that it was made from, with float
scales; an MXArray has its blocks along the last axis and scales of one byte. Its MXFP4 scale is

    2^ceil(log2(amax / 6))

which is our rule `rceil`, but for its float log2, which may be one power too large, and for blocks
whose amax / 6 is below 2^-63: it gives those the scale 1, and their numbers become zeros.

Source: qwix 0.1.8, Apache-2.0 (qwix/_src/core/qarray.py). Needs the extra `qwix`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from duquantpp_jax.core import MXArray, Recipe, Stats, Transform
from duquantpp_jax.formats import MXFP4, MXFP8
from duquantpp_jax.models.layers import matmul
from duquantpp_jax.ptq.mx_linear import Contraction
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite, fit_linear
from duquantpp_jax.recipes import find_fit, recipe
from duquantpp_jax.transforms.basic import FitIdentity, Identity
from duquantpp_jax.transforms.dct import FitDct
from duquantpp_jax.transforms.haar import FitHaar
from duquantpp_jax.transforms.hadamard import FitHadamard

_STORED = {"mxfp4": MXFP4(), "mxfp8": MXFP8()}
_WITHOUT_DATA = (FitIdentity, FitHadamard, FitDct, FitHaar)
_DEFAULTS = {
    "act_static_scale": (None, False),
    "weight_calibration_method": ("absmax",),
    "act_calibration_method": (None, "absmax"),
}
"""What a rule may say of these; a format here has its own rule of scales."""


def _qwix() -> Any:
    """The library, or an error that names the extra."""
    try:
        import qwix  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"qwix's rules need the extra qwix ({error}): pip install 'duquantpp_jax[qwix]'"
        ) from None
    return qwix


def qwix_provider(
    rules: Sequence[Any], moves: str | Mapping[str, Transform] = "rtn", *, seed: int = 0
) -> Any:
    """A provider for `qwix.quantize_model` whose rules name formats of this package.

        rules = [qwix.QuantizationRule(weight_qtype="mxfp4:even", act_qtype="mxfp4:even")]
        model = qwix.quantize_model(model, qwix_provider(rules, "block_hadamard"), x)

    Args:
      rules: Of qwix. `weight_qtype` and `act_qtype` are names of formats (`recipes.find_format`);
        without `act_qtype` inputs are moved and left in float.
      moves: The name of a fit that reads no inputs, such as block_hadamard; or a transform for each
        path of a linear in qwix's spelling ("layers/0"), such as `MXLinear.site.transform` of the
        module that `duquantpp_jax.quantize` gives. Linears without one are rounded as they are.
      seed: For fits that draw random numbers.

    Raises:
      ImportError: qwix is missing; names the extra.
      ValueError: A rule asks for what these formats do not do, or the fit reads inputs; when the
        model runs, a rule matches a product that is not one of an input with one matrix.
    """
    if isinstance(moves, str) and not isinstance(find_fit(moves), _WITHOUT_DATA):
        raise ValueError(
            f"{moves} is fitted to inputs: give the transforms by path, as duquantpp_jax.quantize "
            "fits them, or a fit that reads none, such as block_hadamard"
        )
    return _provider_class()(rules, moves, seed)


@functools.cache
def _provider_class() -> Any:
    """A subclass of qwix's provider, made when qwix is first asked for."""
    qwix = _qwix()
    from qwix._src.utils import flax_util  # pyright: ignore[reportMissingImports]

    class MXProvider(qwix.QuantizationProvider):
        """Computes each product that a rule matches as a linear of this package does."""

        def __init__(self, rules: Any, moves: str | Mapping[str, Transform], seed: int):
            super().__init__(rules)
            self.moves, self.seed = moves, seed

        def _init_rule(self, rule: Any) -> Any:
            _recipe(rule)  # whose errors are said here, before a model runs
            return super()._init_rule(rule)

        def dot_general(
            self, lhs: Any, rhs: Any, dimension_numbers: Any, *arguments: Any, **options: Any
        ) -> Array:
            rule, _ = self._get_current_rule_and_op_id("dot_general")
            if rule is None or rule.weight_qtype is None:
                return jax.lax.dot_general(lhs, rhs, dimension_numbers, *arguments, **options)
            (summed, of_kernel), batches = dimension_numbers
            if any(batches):
                raise ValueError(self._no_matrix(f"a product with batch axes {batches}"))
            axes, first = zip(*sorted(zip(summed, of_kernel, strict=True)), strict=True)
            kernel = jnp.moveaxis(rhs, first, range(len(first)))
            preferred = (*arguments, None, None)[1]
            dtype = options.get("preferred_element_type", preferred)
            return self._product(rule, lhs, kernel, Contraction(kernel.shape, axes), dtype)

        def einsum(self, equation: str, *operands: Any, **options: Any) -> Array:
            rule, _ = self._get_current_rule_and_op_id("einsum")
            if rule is None or rule.weight_qtype is None:
                return jnp.einsum(equation, *operands, **options)
            if len(operands) != 2:
                raise ValueError(self._no_matrix(equation))
            contraction = Contraction(operands[1].shape, equation=equation.replace(" ", ""))
            try:
                contraction.check()
            except ValueError:
                raise ValueError(self._no_matrix(equation)) from None
            dtype = options.get("preferred_element_type")
            return self._product(rule, *operands, contraction, dtype)

        def get_intercept_map(self) -> dict[str, Any]:
            return super().get_intercept_map() | {
                "jax.lax.dot_general": self.dot_general,
                "jax.numpy.einsum": self.einsum,
            }

        def _path(self) -> str:
            return "/".join(map(str, flax_util.get_current_module_path()))

        def _no_matrix(self, what: str) -> str:
            return (
                f"{self._path()!r} computes {what}, which is no product of an input with one "
                "matrix: narrow module_path or op_names of its rule"
            )

        def _product(
            self, rule: Any, x: Array, kernel: Array, contraction: Contraction, dtype: Any
        ) -> Array:
            moves, weight = self.moves, contraction.matrix(kernel).astype(jnp.float32)
            method = _recipe(rule, moves if isinstance(moves, str) else "rtn")
            if isinstance(moves, str):
                stats = Stats.init(contraction.width, rows=1, length=1)
                key = jax.random.key(self.seed)
                transform = fit_linear(method, (weight,), stats, key).transform
            else:
                transform = moves.get(self._path(), Identity())
            given = contraction.tokens(x).astype(jnp.float32)
            acts = None if rule.act_qtype is None else method.activation_format
            seen = QuantizedLinear(acts, "xla").quantized(given, QuantizedSite(transform, ()), acts)
            rounded = method.weight_format.exactly(transform.weights(weight))
            y = contraction.output(matmul(seen, rounded), x.ndim)
            return y.astype(dtype or jnp.result_type(x.dtype, kernel.dtype))

    return MXProvider


def _recipe(rule: Any, fit: str = "rtn") -> Recipe:
    """The fit, and the formats that a rule of qwix names; ValueError for what they cannot be."""
    sides = [side for side in (rule.weight_qtype, rule.act_qtype) if side is not None]
    if not all(isinstance(side, str) for side in sides):
        raise ValueError(f"{rule}: its qtypes must be names of formats, such as 'mxfp4:even'")
    for name, usual in _DEFAULTS.items():
        if (value := getattr(rule, name)) not in usual:
            raise ValueError(f"{name}={value!r}: a format here chooses its scales itself; leave it")
    weights, inputs = rule.weight_qtype or "mxfp4", rule.act_qtype or rule.weight_qtype or "mxfp4"
    method = recipe(fit, weight_format=weights, activation_format=inputs)
    size = method.weight_format.block_size
    if rule.tile_size not in (None, size):
        raise ValueError(f"tile_size={rule.tile_size}: {weights} has blocks of {size}; leave it")
    return method


def to_qwix(q: MXArray, axis: int = -1) -> Any:
    """A quantized array of qwix with the same codes and scales.

    Args:
      q: In MXFP4, or MXFP8 of E4M3, with blocks of 32. A block of zeros gets the scale 1, as qwix
        gives it.
      axis: Where its last axis, that of the blocks, goes: 0 for a kernel [in, out] of flax.

    Returns:
      A `QArray`, whose scales are float32.

    Raises:
      ImportError: qwix is missing; names the extra.
      ValueError: qwix has no such type; or a block other than zero has the scale 2^-127, which is
        subnormal in float32 and may be taken for zero.
    """
    qwix = _qwix()
    kinds = {(f.element, f.block_size): name for name, f in _STORED.items()}
    name = kinds.get((q.element, q.block_size))
    if name is None or q.scales.dtype != jnp.float8_e8m0fnu:
        raise ValueError(
            f"qwix holds {' and '.join(_STORED)} in blocks of 32 under E8M0 scales, not "
            f"{q.element} in blocks of {q.block_size} under {q.scales.dtype}"
        )
    byte = np.asarray(q.scale_bytes())
    zero = ~np.asarray(q.codes()).reshape(*byte.shape, q.block_size).any(axis=-1)
    if ((byte == 0) & ~zero).any():
        raise ValueError("a block has the scale 2^-127, which is subnormal in float32 (qwix's)")
    exponent = np.where(byte == 0, 127, byte)  # a block of zeros has the scale 1 in qwix
    scale = np.ldexp(np.float32(1), exponent.astype(int) - 127)
    scale = np.where(byte == 255, np.float32(np.nan), scale)
    moved = (jnp.moveaxis(a, -1, axis) for a in (q.stored().elements, jnp.asarray(scale)))
    return qwix.QArray(*moved, qtype=name)


def from_qwix(array: Any, axis: int | None = None) -> MXArray:
    """An MXArray with the codes and scales of a quantized array of qwix.

    Args:
      array: A `QArray` of mxfp4 or mxfp8; a scale that several blocks share is repeated.
      axis: That of the blocks, which becomes the last; None for the only axis that is tiled.

    Raises:
      ValueError: It is of another type, has a zero point, other blocks than 32 of an axis, or a
        scale that is no power of two of E8M0.
    """
    format = _STORED.get(array.qtype) if isinstance(array.qtype, str) else None
    if format is None or array.zero_point is not None:
        raise ValueError(f"qtype {array.qtype}: only {' and '.join(_STORED)} of qwix are MX arrays")
    tiles = [n // s for n, s in zip(array.qvalue.shape, array.scale.shape, strict=True)]
    tiled = [i for i, tile in enumerate(tiles) if tile == format.block_size]
    if axis is None and len(tiled) != 1:
        raise ValueError(f"tiles of {tuple(tiles)}: say which axis has the blocks of 32")
    axis = range(len(tiles))[tiled[0] if axis is None else axis]
    if axis not in tiled:
        raise ValueError(f"axis {axis} has tiles of {tiles[axis]}, not of {format.block_size}")
    scale = np.asarray(array.scale, np.float32)
    for i, tile in enumerate(tiles):
        scale = scale if i == axis else np.repeat(scale, tile, axis=i)
    fraction, exponent = np.frexp(scale)
    byte = exponent + 126
    nan = np.isnan(scale)
    if not (nan | ((fraction == 0.5) & (byte >= 0) & (byte <= 254))).all():
        raise ValueError("a scale is no power of two between 2^-127 and 2^127")
    byte = np.moveaxis(np.where(nan, 255, byte).astype(np.uint8), axis, -1)
    scales = jax.lax.bitcast_convert_type(jnp.asarray(byte), jnp.float8_e8m0fnu)
    elements = jnp.moveaxis(array.qvalue, axis, -1)
    return MXArray(elements, scales, element=format.element, block_size=format.block_size)
