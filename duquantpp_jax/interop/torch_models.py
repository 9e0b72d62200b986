"""Exports as models of PyTorch, which compute what the model here does.

transformers 5.24 leaves out the transform_config of an export, and computes something else; so the
export does not let it (checkpoints/readers.py). Here the matrices are put in front of the linears
by compressed-tensors itself, and everything is computed in float32, as in this package: MXFP4
numbers are exact in the bfloat16 that the library decodes them to.

Needs the extra `interop`.
"""

import os
import warnings
from pathlib import Path
from typing import Any

from duquantpp_jax.checkpoints.hugging_face import load_config
from duquantpp_jax.checkpoints.mxfp4 import COMPRESSED, GPT_OSS
from duquantpp_jax.checkpoints.readers import STATUS, other_formats, quantized_for
from duquantpp_jax.checkpoints.shards import inventory
from duquantpp_jax.files import read_json


def load_transformers(directory: str | os.PathLike[str], dtype: Any = None) -> Any:
    """The torch model of a directory that `duquantpp export` wrote, ready for `generate`.

    Args:
      directory: An export of format compressed-tensors, gpt-oss or dequantized.
      dtype: A type of torch for what is not rounded; float32 if None.

    Returns:
      The `transformers` model. Its logits are those of the quantized model, if that was quantized
      with `--serve transformers`, until sums in another order round a number to another code
      (docs/serving.md); its inputs are rounded under the rule EVEN in any case, and a warning says
      so where the model was quantized for another.

    Raises:
      ImportError: torch, transformers or compressed-tensors is missing; names the extra.
      ValueError: The directory is no export.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
        from compressed_tensors.transform import (  # pyright: ignore[reportMissingImports]
            TransformConfig,
            apply_transform_config,
        )
    except ImportError as error:
        raise ImportError(
            f"loading an export in transformers needs the extra interop ({error}): "
            "pip install 'duquantpp_jax[interop]'"
        ) from None
    directory, dtype = Path(directory), dtype or torch.float32
    fields = read_json(directory / "config.json")
    packing = fields.get("quantization_config") or {}
    method = packing.get("quant_method")
    if method not in (None, COMPRESSED, GPT_OSS):
        raise ValueError(
            f"{directory} is no export in compressed-tensors, gpt-oss or dequantized: "
            "duquantpp export --format compressed-tensors writes one"
        )
    moved = packing.get("transform_config") or {}
    groups = moved.get("config_groups", {}).values()
    if any(".experts" in name for group in groups for name in group["apply"][0]["targets"]):
        raise ValueError(
            f"{directory}: the inputs of its experts are moved, which transformers cannot do: "
            "quantize with --recipe identity"
        )
    own = load_config(directory)
    if wrong := other_formats("transformers", quantized_for(packing), mixture=own.num_experts > 0):
        warnings.warn(
            f"{directory}: other logits than the quantized model's: transformers has activations "
            f"in {wrong}",
            stacklevel=2,
        )
    config = transformers.AutoConfig.from_pretrained(directory)
    load = transformers.AutoModelForCausalLM.from_pretrained
    if method == GPT_OSS:
        decoded = transformers.Mxfp4Config(dequantize=True)
        return load(directory, dtype=dtype, quantization_config=decoded).eval()
    if method == COMPRESSED:
        config.quantization_config.pop("transform_config", None)
        if packing.get("quantization_status") == STATUS:
            config.quantization_config["quantization_status"] = "compressed"
    model = load(directory, config=config, dtype=dtype)
    if method == COMPRESSED:
        model.hf_quantizer.compressor.decompress_model(model)
        model.to(dtype)
    if own.embedding_scale != 1:  # of a Gemma, rounded to the type of the checkpoint
        model.get_input_embeddings().embed_scale.fill_(own.embedding_scale)
    if moved:
        apply_transform_config(model, TransformConfig(**moved))
        stored = inventory(directory)
        for name, parameter in model.named_parameters():
            if name in stored and name.endswith("_input.weight"):
                matrix = torch.from_numpy(stored[name].read().copy())
                parameter.data.copy_(matrix)
    return model.eval()
