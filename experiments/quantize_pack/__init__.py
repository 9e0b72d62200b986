"""Packed MXFP4 codes and scale bytes of numbers, and back."""

from experiments.quantize_pack.api import quantize_pack, unpack_dequantize

__all__ = ["quantize_pack", "unpack_dequantize"]
