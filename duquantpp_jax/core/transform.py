"""The noun Transform, under the law t.activations(x) @ t.weights(w).T == x @ w.T."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.core
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


class Blocks(NamedTuple):
    """A transform that keeps to blocks of s channels, in the form that kernels and exports take.

        x'_b = (x / divisor)_b M_b        w'_b = (w divisor)_b M_b^-T

    Attributes:
      divisor: Of each channel; None where nothing is divided.
      matrices: M_b of each block, or one for all; None where nothing mixes.
      inverses: M_b^-1, in the same way.
    """

    divisor: Float[Array, " k"] | None = None
    matrices: Float[Array, "blocks s s"] | None = None
    inverses: Float[Array, "blocks s s"] | None = None

    def then(self, other: Blocks) -> Blocks:
        """These followed by others; a division after a mixing goes into the matrices' columns."""
        matrices, inverses = self.matrices, self.inverses
        if matrices is None or inverses is None:
            divisors = [d for d in (self.divisor, other.divisor) if d is not None]
            divisor = functools.reduce(jnp.multiply, divisors) if divisors else None
            return other._replace(divisor=divisor)
        if other.divisor is not None:
            divisor = other.divisor.reshape(-1, 1, matrices.shape[-1])
            matrices, inverses = matrices / divisor, inverses * divisor.swapaxes(1, 2)
        if other.matrices is not None and other.inverses is not None:
            product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
            matrices = product(matrices, other.matrices)
            inverses = product(other.inverses, inverses)
        return Blocks(self.divisor, matrices, inverses)

    def whole(
        self, width: int, size: int
    ) -> tuple[Float[Array, " k"], Float[Array, "blocks s s"], Float[Array, "blocks s s"]]:
        """Divisor, matrices and inverses, with 1 and I for what is None and a matrix a block."""
        divisor = jnp.ones(width, jnp.float32) if self.divisor is None else self.divisor
        eye, shape = jnp.eye(size, dtype=jnp.float32), (width // size, size, size)
        matrices, inverses = (jnp.broadcast_to(eye if m is None else m, shape) for m in self[1:])
        return divisor, matrices, inverses


class Transform(abc.ABC):
    """How one linear's input is moved: a pytree of arrays under one law.

    The law: t.activations(x) @ t.weights(w).T == x @ w.T for every x and w. With the matrix T of
    the transform, activations(x) = x T and weights(w) = w T^-T.

    Attributes:
      keeps_channels: Whether every channel stays in its place and by itself, as in smoothing, so
        that what belongs to a block of channels still belongs to it afterwards.
      mixes_channels: Whether a moved channel is made of several: its maximum then does not follow
        from theirs, and is taken from the token sample.
    """

    keeps_channels = False
    mixes_channels = True

    @abc.abstractmethod
    def activations(self, x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
        """x T."""

    @abc.abstractmethod
    def weights(self, w: Float[Array, "*outputs k"]) -> Float[Array, "*outputs k"]:
        """w T^-T."""

    @abc.abstractmethod
    def inverse(self) -> Transform:
        """The transform of T^-1, so that t.then(t.inverse()) moves nothing."""

    def cost(self, width: int) -> Cost:
        """What moving inputs of this width costs online, for the transform of one layer.

        Unless a transform says better, it is that of a matrix of all channels by all channels.
        """
        return Cost(width, sum(leaf.nbytes for leaf in jax.tree.leaves(self)))

    def as_channels(self, width: int) -> Channels | None:
        """The transform of one layer as an order and a divisor of channels; None if it mixes them.

        A transform that gives it can be folded into what makes the input (ptq/fuse.py). It looks
        at values, so it is not for traced arrays.
        """
        return None

    def as_blocks(self, width: int, size: int) -> Blocks | None:
        """The transform of one layer on blocks of `size` channels; None if it has no such form.

        What has it is evaluated in it, and runs in kernels and exports that know of nothing else.
        Unless a transform says better, it is seen from what happens to unit vectors, which takes
        arrays with values. One that is better left as it is returns None.

        Raises:
          ValueError: The arrays are traced (under `jax.jit`, in a derivative).
        """
        if width % size:
            return None
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self)):
            raise ValueError(
                f"{type(self).__name__} has traced arrays, which do not show whether it keeps to "
                f"blocks of {size}: give it a method as_blocks(width, size)"
            )
        with jax.ensure_compile_time_eval():
            if (channels := self.as_channels(width)) is not None:
                return Blocks(jnp.asarray(channels.divisor)) if channels.in_place else None
            t, back, outside = diagonal_blocks(self, width, size)
            if not outside <= 1e-6 * jnp.max(jnp.abs(t)):
                return None
            return Blocks(None, t, back.swapaxes(1, 2))

    def flat_links(self) -> tuple[Transform, ...]:
        """The transforms that this one chains, none of them a chain: itself unless it is one."""
        return (self,)

    def then(self, other: Transform) -> Transform:
        """This transform followed by another: T_self T_other."""
        return Chain((self, other))


@functools.partial(jax.jit, static_argnames=("width", "size"))
def diagonal_blocks(
    transform: Transform, width: int, size: int
) -> tuple[Float[Array, "blocks s s"], Float[Array, "blocks s s"], Float[Array, ""]]:
    """The diagonal blocks of T and of T^-T, and the largest magnitude of T outside of them.

    The transform is of one layer, and its type of float, float32 or float64, that of the result.

    >>> import jax.numpy as jnp
    >>> from duquantpp_jax.transforms import Smooth
    >>> blocks, inverses, outside = diagonal_blocks(Smooth(jnp.full(64, 2.0)), 64, 32)
    >>> blocks.shape, float(blocks[0, 0, 0]), float(inverses[0, 0, 0]), float(outside)
    ((2, 32, 32), 0.5, 2.0, 0.0)
    """
    types = [leaf.dtype for leaf in jax.tree.leaves(transform)]
    dtype = jnp.float64 if jnp.float64 in types else jnp.float32

    def of_block(first: Int[Array, ""]) -> tuple[Array, Array, Array]:
        rows = (jnp.arange(width) == first + jnp.arange(size)[:, None]).astype(dtype)
        moved = transform.activations(rows)
        t, back = (
            jax.lax.dynamic_slice_in_dim(side, first, size, axis=1)
            for side in (moved, transform.weights(rows))
        )
        rest = jax.lax.dynamic_update_slice_in_dim(moved, jnp.zeros_like(t), first, axis=1)
        return t, back, jnp.max(jnp.abs(rest))

    t, back, outside = jax.lax.map(of_block, jnp.arange(0, width, size))
    return t, back, jnp.max(outside)


@struct.dataclass
class Chain(Transform):
    """T = T_1 T_2 ... T_n. The law holds for the chain because it holds for each link."""

    links: tuple[Transform, ...]

    @property
    def keeps_channels(self) -> bool:  # type: ignore[override]
        """Whether every link does."""
        return all(link.keeps_channels for link in self.links)

    @property
    def mixes_channels(self) -> bool:  # type: ignore[override]
        """Whether any link does."""
        return any(link.mixes_channels for link in self.links)

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
        costs = [link.cost(width) for link in self.links]
        multiply_adds = sum(cost.multiply_adds for cost in costs)
        size = sum(cost.bytes for cost in costs)
        return Cost(multiply_adds, size, all(cost.fuses for cost in costs))

    def as_channels(self, width: int) -> Channels | None:
        whole = Channels.nothing(width)
        for link in self.links:
            if (channels := link.as_channels(width)) is None:
                return None
            whole = whole.then(channels)
        return whole

    def as_blocks(self, width: int, size: int) -> Blocks | None:
        whole = Blocks()
        for link in self.links:
            if (blocks := link.as_blocks(width, size)) is None:
                return None
            whole = whole.then(blocks)
        return whole

    def flat_links(self) -> tuple[Transform, ...]:
        return tuple(inner for link in self.links for inner in link.flat_links())
