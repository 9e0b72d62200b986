"""Packed MXFP4 codes and scale bytes of numbers, and back."""

from duquantpp_jax.kernels.quantize_pack.api import quantize_pack, unpack_dequantize

__all__ = ["quantize_pack", "unpack_dequantize"]
