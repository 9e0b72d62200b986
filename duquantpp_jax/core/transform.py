"""The noun Transform: how one linear's input is moved, under the one law.

t.activations(x) @ t.weights(w).T == x @ w.T    for every x and w
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int


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


@dataclasses.dataclass(frozen=True)
class Channels:
    """A transform that moves each channel alone: x'_j = x[order_j] / divisor_j.

    Attributes:
      order: Which channel of the input each channel of the moved input is.
      divisor: What it is divided by; the columns of weights are multiplied by it.
    """

    order: Int[np.ndarray, " k"]
    divisor: Float[np.ndarray, " k"]

    @classmethod
    def nothing(cls, width: int) -> Channels:
        """The Channels that move nothing."""
        return cls(np.arange(width), np.ones(width, np.float32))

    @property
    def in_place(self) -> bool:
        """Whether every channel stays in its place."""
        return bool(np.array_equal(self.order, np.arange(len(self.order))))

    @property
    def moves_nothing(self) -> bool:
        """Whether the moved input is the input."""
        return self.in_place and bool(np.all(self.divisor == 1))

    def then(self, other: Channels) -> Channels:
        """These followed by others."""
        return Channels(self.order[other.order], self.divisor[other.order] * other.divisor)

    def activations(self, x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
        """x T."""
        return x[..., self.order] / self.divisor

    def weights(self, w: Float[Array, "*outputs k"]) -> Float[Array, "*outputs k"]:
        """w T^-T."""
        return w[..., self.order] * self.divisor


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

    def as_channels(self, width: int) -> Channels | None:
        """The transform of one layer as an order and a divisor of channels; None if it mixes them.

        A transform that gives it can be folded into what makes the input (ptq/fuse.py). It looks
        at values, so it is not for traced arrays.

        Args:
          width: Channels of the input.
        """
        del width
        return None

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

    def as_channels(self, width: int) -> Channels | None:
        whole = Channels.nothing(width)
        for link in self.links:
            if (channels := link.as_channels(width)) is None:
                return None
            whole = whole.then(channels)
        return whole
