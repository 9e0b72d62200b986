"""Golden packed models: gutenberg-27m in MXFP4 as llm-compressor and AMD Quark write it.

    DUQUANTPP_DATA=.. python tests/goldens/packed_models.py [DIRECTORY to keep the checkpoints in]

    pip install llmcompressor==0.14.0.1 amd-quark==0.13      (on a CPU; 3 minutes)

writes tests/goldens/packed_models.npz: for each case the config.json that the tool wrote, every
tensor of its checkpoint by dtype, shape and SHA-256, and some logits. Weights are not kept: the
test makes them again from gutenberg-27m, and knows by the hashes that they are the tool's.

Logits are those of transformers in float32 on a few tokens; weights are decoded, and inputs turned
where a transform_config says so, by the tool's own library. Inputs are not quantized.
"""

import hashlib
import json
import os
import pathlib
import sys
import tempfile

import numpy as np

PLACE = pathlib.Path(__file__).parent / "packed_models.npz"
LAYERS = {"llm-compressor": 8, "llm-compressor, turned": 2, "quark": 8}
TOKENS = np.arange(24)[None] * 167 % 4096
EVERY = 64
"""Of the logits of a token each 64th is kept."""


def by_llm_compressor(model, turned, out):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import QuIPModifier

    blocks = {"transform_type": "hadamard", "transform_block_size": 32, "rotations": ["v"]}
    recipe = [QuIPModifier(**blocks, targets="Linear")] if turned else []
    recipe += [QuantizationModifier(targets="Linear", scheme="MXFP4", ignore=["lm_head"])]
    oneshot(model=model, recipe=recipe)
    model.save_pretrained(out, save_compressed=True)


def by_quark(model, out):
    from quark.torch import ModelQuantizer, export_safetensors
    from quark.torch.quantization.config.config import OCP_MXFP4Spec, QConfig, QLayerConfig

    weight, inputs = (
        OCP_MXFP4Spec(ch_axis=-1, is_dynamic=dynamic).to_quantization_spec()
        for dynamic in (False, True)
    )
    whole = QLayerConfig(weight=weight, input_tensors=inputs)
    quantizer = ModelQuantizer(QConfig(global_quant_config=whole, exclude=["lm_head"]))
    export_safetensors(quantizer.freeze(quantizer.quantize_model(model, None)), out)


def decoded(tensors, fields):
    """The state of a float model, by the library that the checkpoint was made for."""
    import torch

    packing, state = fields["quantization_config"], {}
    for name, tensor in tensors.items():
        module, _, end = name.rpartition(".")
        scale = tensors.get(f"{module}.weight_scale")
        if end == "weight_packed":
            from compressed_tensors.compressors import BaseCompressor
            from compressed_tensors.quantization import QuantizationScheme

            (group,) = packing["config_groups"].values()
            parts = {"weight_packed": tensor, "weight_scale": scale}
            compressor = BaseCompressor.get_value_from_registry(packing["format"])
            made = compressor.decompress(parts, QuantizationScheme(**group))["weight"]
            state[f"{module}.weight"] = made.float()
        elif end == "weight" and tensor.dtype == torch.uint8:
            from quark.torch.utils.pack import create_pack_method

            values = create_pack_method("per_group", "fp4").unpack(tensor, reorder=False)
            powers = torch.ldexp(torch.ones(scale.shape), scale.int() - 127)
            state[name] = values * powers.repeat_interleave(32, dim=1)
        elif end != "weight_scale" and not name.endswith("_input.weight"):
            state[name] = tensor.float()
    return state


def logits_of(tensors, fields):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {name: value for name, value in fields.items() if name != "quantization_config"}
    config = AutoConfig.for_model(**plain)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config).eval()
    missing, unexpected = model.load_state_dict(decoded(tensors, fields), strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    if groups := (fields["quantization_config"].get("transform_config") or {}).get("config_groups"):
        from compressed_tensors.transform import TransformConfig, apply_transform_config

        for group in groups.values():
            group["apply"] = [place for place in group["apply"] if place["location"] == "input"]
        apply_transform_config(model, TransformConfig(config_groups=groups))
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits[..., ::EVERY].numpy()


def golden(name, directory):
    """The entries of the file for a checkpoint."""
    import torch
    from safetensors import safe_open

    fields = json.loads((directory / "config.json").read_text())
    about, tensors = {}, {}
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        for key in sorted(file.keys()):
            tensors[key] = file.get_tensor(key)
            raw = tensors[key].contiguous().view(-1).view(torch.uint8).numpy()
            header = file.get_slice(key)
            digest = hashlib.sha256(raw.tobytes()).hexdigest()
            about[key] = [header.get_dtype(), header.get_shape(), digest]
    return {
        f"{name}: config": json.dumps(fields),
        f"{name}: tensors": json.dumps(about),
        f"{name}: logits": logits_of(tensors, fields).astype(np.float32),
    }


def main():
    import importlib.metadata

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = pathlib.Path(os.environ["DUQUANTPP_DATA"]) / "models" / "gutenberg-27m"
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        for name, layers in LAYERS.items():
            config = AutoConfig.from_pretrained(source)
            config.num_hidden_layers = layers
            cut = pathlib.Path(scratch) / f"{layers} layers"  # tools look at the model's files
            chosen = {"config": config, "dtype": torch.bfloat16}
            AutoModelForCausalLM.from_pretrained(source, **chosen).save_pretrained(cut)
            model = AutoModelForCausalLM.from_pretrained(cut, dtype=torch.bfloat16)
            out = root / name.replace(", ", "-")
            if name == "quark":
                by_quark(model, out)
            else:
                by_llm_compressor(model, "turned" in name, out)
            found |= golden(name, out)
    packages = ("llmcompressor", "compressed-tensors", "amd-quark", "transformers", "torch")
    about = {package: importlib.metadata.version(package) for package in packages}
    np.savez_compressed(PLACE, about=json.dumps(about), **found)


if __name__ == "__main__":
    main()
