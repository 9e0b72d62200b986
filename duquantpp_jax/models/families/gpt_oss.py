"""gpt-oss: a clamped SwiGLU, biases of router and experts, a sink a head, YaRN, windows in turn.

    act(g, u) = g' sigma(1.702 g') (u' + 1)       g' = min(g, 7),  u' = clip(u, -7, 7)

The attention of a head may go to its sink, a logit without a value (attention.py). Gate and up of
an expert are the even and the odd outputs of one matrix in a checkpoint.

Source: OpenAI, gpt-oss-120b and gpt-oss-20b model card (arXiv:2508.10925), and its `config.json`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from duquantpp_jax.models.families.base import ALL, ATTENTION, MLP, Experts, Family, In

ALPHA, LIMIT = 1.702, 7.0


def clamped_swiglu(
    gate: Float[Array, "*tokens k"], up: Float[Array, "*tokens k"]
) -> Float[Array, "*tokens k"]:
    """act(g, u) at the top of this file."""
    limit = np.asarray(LIMIT, gate.dtype)
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(np.asarray(ALPHA, gate.dtype) * gate) * (up + 1)


_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
GPT_OSS = Family(
    "gpt_oss",
    only={**ALL, "swiglu_alpha": ALPHA, "swiglu_limit": LIMIT, "sliding_window_pattern": 2},
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_theta": 150000.0,
        "rope_scaling": _YARN,
        "attention_bias": True,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
    },
    biases=("mlp.router", *MLP),
    biases_if={"attention_bias": ATTENTION},
    windows="periodic",
    layer={"activation": "clamped_swiglu", "sinks": True},
    experts=Experts(
        count="num_local_experts",
        width="intermediate_size",
        stored={
            "mlp.gate_proj.weight": In("mlp.experts.gate_up_proj", 0, 2, transposed=True),
            "mlp.up_proj.weight": In("mlp.experts.gate_up_proj", 1, 2, transposed=True),
            "mlp.down_proj.weight": In("mlp.experts.down_proj", transposed=True),
            "mlp.gate_proj.bias": In("mlp.experts.gate_up_proj_bias", 0, 2),
            "mlp.up_proj.bias": In("mlp.experts.gate_up_proj_bias", 1, 2),
            "mlp.down_proj.bias": In("mlp.experts.down_proj_bias"),
        },
    ),
)
