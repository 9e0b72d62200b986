"""The formats, and the element types that they are made of.

>>> import jax.numpy as jnp
>>> x = jnp.asarray([-9.0, 0.3, 5.2, *[1.0] * 29])
>>> codes = MXFP4(scale_rule="even").quantize(x)
>>> codes.dequantize()[:3].tolist(), codes.elements.dtype.name, codes.scales.dtype.name
([-8.0, 0.0, 6.0], 'float4_e2m1fn', 'float8_e8m0fnu')
>>> [f"{f.fake_quantize(x)[2]:.2f}" for f in (MXFP8(), NVFP4())]
['5.00', '4.50']
>>> [element.max for element in (E2M1, E2M3, E3M2, E4M3, E5M2)]
[6.0, 7.5, 28.0, 448.0, 57344.0]
>>> [f.block_size for f in (MX(E3M2, block_size=16), MXFP6(), FP32Scale(), Log256())]
[16, 32, 32, 32]
>>> FPQuant() == FPQuant(block_size=32), Quest().block_size
(True, 32)
"""

from duquantpp_jax.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2
from duquantpp_jax.formats.mx import MX, MXFP4, MXFP6, MXFP8
from duquantpp_jax.formats.nonstandard import FP32Scale, FPQuant, Log256, Quest
from duquantpp_jax.formats.nvfp4 import NVFP4

__all__ = ["E2M1", "E2M3", "E3M2", "E4M3", "E5M2", "MX", "MXFP4", "MXFP6", "MXFP8", "NVFP4"]
__all__ += ["FP32Scale", "FPQuant", "Log256", "Quest"]
