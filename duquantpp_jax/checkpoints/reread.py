"""An export read again, tensor by tensor, beside the model that it was made of.

Nothing here looks at what the export was written from in memory: tensors and config.json are those
on the disk. Packed weights must hold the codes and scales of the quantized model bit for bit, and
every matrix of transform_config must be in front of the linears that the model has it for.
"""

from pathlib import Path

import ml_dtypes
import numpy as np

from duquantpp_jax.checkpoints.compressed_tensors import HADAMARD, scale_tensors
from duquantpp_jax.checkpoints.directory import Quantized
from duquantpp_jax.checkpoints.experts import linears
from duquantpp_jax.checkpoints.fp_quant import METHOD
from duquantpp_jax.checkpoints.hugging_face import headers
from duquantpp_jax.checkpoints.mxfp4 import BLOCK, COMPRESSED, PACKED
from duquantpp_jax.checkpoints.one_matrix import QuantizedPart, site_matrix
from duquantpp_jax.checkpoints.readers import other_formats, quantized_for
from duquantpp_jax.checkpoints.shards import Tensor, inventory, read_json
from duquantpp_jax.commands.options.common import Serve
from duquantpp_jax.core import MXArray
from duquantpp_jax.formats import E2M1
from duquantpp_jax.formats.tensors import pack_codes
from duquantpp_jax.models import SITE_WEIGHTS
from duquantpp_jax.models.parameters import experts, layer_prefix
from duquantpp_jax.ptq.experts import parts_of
from duquantpp_jax.ptq.fuse import split
from duquantpp_jax.ptq.plan import linear_shapes
from duquantpp_jax.transforms.hadamard import hadamard


def read_again(out: Path, directory: Path) -> str:
    """What was found in an export; of one as compressed-tensors every bit of linears is compared.

    Args:
      directory: The quantized model.

    Raises:
      ValueError: Something differs; names the tensor.
    """
    packing = read_json(out / "config.json").get("quantization_config") or {}
    method, count = packing.get("quant_method"), 0
    if method not in (COMPRESSED, METHOD):
        *_, places = headers(out)
        return f"Read again: {len(places)} tensors, of the names and shapes of config.json."
    model, found = Quantized(directory), inventory(out)
    formats = quantized_for(packing)
    if method == COMPRESSED and formats != model.activation_formats:
        said = f"config.json says activations of {formats}, not {model.activation_formats}"
        raise ValueError(said if formats else f"{said}: export again, for an earlier version did")
    groups = packing.get("transform_config", {}).get("config_groups", {})
    moved = {target: name for name, g in groups.items() for target in g["apply"][0]["targets"]}
    stored = linears(model.config)
    for number in range(model.config.num_hidden_layers):
        prefix, shapes = layer_prefix(number), linear_shapes(model.config)
        for site, state in model.layer(number)[1].items():
            names = SITE_WEIGHTS[site]
            width = shapes[names[0]][1]
            rest = split(model.config, site, state.transform, width).rest
            matrix = site_matrix(model.config, site, rest, width, f"{prefix}{site}", PACKED)
            for name, weight in zip(names, state.weights, strict=True):
                each = parts_of(experts(model.config, site), weight)
                for whole, (part,) in zip(stored[prefix + name], each, strict=True):
                    if not isinstance(part, MXArray):
                        if whole in moved:
                            raise ValueError(f"{whole} is in float, and its input is moved")
                        continue
                    count += 1
                    codes = pack_codes(np.asarray(part.codes()), E2M1.bits)
                    if method == METHOD:
                        _check(found, f"{whole}.qweight", codes)
                        _check_fp_quant(found, whole, part, matrix)
                        continue
                    _check(found, f"{whole}.weight_packed", codes)
                    own = QuantizedPart(whole, site, part, matrix, state.tensor_scale)
                    for tensor, array in scale_tensors(own).items():
                        _check(found, tensor, array)
                    _check_moved(found, whole, moved, matrix)
    text = f"Read again: {count} linears hold the bits of the quantized model, and "
    if method == METHOD:
        return f"{text}the matrices that move their inputs, in bfloat16."
    text = f"{text}config.json moves the inputs of {len(moved)} by its matrices."
    programs: tuple[Serve, ...] = ("transformers", "vllm")
    for name in programs:
        if wrong := other_formats(name, formats, mixture=model.config.num_experts > 0):
            text += f" {name} has activations in {wrong}."
    return text


def _check(found: dict[str, Tensor], name: str, wanted: np.ndarray) -> None:
    if wanted.itemsize == 1:
        wanted = wanted.view(np.uint8)
    if name not in found or not np.array_equal(found[name].read().ravel(), wanted.ravel()):
        raise ValueError(f"{name} is not what the quantized model has: export again")


def _check_fp_quant(
    found: dict[str, Tensor], linear: str, weight: MXArray, matrix: np.ndarray | None
) -> None:
    """Scales, and the matrix, which stands there where nothing moves an input, too."""
    moved = np.eye(BLOCK) if matrix is None else matrix
    _check(found, f"{linear}.forward_hadamard_matrix", moved.astype(ml_dtypes.bfloat16))
    ends = ("scales", "weight_global_scale")
    stored, unit = (found[f"{linear}.{end}"].read() for end in ends)
    scales = np.ldexp(np.float32(1), stored.astype(np.int32) - 127) / unit
    empty = ~np.any(np.asarray(weight.codes()).reshape(*scales.shape, BLOCK) & 7, axis=-1)
    close = np.isclose(scales, np.asarray(weight.scales).astype(np.float32), rtol=1e-6, atol=0)
    if not np.all(close | empty):
        raise ValueError(f"{linear}.scales is not what the quantized model has: export again")


def _check_moved(
    found: dict[str, Tensor], linear: str, moved: dict[str, str], matrix: np.ndarray | None
) -> None:
    group = moved.get(linear)
    if (group is None) != (matrix is None):
        raise ValueError(f"config.json is wrong about what moves the input of {linear}")
    if matrix is None or group is None:
        return
    if group != HADAMARD:
        _check(found, f"{linear}.{group}_input.weight", matrix * np.float32(BLOCK**0.5))
    elif not np.array_equal(matrix, hadamard(BLOCK)):
        raise ValueError(f"{linear}: config.json says that a Hadamard matrix moves its input")
