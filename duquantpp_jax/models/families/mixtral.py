"""Mixtral: Mistral with experts, each a SwiGLU, whose weights are softmax over those chosen.

Source: Jiang et al., Mixtral of Experts (arXiv:2401.04088); tensor names of its checkpoints.
"""

from duquantpp_jax.models.families.base import ALL, Experts, Family, In

MIXTRAL = Family(
    "mixtral",
    only={**ALL, "attention_bias": False, "mlp_bias": False, "layer_types": None},
    defaults={"num_key_value_heads": 8, "rope_theta": 1e6, "max_position_embeddings": 131072},
    windows="all",
    experts=Experts(
        count="num_local_experts",
        width="intermediate_size",
        stored={
            "mlp.router.weight": In("block_sparse_moe.gate.weight"),
            "mlp.gate_proj.weight": In("block_sparse_moe.experts.*.w1.weight"),
            "mlp.down_proj.weight": In("block_sparse_moe.experts.*.w2.weight"),
            "mlp.up_proj.weight": In("block_sparse_moe.experts.*.w3.weight"),
        },
    ),
)
