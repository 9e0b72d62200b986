"""Golden logits: small random checkpoints of each family as the transformers library computes them.

    python tests/goldens/families.py        pip install torch==2.14.1 transformers==5.24.0

writes tests/goldens/families.npz: for each case its logits and its config.json as the library saves
it, and the versions in the array `about`. Weights are not kept: `weights` makes them again from
their names, so that the file is small; the test writes them to a directory and loads that.

A case is a config.json, half of them as transformers 4 lays it out. All linears that can have a
bias have a random one, norms are random, rotary scaling bends frequencies within the 40 positions,
and they lie beyond every sliding window. Models run in float32; what a library rounds to the type
of the checkpoint, as the scale of Gemma's embeddings, is rounded all the same.
"""

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


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors by their names, float32: norms about 1, biases about 0, matrices that keep size."""
    made = {}
    for name, shape in shapes.items():
        x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("norm.weight"):
            x = 1 + x / 4
        elif not name.endswith(".bias"):
            x = x / math.sqrt(shape[-1])
        made[name] = x.astype(np.float32)
    return made


def tokens() -> np.ndarray:
    """One row of ids."""
    return np.random.default_rng(0).integers(0, _SIZES["vocab_size"], (1, LENGTH))


def _logits(config: dict) -> tuple[np.ndarray, str, list]:
    """Logits, config.json as the library saves it, and names and shapes of the tensors."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as place:
        pathlib.Path(place, "config.json").write_text(json.dumps(config))
        read = transformers.AutoConfig.from_pretrained(place)
        model = transformers.AutoModelForCausalLM.from_config(read, attn_implementation="eager")
        for module in model.modules():
            if hasattr(module, "embed_scale"):
                module.embed_scale = module.embed_scale.to(read.dtype)
        model = model.float().eval()
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        state = {name: torch.from_numpy(w) for name, w in weights(shapes).items()}
        missing = model.load_state_dict(state, strict=False).missing_keys
        assert set(missing) <= {"lm_head.weight"}, missing
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens())).logits
        model.config.save_pretrained(place)
        return logits.numpy(), pathlib.Path(place, "config.json").read_text(), list(shapes.items())


def main() -> None:
    import torch
    import transformers

    arrays = {}
    for name, config in CASES.items():
        logits, saved, shapes = _logits(config)
        arrays |= {f"{name}: logits": logits, f"{name}: config": np.array(saved)}
        arrays[f"{name}: shapes"] = np.array(json.dumps(shapes))
    about = f"torch {torch.__version__}, transformers {transformers.__version__}"
    np.savez_compressed(PLACE, about=np.array(about), **arrays)
    print(about, f"{PLACE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
