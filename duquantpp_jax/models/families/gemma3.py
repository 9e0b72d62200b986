"""Gemma 3, the text model.

    embedding times sqrt(hidden), rounded to the checkpoint's type as its makers do
    n(x) = x / sqrt(mean(x^2) + eps) * (1 + w), also after attention and after the MLP, which is
    gelu(gate) * up; q and k normed head by head; scores over sqrt(query_pre_attn_scalar)
    five layers with a window and a rotary base of their own, then one that sees everything

Soft-capping and attention in both directions, which the architecture can have, are refused.

Source: Gemma 3 Technical Report (arXiv:2503.19786), section 2; Gemma3TextConfig of transformers 4
and 5, whose defaults a config.json of Gemma's makers relies on; llama.cpp, src/llama-model.cpp.
"""

from collections.abc import Mapping
from typing import Any

from duquantpp_jax.models.families.base import ATTENTION, CAUSAL, Family, InGGUF


def _derived(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF file does not state: the scalar is head_dim but in the model of 62 layers, 27B;
    a file without a window is refused, as its layers would be other than those of Gemma 3."""
    scalar = fields.get("head_dim")
    if fields.get("num_hidden_layers") == 62:
        scalar = fields["hidden_size"] // fields["num_attention_heads"]
    return {"query_pre_attn_scalar": scalar, "sliding_window": fields.get("sliding_window")}


GEMMA3: Mapping[str, Family] = {
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        only={
            **CAUSAL,
            "hidden_activation": "gelu_pytorch_tanh",
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        defaults={
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        biases_if={"attention_bias": ATTENTION},
        windows="periodic",
        reads=("query_pre_attn_scalar", "rope_local_base_freq"),
        layer={
            "activation": "gelu_pytorch_tanh",
            "norm_offset": 1.0,
            "post_norms": True,
            "qk_norm": True,
        },
        scaled_embedding=True,
        gguf=InGGUF(
            "gemma3",
            tensors={
                "ffn_norm": "pre_feedforward_layernorm",
                "post_attention_norm": "post_attention_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
            },
            keys={
                "attention.sliding_window": "sliding_window",
                "attention.sliding_window_pattern": "sliding_window_pattern",
                "rope.freq_base_swa": "rope_local_base_freq",
            },
            derived=_derived,
        ),
    ),
}
