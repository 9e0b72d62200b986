"""An export read again, tensor by tensor, beside the model that it was made of.

Nothing here looks at what the export was written from in memory: tensors and config.json are those
on the disk. Packed weights must hold the codes and scales of the quantized model bit for bit, and
every matrix of transform_config must be in front of the linears that the model has it for.
"""

from pathlib import Path

import numpy as np

from duquantpp_jax.checkpoints.compressed_tensors import (
    BLOCK,
    HADAMARD,
    scale_tensors,
    shared_matrix,
)
from duquantpp_jax.checkpoints.directory import Quantized
from duquantpp_jax.checkpoints.hugging_face import headers
from duquantpp_jax.checkpoints.shards import Tensor, inventory, read_json
from duquantpp_jax.core import MXArray
from duquantpp_jax.formats import E2M1
from duquantpp_jax.formats.tensors import pack_codes
from duquantpp_jax.models import SITE_WEIGHTS
from duquantpp_jax.models.parameters import layer_prefix
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
    if packing.get("quant_method") != "compressed-tensors":
        *_, places = headers(out)
        return f"Read again: {len(places)} tensors, of the names and shapes of config.json."
    model, found = Quantized(directory), inventory(out)
    groups = packing["transform_config"].get("config_groups", {})
    moved = {target: name for name, g in groups.items() for target in g["apply"][0]["targets"]}
    linears = 0
    for number in range(model.config.num_hidden_layers):
        prefix, shapes = layer_prefix(number), linear_shapes(model.config)
        for site, state in model.layer(number)[1].items():
            names = SITE_WEIGHTS[site]
            width = shapes[names[0]][1]
            rest = split(model.config, site, state.transform, width).rest
            matrix = shared_matrix(rest, width, f"{prefix}{site}")
            for name, weight in zip(names, state.weights, strict=True):
                if isinstance(weight, MXArray):
                    linears += 1
                    codes = pack_codes(np.asarray(weight.codes()), E2M1.bits)
                    _check(found, f"{prefix}{name}.weight_packed", codes)
                    for tensor, array in scale_tensors(prefix + name, weight, state).items():
                        _check(found, tensor, array)
                    _check_moved(found, prefix + name, moved, matrix)
                elif prefix + name in moved:
                    raise ValueError(f"{prefix}{name} is in float, and its input is moved")
    return (
        f"Read again: {linears} linears hold the bits of the quantized model, and config.json "
        f"moves the inputs of {len(moved)} by its matrices."
    )


def _check(found: dict[str, Tensor], name: str, wanted: np.ndarray) -> None:
    if wanted.itemsize == 1:
        wanted = wanted.view(np.uint8)
    if name not in found or not np.array_equal(found[name].read().ravel(), wanted.ravel()):
        raise ValueError(f"{name} is not what the quantized model has: export again")


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
