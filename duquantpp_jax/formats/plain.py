"""16-bit activations beside quantized weights (W4A16)."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from duquantpp_jax.core import Exact, Format, MXArray
from duquantpp_jax.core.arrays import rounded_to
from duquantpp_jax.formats.mx import check_type


@dataclasses.dataclass(frozen=True)
class BFloat16(Format):
    """Activations in bfloat16, as in a model that is not quantized.

    Attributes:
      block_size: Channels that a block transform mixes; there are no scales.

    Source: W4A16, as in GPTQ, arXiv 2210.17323.
    """

    _: dataclasses.KW_ONLY
    block_size: int = 32
    holds_weights: ClassVar[bool] = False

    def encode(self, x: Array | np.ndarray, **options: Any) -> MXArray:
        """Raises ValueError: there are no elements and no scales."""
        raise ValueError("bf16 has no elements and no scales: it is for activations (W4A16)")

    def exactly(self, x: Float32[Array, "*shape"], **options: Any) -> Exact:
        """See `Format.exactly`; the clips and offsets of fits for other formats change nothing."""
        del options
        return Exact(self.fake_quantize(x))

    def fake_quantize(
        self,
        x: Array | np.ndarray,
        *,
        axis: int = -1,
        pad: bool = False,
        saturated_gradient: bool = True,
        **options: Any,
    ) -> Float[Array, "*shape"]:
        """x rounded to bfloat16, nearest even, in its own type; the gradient is that of x.

        Nothing saturates, and every axis is the same.

        Raises:
          ValueError: As formats of blocks for x's type; or an option is given.
        """
        if given := [name for name, value in options.items() if value is not None]:
            raise ValueError(f"bf16 has no use for {', '.join(given)}: it has no blocks, no scales")
        check_type(x)
        x = jnp.asarray(x)
        return rounded_to(x, x.astype(jnp.bfloat16).astype(x.dtype), jnp.ones((), bool))
