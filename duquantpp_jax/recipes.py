"""The known methods, a line each. A new one is one file in transforms/ and one line here."""

import difflib
from collections.abc import Iterable

from duquantpp_jax.core import Fit, Format, Recipe, Rounding, ScaleRule
from duquantpp_jax.formats import MXFP4, FP32Scale, Log256
from duquantpp_jax.rounding.gptq import GPTQ
from duquantpp_jax.rounding.rtn import rtn
from duquantpp_jax.transforms.basic import FitIdentity, FitInTurn, FitSmooth
from duquantpp_jax.transforms.duquant import FitDuquantpp
from duquantpp_jax.transforms.hadamard import FitHadamard
from duquantpp_jax.transforms.wush import FitWush

_GREEDY = FitDuquantpp()
_RELEASED = FitDuquantpp(
    index="released",
    criterion="range",
    sharing="shared",
    fresh_q=False,
    q_side="right",
    averaged=True,
)

FITS: dict[str, Fit] = {
    "rtn": FitIdentity(),
    "block_hadamard": FitHadamard(),
    "random_hadamard": FitHadamard(random_signs=True),
    "smooth": FitSmooth(),
    "smooth_hadamard": FitInTurn((FitSmooth(), FitHadamard())),
    "greedy": _GREEDY,
    "greedy_mse": FitDuquantpp(criterion="mse"),
    "duquantpp": FitInTurn((FitSmooth(), _GREEDY)),
    "greedy_released": _RELEASED,
    "duquantpp_released": FitInTurn((FitSmooth(), _RELEASED)),
    "duquantpp_released_exact": FitInTurn((FitSmooth(weight_max="first", floor=1e-2), _RELEASED)),
    "wush": FitWush(),
}
"""How each named recipe is fitted; all are rounded by any of ROUNDINGS, in any format."""

ALIASES = {"identity": "rtn"}

ROUNDINGS: dict[str, Rounding] = {"rtn": rtn, "gptq": GPTQ()}

SCALE_RULES: dict[str, Format] = {
    **{rule.value: MXFP4(scale_rule=rule) for rule in ScaleRule},
    "log256": Log256(),
    "fp32": FP32Scale(),
}
"""E2M1 under every scale rule; `log256` and `fp32` are not MXFP4."""


def recipe(name: str, scale_rule: str, rounding: str = "rtn") -> Recipe:
    """W4A4 under one scale rule for both sides, by the names of this file.

    Raises:
      ValueError: An unknown name; says the nearest known one.
    """
    name = ALIASES.get(name, name)
    format = SCALE_RULES[known("scale rule", scale_rule, SCALE_RULES)]
    return Recipe(
        fit=FITS[known("recipe", name, [*FITS, *ALIASES])],
        rounding=ROUNDINGS[known("rounding", rounding, ROUNDINGS)],
        weight_format=format,
        activation_format=format,
    )


def known(kind: str, name: str, names: Iterable[str]) -> str:
    """`name`, if it is one of `names`.

    Raises:
      ValueError: It is not; says the nearest one, or all.
    """
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}"
    raise ValueError(f"unknown {kind} {name!r}: {hint}")
