"""Packed weights stay packed in memory, and are decoded where they are used.

They are used as stored, bit for bit (mxfp4.py has the layouts); activations are quantized only if
a format is asked for. What moves inputs when the model runs is said by a transform_config
(online.py), and is the same for all packed linears of a site.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from duquantpp_jax.checkpoints.lazy import Checkpoint, outermost, take_layers
from duquantpp_jax.checkpoints.mxfp4 import INPUT_SCALE, NVFP4_PACKED, asked_for, tensor_scale
from duquantpp_jax.checkpoints.online import stored_matrix, transform_of
from duquantpp_jax.checkpoints.source import source
from duquantpp_jax.core import Format, MXArray, Transform
from duquantpp_jax.models import SITE_WEIGHTS, SITES, Decoder, Linear
from duquantpp_jax.models.parameters import LINEARS, experts, layer_prefix
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite
from duquantpp_jax.ptq.walk import State, stack_layers
from duquantpp_jax.recipes import format_name
from duquantpp_jax.transforms.basic import Identity


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
                    _transform(checkpoint, number, site, packed),
                    tuple(weights[name] for name in SITE_WEIGHTS[site]),
                    tensor_scale=_input_scale(checkpoint, number, site, packed, activation_format),
                )
                for site in SITES
            }
        )
        rest.append({name: array for name, array in floats.items() if name not in LINEARS})
    parameters = take_layers(rest) | outermost(checkpoint.outside())
    decoder = Decoder(config, parameters, linears=False)
    return decoder, QuantizedLinear(activation_format), stack_layers(layers)


def said(model: str | os.PathLike[str], linear: Linear) -> str | None:
    """How a packed model is used, in a sentence; None of a model that is not packed.

    Args:
      linear: That it is called with, of `load_any`.
    """
    if not isinstance(linear, QuantizedLinear) or isinstance(linear.activation_formats, tuple):
        return None
    if (format := linear.activation_formats) is not None:
        seen = f"in {format_name(format)}"
    elif (asked := asked_for(source(model).fields())) is not None:
        seen = f"not quantized (config.json asks for {asked}: --activation-format)"
    else:
        seen = "not quantized"
    packing = source(model).fields().get("quantization_config") or {}
    kind = "nvfp4" if packing.get("format") == NVFP4_PACKED else "mxfp4"
    return f"packed weights as they are stored ({kind}), their inputs {seen}"


def decoded(model: str | os.PathLike[str] | None) -> str | None:
    """What a command says that decodes packed weights; None of a model that is not packed.

    Args:
      model: Of `Checkpoint`; None for the embedded one.

    Raises:
      ValueError: Its inputs are moved, so that decoded weights are no float model.
    """
    if model is None or not (checkpoint := Checkpoint(model)).packed:
        return None
    checkpoint.check_unmoved()
    return (
        f"{model}: packed weights are decoded, which is exact; what they decode to is the float "
        "model here."
    )


def _transform(
    checkpoint: Checkpoint, number: int, site: str, packed: Mapping[str, MXArray]
) -> Transform:
    """What moves the input of the packed linears of a site; of experts, stacked.

    Raises:
      ValueError: It moves some of them and not others, or linears that are in float.
    """
    moved, found, prefix = checkpoint.moved, checkpoint.found, layer_prefix(number)
    transforms: dict[Any, Transform] = {}
    for name in SITE_WEIGHTS[site]:
        for part in checkpoint.linears[prefix + name]:
            group = moved.get(part)
            if name not in packed and group is not None:
                raise ValueError(
                    f"{part} is in float and transform_config moves its input: what is read are "
                    "packed weights for moved inputs"
                )
            if name not in packed:
                continue
            width = packed[name].shape[-1]
            tensor = group and stored_matrix(part, group, width, found)
            if (key := (group, tensor)) not in transforms:
                made = transform_of(tensor, group, width, found) if group else Identity()
                transforms[key] = made
    transform, *others = [*transforms.values()] or [Identity()]
    if not all(_equal(transform, other) for other in others):
        raise ValueError(
            f"{prefix}{site}: its linears share an input, and transform_config moves it in "
            f"{len(transforms)} ways: one matrix for all of them is read"
        )
    if (count := experts(checkpoint.config, site)) and transforms:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), transform)
    return transform


def _input_scale(
    checkpoint: Checkpoint,
    number: int,
    site: str,
    packed: Mapping[str, MXArray],
    format: Format | None,
) -> Float32[Array, ""] | None:
    """The tensor scale of the input of a site, for formats that calibration gives one.

    Raises:
      ValueError: The checkpoint has none, or several.
    """
    if format is None or format.calibrated_scale(jnp.float32(1)) is None:
        return None
    prefix, found = layer_prefix(number), checkpoint.found
    linears = [n for name in SITE_WEIGHTS[site] if name in packed
               for n in checkpoint.linears[prefix + name]]  # fmt: skip
    if missing := [name for name in linears if name + INPUT_SCALE not in found]:
        raise ValueError(
            f"{missing[0]} has no {INPUT_SCALE[1:]}: give another --activation-format than "
            f"{format_name(format)}, as nvfp4"
        )
    scales = {
        float(tensor_scale(name + INPUT_SCALE, found[name + INPUT_SCALE].read()))
        for name in linears
    }
    if len(scales) > 1:
        raise ValueError(
            f"{prefix}{site}: its linears share an input, and have {len(scales)} scales for it: "
            "one for all of them is read"
        )
    return jnp.float32(scales.pop()) if scales else None


def _equal(a: Transform, b: Transform) -> bool:
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
