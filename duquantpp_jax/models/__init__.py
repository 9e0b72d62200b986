"""Decoders, whose linears the caller gives; nothing here knows of quantization.

>>> import jax, jax.numpy as jnp
>>> config = DecoderConfig(
...     hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
...     num_key_value_heads=2, head_dim=16, vocab_size=257, rms_norm_eps=1e-5,
... )
>>> shapes = parameter_shapes(config)
>>> model = Decoder(config, {name: jnp.ones(shape) for name, shape in shapes.items()})
>>> logits, _ = jax.jit(lambda model, tokens: model(tokens))(model, jnp.zeros((8, 32), int))
>>> logits.shape
(8, 32, 257)
"""

from duquantpp_jax.models.cache import Cache, Store, empty_cache
from duquantpp_jax.models.config import DecoderConfig
from duquantpp_jax.models.decoder import Decoder
from duquantpp_jax.models.families import FAMILIES
from duquantpp_jax.models.layers import Linear, dense
from duquantpp_jax.models.parameters import SITE_WEIGHTS, SITES, linear_names, parameter_shapes

__all__ = ["FAMILIES", "SITES", "SITE_WEIGHTS", "Cache", "Decoder", "DecoderConfig", "Linear"]
__all__ += ["Store", "dense", "empty_cache", "linear_names", "parameter_shapes"]
