"""How a linear's input is moved, and how that is fitted: a file for each way."""

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
