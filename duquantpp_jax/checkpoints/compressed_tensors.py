"""A quantized model in the layouts of the library compressed-tensors: mxfp4-pack-quantized, and
nvfp4-pack-quantized.

Codes and scale bytes are laid out as mxfp4.py says. NVFP4's scales are float8_e4m3fn, of 16 codes
each, and beside them lie X.weight_global_scale and X.input_global_scale [1], the reciprocals of the
tensor scales of weights and of activations: exact, as those of nvfp4_calibrated are powers of two.
What moves the input of a linear X is

    x' = blockdiag(T, ..., T)^T x,     one T [32, 32] for all blocks of a site,

a group of transform_config. A group of type hadamard holds no tensor: T is Sylvester's matrix. In
one of type random-hadamard the library and vLLM compute x M / sqrt(32), with M the tensor
X.{group}_input.weight: here M = sqrt(32) T, for any T. (Type random-matrix is x M in the library,
but x M / sqrt(32) in vLLM.)

Smoothing is folded; whatever else moves an input is refused (one_matrix.py).

Source: the library compressed-tensors 0.20: compressors/mxfp4 and nvfp4,
quantization/quant_config.py and transform/.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from duquantpp_jax.checkpoints.directory import Quantized
from duquantpp_jax.checkpoints.job import Job
from duquantpp_jax.checkpoints.mxfp4 import BLOCK, COMPRESSED, INPUT_SCALE, NVFP4_PACKED, PACKED
from duquantpp_jax.checkpoints.one_matrix import Layer, QuantizedPart, Tensors, in_parts
from duquantpp_jax.checkpoints.readers import ANY, FOR, NVFP4, READERS, STATUS, check_formats
from duquantpp_jax.commands.options.common import Serve
from duquantpp_jax.formats import E2M1
from duquantpp_jax.formats.tensors import pack_codes
from duquantpp_jax.models import SITE_WEIGHTS, SITES, DecoderConfig
from duquantpp_jax.models.parameters import EXPERT_SITES, experts
from duquantpp_jax.ptq.site import QuantizedSite
from duquantpp_jax.transforms.hadamard import hadamard

HADAMARD = "hadamard"
"""The group of all inputs that Hadamard matrices move."""


def check(config: DecoderConfig, job: Job, serve: Serve | None) -> None:
    """Raises ValueError if the layout, or the reader, has no such model or format."""
    if config.architecture == "GptOssForCausalLM":
        raise ValueError(
            f"{PACKED} of a {config.architecture} is not written: it has a layout of its own; "
            "export --format gpt-oss, or dequantized"
        )
    mixture = config.num_experts > 0
    if serve is not None:
        check_formats(serve, job.weight_formats, job.activation_formats, mixture=mixture)
    layout = layout_of(job.weight_formats.values())
    for name in job.activation_formats.values():
        if name.partition(":")[0] not in layout.activations:
            raise ValueError(
                f"{layout.name} with activations in {name} is not known to its readers: "
                f"use one of {', '.join(layout.activations)}"
            )
    if mixture and layout.name != PACKED:
        raise ValueError(f"{layout.name} of experts is not written: quantize into mxfp4")
    of_experts = {job.activation_formats[site].partition(":")[0] for site in EXPERT_SITES}
    if mixture and len(of_experts) > 1:
        raise ValueError(
            f"{PACKED} has one format for the inputs of experts, and this model has "
            f"{' and '.join(sorted(of_experts))}: quantize with one for {', '.join(EXPERT_SITES)}"
        )


def pack_layer(
    config: DecoderConfig,
    number: int,
    parameters: Mapping[str, Any],
    sites: Mapping[str, QuantizedSite],
    serve: Serve | None = None,
) -> Layer:
    """A layer as mxfp4-pack-quantized has it.

    Raises:
      ValueError: What the layout, or the reader, cannot express; names the site.
    """
    reader = READERS[serve] if serve else ANY
    found = in_parts(config, number, parameters, sites, reader, PACKED)
    tensors, moved = found.rest, dict[str, list[str]]()
    for part in found.quantized:
        name, site, weight, matrix, _ = part
        n, k = weight.shape
        codes = pack_codes(np.asarray(weight.codes()), E2M1.bits)
        tensors[f"{name}.weight_packed"] = codes.reshape(n, k // 2)
        tensors |= scale_tensors(part)
        if matrix is None:
            continue
        if serve and experts(config, site):
            raise ValueError(
                f"{name}: {serve} moves no input of an expert: quantize with --recipe identity, or "
                "leave experts in float by --include '*.self_attn.*'"
            )
        if f"{name}.bias" in found.rest and not reader.biases:
            raise ValueError(
                f"{name} has a bias, and {serve} moves no input of such a linear: "
                "quantize with --recipe identity or smooth, or --exclude it"
            )
        is_hadamard = np.array_equal(matrix, hadamard(BLOCK))
        group = HADAMARD if is_hadamard else f"layer_{number}_{site}"
        moved.setdefault(group, []).append(name)
        if not is_hadamard:
            tensors[f"{name}.{group}_input.weight"] = matrix * np.float32(BLOCK**0.5)
    return Layer(tensors, moved, found.floats)


def scale_tensors(part: QuantizedPart) -> Tensors:
    """The tensors of scales of a quantized linear."""
    linear, weight = part.name, part.weight
    if weight.tensor_scale is None:
        return {f"{linear}.weight_scale": np.asarray(weight.scale_bytes())}
    found = {f"{linear}.weight_scale": np.asarray(weight.scales)}
    whole = {".weight_global_scale": weight.tensor_scale, INPUT_SCALE: part.input_scale}
    return found | {
        linear + name: np.float32(1) / np.asarray(scale, np.float32).reshape(1)
        for name, scale in whole.items()
        if scale is not None
    }


_MXFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "group",
    "group_size": BLOCK,
    "symmetric": True,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
_NVFP4 = {
    **_MXFP4,
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}


class Layout(NamedTuple):
    """A layout of the library, by what it calls the formats of weights and of activations."""

    name: str
    weights: dict[str, Any]
    activations: dict[str, dict[str, Any] | None]


LAYOUTS = {
    "mxfp4": Layout(
        PACKED,
        {**_MXFP4, "dynamic": False},
        {
            "mxfp4": {**_MXFP4, "dynamic": True},
            "mxfp8": {**_MXFP4, "num_bits": 8, "dynamic": True},
            "bf16": None,
        },
    ),
    NVFP4: Layout(
        NVFP4_PACKED,
        {**_NVFP4, "dynamic": False},
        {NVFP4: {**_NVFP4, "dynamic": "local"}, "bf16": None},
    ),
}
"""By the format of weights."""


def layout_of(weights: Iterable[str]) -> Layout:
    """The layout of weights in formats of these names; ValueError if there is none."""
    names = sorted({name.partition(":")[0] for name in weights})
    if len(names) > 1:
        raise ValueError(
            f"one export has weights in one format: this model has {' and '.join(names)}"
        )
    if names[0] not in LAYOUTS:
        has = f"{PACKED} holds MXFP4 weights: this model has weights in {names[0]}"
        near = names[0].startswith("nvfp4")
        raise ValueError(f"{has} (of NVFP4 {NVFP4} is exported)" if near else has)
    return LAYOUTS[names[0]]


def quantization_config(
    model: Quantized, moved: Mapping[str, Sequence[str]], floats: Sequence[str]
) -> dict[str, Any]:
    """The entry of config.json that the library reads; `moved` and `floats` as in `Layer`, of all
    layers."""
    groups: dict[str, Any] = {}
    # The library has no names for scale rules: formats that differ in the rule alone are one group.
    formats = {site: name.partition(":")[0] for site, name in model.job.activation_formats.items()}
    layout = layout_of(model.job.weight_formats.values())
    for number, format in enumerate(dict.fromkeys(formats.values())):
        alike = [site for site in SITES if formats[site] == format]
        dense = [n for s in alike if not experts(model.config, s) for n in SITE_WEIGHTS[s]]
        names = [f"re:.*{re.escape(name)}$" for name in dense]
        if any(experts(model.config, site) for site in alike):
            names.append(r"re:.*\.experts\.\d+\..*")
        groups[f"group_{number}"] = {
            "targets": names,
            "weights": layout.weights,
            "input_activations": layout.activations[format],
            "output_activations": None,
            "format": layout.name,
        }
    return {
        "quant_method": COMPRESSED,
        "format": layout.name,
        "quantization_status": STATUS if moved else "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *floats, *_in_vllm(floats)],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        FOR: model.activation_formats,
        "transform_config": {"config_groups": transform_groups(moved)} if moved else {},
    }


def _in_vllm(floats: Sequence[str]) -> list[str]:
    """Names by which vLLM asks for experts that a Mixtral calls otherwise."""
    called = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    split = [name.rpartition(".") for name in floats]
    return [f"{path}.{called[end]}" for path, _, end in split if end in called]


def transform_groups(moved: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The groups of a transform_config."""
    return {
        name: {
            "type": "hadamard" if name == HADAMARD else "random-hadamard",
            "apply": [{"targets": [*targets], "location": "input", "inverse": False, "ignore": []}],
            "head_dim": BLOCK,
            "randomize": False,
            "requires_grad": False,
        }
        for name, targets in moved.items()
    }
