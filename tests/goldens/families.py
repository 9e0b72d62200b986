"""Golden logits: small random checkpoints of each family as the transformers library computes them.

    python tests/goldens/families.py        pip install torch==2.14.1 transformers==5.24.0

writes tests/goldens/families.npz: for each case its logits and its config.json as the library saves
it, for mixtures what their first down_proj decodes to, and the versions in the array `about`.
Weights are not kept: `weights` makes them again from their names, so that the file is small; the
test writes them to a directory and loads that.

A case is a config.json, half of them as transformers 4 lays it out. All linears that can have a
bias have a random one, norms are random, rotary scaling bends frequencies within the 40 positions,
and they lie beyond every sliding window. Every expert gets several tokens in every layer. Models
run in float32; what a library rounds to the type of the checkpoint, as the scale of Gemma's
embeddings, is rounded all the same.
"""

import hashlib
import json
import math
import pathlib
import tempfile
import zlib

import numpy as np

PLACE = pathlib.Path(__file__).parent / "families.npz"
LENGTH = 40

_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
_LLAMA = {**_SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_MISTRAL = {**_SIZES, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
_QWEN2 = {**_SIZES, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3 = {**_SIZES, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
_MOE = {"num_experts_per_tok": 2, "max_position_embeddings": 64}
_MIXTRAL = {**_SIZES, **_MOE, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
_QWEN3_MOE = {
    **_SIZES,
    **_MOE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
}
_GPT_OSS = {
    **_SIZES,
    **_MOE,
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 3,
    "sliding_window": 6,
}
_MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
_GEMMA3 = {
    **{name: value for name, value in _SIZES.items() if name != "hidden_act"},
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 12,
    "sliding_window": 7,
    "torch_dtype": "bfloat16",
}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, dict] = {
    "llama 2": {**_LLAMA, "num_key_value_heads": 4},
    "llama 3": {
        **_LLAMA,
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "llama3", **_LLAMA3},
    },
    "llama 3, tied, one key head": {
        **_LLAMA,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **_LLAMA3},
    },
    "llama with biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama, linear": {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama, yarn": {
        **_LLAMA,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 4.0,
        },
    },
    "mistral": {**_MISTRAL, "sliding_window": 7, "head_dim": 16, "rope_theta": 1e6},
    "mistral without a window": {**_MISTRAL, "sliding_window": None},
    "qwen 2": {**_QWEN2, "use_sliding_window": False, "sliding_window": 7, "rope_theta": 1e6},
    "qwen 2, window in the last layers": {
        **_QWEN2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen 3": {**_QWEN3, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}},
    "qwen 3, windows and biases": {
        **_QWEN3,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mixtral": {**_MIXTRAL, "num_local_experts": 4, "sliding_window": 7, "rope_theta": 1e4},
    "qwen 3 moe": {**_QWEN3_MOE, "tie_word_embeddings": True, "norm_topk_prob": True},
    "qwen 3 moe, window": {
        **_QWEN3_MOE,
        "use_sliding_window": True,
        "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "gpt-oss": {
        **_GPT_OSS,
        "rope_theta": 150.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "gpt-oss, mxfp4": {
        **_GPT_OSS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "quantization_config": _MXFP4,
    },
    "gemma 3": {
        **_GEMMA3,
        "sliding_window_pattern": 2,
        "rope_theta": 500.0,
        "rope_local_base_freq": 20.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma 3, untied, with biases, in float32": {
        **_GEMMA3,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    },
}


def packed(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same with experts in MXFP4: [experts, in, out] as blocks and scales of [.., out, in]."""
    made = {}
    for name, shape in shapes.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            scales = (shape[0], shape[2], shape[1] // 32)
            made |= {f"{name}_blocks": (*scales, 16), f"{name}_scales": scales}
        else:
            made[name] = shape
    return made


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors by their names, float32: norms about 1, biases about 0, matrices that keep size.

    Those of gate_up_proj are larger, so that a clamp at 7 clamps, and biases of routers and of what
    routers read are smaller, so that tokens do not all go one way.
    """
    made = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if name.endswith(("_blocks", "_scales")):
            first, last = (0, 255) if name.endswith("_blocks") else (122, 126)
            made[name] = rng.integers(first, last, shape, np.uint8, endpoint=True)
            continue
        x = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            x = 1 + x / 4
        elif not name.endswith(("bias", "sinks")):
            x = x / math.sqrt(shape[-1]) * (6 if "gate_up_proj" in name else 1)
        elif name.endswith(("router.bias", "down_proj_bias")):
            x = x / 8
        made[name] = x.astype(np.float32)
    return made


def tokens() -> np.ndarray:
    """One row of ids."""
    return np.random.default_rng(0).integers(0, _SIZES["vocab_size"], (1, LENGTH))


def _logits(config: dict) -> tuple[np.ndarray, str, list, str]:
    """Logits, config.json as the library saves it, names and shapes of the tensors, and SHA-256 of
    a matrix of experts as the library has it in memory, in float32."""
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as place:
        file, fields = (pathlib.Path(place, n) for n in ("model.safetensors", "config.json"))
        plain = {name: value for name, value in config.items() if name != "quantization_config"}
        fields.write_text(json.dumps(plain))
        read = transformers.AutoConfig.from_pretrained(place)
        transformers.AutoModelForCausalLM.from_config(read).save_pretrained(place)
        saved = fields.read_text()
        with safe_open(file, framework="numpy") as header:
            shapes = {name: header.get_slice(name).get_shape() for name in header.keys()}  # noqa: SIM118
        if plain != config:
            shapes = packed(shapes)
            fields.write_text(json.dumps(config))
        save_file(weights(shapes), file, {"format": "pt"})
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            place,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys")), info
        for module in model.modules():
            if hasattr(module, "embed_scale"):
                dtype = getattr(torch, str(read.dtype).removeprefix("torch."))
                module.embed_scale = module.embed_scale.to(dtype).float()
        with torch.no_grad():
            logits = model.eval()(torch.from_numpy(tokens())).logits
        experts = getattr(model.model.layers[0].mlp, "experts", None)
        matrix = b"" if experts is None else experts.down_proj.detach().numpy().tobytes()
        return logits.numpy(), saved, list(shapes.items()), hashlib.sha256(matrix).hexdigest()


def main() -> None:
    import torch
    import transformers

    arrays = {}
    for name, config in CASES.items():
        logits, saved, shapes, digest = _logits(config)
        arrays |= {f"{name}: logits": logits, f"{name}: config": np.array(saved)}
        arrays[f"{name}: shapes"] = np.array(json.dumps(shapes))
        if "experts" in str(config):
            arrays[f"{name}: down_proj"] = np.array(digest)
    about = f"torch {torch.__version__}, transformers {transformers.__version__}"
    np.savez_compressed(PLACE, about=np.array(about), **arrays)
    print(about, f"{PLACE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
