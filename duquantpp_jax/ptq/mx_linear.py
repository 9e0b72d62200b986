"""A linear of a flax nnx module whose weight and input are in formats of blocks.

    y = Q(transform.activations(x)) @ W^.T + b

`nnx.Linear`, `nnx.LinearGeneral` and `nnx.Einsum` all are this product, once the axes that they sum
over are the last of the input and the kernel is a matrix [out, in]. The arithmetic is that of
`QuantizedLinear`, and the output has the type that the float linear would give it.

With a weight that is trained, W^ is its rounding, made anew at each call: gradients pass straight
through it, as they pass through Q. Source: Bengio et al., arXiv 1308.3432.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Shaped

from duquantpp_jax.core import MXArray, Recipe
from duquantpp_jax.formats.mx import FLOAT_TYPES
from duquantpp_jax.models.products import matmul
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite, pad_channels

LINEARS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
"""The modules that become an MXLinear."""

_PRODUCTS = {"dot_general": lax.dot_general, "dot_general_cls": None, "einsum_op": jnp.einsum}


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Which axes a linear sums over, and where those of its kernel go in the output.

    Attributes:
      kernel: Shape of the kernel.
      axes: Of the input that are summed over: in increasing order the first axes of the kernel.
      equation: That of an nnx.Einsum, in place of `axes`.
    """

    kernel: tuple[int, ...]
    axes: tuple[int, ...] = ()
    equation: str = ""

    @classmethod
    def of(cls, linear: Any) -> Contraction:
        """That of one of LINEARS; ValueError says why it cannot become an MXLinear."""
        if type(linear) not in LINEARS:
            raise ValueError(f"is a {type(linear).__name__}, whose arithmetic is not known here")
        for name, usual in _PRODUCTS.items():
            if getattr(linear, name, None) not in (usual, None):
                raise ValueError(f"multiplies by a {name} of its own")
        shape, dtype = linear.kernel.shape, linear.kernel.dtype
        if str(dtype) not in FLOAT_TYPES:
            raise ValueError(f"has a kernel of {dtype}: only {', '.join(FLOAT_TYPES)} are rounded")
        if isinstance(linear, nnx.Einsum):
            found, whole = cls(shape, equation=linear.einsum_str), linear.kernel_shape
            found.check()
        elif isinstance(linear, nnx.Linear):
            found, whole = cls(shape, (-1,)), (linear.in_features, linear.out_features)
        else:
            if linear.batch_axis:
                raise ValueError("has batch axes: a kernel for each of their indices")
            found, whole = cls(shape, linear.axis), (*linear.in_features, *linear.out_features)
        if shape != tuple(whole):
            raise ValueError(f"has a kernel {shape} where its features are {tuple(whole)}: stacked")
        return found

    def check(self) -> None:
        """Raises ValueError unless the equation is a product of two matrices."""
        x, kernel, y = re.split(",|->", self.equation)
        summed = set(kernel) & set(x) - {"."}
        once = all(len({*part}) == len(part) for part in (s.replace("...", "") for s in (x, y)))
        free = set(x) - summed == set(y) - (set(kernel) - summed)
        alone = "." not in kernel and len({*kernel}) == len(kernel) and not summed & set(y)
        if not (summed and once and free and alone):
            raise ValueError(
                f"computes {self.equation}, which is no product of two matrices: each axis of the "
                "kernel is either summed with one of the input, or an axis of the output"
            )

    @property
    def width(self) -> int:
        """How many channels are summed over."""
        return math.prod(self.kernel[axis] for axis in self._summed)

    @property
    def _summed(self) -> list[int]:
        """The axes of the kernel that are summed over."""
        if not self.equation:
            return list(range(len(self.axes)))
        x, kernel, _ = re.split(",|->", self.equation)
        return [axis for axis, letter in enumerate(kernel) if letter in x]

    def summed_in(self, ndim: int) -> tuple[int, ...]:
        """The axes of an input with `ndim` axes that are summed over, as channels count them."""
        given, kernel, _ = self.letters(ndim)
        return tuple(given.index(c) for c in kernel if c in given)

    def letters(self, ndim: int) -> tuple[str, str, str]:
        """Input, kernel and output, a letter for each axis, of an input with `ndim` axes."""
        if not self.equation:
            x, rest = string.ascii_letters[:ndim], string.ascii_letters[ndim:]
            summed = "".join(x[axis] for axis in sorted(axis % ndim for axis in self.axes))
            made = rest[: len(self.kernel) - len(summed)]
            return x, summed + made, "".join(c for c in x if c not in summed) + made
        x, kernel, y = re.split(",|->", self.equation)
        spare = "".join(c for c in string.ascii_letters if c not in self.equation)
        spare = spare[: ndim - len(x) + 3]
        return x.replace("...", spare), kernel, y.replace("...", spare)

    def tokens(self, x: Array | np.ndarray) -> Shaped[Array, "*tokens k"]:
        """The input with the axes that are summed over as its last."""
        given, kernel, _ = self.letters(x.ndim)
        order = [c for c in given if c not in kernel] + [c for c in kernel if c in given]
        moved = jnp.transpose(x, [given.index(c) for c in order])
        return moved.reshape(*moved.shape[: x.ndim - len(self._summed)], self.width)

    def matrix(self, kernel: Array) -> Float[Array, "n k"]:
        """The kernel as a matrix [out, in]."""
        summed = self._summed
        made = [axis for axis in range(len(self.kernel)) if axis not in summed]
        return jnp.transpose(kernel, made + summed).reshape(-1, self.width)

    def output(self, y: Float[Array, "*tokens n"], ndim: int) -> Array:
        """What comes of the product with that matrix, in the axes of the linear's output."""
        given, kernel, out = self.letters(ndim)
        made = [axis for axis, c in enumerate(kernel) if c not in given]
        order = [c for c in given if c not in kernel] + [kernel[axis] for axis in made]
        parts = y.reshape(*y.shape[:-1], *(self.kernel[axis] for axis in made))
        return jnp.transpose(parts, [order.index(c) for c in out])

    def bias_shape(self, ndim: int) -> list[int]:
        """In which a bias is added to the output."""
        _, kernel, out = self.letters(ndim)
        return [self.kernel[kernel.index(c)] if c in kernel else 1 for c in out]


class Quantized(nnx.Variable):
    """What an MXLinear keeps beside its parameters; not for an optimiser."""


class MXLinear(nnx.Module):
    """A quantized nnx.Linear, nnx.LinearGeneral or nnx.Einsum, called as that is.

    Attributes:
      moves: A `QuantizedSite` without weights; linears that share an input share it.
      weight: Moved, [out, in]: an MXArray; or float parameters that are rounded at each call.
      bias: That of the float linear.
      formats: Of the weight and of the input.
    """

    def __init__(
        self,
        linear: Any,
        moves: Quantized,
        weight: MXArray | Float[Array, "n k"],
        recipe: Recipe,
    ):
        self.contraction = Contraction.of(linear)
        self.moves = moves
        self.weight = (Quantized if isinstance(weight, MXArray) else nnx.Param)(weight)
        self.bias = linear.bias
        self.formats = (recipe.weight_format, recipe.activation_format)
        self.dtype = getattr(linear, "preferred_element_type", None) or linear.dtype
        self.kernel_dtype = linear.kernel.dtype

    def __call__(self, inputs: Array | np.ndarray, *, out_sharding: None = None) -> Array:
        """The output of the quantized linear, in the type of the float one.

        Raises:
          ValueError: A sharding of the output is asked for.
        """
        if out_sharding is not None:
            raise ValueError("an MXLinear leaves the sharding of its output to the compiler")
        x, site = self.contraction.tokens(inputs).astype(jnp.float32), self.site
        linear = QuantizedLinear(self.formats[1], "xla")
        if site.weights:
            ((y,), _) = linear("", x, (), site)
        else:
            weight = self.weight[...]
            seen = linear.quantized(pad_channels(x, weight.shape[-1]), site, self.formats[1])
            y = matmul(seen, self.formats[0].exactly(weight.astype(jnp.float32)))
        y = self.contraction.output(y, inputs.ndim)
        types = [inputs.dtype, self.kernel_dtype]
        if self.bias is not None:
            bias = self.bias[...].astype(jnp.float32)
            y = y + bias.reshape(self.contraction.bias_shape(inputs.ndim))
            types.append(self.bias.dtype)
        return y.astype(self.dtype or jnp.result_type(*types))

    @property
    def site(self) -> QuantizedSite:
        """What moves the input, and the rounded weight; no weight where it is trained."""
        weight = self.weight.get_value()
        weights = (weight,) if isinstance(weight, MXArray) else ()
        return dataclasses.replace(self.moves.get_value(), weights=weights)
