"""Block-scaled matmul of MXFP4, NVFP4 and MXFP8 operands."""

from duquantpp_jax.kernels.scaled_matmul.api import scaled_matmul

__all__ = ["scaled_matmul"]
