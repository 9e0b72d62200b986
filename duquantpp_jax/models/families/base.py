"""How an architecture differs from the others, as data that config.py and layers.py read.

A family is a file beside this one: the values of a `Family`, by its name in config.json.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (*QKV, "self_attn.o_proj")
MLP = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
CAUSAL: Mapping[str, Any] = {
    "partial_rotary_factor": 1.0,
    "is_causal": True,
    "is_encoder_decoder": False,
    "attention_chunk_size": None,
    "kv_sharing_modes": None,
    "per_layer_config": None,
}
"""What every family has in `only`."""
ALL: Mapping[str, Any] = {**CAUSAL, "hidden_act": "silu"}


class In(NamedTuple):
    """The tensor of a checkpoint that a parameter is in.

    Attributes:
      tensor: Its name inside a layer; a star stands for the number of the expert.
      first, step: Its rows that are the parameter's: first, first + step, ...
      transposed: Whether the tensor is [experts, in, out]; its columns are then meant by rows.
    """

    tensor: str
    first: int = 0
    step: int = 1
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class Experts:
    """How a family has its experts.

    Attributes:
      count, width: Fields of config.json: how many experts there are, and their intermediate size.
      stored: Where a checkpoint has the tensors that it does not have by their names here.
    """

    count: str
    width: str
    stored: Mapping[str, In]


@dataclasses.dataclass(frozen=True)
class InGGUF:
    """How llama.cpp stores a family, where that is not as it stores most.

    Attributes:
      name: general.architecture.
      tensors: Further tensors of a layer by their names there, with those of Hugging Face.
      keys: Further keys of the architecture, with the fields of config.json that they give.
      derived: Fields of config.json that its other fields imply.
      paired: Whether rows of q and k are in the order of rotary pairs.
    """

    name: str
    tensors: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda _: {}
    paired: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """How an architecture differs from the others.

    Attributes:
      only: Fields of config.json that must have this value, which is also their default. Another
        value is refused.
      defaults: Other fields that config.json may lack.
      biases: Linears that always have a bias.
      biases_if: Linears that have a bias where this field of config.json is true.
      windows: Which layers have the sliding window of config.json: none, all, all where
        `use_sliding_window` says so (used), or those that `layer_types` lists. Without it, if
        listed, those from `max_window_layers` on; if periodic, all but every
        `sliding_window_pattern`-th.
      layer: Fields of `DecoderConfig` that are the same in all models of the family.
      reads: Further fields of `DecoderConfig` that config.json has, numbers above 0.
      scaled_embedding: Whether the embedding is multiplied by sqrt(hidden_size).
      gguf: How llama.cpp stores it; None where that is not known.
      experts: How the MLP is a mixture of experts; None where it is a single one.
    """

    model_type: str
    only: Mapping[str, Any]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()
    biases_if: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    windows: Literal["none", "all", "used", "listed", "periodic"] = "none"
    layer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads: tuple[str, ...] = ()
    scaled_embedding: bool = False
    gguf: InGGUF | None = None
    experts: Experts | None = None
