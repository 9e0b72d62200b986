"""The weights W^ that a quantized directory holds, and those that its export gives, in two ways."""

import json
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from duquantpp_jax.checkpoints import Quantized
from duquantpp_jax.checkpoints.shards import inventory
from duquantpp_jax.models import SITE_WEIGHTS

Weights = dict[str, Float32[np.ndarray, "n k"]]
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
"""Of E2M1, by the three lower bits of a code; the fourth is the sign."""


def dequantized(directory: Path) -> Weights:
    """W^ of every quantized linear, from the quantized model."""
    model = Quantized(directory)
    return {
        f"model.layers.{number}.{name}": np.asarray(weight.dequantize())
        for number in range(model.config.num_hidden_layers)
        for site, quantized in model.layer(number)[1].items()
        for name, weight in zip(SITE_WEIGHTS[site], quantized.weights, strict=True)
        if hasattr(weight, "dequantize")
    }


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a Hugging Face directory; scales of eight bits as their bytes."""
    return {name: tensor.read() for name, tensor in inventory(directory).items()}


def packed(directory: Path) -> dict[str, dict[str, np.ndarray]]:
    """`weight_packed` and `weight_scale` of every quantized linear of an export."""
    tensors, end = tensors_of(directory), ".weight_packed"
    return {
        name.removesuffix(end): {
            part: tensors[name.removesuffix(end) + f".{part}"]
            for part in ("weight_packed", "weight_scale")
        }
        for name in tensors
        if name.endswith(end)
    }


def by_numpy(directory: Path) -> Weights:
    """What an export in the layout mxfp4-pack-quantized says, with nothing but NumPy."""

    def decompressed(weight_packed: np.ndarray, weight_scale: np.ndarray) -> np.ndarray:
        codes = np.stack([weight_packed & 15, weight_packed >> 4], axis=-1)
        codes = codes.reshape(len(weight_packed), -1)
        sign = np.where(codes & 8, np.float32(-1), np.float32(1))
        scale = np.ldexp(np.float32(1), weight_scale.astype(np.int32) - 127)
        return sign * VALUES[codes & 7] * scale.repeat(32, axis=1)

    return {name: decompressed(**parts) for name, parts in packed(directory).items()}


def by_library(directory: Path) -> Weights:
    """What the library compressed-tensors makes of an export; needs the extra `interop`."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    fields = json.loads((directory / "config.json").read_text())["quantization_config"]
    fields["quantization_status"] = "compressed"  # of a model whose inputs are moved it is refused
    known = QuantizationConfig.model_fields
    config = QuantizationConfig(**{k: v for k, v in fields.items() if k in known})
    (scheme,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    # bfloat16 holds an element times a power of two exactly.
    return {
        name: compressor.decompress(
            {part: torch.from_numpy(array.copy()) for part, array in parts.items()}, scheme
        )["weight"]
        .float()
        .numpy()
        for name, parts in packed(directory).items()
    }


def assert_equal(found: Weights, wanted: Weights) -> None:
    """The same linears, each with the same bytes."""
    assert wanted
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        assert found[name].dtype == w.dtype
        assert found[name].tobytes() == w.tobytes(), name
