"""The parameters of a decoder: their names in a checkpoint, and shapes.

A *site* is an input of linears; several weights may share it.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Float

from duquantpp_jax.models.config import DecoderConfig

SITES = ("attention_in", "attention_out", "mlp_in", "mlp_out")
"""The sites of a layer in order of call."""

SITE_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "attention_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention_out": ("self_attn.o_proj",),
    "mlp_in": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp_out": ("mlp.down_proj",),
}
"""The weights of each site in order, by their names inside a layer of a checkpoint."""

EXPERT_SITES = ("mlp_in", "mlp_out")
"""The sites whose linears are stacks of experts in a mixture of them."""

LINEARS = tuple(name for names in SITE_WEIGHTS.values() for name in names)

HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
ROUTER, SINKS = "mlp.router", "self_attn.sinks"
EMBEDDING, NORM, HEAD, LAYER = "model.embed_tokens", "model.norm", "lm_head", "model.layers.*."

Parameters = Mapping[str, Float[Array | np.ndarray, "..."]]
"""The parameters of one layer in any float type, by name inside it."""


def input_norms(config: DecoderConfig) -> dict[str, str]:
    """The norm of the input of each site that has one."""
    mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    return {"attention_in": "input_layernorm", "mlp_in": mlp}


def output_norms(config: DecoderConfig) -> dict[str, str]:
    """The norm of the output of each site that has one."""
    if not config.post_norms:
        return {}
    return {"attention_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}


def layer_prefix(layer: int) -> str:
    """What the checkpoint names of a layer begin with, e.g. `model.layers.3.`."""
    return LAYER.replace("*", str(layer))


def linear_names(site: str, layer: int) -> tuple[str, ...]:
    """Checkpoint names of a site's linears, e.g. `model.layers.3.mlp.down_proj`.

    >>> linear_names("mlp_in", 3)
    ('model.layers.3.mlp.up_proj', 'model.layers.3.mlp.gate_proj')
    """
    return tuple(layer_prefix(layer) + name for name in SITE_WEIGHTS[site])


def expert_name(name: str, expert: int) -> str:
    """Name of an expert's linear, e.g. `mlp.experts.5.down_proj` for `mlp.down_proj`."""
    return name.replace("mlp.", f"mlp.experts.{expert}.")


def tensor_name(parameter: str) -> str:
    """Checkpoint name of a parameter's tensor: biases and sinks have it in their name."""
    return parameter if parameter.endswith((".bias", SINKS)) else f"{parameter}.weight"


def experts(config: DecoderConfig, site: str) -> int:
    """How many experts the linears of a site are stacks of; 0 where they are plain linears."""
    return config.num_experts if site in EXPERT_SITES else 0


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by checkpoint name without `.weight` (biases keep `.bias`).

    The star of `model.layers.*.NAME` is the layer, the leading axis of the shape. The parameters of
    experts have an axis of experts after it.

    >>> from duquantpp_jax.checkpoints import testbed
    >>> parameter_shapes(testbed.load().config)["model.layers.*.mlp.down_proj"]
    (4, 256, 768)
    """
    layers, hidden, ffn = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    before = input_norms(config)
    layer = {
        before["attention_in"]: (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        before["mlp_in"]: (hidden,),
        "mlp.up_proj": (ffn, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    layer |= dict.fromkeys(output_norms(config).values(), (hidden,))
    if config.num_experts:
        for name in (name for site in EXPERT_SITES for name in SITE_WEIGHTS[site]):
            layer[name] = (config.num_experts, *layer[name])
        layer[ROUTER] = (config.num_experts, hidden)
    layer |= {f"{name}.bias": layer[name][:-1] for name in config.biases}
    if config.sinks:
        layer[SINKS] = (config.num_attention_heads,)
    if config.qk_norm:
        layer |= dict.fromkeys(HEAD_NORMS, (config.head_dim,))
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    shapes |= {LAYER + name: (layers, *shape) for name, shape in layer.items()}
    shapes[NORM] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    return shapes
