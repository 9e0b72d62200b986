"""How an architecture differs from the others, as data that config.py and layers.py read.

A family is a file beside this one: the values of a `Family`, by its name in config.json.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (*QKV, "self_attn.o_proj")
MLP = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")


@dataclasses.dataclass(frozen=True)
class Family:
    """How an architecture differs from the others.

    Attributes:
      only: Fields of config.json that must have this value, which is also their default. Another
        value is refused.
      defaults: Other fields that config.json may lack.
      biases: Linears that always have a bias.
      biases_if: Linears that have a bias where this field of config.json is true.
      windows: Which layers have the sliding window of config.json: none, all, or those that
        `layer_types` lists. Without it, if listed, those from `max_window_layers` on; if periodic,
        all but every `sliding_window_pattern`-th.
      layer: Fields of `DecoderConfig` that are the same in all models of the family.
    """

    model_type: str
    only: Mapping[str, Any]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()
    biases_if: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    windows: Literal["none", "all", "listed", "periodic"] = "none"
    layer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
