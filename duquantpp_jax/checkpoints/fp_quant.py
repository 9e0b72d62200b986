"""A quantized model in the layout of FP-Quant, which runs on QuTLASS in transformers and in vLLM.

A linear X computes y = (1 / (a w)) decode(q(x T)) decode(qweight)^T of these tensors:

    X.qweight                  uint8 [out, in / 2]     two codes of E2M1 a byte, the lower index low
    X.scales                   uint8 [out, in / 32]    E8M0
    X.forward_hadamard_matrix  bfloat16 [32, 32]       T, the same for all blocks of the input
    X.weight_global_scale      float32 [1]             w
    X.act_global_scale         float32 [1]             a

q is the forward_method of config.json, the same for all linears: abs_max (our fpquant, a = 3) or
quest (ours of that name, a = 1). A weight comes with its scales, so it may be of either (w = 3, w =
1) or in mxfp4 under any rule (w = 1). FP-Quant itself writes a backward_hadamard_matrix, too, which
no forward pass reads, and which vLLM has no place for: it is left out.

Source: fp_quant 0.3.2, module/linear.py; transformers 5.24, integrations/fp_quant.py; vLLM,
layers/quantization/fp_quant.py; QuTLASS, fused_quantize_mx (the last two read, not run).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import UInt8

from duquantpp_jax.checkpoints.directory import Quantized
from duquantpp_jax.checkpoints.job import Job
from duquantpp_jax.checkpoints.mxfp4 import BLOCK
from duquantpp_jax.checkpoints.one_matrix import Layer, Matrix, in_parts
from duquantpp_jax.checkpoints.readers import READERS, check_formats
from duquantpp_jax.core import MXArray
from duquantpp_jax.formats import E2M1
from duquantpp_jax.formats.tensors import pack_codes
from duquantpp_jax.models import SITE_WEIGHTS, DecoderConfig
from duquantpp_jax.models.parameters import layer_prefix
from duquantpp_jax.ptq.site import QuantizedSite

METHOD, LAYOUT = "fp_quant", "the layout of FP-Quant"
METHODS = {"fpquant": ("abs_max", 3.0), "quest": ("quest", 1.0)}
"""What the library calls our activation formats, and the number that it multiplies by."""
_FUSED = {"attention_in": "self_attn.qkv_proj", "mlp_in": "mlp.gate_up_proj"}
"""What vLLM calls the linears of a site, which are one there."""


def check(config: DecoderConfig, job: Job) -> None:
    """Raises ValueError if the layout has no such model or format."""
    if config.num_experts:
        raise ValueError(
            f"{LAYOUT} holds no experts, and this is a {config.architecture}: "
            "export --format compressed-tensors, or dequantized"
        )
    check_formats("qutlass", job.weight_formats, job.activation_formats, mixture=False)
    if len(names := set(job.activation_formats.values())) > 1:
        raise ValueError(
            f"{LAYOUT} has one format for all activations, and this model has "
            f"{', '.join(sorted(names))}: quantize with --serve qutlass"
        )


def pack_layer(
    job: Job,
    config: DecoderConfig,
    number: int,
    parameters: Mapping[str, Any],
    sites: Mapping[str, QuantizedSite],
) -> Layer:
    """A layer in this layout; raises ValueError for what that cannot express, by its site."""
    found = in_parts(config, number, parameters, sites, READERS["qutlass"], LAYOUT)
    tensors, floats = found.rest, list(found.floats)
    for name, site, weight, matrix, _ in found.quantized:
        own = packed(weight, matrix, job.weight_formats[site], job.activation_formats[site])
        tensors |= {f"{name}.{part}": array for part, array in own.items()}
    for site, fused in _FUSED.items():
        prefix = layer_prefix(number)
        if all(prefix + name in floats for name in SITE_WEIGHTS[site]):
            floats.append(prefix + fused)
    return Layer(tensors, {}, floats)


def packed(
    weight: MXArray, matrix: Matrix | None, weights: str, activations: str
) -> dict[str, np.ndarray]:
    """The tensors of one linear, by the ends of their names; formats are by their full names."""
    unit = METHODS[weights][1] if weights in METHODS else 1.0
    scales = scale_bytes(weight, unit)
    moved = np.eye(BLOCK, dtype=np.float32) if matrix is None else matrix
    codes = pack_codes(np.asarray(weight.codes()), E2M1.bits)
    return {
        "qweight": codes.reshape(len(scales), -1),
        "scales": scales,
        "forward_hadamard_matrix": moved.astype(ml_dtypes.bfloat16),
        "weight_global_scale": np.full(1, unit, np.float32),
        "act_global_scale": np.full(1, METHODS[activations][1], np.float32),
    }


def scale_bytes(weight: MXArray, unit: float) -> UInt8[np.ndarray, "n blocks"]:
    """Scales times `unit` as E8M0; blocks of zeros have any.

    Raises:
      ValueError: One of them is not a power of two in the range of E8M0.
    """
    if weight.scales.dtype.itemsize == 1:
        return np.asarray(weight.scale_bytes())
    zero = ~np.any(np.asarray(weight.codes()).reshape(*weight.scales.shape, -1) & 7, axis=-1)
    scales = np.where(zero, 1, np.asarray(weight.scales) * np.float32(unit))
    significand, exponent = np.frexp(scales)  # 2^E is .5 * 2^(E + 1)
    byte = exponent + 126
    if np.any(significand != 0.5) or np.any((byte < 0) | (byte > 254)):
        raise ValueError(f"{LAYOUT} has powers of two as scales, and this weight has others")
    return byte.astype(np.uint8)


def quantization_config(model: Quantized, floats: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json; `floats` as in `Layer`, of all layers."""
    (activations,) = set(model.job.activation_formats.values())
    return {
        "quant_method": METHOD,
        "forward_dtype": "mxfp4",
        "forward_method": METHODS[activations][0],
        "backward_dtype": "bf16",
        "hadamard_group_size": BLOCK,
        "store_master_weights": False,
        "pseudoquantization": False,
        "transform_init": "identity",
        "modules_to_not_convert": ["lm_head", *floats],
    }


def notes(model: Quantized) -> list[str]:
    """What a user is told of an export."""
    (activations,) = set(model.job.activation_formats.values())
    return [
        f"Weights are in {LAYOUT}, bit for bit those of the quantized model.",
        f"Activations are for {activations}, {METHODS[activations][0]} in the library.",
        "By their source, transformers with fp_quant and QuTLASS, and vLLM, compute this model "
        "with inputs and matrices in bfloat16, on GPUs of compute capability 10 and 12 (elsewhere "
        "both refuse it); we have not run them.",
    ]
