"""Rotations that are Kronecker products, applied factor by factor.

    R = F_1 x F_2 x ... x F_m,    sides n_1, ..., n_m,    rotation size r = n_1 n_2 ... n_m

With the r channels of a block as an array of m axes, each factor acts on an axis of its own: that
takes n_1 + ... + n_m multiply-adds a value in place of r. For a Hadamard matrix of side 2^n, a
product of n matrices of side 2, this is the fast Walsh-Hadamard transform; a factor joins several
of its stages, to suit matrix units.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from duquantpp_jax.core import Blocks, Cost, Transform


@struct.dataclass
class KroneckerRotation(Transform):
    """T = blockdiag(R, ..., R), R the Kronecker product of orthogonal factors F_1, ..., F_m."""

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
