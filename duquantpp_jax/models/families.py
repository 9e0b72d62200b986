"""The architectures that the decoder knows: a table of what differs from one to the next.

All are the decoder at the top of decoder.py, under the same tensor names. They differ in which
linears have a bias, in whether queries and keys are normed, in which layers see a sliding window,
and in what config.json may leave out. What a family takes for granted is in `only`: a field of
config.json with another value is refused, because a wrong activation or a partial rotation only
shows as a slightly worse model.

Source: the configuration classes of transformers 4 and 5 for the architectures named here.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
_ALL = {"hidden_act": "silu", "partial_rotary_factor": 1.0}


@dataclasses.dataclass(frozen=True)
class Family:
    """What one architecture takes for granted.

    Attributes:
      model_type: As config.json names it.
      only: Fields that must have one value, which is also their default.
      defaults: Other fields that config.json may lack.
      biases: Linears that always have a bias.
      biases_if: Linears that have one where a field of config.json is true.
      qk_norm: Whether each head's query and key are RMS-normed before the rotation.
      windows: Which layers see a sliding window where config.json gives one: none, all, or those
        that `layer_types` lists (without it, those from `max_window_layers` on).
    """

    model_type: str
    only: Mapping[str, Any]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()
    biases_if: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    qk_norm: bool = False
    windows: Literal["none", "all", "listed"] = "none"


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(
            model_type="llama",
            only=_ALL,
            biases_if={"attention_bias": _ATTENTION, "mlp_bias": _MLP},
        ),
        "MistralForCausalLM": Family(
            model_type="mistral",
            only={**_ALL, "attention_bias": False, "mlp_bias": False, "layer_types": None},
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
            windows="all",
        ),
        "Qwen2ForCausalLM": Family(
            model_type="qwen2",
            only={**_ALL, "mlp_bias": False},
            defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
            biases=_QKV,
            windows="listed",
        ),
        "Qwen3ForCausalLM": Family(
            model_type="qwen3",
            only={**_ALL, "mlp_bias": False},
            defaults={
                "num_key_value_heads": 32,
                "head_dim": 128,
                "sliding_window": 4096,
                "max_window_layers": 28,
            },
            biases_if={"attention_bias": _ATTENTION},
            qk_norm=True,
            windows="listed",
        ),
    }
)
"""Architecture name, as in `architectures` of config.json, to its family."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "moe": "a mixture of experts, each of which sees only the tokens routed to it",
        "mixtral": "a mixture of experts, each of which sees only the tokens routed to it",
        "gemma": "a Gemma, whose norms, activation and softcapping this decoder does not have",
    }
)
"""Parts of names of architectures that are refused with the reason."""
