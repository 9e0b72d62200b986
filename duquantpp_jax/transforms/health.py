"""The numerical errors of a fitted transform, in float64.

    condition            s_max(T) / s_min(T), the most by which T^-1 may amplify rounding errors
    orthogonality_error  max |T T^T - I|
    law_error            max |T (T^-T)^T - I|, the error of the law of transforms

For a transform that does not mix blocks, each is the largest over blocks. To bound the condition,
use `FitWush(max_condition=...)`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from duquantpp_jax.core import Transform, diagonal_blocks


class Health(NamedTuple):
    """The numbers at the top of this file; NaN or Inf where T is not finite."""

    condition: float
    orthogonality_error: float
    law_error: float


def matrices(
    transform: Transform, width: int, size: int | None = None
) -> tuple[Float[np.ndarray, "blocks r r"], Float[np.ndarray, "blocks r r"]]:
    """T and T^-T as their diagonal blocks, computed in float64.

    Args:
      transform: Of a single layer.
      width: Channels k.
      size: Side of the diagonal blocks; None for a single block of side k.

    Raises:
      ValueError: T has entries outside the blocks.
    """
    size = width if size is None else size

    def exact(leaf: Array) -> Array:
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    with jax.enable_x64(True):
        transform = jax.tree.map(exact, transform)
        t, back, outside = map(np.asarray, diagonal_blocks(transform, width, size))
    if np.isfinite(t).all() and not outside <= 1e-9 * max(1.0, np.abs(t).max()):
        raise ValueError(f"the transform mixes channels beyond blocks of {size}: give no size")
    return t, back


def health(transform: Transform, width: int, size: int | None = None) -> Health:
    """Condition number, orthogonality error and error of the law; arguments as of `matrices`."""
    t, back = matrices(transform, width, size)
    eye = np.eye(t.shape[-1])
    if not (np.isfinite(t).all() and np.isfinite(back).all()):
        return Health(np.nan, np.nan, np.nan)
    return Health(
        condition=float(np.linalg.cond(t).max()),
        orthogonality_error=float(np.abs(t @ t.swapaxes(1, 2) - eye).max()),
        law_error=float(np.abs(t @ back.swapaxes(1, 2) - eye).max()),
    )
