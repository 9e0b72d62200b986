"""The supported architectures, a file a family, by their name in `architectures` of config.json."""

from collections.abc import Mapping

from duquantpp_jax.models.families.base import Family, InGGUF
from duquantpp_jax.models.families.gemma3 import GEMMA3
from duquantpp_jax.models.families.gpt_oss import GPT_OSS
from duquantpp_jax.models.families.llama import LLAMA
from duquantpp_jax.models.families.mixtral import MIXTRAL
from duquantpp_jax.models.families.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "REFUSED", "Family", "InGGUF"]

FAMILIES: Mapping[str, Family] = {
    **LLAMA,
    **GEMMA3,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "GptOssForCausalLM": GPT_OSS,
}

_EXPERTS = "a mixture of experts that this decoder does not have"
REFUSED: Mapping[str, str] = {
    "moe": _EXPERTS,
    "gemma": "a Gemma with softcapping, or with layers, that this decoder does not have",
}
"""Why architectures are refused, by a part of their name."""
