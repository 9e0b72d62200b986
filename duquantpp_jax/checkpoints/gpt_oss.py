"""A quantized gpt-oss in its own layout: experts in MXFP4, everything else in floats.

Codes and scales are those of the quantized layer, bit for bit; experts that were left packed are
those of the model that was quantized, and experts in float are refused. A Hadamard matrix that
moves an input online is named in a transform_config, as in compressed-tensors; no other transform
is expressed.

Source: the `config.json` of openai/gpt-oss-20b, for modules_to_not_convert.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from duquantpp_jax.checkpoints.compressed_tensors import HADAMARD, transform_groups
from duquantpp_jax.checkpoints.directory import Quantized, layer_file
from duquantpp_jax.checkpoints.experts import linears, tensors_of
from duquantpp_jax.checkpoints.mxfp4 import BLOCK, BLOCKS, GPT_OSS, SCALES
from duquantpp_jax.checkpoints.one_matrix import Layer, check_activations, shared_matrix
from duquantpp_jax.checkpoints.readers import FOR
from duquantpp_jax.core import MXArray, Transform
from duquantpp_jax.models import SITE_WEIGHTS
from duquantpp_jax.models.parameters import EXPERT_SITES, LINEARS, layer_prefix, tensor_name
from duquantpp_jax.ptq.experts import parts_of
from duquantpp_jax.ptq.fuse import moving
from duquantpp_jax.ptq.plan import linear_shapes
from duquantpp_jax.transforms.hadamard import hadamard

LAYOUT = "the layout of gpt-oss"
FLOATS = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def check(model: Quantized) -> None:
    """Raises ValueError if the layout cannot hold the model."""
    if model.config.architecture != "GptOssForCausalLM":
        raise ValueError(f"a {model.config.architecture} has not {LAYOUT}: choose another")
    plan, layers = model.plan, range(model.config.num_hidden_layers)
    for site, weights in SITE_WEIGHTS.items():
        names = [plan.names(site, number) for number in layers]
        if site not in EXPERT_SITES and any(names):
            raise ValueError(
                f"{LAYOUT} holds {weights[0]} in float, and this model has it "
                "quantized: quantize with --include '*.mlp.*'"
            )
        if any(0 < len(chosen) < len(weights) for chosen in names):
            raise ValueError(f"{LAYOUT} has {' and '.join(weights)} in one tensor")
        if site in EXPERT_SITES and not model.job.weight_formats[site].startswith("mxfp4:"):
            raise ValueError(f"{LAYOUT} holds MXFP4 weights: quantize into mxfp4")


def pack_layer(model: Quantized, number: int) -> Layer:
    """A layer; raises ValueError if anything but Hadamard matrices moves its inputs, or activations
    have clips or scale offsets."""
    config, prefix, shapes = model.config, layer_prefix(number), linear_shapes(model.config)
    _, sites = model.layer(number)  # which checks the file
    file = load_file(model.directory / layer_file(number))
    tensors = {name: array for name, array in file.items() if "/" not in name}
    rotated = []
    for name in LINEARS:
        codes, scales = (tensors.pop(f"{prefix}{name}.{end}", None) for end in ("codes", "scales"))
        if codes is None or scales is None:
            if any(name in SITE_WEIGHTS[site] for site in EXPERT_SITES):
                raise ValueError(
                    f"{prefix}{name} is in float, and {LAYOUT} has all experts packed: quantize "
                    "with --include '*.mlp.*'"
                )
            continue
        if BLOCK * scales.shape[-1] != shapes[name][1]:
            raise ValueError(f"{prefix}{name} was padded, which {LAYOUT} has not")
        tensors[tensor_name(prefix + name) + BLOCKS] = codes.reshape(*scales.shape, BLOCK // 2)
        tensors[tensor_name(prefix + name) + SCALES] = scales
    for site in EXPERT_SITES:
        names, state = SITE_WEIGHTS[site], sites[site]
        if not isinstance(state.weights[0], MXArray):
            continue
        width, where = shapes[names[0]][1], f"{prefix}{site}"
        check_activations(where, state, LAYOUT)
        parts = parts_of(config.num_experts, state.transform)
        found = {_turned(moving(part, width), width, where) for (part,) in parts}
        if len(found) > 1:
            raise ValueError(f"{where}: the inputs of some experts are moved, those of others not")
        if True in found:
            rotated += linears(config)[prefix + names[0]]
    return Layer(tensors_of(config, tensors), {HADAMARD: rotated} if rotated else {}, [])


def _turned(transform: Transform, width: int, where: str) -> bool:
    """Whether Hadamard matrices move a site's input; ValueError if anything else does."""
    matrix = shared_matrix(transform, width, where, LAYOUT, "identity or block_hadamard")
    if matrix is not None and not np.array_equal(matrix, hadamard(BLOCK)):
        raise ValueError(
            f"{where}: its input is moved online by a matrix that is not Hadamard's, which "
            f"{LAYOUT} cannot express: quantize with identity or block_hadamard"
        )
    return matrix is not None


def quantization_config(model: Quantized, moved: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The entry of config.json; `moved` as in `Layer`, of all layers."""
    groups = transform_groups(moved)
    transforms = {"transform_config": {"config_groups": groups}} if groups else {}
    own = {FOR: model.activation_formats}
    return {"quant_method": GPT_OSS, "modules_to_not_convert": FLOATS, **own, **transforms}
