"""Decoders that call a `linear` they are given, and the checkpoints they come from."""

from duquantpp_jax.models.cache import Cache, Store, empty_cache
from duquantpp_jax.models.checkpoint import load, load_config, load_tokenizer, save, sha256
from duquantpp_jax.models.config import DecoderConfig
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
from duquantpp_jax.models.families import FAMILIES

__all__ = [
    "FAMILIES",
    "SITES",
    "SITE_WEIGHTS",
    "Cache",
    "Decoder",
    "DecoderConfig",
    "Linear",
    "Store",
    "dense",
    "empty_cache",
    "linear_names",
    "load",
    "load_config",
    "load_tokenizer",
    "parameter_shapes",
    "random_parameters",
    "save",
    "sha256",
]
