"""A quantized checkpoint in the layouts that other programs read.

compressed-tensors   its mxfp4-pack-quantized: of W^ [n, k] the codes, two a byte along each row
    (lower index low), as weight_packed [n, k / 2], and the scale bytes as weight_scale [n, k / 32],
    both uint8. Smoothing before q/k/v and up/gate is folded into the norm before them, g / s, if
    `quantize --fuse` has not done it; other smoothing only that folds, before rounding. A
    Hadamard matrix in every block is written in its transform_config, as an online transform of
    the input. Whatever else moves an input it cannot express, and is refused.
dequantized          every weight moved back through its transform, W = W^ T, and rounded to
    bfloat16; activations are not quantized.
gpt-oss              experts as packed MXFP4 (gpt_oss.py).

config.json of the packed ones says that the model is bfloat16, whatever it was made from: readers
decode MXFP4 to bfloat16, and multiply no other type with it. Other tensors are written as they are.

Source: the library compressed-tensors 0.20: compressors/mxfp4, quantization/quant_config.py and
transform/.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from duquantpp_jax import files
from duquantpp_jax.checkpoints import Quantized, gpt_oss
from duquantpp_jax.checkpoints.experts import tensors_of
from duquantpp_jax.checkpoints.shards import INDEX
from duquantpp_jax.checkpoints.source import Directory
from duquantpp_jax.checkpoints.writer import Progress, write_rest, write_tensors
from duquantpp_jax.core import MXArray, Transform
from duquantpp_jax.formats import E2M1
from duquantpp_jax.formats.tensors import pack_codes
from duquantpp_jax.models import SITE_WEIGHTS, SITES, DecoderConfig
from duquantpp_jax.models.parameters import input_norms, layer_prefix, tensor_name
from duquantpp_jax.ptq.experts import by_expert
from duquantpp_jax.ptq.fuse import moved_gain, split
from duquantpp_jax.ptq.plan import linear_shapes
from duquantpp_jax.ptq.site import QuantizedSite
from duquantpp_jax.transforms.hadamard import hadamard

_WIDER = (np.float16, np.float32)
PACKED = "mxfp4-pack-quantized"
BLOCK = 32

Tensors = dict[str, np.ndarray]
Layout = Literal["compressed-tensors", "dequantized", "gpt-oss"]


class Layer(NamedTuple):
    """A layer in another layout: its tensors by their whole names.

    Attributes:
      rotated: Linears whose input a Hadamard matrix moves online.
      floats: Linears that are not quantized.
    """

    tensors: Tensors
    rotated: list[str]
    floats: list[str]


def write_export(
    directory: Path,
    format: Layout,
    out: Path,
    progress: Progress = lambda *_: None,
) -> list[str]:
    """Writes a quantized model in another layout, whole or not at all; returns notes for the user.

    Args:
      directory: That `duquantpp quantize` wrote.
      out: New directory.

    Raises:
      ValueError: The model cannot be expressed so; one line that says why.
    """
    model = Quantized(directory)
    files.check_writable(out)
    packed = format == "compressed-tensors"
    if packed:
        _check_formats(model)
    if own := format == "gpt-oss":
        gpt_oss.check(model)
    convert = pack_layer if packed else dequantize_layer
    count = model.config.num_hidden_layers
    places: dict[str, str] = {}
    rotated: list[str] = []
    floats: list[str] = []
    wider: list[str] = []
    with files.new_directory(out) as partial:

        def write(number: int, tensors: Tensors) -> None:
            name = f"model-{number + 1:05d}-of-{count + 1:05d}.safetensors"
            write_tensors(partial / name, tensors, {})
            places.update(dict.fromkeys(tensors, name))
            wider.extend(n for n, array in tensors.items() if array.dtype in _WIDER)

        for number in range(count):
            progress(f"layer {number + 1} of {count}", number, count)
            if own:
                layer = Layer(*gpt_oss.pack_layer(model, number, _turned), [])
            else:
                layer = convert(model.config, number, *model.layer(number))
            write(number, layer.tensors)
            rotated += layer.rotated
            floats += layer.floats
        write(count, model.outside())
        fields = dict(model.fields)
        if packed or own:
            fields |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
        if packed:
            fields["quantization_config"] = quantization_config(model, rotated, floats)
        elif own:
            fields["quantization_config"] = gpt_oss.quantization_config(_scheme(rotated))
        write_rest(partial, INDEX, places, {}, Directory(model.directory), fields)
    return _notes(model, format, rotated, len(wider))


def _check_formats(model: Quantized) -> None:
    if model.config.num_experts:
        raise ValueError(
            f"{PACKED} of a {model.config.architecture} is not written: its experts have "
            "transforms of their own; export --format dequantized, or gpt-oss for a gpt-oss"
        )
    for name in model.job.weight_formats.values():
        if name.partition(":")[0] != "mxfp4":
            raise ValueError(f"{PACKED} holds MXFP4 weights: this model has weights in {name}")
    for name in model.job.activation_formats.values():
        if name.partition(":")[0] not in _ACTIVATIONS:
            raise ValueError(
                f"{PACKED} with activations in {name} is not known to its readers: "
                f"use one of {', '.join(_ACTIVATIONS)}"
            )


def pack_layer(
    config: DecoderConfig,
    number: int,
    parameters: Mapping[str, np.ndarray],
    sites: Mapping[str, QuantizedSite],
) -> Layer:
    """A layer as mxfp4-pack-quantized has it.

    Raises:
      ValueError: A site's input is moved by what the layout cannot express; names it.
    """
    prefix, shapes = layer_prefix(number), linear_shapes(config)
    parameters, tensors = dict(parameters), {}
    rotated, floats = [], []
    for site in SITES:
        width = shapes[SITE_WEIGHTS[site][0]][1]
        folding = split(config, site, sites[site].transform, width)
        turned = _turned(folding.rest, -(-width // BLOCK) * BLOCK, f"{prefix}{site}")
        if folding.moves and site not in input_norms(config):
            raise ValueError(
                f"{prefix}{site}: its smoothing has to be folded into the linear before it prior "
                f"to rounding, and {PACKED} has no online one: quantize again with --fuse"
            )
        for _, made in folding.moves:
            for name, channels in made.items():
                parameters[name] = np.asarray(moved_gain(config, parameters[name], channels))
        for name, weight in zip(SITE_WEIGHTS[site], sites[site].weights, strict=True):
            if not isinstance(weight, MXArray):
                if folding.moves:
                    raise ValueError(
                        f"{prefix}{name} is in float beside linears whose smoothing is folded into "
                        f"their norm, which {PACKED} cannot express: quantize again with --fuse"
                    )
                tensors[f"{prefix}{name}.weight"] = np.asarray(weight)
                floats.append(prefix + name)
                continue
            n, k = weight.shape
            if k != shapes[name][1]:
                raise ValueError(
                    f"{prefix}{name} was padded from {shapes[name][1]} to {k} inputs, which "
                    f"{PACKED} cannot express: export --format dequantized"
                )
            codes = pack_codes(np.asarray(weight.codes()), E2M1.bits)
            tensors[f"{prefix}{name}.weight_packed"] = codes.reshape(n, k // 2)
            tensors[f"{prefix}{name}.weight_scale"] = np.asarray(weight.scale_bytes())
            rotated += [prefix + name] if turned else []
    return Layer(tensors | _named(prefix, parameters), rotated, floats)


def dequantize_layer(
    config: DecoderConfig,
    number: int,
    parameters: Mapping[str, np.ndarray],
    sites: Mapping[str, QuantizedSite],
) -> Layer:
    """A layer of the float model in bfloat16, with its rounded weights moved back."""
    prefix, shapes = layer_prefix(number), linear_shapes(config)
    tensors: Tensors = {}
    for site in SITES:
        for name, weight in zip(SITE_WEIGHTS[site], sites[site].weights, strict=True):
            if isinstance(weight, MXArray):
                moved = by_expert(config, site, _moved_back, sites[site].transform, weight)
                weight = moved[..., : shapes[name][1]]
            tensors[f"{prefix}{name}.weight"] = np.asarray(weight).astype(ml_dtypes.bfloat16)
    return Layer(tensors_of(config, tensors | _named(prefix, parameters)), [], [])


def _moved_back(transform: Transform, weight: MXArray) -> Float[Array, "n k"]:
    return transform.inverse().weights(weight.dequantize())


def _named(prefix: str, parameters: Mapping[str, np.ndarray]) -> Tensors:
    return {prefix + tensor_name(name): array for name, array in parameters.items()}


def _turned(transform: Transform, width: int, where: str, layout: str = PACKED) -> bool:
    """Whether Hadamard matrices move a site's input; ValueError if anything else does."""
    kinds = ", ".join(type(link).__name__ for link in transform.flat_links())
    if (blocks := transform.as_blocks(width, BLOCK)) is None:
        raise ValueError(
            f"{where}: its input is moved online by {kinds}, whose as_blocks gives no matrix for "
            f"each block of {BLOCK}: {layout} has nothing else; export --format dequantized"
        )
    if blocks.divisor is not None and np.any(np.asarray(blocks.divisor) != 1):
        raise ValueError(
            f"{where}: its input is divided online by {kinds}, which {layout} cannot express: "
            "quantize again with --fuse, which folds smoothing, or export --format dequantized"
        )
    if blocks.matrices is None:
        return False
    if np.any(np.asarray(blocks.matrices) != np.asarray(hadamard(BLOCK))):
        raise ValueError(
            f"{where}: its input is rotated online by matrices that are not Hadamard's, which "
            f"{layout} cannot express: export --format dequantized, or quantize with identity or "
            "block_hadamard"
        )
    return True


_MXFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "group",
    "group_size": BLOCK,
    "symmetric": True,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
_ACTIVATIONS: dict[str, dict[str, Any] | None] = {
    "mxfp4": {**_MXFP4, "dynamic": True},
    "mxfp8": {**_MXFP4, "num_bits": 8, "dynamic": True},
    "bf16": None,
}
"""What the library calls our activation formats."""


def quantization_config(model: Quantized, rotated: list[str], floats: list[str]) -> dict[str, Any]:
    """The entry of config.json that the library reads; lists as in `Layer`, of all layers."""
    groups: dict[str, Any] = {}
    # The library has no names for scale rules: formats that differ in the rule alone are one group.
    formats = {site: name.partition(":")[0] for site, name in model.job.activation_formats.items()}
    for number, format in enumerate(dict.fromkeys(formats.values())):
        names = [n for site in SITES if formats[site] == format for n in SITE_WEIGHTS[site]]
        groups[f"group_{number}"] = {
            "targets": [f"re:.*{re.escape(name)}$" for name in names],
            "weights": {**_MXFP4, "dynamic": False},
            "input_activations": _ACTIVATIONS[format],
            "output_activations": None,
            "format": PACKED,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *floats],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {"config_groups": _scheme(rotated)} if rotated else {},
    }


def _scheme(rotated: list[str]) -> dict[str, Any] | None:
    """The groups of a transform_config."""
    if not rotated:
        return None
    online = {"targets": rotated, "location": "input", "inverse": False, "ignore": []}
    scheme = {"type": "hadamard", "apply": [online], "head_dim": BLOCK}
    return {"hadamard": scheme | {"randomize": False, "requires_grad": False}}


def _notes(model: Quantized, format: Layout, rotated: list[str], wider: int) -> list[str]:
    if format == "dequantized":
        return [
            "Weights were moved back through their transforms and rounded to bfloat16.",
            "Activations are not quantized in this layout; the quantized model's are.",
        ]
    layout = PACKED if format == "compressed-tensors" else "MXFP4 in the layout of gpt-oss"
    notes = [f"Weights are {layout}, bit for bit those of the quantized model."]
    if formats := sorted(set(model.job.activation_formats.values()) - {"bf16"}):
        notes.append(
            "Activations are quantized by the reader, with its own scale rule; this model was "
            f"quantized for {', '.join(formats)}."
        )
    if rotated:
        notes.append(
            f"The inputs of {len(rotated)} linears are to be rotated online: a reader must apply "
            "transform_config, or its outputs are wrong."
        )
    if wider:
        notes.append(
            f"config.json says dtype bfloat16, to which readers round the {wider} tensors that are "
            "float16 or float32."
        )
    return notes
