"""What is tortured: tiny random models with a byte tokenizer, texts, and the notes of a run."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from duquantpp_jax import __version__, files
from duquantpp_jax.checkpoints.experts import linears, tensors_of
from duquantpp_jax.checkpoints.mxfp4 import BLOCKS, COMPRESSED, DEEPSEEK, GPT_OSS, PACKED, QUARK
from duquantpp_jax.checkpoints.mxfp4 import SCALES as ENDING
from duquantpp_jax.checkpoints.shards import INDEX
from duquantpp_jax.models import DecoderConfig, parameter_shapes
from duquantpp_jax.models.families import FAMILIES
from duquantpp_jax.models.parameters import tensor_name

RESULTS = Path(__file__).resolve().parents[1] / "results"
FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 257,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "max_position_embeddings": 2048,
}
"""config.json of the smallest model, but for its family."""
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 64}
_GROUP = {"weights": {"num_bits": 4, "type": "float", "group_size": 32}, "targets": ["Linear"]}
PACKINGS: dict[str, dict[str, Any]] = {
    COMPRESSED: {
        "quant_method": COMPRESSED,
        "format": PACKED,
        "config_groups": {"group_0": _GROUP},
    },
    QUARK: {
        "quant_method": QUARK,
        "global_quant_config": {
            "weight": {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0"}
        },
    },
    DEEPSEEK: {"quant_method": DEEPSEEK},
    GPT_OSS: {"quant_method": GPT_OSS},
}
"""quantization_config of each packing that is read."""


def fields_of(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """A config.json of a family."""
    family = FAMILIES[architecture]
    named = {"architectures": [architecture], "model_type": family.model_type}
    return FIELDS | named | (EXPERTS if family.experts else {}) | changes


def tokenizer(seed: int = 1) -> Tokenizer:
    """One token a byte, and 256 for what separates documents; ids are shifted by the seed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*alphabet[seed - 1 :], *alphabet[: seed - 1]]
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def floats(config: DecoderConfig, seed: int = 1) -> dict[str, np.ndarray]:
    """The tensors of a model by the names of parameters, drawn so that outputs differ."""
    random, made = np.random.default_rng(seed), {}
    for name, shape in parameter_shapes(config).items():
        layers = range(config.num_hidden_layers) if "*" in name else [None]
        for layer in layers:
            own = shape if layer is None else shape[1:]
            drawn = np.ones(own) if name.endswith("norm") else 0.15 * random.standard_normal(own)
            tensor = tensor_name(name).replace("*", str(layer))
            made[tensor] = drawn.astype(ml_dtypes.bfloat16)
    return made


def write_model(
    place: Path, packing: str | None = None, shards: int = 1, seed: int = 1, **changes: Any
) -> Path:
    """Writes a Hugging Face directory; gives it.

    Args:
      packing: Of the weights of the MLP, a key of PACKINGS; None for floats.
      changes: Of config.json.
    """
    own = {"architecture": "GptOssForCausalLM"} if packing == GPT_OSS else {}
    fields = fields_of(**own | changes)
    config = DecoderConfig.from_dict(fields)
    tensors, random = floats(config, seed), np.random.default_rng(2)
    packed = {}
    if packing is not None:
        fields["quantization_config"] = PACKINGS[packing]
        fields |= {"expert_dtype": "fp4"} if packing == DEEPSEEK else {}
        for name, parts in linears(config).items():
            if "mlp." not in name:
                continue
            *outputs, width = tensors.pop(f"{name}.weight").shape
            codes = random.integers(0, 256, (*outputs, width // 2), np.uint8)
            scales = random.integers(110, 140, (*outputs, width // 32), np.uint8)
            if packing == GPT_OSS:
                blocks = codes.reshape(*outputs, width // 32, 16)
                tensors |= {f"{name}.weight{BLOCKS}": blocks, f"{name}.weight{ENDING}": scales}
            else:
                packed |= _pair(parts[0], packing, codes, scales)
    tensors = {**tensors_of(config, tensors), **packed}
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    place.mkdir(parents=True)
    (place / "config.json").write_bytes(files.to_json(fields))
    (place / "tokenizer.json").write_text(tokenizer(seed).to_str(), encoding="utf-8")
    if shards == 1:
        save_file(tensors, place / "model.safetensors", {"format": "pt"})
        return place
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    where = {name: names[number % shards] for number, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: a for n, a in tensors.items() if where[n] == file}, place / file)
    (place / INDEX).write_bytes(files.to_json({"metadata": {}, "weight_map": where}))
    return place


def _pair(
    module: str, packing: str, codes: np.ndarray, scales: np.ndarray
) -> dict[str, np.ndarray]:
    if packing == COMPRESSED:
        return {f"{module}.weight_packed": codes, f"{module}.weight_scale": scales}
    if packing == QUARK:
        return {f"{module}.weight": codes, f"{module}.weight_scale": scales}
    return {
        f"{module}.weight": codes.view(np.int8),
        f"{module}.scale": scales.view(ml_dtypes.float8_e8m0fnu),
    }


def write_text(path: Path, documents: int = 20, letters: int = 2500) -> Path:
    """Writes documents of letters that no two of them share in order; gives the file."""
    texts = (
        "".join(chr(97 + (i * i + 7 * d * i) % 26) for i in range(letters + 10 * d))
        for d in range(documents)
    )
    path.write_text("<|endoftext|>".join(texts), encoding="utf-8")
    return path


def environment() -> dict[str, Any]:
    """Where and when something was tried."""
    return {
        "date": datetime.date.today().isoformat(),
        "duquantpp_jax": __version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def write_result(kind: str, result: dict[str, Any]) -> None:
    """Writes the last result of a kind of torture, from which the page is made."""
    path = RESULTS / f"torture_{kind}.json"
    files.write_whole(path, files.to_json(environment() | result))
    print(f"wrote {path.name}")


def read_result(kind: str) -> dict[str, Any] | None:
    """The last result of a kind of torture; None if it was not run at length yet."""
    path = RESULTS / f"torture_{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
