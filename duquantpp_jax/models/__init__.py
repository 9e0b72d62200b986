"""Decoders, whose linears the caller gives; nothing here knows of quantization."""

from duquantpp_jax.models.cache import Cache, Store, empty_cache
from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.decoder import Decoder
from duquantpp_jax.models.families import FAMILIES
from duquantpp_jax.models.layers import Linear, dense
from duquantpp_jax.models.parameters import SITE_WEIGHTS, SITES, linear_names, parameter_shapes

__all__ = ["FAMILIES", "SITES", "SITE_WEIGHTS", "Cache", "Decoder", "DecoderConfig", "Linear"]
__all__ += ["Store", "dense", "empty_cache", "linear_names", "parameter_shapes"]
