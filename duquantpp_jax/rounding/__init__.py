"""How moved weights become numbers of their format: to nearest, searched, GPTQ, descent.

>>> import jax.numpy as jnp, numpy as np
>>> from duquantpp_jax import MXFP4, Needs, Stats
>>> x, w = np.random.default_rng(0).standard_normal((2, 64, 64), np.float32)
>>> stats = Stats.init(64, 1, 64, needs=Needs.GRAM).update(jnp.asarray(x[None]), jnp.int32(0))
>>> for rounding in (Rtn(), SCALE, GPTQ(damping=0.01)):
...     error = w - np.asarray(rounding(jnp.asarray(w), MXFP4(), stats).dequantize())
...     print(f"{np.linalg.norm(x @ error.T) / np.linalg.norm(x @ w.T):.2f}")
0.11
0.11
0.08
>>> Search(per="row").needs, GPTQDescent(passes=1).needs, Asymmetric(rounding=GPTQ()).needs
(<Needs.NOTHING: 0>, <Needs.GRAM: 1>, <Needs.GRAM|CROSS: 9>)
"""

from duquantpp_jax.rounding.asymmetric import Asymmetric
from duquantpp_jax.rounding.clip import SCALE, Search
from duquantpp_jax.rounding.descent import GPTQDescent
from duquantpp_jax.rounding.gptq import GPTQ
from duquantpp_jax.rounding.rtn import Rtn

__all__ = ["GPTQ", "SCALE", "Asymmetric", "GPTQDescent", "Rtn", "Search"]
