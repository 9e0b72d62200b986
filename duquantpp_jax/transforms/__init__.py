"""How a linear's input is moved, and how that is fitted: a file for each way.

>>> import jax, jax.numpy as jnp, numpy as np
>>> from duquantpp_jax import Stats, recipe
>>> x, w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 64), np.float32))
>>> ts = [Identity(), Smooth(jnp.full(64, 2.0)), Permute(jnp.arange(64)[::-1])]
>>> ts += [BlockRotation(jnp.eye(32)[None]), KroneckerRotation((jnp.eye(2), jnp.eye(32)))]
>>> ts += [BlockAffine(2 * jnp.eye(32)[None], jnp.eye(32)[None] / 2)]
>>> all(np.allclose(t.activations(x) @ t.weights(w).T, x @ w.T, atol=1e-4) for t in ts)
True
>>> fit = FitInTurn((FitSmooth(), FitHadamard()))  # what `smooth_hadamard` names
>>> stats = Stats.init(64, 1, 64).update(x[None], jnp.int32(0))
>>> t = fit((w,), stats, recipe(fit), jax.random.key(0)).transform
>>> [type(link).__name__ for link in t.links]
['Smooth', 'BlockRotation']
>>> others = FitIdentity(), FitDct(), FitHaar(), FitDuquantpp(), FitPermutation("zigzag")
>>> others += FitPca(hadamard=True), FitWush(max_condition=10.0)
>>> [recipe(fit).needs.name for fit in others]
['NOTHING', 'NOTHING', 'NOTHING', 'NOTHING', 'NOTHING', 'GRAM', 'GRAM']
"""

from duquantpp_jax.transforms.basic import FitIdentity, FitInTurn, FitSmooth, Identity, Smooth
from duquantpp_jax.transforms.block import BlockAffine, BlockRotation, KroneckerRotation, lower
from duquantpp_jax.transforms.dct import FitDct
from duquantpp_jax.transforms.duquant import FitDuquantpp
from duquantpp_jax.transforms.haar import FitHaar
from duquantpp_jax.transforms.hadamard import FitHadamard
from duquantpp_jax.transforms.pca import FitPca
from duquantpp_jax.transforms.permutation import FitPermutation, Permute
from duquantpp_jax.transforms.wush import FitWush

__all__ = ["BlockAffine", "BlockRotation", "Identity", "KroneckerRotation", "Permute", "Smooth"]
__all__ += ["FitDct", "FitDuquantpp", "FitHaar", "FitHadamard", "FitIdentity", "FitInTurn"]
__all__ += ["FitPca", "FitPermutation", "FitSmooth", "FitWush", "lower"]
