"""A quantized checkpoint in the layouts that other programs read.

compressed-tensors   packed MXFP4 or NVFP4, with one matrix for each site's input
    (compressed_tensors.py).
fp-quant             the same for QuTLASS, in MXFP4 (fp_quant.py).
dequantized          every weight moved back through its transform, W = W^ T, and rounded to
    bfloat16; activations are not quantized.
gpt-oss              experts as packed MXFP4 (gpt_oss.py).

config.json of the packed ones says that the model is bfloat16, whatever it was made from: readers
decode MXFP4 to bfloat16, and multiply no other type with it. Other tensors are written as they are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from duquantpp_jax import files
from duquantpp_jax.checkpoints import Quantized, compressed_tensors, fp_quant, gpt_oss, readers
from duquantpp_jax.checkpoints.ending import write_rest
from duquantpp_jax.checkpoints.experts import tensors_of
from duquantpp_jax.checkpoints.job import Job
from duquantpp_jax.checkpoints.one_matrix import Layer, Tensors
from duquantpp_jax.checkpoints.readers import CARD
from duquantpp_jax.checkpoints.shards import INDEX
from duquantpp_jax.checkpoints.source import Directory
from duquantpp_jax.checkpoints.writer import Progress, write_tensors
from duquantpp_jax.commands.options.common import Serve
from duquantpp_jax.commands.options.export import Layout
from duquantpp_jax.core import MXArray, Transform
from duquantpp_jax.models import SITE_WEIGHTS, SITES, DecoderConfig
from duquantpp_jax.models.parameters import layer_prefix, tensor_name
from duquantpp_jax.ptq.experts import by_expert
from duquantpp_jax.ptq.plan import linear_shapes
from duquantpp_jax.ptq.site import QuantizedSite

_WIDER, _BFLOAT16 = (np.float16, np.float32), ml_dtypes.bfloat16


def write_export(
    directory: Path,
    format: Layout,
    out: Path,
    progress: Progress = lambda *_: None,
    serve: Serve | None = None,
) -> list[str]:
    """Writes a quantized model in another layout, whole or not at all; returns notes for the user.

    Args:
      directory: That `duquantpp quantize` wrote.
      out: New directory.
      serve: The program that is to read it, which has to compute this model; None for any.

    Raises:
      ValueError: The model cannot be expressed so; one line that says why.
    """
    model, source = Quantized(directory), Directory(directory)
    files.check_writable(out)
    if Path(directory).resolve() in out.resolve().parents:
        raise ValueError(f"--out {out} is inside the model: give another directory")
    if serve is not None and format != (read := readers.READERS[serve].layout):
        raise ValueError(f"--serve {serve} is for --format {read}: leave one out")
    if own := format == "gpt-oss":
        gpt_oss.check(model)
    check(format, model.config, model.job, serve)
    count, before = model.config.num_hidden_layers, source.beside()
    places: dict[str, str] = {}
    moved: dict[str, list[str]] = {}
    floats: list[str] = []
    wider: list[str] = []
    with files.new_directory(out) as partial:

        def write(number: int, tensors: Tensors) -> None:
            name = f"model-{number + 1:05d}-of-{count + 1:05d}.safetensors"
            write_tensors(partial / name, tensors, {})
            places.update(dict.fromkeys(tensors, name))
            named = ((n, a) for n, a in tensors.items() if not n.endswith("_global_scale"))
            wider.extend(name for name, array in named if array.dtype in _WIDER)

        for number in range(count):
            progress(f"layer {number + 1} of {count}", number, count)
            if own:
                layer = gpt_oss.pack_layer(model, number)
            else:
                what = model.config, number, *model.layer(number)
                layer = layer_as(format, model.job, *what, serve)
            write(number, layer.tensors)
            for group, names in layer.moved.items():
                moved.setdefault(group, []).extend(names)
            floats += layer.floats
        write(count, model.outside())
        fields = dict(model.fields)
        if format != "dequantized":
            fields |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
        match format:
            case "compressed-tensors":
                made = compressed_tensors.quantization_config(model, moved, floats)
                fields["quantization_config"] = made
            case "fp-quant":
                fields["quantization_config"] = fp_quant.quantization_config(model, floats)
            case "gpt-oss":
                fields["quantization_config"] = gpt_oss.quantization_config(model, moved)
        notes = _notes(model, format, moved)
        if wider and fields.get("dtype", fields.get("torch_dtype")) == "bfloat16":
            scale = model.config.embedding_scale
            more = ", and the scale of the embedding" if _BFLOAT16(scale) != scale else ""
            notes.append(
                f"config.json says dtype bfloat16, to which readers round the {len(wider)} tensors "
                f"that are float16 or float32{more}."
            )
        write_rest(partial, INDEX, places, {}, source, fields, before)
        card = partial / CARD
        own_card = card.read_text(encoding="utf-8") if card.is_file() else ""
        files.write_whole(card, readers.card(own_card, notes, format).encode())
    return notes


def check(layout: Layout, config: DecoderConfig, job: Job, serve: Serve | None) -> None:
    """Raises ValueError if a packed layout, or the program, has no such model or format."""
    if layout == "compressed-tensors":
        compressed_tensors.check(config, job, serve)
    elif layout == "fp-quant":
        fp_quant.check(config, job)


def layer_as(
    layout: Layout,
    job: Job,
    config: DecoderConfig,
    number: int,
    parameters: Mapping[str, Any],
    sites: Mapping[str, QuantizedSite],
    serve: Serve | None = None,
) -> Layer:
    """A layer in a layout other than that of gpt-oss.

    Raises:
      ValueError: What the layout, or the program, cannot express; names the site.
    """
    what = config, number, parameters, sites
    if layout == "compressed-tensors":
        return compressed_tensors.pack_layer(*what, serve)
    return fp_quant.pack_layer(job, *what) if layout == "fp-quant" else dequantize_layer(*what)


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
                moved = by_expert(config, site, _moved_back)(sites[site].transform, weight)
                weight = moved[..., : shapes[name][1]]
            tensors[f"{prefix}{name}.weight"] = np.asarray(weight).astype(ml_dtypes.bfloat16)
    named = {prefix + tensor_name(name): array for name, array in parameters.items()}
    return Layer(tensors_of(config, tensors | named), {}, [])


def _moved_back(transform: Transform, weight: MXArray) -> Float[Array, "n k"]:
    return transform.inverse().weights(weight.dequantize())


def _notes(model: Quantized, format: Layout, moved: Mapping[str, list[str]]) -> list[str]:
    if format == "dequantized":
        return [
            "Weights were moved back through their transforms and rounded to bfloat16.",
            "Activations are not quantized in this layout; the quantized model's are.",
        ]
    if format == "fp-quant":
        return fp_quant.notes(model)
    linears = [name for names in moved.values() for name in names]
    if format == "gpt-oss":
        notes = ["Weights are MXFP4 in the layout of gpt-oss, bit for bit the quantized model's."]
        if linears:
            notes.append(
                f"The inputs of {len(linears)} linears are to be rotated online: a reader must "
                "apply transform_config, or its outputs are wrong; transformers does not."
            )
        if wrong := readers.other_formats("transformers", model.activation_formats, mixture=True):
            notes.append(f"transformers gives other logits: it has activations in {wrong}.")
        return notes
    formats = ", ".join(sorted(set(model.activation_formats.values())))
    said = readers.says(
        model.activation_formats,
        moved=bool(moved),
        biases=any(name.endswith(tuple(model.config.biases)) for name in linears),
        mixture=model.config.num_experts > 0,
        experts_moved=any(".experts." in name for name in linears),
    )
    layout = compressed_tensors.layout_of(model.job.weight_formats.values()).name
    return [
        f"Weights are {layout}, bit for bit those of the quantized model.",
        f"Activations are for {formats}; the inputs of {len(linears)} linears "
        f"are moved online, by {len(moved)} matrices.",
        *(f"{name} {line}." for name, line in said.items()),
    ]
