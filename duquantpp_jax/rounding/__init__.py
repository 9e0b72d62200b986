"""How moved weights become numbers of their format: to nearest, searched, GPTQ, descent."""

from duquantpp_jax.rounding.asymmetric import Asymmetric
from duquantpp_jax.rounding.clip import SCALE, Search
from duquantpp_jax.rounding.descent import GPTQDescent
from duquantpp_jax.rounding.gptq import GPTQ
from duquantpp_jax.rounding.rtn import Rtn

__all__ = ["GPTQ", "SCALE", "Asymmetric", "GPTQDescent", "Rtn", "Search"]
