"""Quantized checkpoints: how they are described, written a layer at a time, and read again."""

from duquantpp_jax.quantized.directory import Quantized, is_quantized, load_quantized
from duquantpp_jax.quantized.job import ACTIVATION_FORMATS, WEIGHT_FORMATS, Job, format_named

__all__ = [
    "ACTIVATION_FORMATS",
    "WEIGHT_FORMATS",
    "Job",
    "Quantized",
    "format_named",
    "is_quantized",
    "load_quantized",
]
