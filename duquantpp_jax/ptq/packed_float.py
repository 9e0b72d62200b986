"""A weight in float of a model whose weights were packed before it was quantized."""

import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from duquantpp_jax.core import MXArray


@struct.dataclass
class PackedFloat:
    """A weight that is left in float, and is packed in memory until it is used: a model whose
    weights were packed before it was quantized keeps those that were not chosen so."""

    packed: MXArray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers."""
        return self.packed.shape

    def astype(self, dtype: DTypeLike) -> Float[Array, "*layers _ _"]:
        """The numbers in another type."""
        return self.packed.dequantize().astype(dtype)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.packed.dequantize(), dtype)
