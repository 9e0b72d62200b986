"""The sizes and constants of a decoder, read from a Hugging Face `config.json` and checked.

families/ says how architectures differ. Each field of config.json that changes the arithmetic is
a field of `DecoderConfig`, or is refused by name: a wrong rotary scaling or a missing bias would go
unnoticed as a slightly worse model.

Source: the `config.json` of the architectures in families/ and their documented defaults, in the
layouts of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters).
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from duquantpp_jax.models import fields as read
from duquantpp_jax.models.families import FAMILIES, REFUSED, Family
from duquantpp_jax.models.rope import Scaling, read_scaling, write_scaling

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and constants of a decoder, under their names in config.json.

    Fields without a default must be in config.json. The defaults are those of the file format; that
    of `num_key_value_heads` is `num_attention_heads`, and that of `head_dim` is
    hidden_size / num_attention_heads.

    Attributes:
      biases: Linears that have a bias, by their name inside a layer.
      qk_norm: Whether each head's query and key are RMS-normed before the rotation.
      norm_offset: What is added to the weights of norms, before they are multiplied with.
      post_norms: Whether what attention and the MLP give out is RMS-normed, too.
      embedding_scale: Factor on the embedding of the tokens.
      query_pre_attn_scalar: Scores are divided by its square root; None for that of head_dim.
      rope_local_base_freq: The rope_theta, without scaling, of layers with a window; None where it
        is that of all layers.
      sliding_window: Positions that a layer with a window sees, the query's own among them.
      layer_types: "sliding_attention" or "full_attention" for each layer; None where all layers
        are alike.
      num_experts: In every layer, each of `intermediate_size`; 0 where the MLP is a single one.
      num_experts_per_tok: Experts that a token goes to.
      norm_topk_prob: Whether the weights of their outputs add up to 1.
      activation: Of the MLP, by its name in layers.py.
      sinks: Whether each head of attention has a sink.
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
    rope_scaling: Scaling | None = None
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = True
    activation: str = "silu"
    sinks: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scale: float = 1.0
    query_pre_attn_scalar: float | None = None
    rope_local_base_freq: float | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "DecoderConfig":
        """The configuration of a parsed config.json.

        Fields that do not change the float function (dropout, torch_dtype, ...) are ignored.

        Raises:
          ValueError: A field is missing, wrong or not supported; names it and what would be right.
        """
        architecture = _architecture(fields)
        family = FAMILIES[architecture]
        fields = {**family.only, **family.defaults, **_without_rope_parameters(fields, family)}
        for name, only in {**family.only, "model_type": family.model_type}.items():
            if fields.get(name, only) not in (only, None):
                raise ValueError(
                    f"config.json: {name} = {read.short(fields[name])} is not supported for "
                    f"{architecture}: it must be {json.dumps(only)}"
                )
        hidden = read.integer(fields, "hidden_size")
        heads = read.integer(fields, "num_attention_heads")
        if fields.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads "
                f"{heads}: give head_dim or sizes that divide"
            )
        kv_heads = read.integer(fields, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {kv_heads}: every key head must serve the same number of "
                "query heads"
            )
        head_dim = read.integer(fields, "head_dim", hidden // heads)
        if head_dim % 2:
            raise ValueError(
                f"config.json: head_dim {head_dim} is odd: rotary positions need an even one"
            )
        vocab = read.integer(fields, "vocab_size")
        layers = read.integer(fields, "num_hidden_layers", below=10_000)
        max_positions = read.integer(fields, "max_position_embeddings", cls.max_position_embeddings)
        biases = family.biases
        for name, linears in family.biases_if.items():
            biases += linears if read.boolean(fields, name, False) else ()
        window, layer_types = _windows(fields, family, layers)
        width, experts = "intermediate_size", {}
        if family.experts is not None:
            width, count = family.experts.width, _experts(fields, family.experts.count)
            experts = {"num_experts": count, "norm_topk_prob": True}
            experts["num_experts_per_tok"] = read.integer(
                fields, "num_experts_per_tok", below=count + 1
            )
            if "norm_topk_prob" in family.defaults:
                experts["norm_topk_prob"] = read.boolean(fields, "norm_topk_prob")
        return cls(
            **experts,
            hidden_size=hidden,
            intermediate_size=read.integer(fields, width),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab,
            rms_norm_eps=read.positive(fields, "rms_norm_eps"),
            rope_theta=read.positive(
                fields, "rope_theta", family.defaults.get("rope_theta", cls.rope_theta)
            ),
            tie_word_embeddings=read.boolean(fields, "tie_word_embeddings", False),
            max_position_embeddings=max_positions,
            bos_token_id=read.token(fields.get("bos_token_id"), "bos_token_id", vocab),
            eos_token_id=read.stop_tokens(fields.get("eos_token_id"), "eos_token_id", vocab),
            architecture=architecture,
            rope_scaling=read_scaling(fields, max_positions),
            biases=biases,
            sliding_window=window,
            layer_types=layer_types,
            embedding_scale=_root(fields, hidden) if family.scaled_embedding else 1.0,
            **{name: read.positive(fields, name) for name in family.reads},
            **family.layer,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields of a config.json from which `from_dict` makes this configuration."""
        family = FAMILIES[self.architecture]
        fields = {name: only for name, only in family.only.items() if only is not None}
        fields |= {n: v for n, v in vars(self).items() if n in family.reads or n not in _DERIVED}
        if family.experts is not None:
            fields |= {n: getattr(self, n) for n in ("num_experts_per_tok", "norm_topk_prob")}
            fields[family.experts.count] = self.num_experts
            fields[family.experts.width] = self.intermediate_size
        fields["rope_scaling"] = write_scaling(self.rope_scaling)
        if self.rope_scaling is None and "rope_scaling" in family.defaults:
            fields["rope_scaling"] = {"rope_type": "default"}
        for name, linears in family.biases_if.items():
            fields[name] = set(linears) <= set(self.biases)
        if family.windows != "none":
            fields["sliding_window"] = self.sliding_window
        if family.windows in ("listed", "periodic"):
            fields["layer_types"] = self.layer_types or (FULL,) * self.num_hidden_layers
        if family.windows in ("used", "listed"):
            fields["use_sliding_window"] = self.sliding_window is not None
        if (scalar := fields.get("query_pre_attn_scalar")) is not None and scalar == int(scalar):
            fields["query_pre_attn_scalar"] = int(scalar)  # transformers refuses 256.0
        size, scale = self.hidden_size, self.embedding_scale
        types = (name for name in _DTYPES if _root({"dtype": name}, size) == scale)
        return {
            "architectures": [self.architecture],
            "model_type": family.model_type,
            **{name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()},
            "torch_dtype": next(types, "bfloat16"),
        }


_DERIVED = (
    *("architecture", "biases", "qk_norm", "sliding_window", "layer_types", "norm_offset"),
    *("post_norms", "activation", "embedding_scale", "query_pre_attn_scalar"),
    *("rope_local_base_freq", "sinks", "num_experts", "num_experts_per_tok", "norm_topk_prob"),
)
"""Fields of a `DecoderConfig` that config.json has under other names, or only in some families."""
_DTYPES = ("bfloat16", "float16", "float32")


def _root(fields: Mapping[str, Any], hidden_size: int) -> float:
    """sqrt(hidden_size) in the type of the checkpoint, as transformers multiplies with it."""
    name = fields.get("dtype", fields.get("torch_dtype"))
    if name not in _DTYPES:
        raise read.wrong("torch_dtype", name, f"one of {', '.join(_DTYPES)}")
    return float(np.asarray(hidden_size**0.5, np.float32).astype(jnp.dtype(name)))


def _experts(fields: Mapping[str, Any], name: str) -> int:
    """How many experts a layer has; transformers takes both names for the same."""
    both = {n: fields[n] for n in (name, "num_local_experts", "num_experts") if n in fields}
    counts = {n: read.integer(both, n) for n in both} or {name: read.integer(fields, name)}
    if len({*counts.values()}) > 1:
        raise ValueError(
            f"config.json: num_local_experts = {counts['num_local_experts']} and num_experts = "
            f"{counts['num_experts']} are two names of the same number: leave out one"
        )
    return next(iter(counts.values()))


def _windows(
    fields: Mapping[str, Any], family: Family, layers: int
) -> tuple[int | None, tuple[str, ...] | None]:
    """`sliding_window` and `layer_types` of the `DecoderConfig`."""
    if family.windows == "none":
        return None, None
    given, types = fields.get("sliding_window") is not None, fields.get("layer_types")
    window = read.integer(fields, "sliding_window") if given else None
    if family.windows == "all":
        return window, None
    switched = family.windows in ("used", "listed")
    if switched and not read.boolean(fields, "use_sliding_window", False):
        window = None
    if family.windows == "used":
        return window, None
    if types is None and family.windows == "periodic":
        period = read.integer(fields, "sliding_window_pattern")
        types = [SLIDING if layer % period else FULL for layer in range(1, layers + 1)]
    elif types is None:
        first = fields["max_window_layers"] and read.integer(fields, "max_window_layers")
        types = [FULL if layer < first or window is None else SLIDING for layer in range(layers)]
    if types == [FULL] * layers:
        return None, None
    known = isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types)
    if not (known and len(types) == layers and window is not None):
        switch = "use_sliding_window and " if family.windows == "listed" else ""
        raise ValueError(
            f"config.json: layer_types = {read.short(types)} is not supported: it must name "
            f"{FULL} or {SLIDING} for each of {layers} layers, and the latter needs "
            f"{switch}a sliding_window"
        )
    return window, tuple(types)


def _architecture(fields: Mapping[str, Any]) -> str:
    """The name in `architectures`, which must be supported."""
    names, supported = fields.get("architectures"), " or ".join(FAMILIES)
    if not (isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)):
        raise ValueError(
            f"config.json: architectures = {read.short(names)} does not name one architecture: "
            f"it must be a list of one name: {supported}"
        )
    name = names[0]
    if name not in FAMILIES:
        reasons = (f" (it is {why})" for part, why in REFUSED.items() if part in name.lower())
        raise ValueError(
            f"config.json: architecture {read.short(name)} is not supported"
            f"{next(reasons, '')}: use {supported}"
        )
    if (quantization := fields.get("quantization_config")) is not None:
        raise ValueError(
            f"config.json: quantization_config = {read.short(quantization)}: the model is already "
            "quantized, in a way that is not read here: give the float one it was made from"
        )
    return name


def _without_rope_parameters(fields: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The fields in the layout of transformers 4: rope_parameters of transformers 5 is unpacked.

    As in transformers, rope_scaling comes before rope_parameters, and what stands inside before
    what stands outside.
    """
    fields = dict(fields)
    nested, scaling = fields.pop("rope_parameters", None), fields.get("rope_scaling")
    own = "rope_local_base_freq" in family.reads  # each kind of layer has a scaling
    if own and isinstance(scaling, dict) and "type" in scaling and "rope_type" not in scaling:
        raise ValueError(  # transformers 5 passes over it
            f"config.json: rope_scaling of type {read.short(scaling['type'])} is not supported for "
            f'{family.model_type}: its type must stand under "rope_type"'
        )
    if isinstance(nested, dict) and own:
        local, given = nested.get(SLIDING) or {}, nested
        nested = nested.get(FULL) or {}
        known = isinstance(local, dict) and {*local} <= {"rope_type", "rope_theta"}
        if (
            {*given} - {FULL, SLIDING}
            or not known
            or local.get("rope_type") not in (None, "default")
        ):
            raise ValueError(
                f"config.json: rope_parameters = {read.short(given)} is not supported: it must "
                f"have {FULL} and {SLIDING}, and the latter rope_type default"
            )
        if "rope_theta" in local:
            fields["rope_local_base_freq"] = local["rope_theta"]
        if isinstance(scaling, dict) and isinstance(nested, dict):
            scaling = {**nested, **scaling}
    if nested is not None and not isinstance(nested, dict):
        raise ValueError(
            f"config.json: rope_parameters = {read.short(nested)} is not an object: "
            'it must look like {"rope_type": "default", "rope_theta": 10000.0}'
        )
    if scaling := scaling or nested or None:
        fields["rope_scaling"] = scaling
    else:  # the family may have one
        fields.pop("rope_scaling", None)
    if isinstance(scaling, dict):
        inside = ("rope_theta", "partial_rotary_factor")
        fields |= {name: scaling[name] for name in inside if scaling.get(name) is not None}
        given = {n for n, v in scaling.items() if v is not None}
        if scaling.get("rope_type", scaling.get("type", "default")) == "default":
            fields["rope_scaling"] = None
            if unknown := given - {"rope_type", "type", *inside}:
                raise ValueError(
                    f"config.json: {min(unknown)} = {read.short(scaling[min(unknown)])} is not "
                    f"supported in rope_scaling of type default: it may have {' and '.join(inside)}"
                )
    return fields
