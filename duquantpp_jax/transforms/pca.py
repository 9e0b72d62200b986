"""Principal axes of each block (PCA, Karhunen-Loeve): the rotation that decorrelates its channels.

With X_b the tokens of a block and V the eigenvectors of X_b^T X_b, largest eigenvalue first,

    R_b = V      or      R_b = V H

V concentrates the energy in few channels. That suits channels with a scale each, but not a block
that shares a scale; the Hadamard matrix H spreads the energy evenly again.

Source: Hotelling, Analysis of a complex of statistical variables into principal components (1933).
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from duquantpp_jax.core import Fitted, Needs, RandomKey, Recipe, Stats, Weights
from duquantpp_jax.transforms.block import BlockRotation, rotation_size
from duquantpp_jax.transforms.hadamard import hadamard
from duquantpp_jax.transforms.wush import block_gram


@dataclasses.dataclass(frozen=True)
class FitPca:
    """Eigenvectors of each block's second moment, in float64 on the host; `hadamard` spreads them.

    `size` is the rotation size, None for the full width; sharing "shared" takes the mean of the
    blocks' moments."""

    hadamard: bool = False
    size: int | None = 32
    sharing: Literal["per_block", "shared"] = "per_block"
    needs = Needs.GRAM

    def shared(self) -> "FitPca":
        return dataclasses.replace(self, sharing="shared")

    def __call__(self, weights: Weights, stats: Stats, recipe: Recipe, key: RandomKey) -> Fitted:
        gram = stats.require(Needs.GRAM, "PCA")
        size = rotation_size(self.size, weights[0].shape[-1])
        moments = block_gram(np.asarray(gram, np.float64), size)
        if self.sharing == "shared":
            moments = moments.mean(axis=0, keepdims=True)
        _, v = np.linalg.eigh(moments)
        v = v[..., ::-1]
        # The sign of an eigenvector is arbitrary: its largest entry is made positive.
        largest = np.argmax(np.abs(v), axis=-2, keepdims=True)
        v = v * np.where(np.take_along_axis(v, largest, axis=-2) < 0, -1.0, 1.0)
        if self.hadamard:
            v = v @ np.asarray(hadamard(size), np.float64)
        return Fitted(BlockRotation(jnp.asarray(v, jnp.float32)))
