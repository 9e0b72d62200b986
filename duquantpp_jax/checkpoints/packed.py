"""Packed weights stay packed in memory, and are decoded where they are used.

They are used as stored, bit for bit (experts.py has the layout); activations are quantized only if
a format is asked for. What `duquantpp export --format gpt-oss` has written may say in a
transform_config, laid out as that of compressed-tensors, that a Hadamard matrix moves the input of
a weight, in blocks of 32.
"""

import jax.numpy as jnp
import numpy as np

from duquantpp_jax.checkpoints.experts import BLOCK, moved_online, stored_name
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.core import Format, Transform
from duquantpp_jax.models import SITE_WEIGHTS, SITES, Decoder, Linear
from duquantpp_jax.models.parameters import LAYER, LINEARS, layer_prefix, tensor_name
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite
from duquantpp_jax.ptq.walk import State, stack_layers
from duquantpp_jax.recipes import format_name
from duquantpp_jax.transforms.basic import Identity
from duquantpp_jax.transforms.block import BlockRotation
from duquantpp_jax.transforms.hadamard import hadamard


def load_packed(
    checkpoint: Checkpoint, activation_format: Format | None
) -> tuple[Decoder, QuantizedLinear, State]:
    """A packed model: the decoder, the linear that it calls, and its state.

    Args:
      activation_format: Of the inputs of packed weights; None to leave them as they are.
    """
    config, layers, rest = checkpoint.config, [], []
    for number in range(config.num_hidden_layers):
        floats, packed = checkpoint.layer_as_stored(number)
        weights = {name: jnp.asarray(array) for name, array in floats.items()} | packed
        layers.append(
            {
                site: QuantizedSite(
                    _transform(checkpoint, number, site),
                    tuple(weights[name] for name in SITE_WEIGHTS[site]),
                )
                for site in SITES
            }
        )
        rest.append({name: array for name, array in floats.items() if name not in LINEARS})
    arrays = {LAYER + name: np.stack([layer[name] for layer in rest]) for name in rest[0]}
    arrays |= {name.removesuffix(".weight"): array for name, array in checkpoint.outside()}
    parameters = {name: jnp.asarray(array.astype(np.float32)) for name, array in arrays.items()}
    decoder = Decoder(config, parameters, linears=False)
    return decoder, QuantizedLinear(activation_format), stack_layers(layers)


def said(linear: Linear) -> str | None:
    """How a packed model is used, in a sentence; None of a model that is not packed.

    Args:
      linear: That it is called with, of `load_any`.
    """
    if not isinstance(linear, QuantizedLinear) or isinstance(linear.activation_formats, tuple):
        return None
    format = linear.activation_formats
    seen = "not quantized" if format is None else f"in {format_name(format)}"
    return f"packed weights as they are stored (mxfp4), their inputs {seen}"


def _transform(checkpoint: Checkpoint, number: int, site: str) -> Transform:
    """What moves the input of a site, the same for all experts."""
    tensor = layer_prefix(number) + tensor_name(SITE_WEIGHTS[site][0])
    if stored_name(checkpoint.config, tensor) not in moved_online(checkpoint.source.fields()):
        return Identity()
    shape = (checkpoint.config.num_experts, 1, BLOCK, BLOCK)
    return BlockRotation(jnp.broadcast_to(hadamard(BLOCK), shape))
