"""The formats, and the element types that they are made of."""

from duquantpp_jax.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2
from duquantpp_jax.formats.mx import MX, MXFP4, MXFP6, MXFP8
from duquantpp_jax.formats.nonstandard import FP32Scale, FPQuant, Log256, Quest
from duquantpp_jax.formats.nvfp4 import NVFP4

__all__ = ["E2M1", "E2M3", "E3M2", "E4M3", "E5M2", "MX", "MXFP4", "MXFP6", "MXFP8", "NVFP4"]
__all__ += ["FP32Scale", "FPQuant", "Log256", "Quest"]
