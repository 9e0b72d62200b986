"""Packed MXFP4 as four programs lay it out, NVFP4 as one does, and what config.json says of it.

A weight T = X.weight of a checkpoint, [out, in], is two tensors there:

    compressed-tensors   X.weight_packed uint8 [out, in / 2]   X.weight_scale uint8 [out, in / 32]
    Quark                X.weight uint8 [out, in / 2]          X.weight_scale uint8 [out, in / 32]
    DeepSeek-V4          X.weight int8 [out, in / 2]           X.scale F8_E8M0 [out, in / 32]
    gpt-oss              T_blocks uint8 [experts, out, in / 32, 16]
                         T_scales uint8 [experts, out, in / 32]

A byte of codes is two of E2M1, lower index low; scales are E8M0. NVFP4 of compressed-tensors has
scales in E4M3 [out, in / 16], X.weight_global_scale [1], the reciprocal of the weight's tensor
scale, and X.input_global_scale [1], that of its input's. Names and types of the tensors say
which layout it is, weight by weight; a config.json that says more than that is refused.

Source: compressed-tensors 0.20, compressors/mxfp4; amd-quark 0.13, torch/utils/pack.py;
DeepSeek-V4, inference/convert.py; transformers 5.24, integrations/mxfp4.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from duquantpp_jax.checkpoints.readers import NVFP4, STATUS, quantized_for
from duquantpp_jax.checkpoints.shards import Stored
from duquantpp_jax.core import MXArray
from duquantpp_jax.formats.tensors import from_tensors
from duquantpp_jax.models.fields import short

BLOCK, NVFP4_BLOCK = 32, 16
GPT_OSS, COMPRESSED, QUARK, DEEPSEEK = "mxfp4", "compressed-tensors", "quark", "fp8"
"""What config.json calls the packing, as quant_method."""
PACKED, NVFP4_PACKED = "mxfp4-pack-quantized", "nvfp4-pack-quantized"
"""What compressed-tensors calls it, as format."""
INPUT_SCALE = ".input_global_scale"
"""Behind the name of a linear."""
BLOCKS, SCALES = "_blocks", "_scales"
_OFFLINE = {"smooth", "awq", "autosmoothquant", "gptq", "gptaq", "autoround", "qronos"}
"""Algorithms of Quark that leave nothing to do when the model runs."""


class Packing(NamedTuple):
    """A layout: how a weight's tensors of codes and of scales are called, and their types."""

    codes: str
    scales: str
    code_type: str = "U8"
    scale_types: tuple[str, ...] = ("U8",)
    block: int = BLOCK
    whole: str = ""

    def names(self, tensor: str) -> tuple[str, ...]:
        """The tensors of codes and of scales of a weight; behind them of its reciprocal scale."""
        module = tensor.removesuffix(".weight")
        scales = self.scales.format(tensor=tensor, module=module)
        return tensor + self.codes, scales, *([tensor + self.whole] if self.whole else [])

    def shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Their shapes, for a weight of a shape."""
        *outputs, width = shape
        codes = (width // BLOCK, BLOCK // 2) if self.codes == BLOCKS else (width // 2,)
        return (*outputs, *codes), (*outputs, width // self.block), *([(1,)] if self.whole else [])

    def types(self) -> tuple[tuple[str, ...], ...]:
        """Which types each of them may have."""
        return (self.code_type,), self.scale_types, *([("F32",)] if self.whole else [])


PACKINGS = (
    Packing(BLOCKS, "{tensor}" + SCALES),
    Packing("_packed", "{tensor}_scale", scale_types=("F8_E4M3",), block=16, whole="_global_scale"),
    Packing("_packed", "{tensor}_scale"),
    Packing("", "{tensor}_scale"),
    Packing("", "{module}.scale", "I8", ("F8_E8M0", "U8")),
)


def packing_of(tensor: str, found: Mapping[str, Stored]) -> Packing | None:
    """The layout of a weight among the tensors of a checkpoint; None where it is not packed."""
    for packing in PACKINGS:
        codes, scales, *rest = packing.names(tensor)
        if codes == tensor:  # which floats are called, too
            fits = codes in found and found[codes].dtype == packing.code_type and scales in found
        else:
            fits = codes in found and tensor not in found and all(name in found for name in rest)
        if fits:
            return packing
    return None


def array_of(
    name: str, codes: np.ndarray, scales: np.ndarray, reciprocal: np.ndarray | None = None
) -> MXArray:
    """The numbers of codes and scales, whose leading axes are those of the weight; of NVFP4 where
    there is a reciprocal of its tensor scale."""
    block = BLOCK if reciprocal is None else NVFP4_BLOCK
    about = {
        "element": "e2m1",
        "block_size": block,
        "shape": (*scales.shape[:-1], block * scales.shape[-1]),
        "scales": "float8_e8m0fnu" if reciprocal is None else "float8_e4m3fn",
    }
    parts = {"codes": codes.view(np.uint8).ravel(), "scales": scales}
    if reciprocal is not None:
        if reciprocal.ndim > 1:
            raise ValueError(f"{name}: packed NVFP4 of experts is not read: give the float model")
        parts["tensor_scale"] = tensor_scale(f"{name}_global_scale", reciprocal)
    return from_tensors(name, about, {f"{name}.{end}": array for end, array in parts.items()})


def tensor_scale(name: str, reciprocal: np.ndarray) -> np.float32:
    """The tensor scale whose reciprocal a tensor of one number is.

    Raises:
      ValueError: Either is not a positive, normal float32.
    """
    (stored,) = reciprocal.astype(np.float64)
    if not 2.0**-126 <= stored <= 2.0**126:
        raise ValueError(
            f"{name} is {stored:g}: it is the reciprocal of a scale and must lie in 2^-126 .. 2^126"
        )
    return np.float32(1) / reciprocal[0]


def unpacked(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json without a packing that is read here, which the tensors show; else as it is.

    Raises:
      ValueError: The packing is by one of these programs, and not what is read here.
    """
    packing = fields.get("quantization_config")
    method = str(packing.get("quant_method")) if isinstance(packing, dict) else ""
    known = {
        GPT_OSS: fields.get("architectures") == ["GptOssForCausalLM"],
        DEEPSEEK: fields.get("expert_dtype") == "fp4",
    }
    if not isinstance(packing, dict) or not known.get(method, method in (COMPRESSED, QUARK)):
        return fields
    refusal = {COMPRESSED: _compressed, QUARK: _quark}.get(method, lambda _: None)(packing)
    if refusal is not None:
        name, value, right = refusal
        raise ValueError(
            f"config.json: quantization_config of {method} has {name} {short(value)}: packed "
            f"weights are read where it is {right}"
        )
    return {name: value for name, value in fields.items() if name != "quantization_config"}


def asked_for(fields: Mapping[str, Any]) -> str | None:
    """The activation formats that a config.json names; None where it names none.

    Args:
      fields: That `unpacked` has not refused.
    """
    packing, inputs = fields.get("quantization_config") or {}, []
    if packing.get("quant_method") == QUARK:
        inputs = [packing["global_quant_config"].get("input_tensors")]
    elif packing.get("quant_method") == COMPRESSED:
        if own := [name for name in quantized_for(packing).values() if name != "bf16"]:
            return " and ".join(dict.fromkeys(own))
        inputs = [group.get("input_activations") for group in packing["config_groups"].values()]
    names = dict.fromkeys(_format(given) for given in inputs if given is not None)
    return " and ".join(names) or None


def _format(given: Any) -> str:
    match given:
        case {"num_bits": 4 | 8 as bits, "type": "float", "group_size": 32}:
            return f"mxfp{bits}"
        case {"num_bits": 4, "type": "float", "group_size": 16}:
            return NVFP4
        case {"dtype": "fp4", "group_size": 32}:
            return "mxfp4"
        case {"num_bits": bits, "type": kind}:
            return f"{short(bits)} bits of {short(kind)}"
        case {"dtype": kind}:
            return short(kind)
    return short(given)


Refusal = tuple[str, Any, str] | None
"""A field, its value, and what it must be."""


def _compressed(packing: Mapping[str, Any]) -> Refusal:
    groups = packing.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "config_groups", groups, "an object of groups"
    for group in groups.values():
        match group:
            case {"weights": {"num_bits": 4, "type": "float", "group_size": 16 | 32 as size}}:
                format = group.get("format") or packing.get("format")
            case _:
                return "a group", group, "one of MXFP4 weights (4 bits, float, group_size 32)"
        if format != (right := PACKED if size == BLOCK else NVFP4_PACKED):
            return "format", format, right
        if group.get("output_activations") is not None:
            return "output_activations", group["output_activations"], "null"
    status, sparsity = packing.get("quantization_status"), packing.get("sparsity_config")
    if status not in (None, "compressed", STATUS):
        return "quantization_status", status, "compressed"
    if packing.get("kv_cache_scheme") is not None:
        return "kv_cache_scheme", packing["kv_cache_scheme"], "null"
    if sparsity not in (None, {}) and sparsity != {"format": "dense"}:
        return "sparsity_config", sparsity, "empty"
    return None


def _quark(packing: Mapping[str, Any]) -> Refusal:
    whole = packing.get("global_quant_config")
    match whole:
        case {"weight": {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0"}}:
            pass
        case _:
            return "global_quant_config", whole, "of MXFP4 weights (fp4, group_size 32, e8m0)"
    if whole.get("output_tensors") is not None:
        return "output_tensors", whole["output_tensors"], "null"
    others = "layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config"
    for name in (*others, "softmax_quant_spec"):
        if packing.get(name):
            return name, packing[name], "empty"
    export = packing.get("export")
    if isinstance(export, dict) and export.get("weight_format") != "real_quantized":
        return "weight_format", export.get("weight_format"), "real_quantized"
    algorithms = packing.get("algo_config") or []
    for made in algorithms if isinstance(algorithms, list) else [algorithms]:
        name = made.get("name") if isinstance(made, dict) else made
        if str(name) not in _OFFLINE:
            return "algo_config", name, f"empty or of {', '.join(sorted(_OFFLINE))}"
    return None
