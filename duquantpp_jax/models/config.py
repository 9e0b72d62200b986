"""What a decoder is: the numbers of a Hugging Face `config.json`, checked field by field.

A family is one entry of `FAMILIES`: the fields of config.json whose value this code takes for
granted, each with the only value it may have. Whatever a family changes in the arithmetic is a
field of `DecoderConfig` that the decoder reads; what is not supported is refused by name, never
ignored, because a wrong rotary scaling or a missing bias only shows as a slightly worse model.

Source: the `config.json` of LlamaForCausalLM and its documented defaults (transformers 4 and 5).
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_LLAMA = MappingProxyType(
    {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }
)

FAMILIES: Mapping[str, Mapping[str, Any]] = MappingProxyType({"LlamaForCausalLM": _LLAMA})
"""Architecture name to the fields that must have one value; that value is also their default."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and constants of one decoder, under their names in config.json.

    Fields without a default must stand in config.json. The defaults are those of the file format;
    `num_key_value_heads` falls back to `num_attention_heads` and `head_dim` to
    hidden_size / num_attention_heads, as config.json defines them.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    architecture: str = "LlamaForCausalLM"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "DecoderConfig":
        """The configuration that a parsed config.json states.

        Args:
          fields: config.json as a mapping. Fields that do not change the float function
            (dropout, initializer_range, torch_dtype, ...) are ignored.

        Returns:
          The configuration.

        Raises:
          ValueError: one line saying which field is missing, of the wrong type, out of range or
            not supported, and what would be right.
        """
        architecture = _architecture(fields)
        fields = _without_rope_parameters(fields)
        for name, only in FAMILIES[architecture].items():
            if fields.get(name, only) != only:
                raise ValueError(
                    f"config.json: {name} = {_short(fields[name])} is not supported for "
                    f"{architecture}: it must be {json.dumps(only)}{_HINTS.get(name, '')}"
                )
        hidden, heads = _integer(fields, "hidden_size"), _integer(fields, "num_attention_heads")
        if fields.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads "
                f"{heads}: give head_dim or sizes that divide"
            )
        vocab_size = _integer(fields, "vocab_size")
        config = cls(
            hidden_size=hidden,
            intermediate_size=_integer(fields, "intermediate_size"),
            num_hidden_layers=_integer(fields, "num_hidden_layers", below=10_000),
            num_attention_heads=heads,
            num_key_value_heads=_integer(fields, "num_key_value_heads", heads),
            head_dim=_integer(fields, "head_dim", hidden // heads),
            vocab_size=vocab_size,
            rms_norm_eps=_positive(fields, "rms_norm_eps"),
            rope_theta=_positive(fields, "rope_theta", cls.rope_theta),
            tie_word_embeddings=_boolean(fields, "tie_word_embeddings", cls.tie_word_embeddings),
            max_position_embeddings=_integer(
                fields, "max_position_embeddings", cls.max_position_embeddings
            ),
            bos_token_id=_token(fields.get("bos_token_id"), "bos_token_id", vocab_size),
            eos_token_id=_tokens(fields.get("eos_token_id"), "eos_token_id", vocab_size),
            architecture=architecture,
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {config.num_key_value_heads}: every key head must serve the "
                "same number of query heads"
            )
        if config.head_dim % 2:
            raise ValueError(
                f"config.json: head_dim {config.head_dim} is odd: rotary positions need an even one"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields of a config.json that `from_dict` reads back as this configuration."""
        fields = dataclasses.asdict(self)
        fields.pop("architecture")
        return {
            "architectures": [self.architecture],
            "model_type": "llama",
            **{name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "bfloat16",
        }


_HINTS = {"quantization_config": " (the model is already quantized: give the float one)"}


def _architecture(fields: Mapping[str, Any]) -> str:
    """The one supported name in `architectures`."""
    names = fields.get("architectures")
    supported = " or ".join(FAMILIES)
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise ValueError(
            f"config.json: architectures = {_short(names)} does not name one architecture: "
            f'it must be ["{supported}"]'
        )
    if names[0] not in FAMILIES:
        raise ValueError(
            f"config.json: architecture {_short(names[0])} is not supported: use {supported}"
        )
    return names[0]


def _without_rope_parameters(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 nests rope_theta and the scaling in rope_parameters; this undoes it."""
    fields = dict(fields)
    nested = fields.pop("rope_parameters", None)
    if nested is not None:
        if not isinstance(nested, dict):
            raise ValueError(
                f"config.json: rope_parameters = {_short(nested)} is not an object: "
                'it must look like {"rope_type": "default", "rope_theta": 10000.0}'
            )
        fields["rope_theta"] = nested.get("rope_theta", fields.get("rope_theta", 10000.0))
        if nested.get("rope_type", "default") != "default":
            fields["rope_scaling"] = nested
    scaling = fields.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "default":
        fields["rope_scaling"] = None
    return fields


_REQUIRED: Any = object()


def _field(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    value = fields.get(name)
    if value is not None:
        return value
    if default is not _REQUIRED:
        return default
    near = difflib.get_close_matches(name, [f for f in fields if isinstance(f, str)], 1, 0.85)
    hint = f" (found {_short(near[0])})" if near and near[0] != name else ""
    raise ValueError(f"config.json: {name} is missing{hint}: it must be a number above 0")


def _integer(
    fields: Mapping[str, Any], name: str, default: Any = _REQUIRED, below: int = 2**31
) -> int:
    value = _field(fields, name, default)
    if type(value) is not int or not 0 < value < below:
        raise ValueError(
            f"config.json: {name} = {_short(value)} is out of place: "
            f"it must be an integer above 0 and below {below}"
        )
    return value


def _positive(fields: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> float:
    value = _field(fields, name, default)
    if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"config.json: {name} = {_short(value)} is out of place: "
            "it must be a finite number above 0"
        )
    return float(value)


def _boolean(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = _field(fields, name, default)
    if type(value) is not bool:
        raise ValueError(
            f"config.json: {name} = {_short(value)} is out of place: it must be true or false"
        )
    return value


def _token(value: Any, name: str, vocab_size: int) -> int | None:
    if value is None or (type(value) is int and 0 <= value < vocab_size):
        return value
    raise ValueError(
        f"config.json: {name} = {_short(value)} is out of place: "
        f"it must be null or a token id below vocab_size {vocab_size}"
    )


def _tokens(value: Any, name: str, vocab_size: int) -> int | tuple[int, ...] | None:
    """A token id, or the several that Llama 3 lists."""
    if not isinstance(value, list):
        return _token(value, name, vocab_size)
    ids = (_token(one, name, vocab_size) for one in value)
    return tuple(one for one in ids if one is not None)


def _short(value: Any) -> str:
    """A value for a message: one line, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
