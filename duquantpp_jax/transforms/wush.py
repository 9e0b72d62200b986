"""WUSH: the closed form that balances both sides of a linear, block by block.

With L_x L_x^T = X^T X / tokens and L_w L_w^T = W^T W / n of a block (each damped), the singular
value decomposition L_w^T L_x = U S V^T and a Hadamard matrix H, acting from the left on columns,

    T = H S^(-1/2) U^T L_w^T,      x' = x T^T,      w' = w T^-1.

Both moved second moments are then H S H^T: equal to each other, and even over the channels.

Source: WUSH, arXiv 2512.00956.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from duquantpp_jax.core import Fitted, Recipe, Stats, Weights, stack
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.hadamard import hadamard


def block_gram(gram: Float[np.ndarray, "k k"], size: int) -> Float[np.ndarray, "blocks size size"]:
    """The diagonal blocks of a Gram matrix."""
    count = gram.shape[0] // size
    blocks = gram.reshape(count, size, count, size)
    return np.stack([blocks[b, :, b, :] for b in range(count)])


def damped(
    moments: Float[np.ndarray, "*blocks n n"], damping: float
) -> Float[np.ndarray, "*blocks n n"]:
    """Each second moment plus `damping` times its mean diagonal (or 1 where that is zero)."""
    n = moments.shape[-1]
    mean = np.trace(moments, axis1=-2, axis2=-1) / n
    ridge = np.where(mean > 0, damping * mean, 1.0)
    return moments + ridge[..., None, None] * np.eye(n)


@dataclasses.dataclass(frozen=True)
class FitWush:
    """WUSH in float64 on the host.

    Attributes:
      damping: In units of the mean diagonal of each second moment.
      size: Side of the matrices, a power of two.
    """

    damping: float = 1e-3
    size: int = 32
    needs = frozenset({"gram"})

    def __call__(
        self, weights: Weights, stats: Stats, recipe: Recipe, key: Key[Array, ""]
    ) -> Fitted:
        assert stats.gram is not None
        w = np.asarray(stack(weights), np.float64)
        x_gram = np.asarray(stats.gram, np.float64) / float(stats.count)
        l_x = np.linalg.cholesky(damped(block_gram(x_gram, self.size), self.damping))
        l_w = np.linalg.cholesky(damped(block_gram(w.T @ w / len(w), self.size), self.damping))
        u, s, _ = np.linalg.svd(np.swapaxes(l_w, 1, 2) @ l_x)
        h = np.asarray(hadamard(self.size), np.float64)
        # T^T = L_w U S^(-1/2) H^T, and its inverse H S^(1/2) U^T L_w^-1.
        forward = (l_w @ u / np.sqrt(s)[:, None, :]) @ h.T
        back = h @ (np.sqrt(s)[:, :, None] * np.swapaxes(u, 1, 2)) @ np.linalg.inv(l_w)
        return Fitted(
            BlockAffine(jnp.asarray(forward, jnp.float32), jnp.asarray(back, jnp.float32))
        )
