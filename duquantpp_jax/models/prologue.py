"""The input of a linear before its norm or its activation, for a linear whose kernels apply them.

    y = f(x) W^T + residual,      f(x) = RMSNorm(x),  activation(gate, up),  or x itself

Source: Zhang and Sennrich (arXiv:1910.07467), equation 4, for RMSNorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from duquantpp_jax.models.in_place import InPlace


@struct.dataclass
class Prologue:
    """What a linear is given before it is what the linear multiplies.

    Attributes:
      parts: The arguments of the activation, or x alone.
      gain: The weight of the norm, as it is or of all layers; None without a norm.
      residual: Added to the output, which is then that of a single weight.
      activation: f of the parts, element by element; None where there is a single part.
      eps, offset: As in `rms_norm`.
      dtype: Type to which f(x) is rounded.
    """

    # "or Any": jax puts objects here that are not arrays.
    parts: tuple[Float[Array, "*tokens k"] | Any, ...]
    gain: Float[Array, " k"] | InPlace | Any = None
    residual: Float32[Array, "*tokens n"] | Any = None
    activation: Callable[..., Array] | None = struct.field(pytree_node=False, default=None)
    eps: float = struct.field(pytree_node=False, default=0.0)
    offset: float = struct.field(pytree_node=False, default=0.0)
    dtype: DTypeLike = struct.field(pytree_node=False, default=jnp.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of f(x)."""
        return self.parts[0].shape

    def applied(self) -> Float[Array, "*tokens k"]:
        """f(x), in the type of the products."""
        x = self.parts[0] if self.activation is None else self.activation(*self.parts)
        x = x if self.gain is None else rms_norm(x, self.gain, self.eps, self.offset)
        return x.astype(self.dtype)

    def flat(self) -> Prologue:
        """The same with tokens on a single axis."""
        count = math.prod(self.shape[:-1])

        def of(x: Array) -> Array:
            return x.reshape(count, x.shape[-1])

        residual = None if self.residual is None else of(self.residual)
        return self.replace(parts=tuple(map(of, self.parts)), residual=residual)  # pyright: ignore


@runtime_checkable
class InKernels(Protocol):
    """A `Linear` that may be given a `Prologue` in place of an input."""

    def takes(self, site: str, x: Prologue, state: Any) -> bool:
        """Whether it may be here: then it returns f(x) W^T + residual."""
        ...

    def __call__(
        self, site: str, x: Any, weights: tuple[Array, ...], state: Any
    ) -> tuple[tuple[Array, ...], Any]:
        """As `Linear`."""
        ...


def rms_norm(
    x: Float[Array, "*tokens k"], weight: Float[Array, " k"] | InPlace, eps: float, offset: float
) -> Float32[Array, "*tokens k"]:
    """x / sqrt(mean(x^2) + eps) * gain, where gain is weight + offset, in float32."""
    gain: Array = weight.own() if isinstance(weight, InPlace) else weight
    x = x.astype(jnp.float32)
    scaled = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return scaled * (gain.astype(jnp.float32) + offset)
