"""Transforms that move each block of channels by a matrix of its own, or all by one.

    BlockRotation       x'_b = x_b R_b    w'_b = w_b R_b      R_b orthogonal
    BlockAffine         x'_b = x_b A_b    w'_b = w_b A_b^-T
    KroneckerRotation   x'_b = x_b R      w'_b = w_b R        R = F_1 x ... x F_m, orthogonal

where x_b are the channels of block b. The side of the matrices is the rotation size; DuQuant++'s
claim is that it should equal the block size of the format.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from duquantpp_jax.core import Blocks, Chain, Channels, Cost, Transform
from duquantpp_jax.transforms.basic import Smooth


def multiply_blocks(
    x: Float[Array, "*tokens k"], matrices: Float[Array, "blocks r r"]
) -> Float[Array, "*tokens k"]:
    """x_b @ matrices_b for each block of r channels; a single matrix serves all blocks.

    Raises:
      ValueError: The width is not that of the blocks.
    """
    count, size, _ = matrices.shape
    width = x.shape[-1]
    if width % size or count not in (1, width // size):
        raise ValueError(
            f"{count} matrices of side {size} move a width of {count * size} "
            f"(or, if one, any multiple of {size}): got {width}"
        )
    if count == 1:
        blocks = x.reshape(*x.shape[:-1], width // size, size)
        moved = jnp.matmul(blocks, matrices[0], precision=jax.lax.Precision.HIGHEST)
        return moved.reshape(x.shape)
    # Blocks in front, as the batch of one product: on CPUs twice as fast as leaving them inside.
    blocks = x.reshape(-1, count, size).swapaxes(0, 1)
    moved = jnp.matmul(blocks, matrices, precision=jax.lax.Precision.HIGHEST)
    return moved.swapaxes(0, 1).reshape(x.shape)


def rotation_size(size: int | None, width: int) -> int:
    """The rotation size for a width, None the whole; raises ValueError unless it divides it."""
    size = width if size is None else size
    if size < 1 or width % size:
        fits = max(d for d in range(1, min(max(size, 1), width) + 1) if width % d == 0)
        raise ValueError(
            f"rotation size {size} does not divide the width {width}: the next smaller that does "
            f"is {fits}"
        )
    return size


def polished(
    matrices: Float[Array | np.ndarray, "*layers blocks r r"],
) -> Float[Array, "*layers blocks r r"]:
    """The matrices made orthogonal up to float32: one step of Newton and Schulz in float64.

    R (3 I - R^T R) / 2 has the error 3/4 e^2 where R^T R = I + E, |E| = e: matrices that have
    drifted by 1e-5 over many products in float32 come back to the last bit.

    Source: Higham, Functions of Matrices (2008), section 8.3.
    """
    r = np.asarray(matrices, np.float64)
    error = r.mT @ r - np.eye(r.shape[-1])
    return jnp.asarray(r - r @ error / 2, jnp.float32)


@struct.dataclass
class BlockRotation(Transform):
    """T = blockdiag(R_1, ..., R_B), each R_b orthogonal, so that T^-T = T; or one R for all."""

    matrices: Float[Array, "*layers blocks r r"]

    def activations(self, x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
        return multiply_blocks(x, self.matrices)

    def weights(self, w: Float[Array, "*outputs k"]) -> Float[Array, "*outputs k"]:
        return multiply_blocks(w, self.matrices)

    def inverse(self) -> Transform:
        return BlockRotation(self.matrices.mT)

    def cost(self, width: int) -> Cost:
        return Cost(self.matrices.shape[-1], self.matrices.nbytes)

    def as_blocks(self, width: int, size: int) -> Blocks | None:
        return _of_side(size, width, self.matrices, self.matrices.mT)


@struct.dataclass
class BlockAffine(Transform):
    """T = blockdiag(A_1, ..., A_B), invertible; the inverses are kept beside the matrices."""

    matrices: Float[Array, "*layers blocks r r"]
    inverses: Float[Array, "*layers blocks r r"]

    def activations(self, x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
        return multiply_blocks(x, self.matrices)

    def weights(self, w: Float[Array, "*outputs k"]) -> Float[Array, "*outputs k"]:
        return multiply_blocks(w, self.inverses.mT)

    def inverse(self) -> Transform:
        return BlockAffine(self.inverses, self.matrices)

    def cost(self, width: int) -> Cost:
        return Cost(self.matrices.shape[-1], self.matrices.nbytes)

    def as_channels(self, width: int) -> Channels | None:
        """The Channels that move nothing, where every matrix is the identity; else None."""
        matrices = np.asarray(self.matrices)
        if np.array_equal(matrices, np.broadcast_to(np.eye(matrices.shape[-1]), matrices.shape)):
            return Channels.nothing(width)
        return None

    def as_blocks(self, width: int, size: int) -> Blocks | None:
        return _of_side(size, width, self.matrices, self.inverses)


@struct.dataclass
class KroneckerRotation(Transform):
    """T = blockdiag(R, ..., R), R = F_1 x ... x F_m the Kronecker product of orthogonal factors.

    With the channels of a block as an array of m axes, each factor acts on an axis of its own: that
    takes as many multiply-adds a value as the sides of the factors add up to, not their product.
    For a Hadamard matrix of side 2^n, a product of n matrices of side 2, this is the fast
    Walsh-Hadamard transform; a factor joins several of its stages, to suit matrix units.
    """

    factors: tuple[Float[Array, "*layers _ _"], ...]

    @property
    def size(self) -> int:
        """The rotation size r."""
        return math.prod(factor.shape[-1] for factor in self.factors)

    def activations(self, x: Float[Array, "*tokens k"]) -> Float[Array, "*tokens k"]:
        if x.shape[-1] % (after := self.size):
            raise ValueError(
                f"a Kronecker product of side {after} moves any multiple of {after} channels: "
                f"got {x.shape[-1]}"
            )
        moved = x
        for factor in self.factors:
            after //= factor.shape[-1]
            moved = moved.reshape(-1, factor.shape[-1], after)
            moved = jnp.einsum("bia,ij->bja", moved, factor, precision=jax.lax.Precision.HIGHEST)
        return moved.reshape(x.shape)

    def weights(self, w: Float[Array, "*outputs k"]) -> Float[Array, "*outputs k"]:
        return self.activations(w)

    def inverse(self) -> Transform:
        return KroneckerRotation(tuple(factor.mT for factor in self.factors))

    def cost(self, width: int) -> Cost:
        sides = (factor.shape[-1] for factor in self.factors)
        return Cost(sum(sides), sum(factor.nbytes for factor in self.factors))

    def as_blocks(self, width: int, size: int) -> Blocks | None:
        return super().as_blocks(width, size) if self.size <= size else None


def lower(transform: Transform, width: int, size: int) -> Transform:
    """The same map as Chain((Smooth, BlockAffine of side `size`)), where it has that form.

    Transforms that lower share one pytree structure: they stack over layers, and a grid of them
    compiles once. Others (permutations, larger rotations) come back as they are.

    >>> type(lower(Smooth(jnp.full(64, 2.0)), 64, 32)).__name__
    'Chain'
    """
    if (blocks := transform.as_blocks(width, size)) is None:
        return transform
    scale, matrices, inverses = blocks.whole(width, size)
    return Chain((Smooth(scale), BlockAffine(matrices, inverses)))


def _of_side(size: int, width: int, *sides: Float[Array, "blocks r r"]) -> Blocks | None:
    """Matrices, and inverses, as block-diagonal ones of side `size`; None if it is no multiple."""
    count, side, _ = sides[0].shape
    if size % side or width % size:
        return None
    if (each := size // side) == 1:
        return Blocks(None, *sides)

    def joined(m: Float[Array, "blocks r r"]) -> Float[Array, "more s s"]:
        m = jnp.broadcast_to(m, (each, side, side)) if count == 1 else m
        grouped, eye = m.reshape(-1, each, side, side), jnp.eye(each, dtype=m.dtype)
        return jnp.einsum("gmij,mn->gminj", grouped, eye).reshape(-1, size, size)

    return Blocks(None, *map(joined, sides))
