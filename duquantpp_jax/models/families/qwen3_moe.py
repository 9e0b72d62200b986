"""Qwen3 with experts in every layer; norm_topk_prob says whether their weights add up to 1.

Source: Yang et al., Qwen3 technical report (arXiv:2505.09388); tensor names of its checkpoints.
"""

from duquantpp_jax.models.families.base import ALL, ATTENTION, Experts, Family, In

QWEN3_MOE = Family(
    "qwen3_moe",
    only={
        **ALL,
        "mlp_bias": False,
        "layer_types": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    defaults={
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "norm_topk_prob": False,
        "max_position_embeddings": 32768,
    },
    biases_if={"attention_bias": ATTENTION},
    windows="used",
    layer={"qk_norm": True},
    experts=Experts(
        count="num_experts",
        width="moe_intermediate_size",
        stored={
            "mlp.router.weight": In("mlp.gate.weight"),
            "mlp.gate_proj.weight": In("mlp.experts.*.gate_proj.weight"),
            "mlp.down_proj.weight": In("mlp.experts.*.down_proj.weight"),
            "mlp.up_proj.weight": In("mlp.experts.*.up_proj.weight"),
        },
    ),
)
