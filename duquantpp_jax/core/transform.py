"""The noun Transform: how one linear's input is moved, under the one law.

t.activations(x) @ t.weights(w).T == x @ w.T    for every x and w
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a transform costs while the model runs; what it does to weights is done offline.

    Attributes:
      multiply_adds: For each value of the input.
      bytes: Of the arrays that are read to move the input of one layer, as they are stored.
      fuses: Whether `fuse` can fold it into a norm or a preceding linear, where the model has one
        that fits; it then costs nothing.
    """

    multiply_adds: int = 0
    bytes: int = 0
    fuses: bool = False

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.multiply_adds + other.multiply_adds,
            self.bytes + other.bytes,
            self.fuses and other.fuses,
        )


class Transform(abc.ABC):
    """How one linear's input is moved: a pytree of arrays under one law.

    The law: t.activations(x) @ t.weights(w).T == x @ w.T for every x and w. With the matrix T of
    the transform, activations(x) = x T and weights(w) = w T^-T.

    Attributes:
      keeps_channels: Whether every channel stays in its place and by itself, as in smoothing, so
        that what belongs to a block of channels still belongs to it afterwards.
    """

    keeps_channels = False

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

    def cost(self, width: int) -> Cost:
        """What moving inputs of this width costs online, for the transform of one layer.

        Unless a transform says better, it is that of a matrix of all channels by all channels.
        """
        return Cost(width, sum(leaf.nbytes for leaf in jax.tree.leaves(self)))

    def then(self, other: Transform) -> Transform:
        """This transform followed by another: T_self T_other."""
        return Chain((self, other))


@struct.dataclass
class Chain(Transform):
    """T = T_1 T_2 ... T_n. The law holds for the chain because it holds for each link."""

    links: tuple[Transform, ...]

    @property
    def keeps_channels(self) -> bool:  # type: ignore[override]
        """Whether every link does."""
        return all(link.keeps_channels for link in self.links)

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

    def cost(self, width: int) -> Cost:
        return sum((link.cost(width) for link in self.links), Cost(fuses=True))
