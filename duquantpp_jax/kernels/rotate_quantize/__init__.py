"""Rotation and MXFP4 quantization in one pass."""

from duquantpp_jax.kernels.rotate_quantize.api import rotate_quantize

__all__ = ["rotate_quantize"]
