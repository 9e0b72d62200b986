"""WUSH: the closed form that balances activations and weights of a linear, block by block.

With L_x L_x^T = X^T X / tokens and L_w L_w^T = W^T W / n of a block (each damped), the singular
value decomposition L_w^T L_x = U S V^T and a Hadamard matrix H, acting from the left on columns,

    T = H S^(-1/2) U^T L_w^T,      x' = x T^T,      w' = w T^-1.

Both second moments become H S H^T: equal, and even over the channels.

T T^T is the geometric mean of a moment and the inverse of the other. A channel that is far larger
than the rest, or dead, makes T ill-conditioned, and T^-1 then amplifies rounding errors. Damping
bounds this: with `max_condition` each block takes the least damping of the grid

    damping, damping * 10^(1/4), damping * 10^(2/4), ...

for which cond(T) = s_max / s_min is within the bound. (As damping grows, both moments become
multiples of I, and cond(T) becomes 1.)

Source: WUSH, arXiv 2512.00956.
"""

import contextlib
import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from duquantpp_jax.core import Fitted, Needs, RandomKey, Recipe, Stats, Weights, stack
from duquantpp_jax.core.notices import NotFinite, inform, warn
from duquantpp_jax.transforms.block import BlockAffine, rotation_size
from duquantpp_jax.transforms.hadamard import hadamard


def block_gram(gram: Float[np.ndarray, "k k"], size: int) -> Float[np.ndarray, "blocks size size"]:
    """The diagonal blocks of a Gram matrix."""
    count = gram.shape[0] // size
    blocks = gram.reshape(count, size, count, size)
    return np.stack([blocks[b, :, b, :] for b in range(count)])


def damped_moments(
    moments: Float[np.ndarray, "*blocks n n"], damping: float
) -> Float[np.ndarray, "*blocks n n"]:
    """Each second moment plus `damping` times its mean diagonal (or 1 where that is zero)."""
    n = moments.shape[-1]
    mean = np.trace(moments, axis1=-2, axis2=-1) / n
    ridge = np.where(mean > 0, damping * mean, 1.0)
    return moments + ridge[..., None, None] * np.eye(n)


def wush(
    x_moments: Float[np.ndarray, "blocks n n"],
    w_moments: Float[np.ndarray, "blocks n n"],
    damping: float,
) -> tuple[Float[np.ndarray, "blocks n n"], Float[np.ndarray, "blocks n n"]]:
    """T^T of each block, which acts on x from the right, and its inverse.

    The damping is raised by powers of ten, with a warning, until the moments can be factorized.

    Raises:
      NotFinite: They have NaN or Inf.
    """
    if not (np.isfinite(x_moments).all() and np.isfinite(w_moments).all()):
        wrong = [np.count_nonzero(~np.isfinite(moments)) for moments in (x_moments, w_moments)]
        raise NotFinite(
            f"second moments have NaN or Inf in {wrong[0]} numbers of the input's and {wrong[1]} "
            "of the weights'"
        )
    both = np.stack([x_moments, w_moments])
    for times in 10.0 ** np.arange(8):
        with contextlib.suppress(np.linalg.LinAlgError):
            l_x, l_w = np.linalg.cholesky(damped_moments(both, damping * times))
            break
    else:
        raise ValueError("the second moments of input or weights cannot be factorized")
    if times > 1:
        said = "WUSH: damping raised from %g to %g, so that second moments can be factorized"
        warn(said, damping, damping * times)
    u, s, _ = np.linalg.svd(np.swapaxes(l_w, 1, 2) @ l_x)
    h = np.asarray(hadamard(x_moments.shape[-1]), np.float64)
    # T^T = L_w U S^(-1/2) H^T, and its inverse H S^(1/2) U^T L_w^-1.
    forward = (l_w @ u / np.sqrt(s)[:, None, :]) @ h.T
    back = h @ (np.sqrt(s)[:, :, None] * np.swapaxes(u, 1, 2)) @ np.linalg.inv(l_w)
    return forward, back


@dataclasses.dataclass(frozen=True)
class FitWush:
    """WUSH: second moments of inputs and weights balanced, in float64 on the host.

    Attributes:
      damping: In units of the mean diagonal of each second moment; the least damping where
        `max_condition` is given.
      size: Side of the matrices, of which a Hadamard matrix exists.
      max_condition: Bound on the condition number of the matrix of each block, at least 1.01. How
        far damping was raised for it is a note of the log.
      sharing: "shared" makes a single matrix of the means of the blocks' moments.
    """

    damping: float = 1e-3
    size: int = 32
    max_condition: float | None = None
    sharing: Literal["per_block", "shared"] = "per_block"
    needs = Needs.GRAM

    def shared(self) -> "FitWush":
        return dataclasses.replace(self, sharing="shared")

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        gram = stats.require(Needs.GRAM, "WUSH")
        rotation_size(self.size, weights[0].shape[-1])
        w = np.asarray(stack(weights), np.float64)
        x_gram = np.asarray(gram, np.float64) / float(stats.count)
        x_moments, w_moments = (block_gram(m, self.size) for m in (x_gram, w.T @ w / len(w)))
        if self.sharing == "shared":
            x_moments, w_moments = (m.mean(axis=0, keepdims=True) for m in (x_moments, w_moments))
        forward, back = wush(x_moments, w_moments, self.damping)
        if self.max_condition is not None:
            if not self.max_condition >= 1.01:
                raise ValueError(f"max_condition = {self.max_condition}: it must be 1.01 or more")
            damping, raised = self.damping, 0
            while len(beyond := np.flatnonzero(np.linalg.cond(forward) > self.max_condition)):
                damping, raised = damping * 10**0.25, max(raised, len(beyond))
                forward[beyond], back[beyond] = wush(x_moments[beyond], w_moments[beyond], damping)
            if raised:
                said = (
                    "WUSH: damping raised from %g to up to %g in %d of %d blocks, for a condition "
                )
                numbers = self.damping, damping, raised, len(forward), self.max_condition
                inform(said + "number of %g", *numbers)
        return Fitted(BlockAffine(*(jnp.asarray(m, jnp.float32) for m in (forward, back))))
