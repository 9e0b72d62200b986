"""A few tokens in MXFP4 beside `PackedRows`.

An element is an int8, twice its value: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int8, UInt8, UInt32

from duquantpp_jax.core import MXArray
from duquantpp_jax.kernels.matvec.rows import PackedRows, filled


@struct.dataclass
class Tokens:
    """Tokens in MXFP4 beside `PackedRows`.

    Attributes:
      words: Four elements in each, the first in the lowest byte; those of a token together.
    """

    words: UInt32[Array, "words_of_tokens blocks"]
    scale_bytes: UInt8[Array, "tokens blocks"]

    @classmethod
    def of(cls, x: MXArray, rows: PackedRows) -> Tokens:
        """Lays out tokens [m, k] for weights of k inputs."""
        m, blocks = x.scales.shape
        byte = doubled(x.codes()).astype(jnp.uint32).reshape(m, blocks, 8, 4) & 0xFF
        words = sum(byte[..., place] << (8 * place) for place in range(4))
        words = jnp.swapaxes(words, 1, 2).reshape(8 * m, blocks)
        missing = rows.scale_bytes.shape[-1] - blocks
        return cls(filled(words, 1, missing), filled(x.scale_bytes(), 1, missing))


def doubled(codes: UInt8[Array, "*shape"]) -> Int8[Array, "*shape"]:
    """Twice the value of each E2M1 code."""
    code = codes.astype(jnp.int8)
    magnitude = code & 7
    steep = jnp.where(magnitude < 6, 2 * magnitude - 4, 4 * magnitude - 16)
    magnitude = jnp.where(magnitude < 4, magnitude, steep)
    return jnp.where(code < 8, magnitude, -magnitude)
