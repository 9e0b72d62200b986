"""The noun Transform: how one linear's input is moved, under the one law.

t.activations(x) @ t.weights(w).T == x @ w.T    for every x and w
"""

from __future__ import annotations

import abc

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


class Transform(abc.ABC):
    """How one linear's input is moved: a pytree of arrays under one law.

    The law: t.activations(x) @ t.weights(w).T == x @ w.T for every x and w. With the matrix T of
    the transform, activations(x) = x T and weights(w) = w T^-T.
    """

    @abc.abstractmethod
    def activations(self, x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
        """x T."""

    @abc.abstractmethod
    def weights(self, w: Float[Array, "*outputs k"]) -> Float[Array, "*outputs k"]:
        """w T^-T."""

    @abc.abstractmethod
    def inverse(self) -> Transform:
        """The transform of T^-1, so that t.then(t.inverse()) moves nothing."""

    def maxima(
        self, absmax: Float[Array, " k"], moved: Float[Array, "tokens k"]
    ) -> Float[Array, " k"]:
        """Channel maxima after the transform, from those before it and a moved token sample.

        Maxima do not follow from maxima where channels mix, so this takes the sample's; the
        transforms that keep channels apart override it and are exact.
        """
        del absmax
        return jnp.max(jnp.abs(moved), axis=0)

    def then(self, other: Transform) -> Transform:
        """This transform followed by another: T_self T_other."""
        return Chain((self, other))


@struct.dataclass
class Chain(Transform):
    """T = T_1 T_2 ... T_n. The law holds for the chain because it holds for each link."""

    links: tuple[Transform, ...]

    def activations(self, x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
        for link in self.links:
            x = link.activations(x)
        return x

    def weights(self, w: Float[Array, "*outputs k"]) -> Float[Array, "*outputs k"]:
        for link in self.links:
            w = link.weights(w)
        return w

    def inverse(self) -> Transform:
        return Chain(tuple(link.inverse() for link in reversed(self.links)))
