"""Decoders that call a `linear` they are given, and the checkpoints they come from."""

from duquantpp_jax.models.checkpoint import load, load_config, load_tokenizer, save, sha256
from duquantpp_jax.models.config import FAMILIES, DecoderConfig
from duquantpp_jax.models.decoder import (
    SITE_WEIGHTS,
    SITES,
    Decoder,
    Linear,
    dense,
    linear_names,
    parameter_shapes,
    random_parameters,
)

__all__ = [
    "FAMILIES",
    "SITES",
    "SITE_WEIGHTS",
    "Decoder",
    "DecoderConfig",
    "Linear",
    "dense",
    "linear_names",
    "load",
    "load_config",
    "load_tokenizer",
    "parameter_shapes",
    "random_parameters",
    "save",
    "sha256",
]
