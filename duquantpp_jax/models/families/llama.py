"""Llama, and the families that add to its layer no more than biases, windows, norms of heads.

Source: the configuration classes of transformers 4 and 5 for the architectures named here.
"""

from collections.abc import Mapping

from duquantpp_jax.models.families.base import ALL, ATTENTION, MLP, QKV, Family, InGGUF

_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_QWEN |= {"max_position_embeddings": 32768}

LLAMA: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        "llama",
        only={**ALL, "sliding_window": None, "layer_types": None},
        biases_if={"attention_bias": ATTENTION, "mlp_bias": MLP},
        gguf=InGGUF("llama", paired=True),
    ),
    "MistralForCausalLM": Family(
        "mistral",
        only={**ALL, "attention_bias": False, "mlp_bias": False, "layer_types": None},
        defaults={
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
        },
        windows="all",
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        only={**ALL, "mlp_bias": False},
        defaults=_QWEN,
        biases=QKV,
        windows="listed",
        gguf=InGGUF("qwen2"),
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        only={**ALL, "mlp_bias": False},
        defaults={**_QWEN, "head_dim": 128},
        biases_if={"attention_bias": ATTENTION},
        windows="listed",
        layer={"qk_norm": True},
        gguf=InGGUF("qwen3"),
    ),
}
