"""Kernels: block-scaled matmul, rotation with quantization, and the linear made of both."""

from duquantpp_jax.kernels.operand import Operand
from duquantpp_jax.kernels.quantized_linear import quantized_linear
from duquantpp_jax.kernels.rotate_quantize.api import rotate_fake_quantize, rotate_quantize
from duquantpp_jax.kernels.scaled_matmul.api import scaled_matmul

__all__ = [
    "Operand",
    "quantized_linear",
    "rotate_fake_quantize",
    "rotate_quantize",
    "scaled_matmul",
]
