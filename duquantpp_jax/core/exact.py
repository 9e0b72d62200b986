"""Numbers that bfloat16 holds exactly, but for one factor of all.

    x_i = numbers_i * factor

bfloat16 has 8 significant bits and the exponents of float32. An element has 2 to 4 significant bits
(E2M1 2, E3M2 and E5M2 3, E2M3 and E4M3 4); an E8M0 scale has 1, one in E4M3 4. Their product has at
most 6 and is exact from 2^-126 to the largest float32. Below, where float32 has subnormals that
CPUs flush to zero, bfloat16 has the multiples of 2^-133: still all of MXFP4, MXFP6 and NVFP4, of
MXFP8 those with scale bytes from 3 (E4M3) or 10 (E5M2) on. A tensor scale of NVFP4 has 24
significant bits; it is the factor. Activations in bfloat16 are such numbers themselves, of 8 bits.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float32

SIGNIFICANT_BITS = 8
"""Of bfloat16."""


@struct.dataclass
class Exact:
    """An array, or inputs of experts, of such numbers.

    Attributes:
      numbers: In float32, or in bfloat16.
      factor: Of each of the arrays that are stacked on the first axes; None for 1.
    """

    numbers: Any
    factor: Float32[Array, "*stack"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.numbers.shape

    def whole(self) -> Any:
        """numbers * factor in float32, rounded once."""
        numbers = self.numbers.astype(jnp.float32)
        return numbers if self.factor is None else numbers * self.factors()

    def factors(self) -> Float32[Array, "..."]:
        """The factor with an axis for each of the numbers."""
        factor = jnp.ones((), jnp.float32) if self.factor is None else self.factor
        return factor.reshape(*factor.shape, *[1] * (self.numbers.ndim - factor.ndim))
