"""Numbers to packed MXFP4 codes and scale bytes, in one pass over memory."""

from duquantpp_jax.kernels.quantize_pack.api import quantize_pack

__all__ = ["quantize_pack"]
