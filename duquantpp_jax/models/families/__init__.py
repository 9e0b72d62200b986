"""The supported architectures, a file a family, by their name in `architectures` of config.json."""

from collections.abc import Mapping

from duquantpp_jax.models.families.base import Family, InGGUF
from duquantpp_jax.models.families.gemma3 import GEMMA3
from duquantpp_jax.models.families.llama import LLAMA

__all__ = ["FAMILIES", "REFUSED", "Family", "InGGUF"]

FAMILIES: Mapping[str, Family] = {**LLAMA, **GEMMA3}

_EXPERTS = "a mixture of experts, each of which sees only the tokens routed to it"
REFUSED: Mapping[str, str] = {
    "moe": _EXPERTS,
    "mixtral": _EXPERTS,
    "gemma": "a Gemma with softcapping, or with layers, that this decoder does not have",
}
"""Why architectures are refused, by a part of their name."""
