"""The supported architectures: a table of how they differ.

All are stacks of the layer at the top of layers.py, under the same tensor names. A field of
config.json that is in `only` and has another value is refused.

Source: the configuration classes of transformers 4 and 5 for the architectures named here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from duquantpp_jax.models import gpt_oss, mixtral, qwen3_moe
from duquantpp_jax.models.experts import Activation, Experts, swiglu

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
_ALL = {"hidden_act": "silu", "partial_rotary_factor": 1.0}
_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}


@dataclasses.dataclass(frozen=True)
class Family:
    """How an architecture differs from the others.

    Attributes:
      only: Fields of config.json that must have this value, which is also their default.
      defaults: Other fields that config.json may lack.
      biases: Linears that always have a bias.
      biases_if: Linears that have a bias where this field of config.json is true.
      qk_norm: Whether each head's query and key are RMS-normed before the rotation.
      windows: Which layers have the sliding window of config.json: none, all, all where
        `use_sliding_window` says so ("used"), or those that `layer_types` lists: without it those
        from `max_window_layers` on ("listed"), or every other one ("alternating").
      activation: Of the MLP.
      experts: How the MLP is a mixture of experts; None where it is not.
      sinks: Whether each head of attention has a sink.
    """

    model_type: str
    only: Mapping[str, Any]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()
    biases_if: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    qk_norm: bool = False
    windows: Literal["none", "all", "used", "listed", "alternating"] = "none"
    activation: Activation = swiglu
    experts: Experts | None = None
    sinks: bool = False


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        "llama", only=_ALL, biases_if={"attention_bias": _ATTENTION, "mlp_bias": _MLP}
    ),
    "MistralForCausalLM": Family(
        "mistral",
        only={**_ALL, "attention_bias": False, "mlp_bias": False, "layer_types": None},
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2", only={**_ALL, "mlp_bias": False}, defaults=_QWEN, biases=_QKV, windows="listed"
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        only={**_ALL, "mlp_bias": False},
        defaults={**_QWEN, "head_dim": 128},
        biases_if={"attention_bias": _ATTENTION},
        qk_norm=True,
        windows="listed",
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        only={**_ALL, "attention_bias": False, "mlp_bias": False, "layer_types": None},
        defaults={"num_key_value_heads": 8, "rope_theta": 1e6},
        windows="all",
        experts=mixtral.EXPERTS,
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        only={**_ALL, "mlp_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        defaults={"num_key_value_heads": 4, "sliding_window": 4096, "norm_topk_prob": False},
        biases_if={"attention_bias": _ATTENTION},
        qk_norm=True,
        windows="used",
        experts=qwen3_moe.EXPERTS,
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        only={**_ALL, "swiglu_alpha": gpt_oss.ALPHA, "swiglu_limit": gpt_oss.LIMIT},
        defaults=gpt_oss.DEFAULTS,
        biases=("mlp.router", *_MLP),
        biases_if={"attention_bias": _ATTENTION},
        windows="alternating",
        activation=gpt_oss.clamped_swiglu,
        experts=gpt_oss.EXPERTS,
        sinks=True,
    ),
}
"""Families by their name in `architectures` of config.json."""

_EXPERTS = "a mixture of experts that this decoder does not have"
REFUSED: Mapping[str, str] = {
    "moe": _EXPERTS,
    "gemma": "a Gemma, whose norms, activation and softcapping this decoder does not have",
}
"""Why architectures are refused, by a part of their name."""
