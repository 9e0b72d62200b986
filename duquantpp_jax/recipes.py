"""The known methods, a line each. A new one is one file in transforms/ and one line here.

A fit from outside the package needs no line: `module:NAME` names it wherever a recipe is named.
"""

import difflib
import importlib
from collections.abc import Iterable
from typing import cast

from duquantpp_jax.core import Fit, Format, Recipe, Rounding, ScaleRule
from duquantpp_jax.formats import MXFP4, FP32Scale, Log256
from duquantpp_jax.learning.moves import Moves
from duquantpp_jax.learning.site import FitLearned
from duquantpp_jax.rounding.clip import SCALE, Search
from duquantpp_jax.rounding.descent import GPTQDescent
from duquantpp_jax.rounding.gptq import GPTQ
from duquantpp_jax.rounding.rtn import rtn
from duquantpp_jax.transforms.basic import FitIdentity, FitInTurn, FitSmooth
from duquantpp_jax.transforms.dct import FitDct
from duquantpp_jax.transforms.duquant import FitDuquantpp
from duquantpp_jax.transforms.haar import FitHaar
from duquantpp_jax.transforms.hadamard import FitHadamard
from duquantpp_jax.transforms.learned import Affine, Cayley
from duquantpp_jax.transforms.pca import FitPca
from duquantpp_jax.transforms.permutation import FitPermutation
from duquantpp_jax.transforms.wush import FitWush

_GREEDY = FitDuquantpp()
_RELEASED = FitDuquantpp(
    index="released",
    criterion="range",
    sharing="shared",
    fresh_q=False,
    q_side="right",
    averaged=True,
    polish=False,
)
_ROTATION = Moves(Cayley(), through_amax=True)
_AFFINE = Moves(Affine(), max_condition=16.0)
_SEARCH_128 = FitDuquantpp(size=128, fresh_q=False)

FITS: dict[str, Fit] = {
    "rtn": FitIdentity(),
    "block_hadamard": FitHadamard(),
    "random_hadamard": FitHadamard(random_signs=True),
    "hadamard_128": FitHadamard(size=128),
    "full_hadamard": FitHadamard(size=None),
    "random_full_hadamard": FitHadamard(size=None, random_signs=True),
    "gsr": FitHadamard(order="sequency"),
    "gsr_128": FitHadamard(order="sequency", size=128),
    "dct": FitDct(),
    "haar": FitHaar(),
    "smooth": FitSmooth(),
    "smooth_hadamard": FitInTurn((FitSmooth(), FitHadamard())),
    "greedy": _GREEDY,
    "greedy_mse": FitDuquantpp(criterion="mse"),
    "greedy_best_of_8": FitDuquantpp(seeds=8),
    "duquantpp": FitInTurn((FitSmooth(), _GREEDY)),
    "greedy_released": _RELEASED,
    "duquantpp_released": FitInTurn((FitSmooth(), _RELEASED)),
    "duquantpp_released_exact": FitInTurn((FitSmooth(weight_max="first", floor=1e-2), _RELEASED)),
    "duquant": FitInTurn((FitSmooth(), _SEARCH_128, FitPermutation("zigzag", 128), _SEARCH_128)),
    "zigzag_hadamard": FitInTurn((FitPermutation("zigzag"), FitHadamard())),
    "mass_hadamard": FitInTurn((FitPermutation("mass"), FitHadamard())),
    "permuted_hadamard": FitInTurn((FitPermutation("random"), FitHadamard())),
    "pca": FitPca(),
    "pca_hadamard": FitPca(hadamard=True),
    "wush": FitWush(),
    "wush_conditioned": FitWush(max_condition=10.0),
    "learned_rotation": FitLearned(_ROTATION, FitHadamard()),
    "learned_affine": FitLearned(_AFFINE, FitWush(max_condition=10.0), rate=3e-3),
}
"""How each named recipe is fitted; all are rounded by any of ROUNDINGS, in any format."""

ALIASES = {"identity": "rtn"}

ROUNDINGS: dict[str, Rounding] = {
    "rtn": rtn,
    "clip": Search(),
    "clip_row": Search(per="row"),
    "scale": SCALE,
    "gptq": GPTQ(),
    "gptq_clip": GPTQ(search=Search()),
    "gptq_scale": GPTQ(search=SCALE),
    "descent": GPTQDescent(),
}

SCALE_RULES: dict[str, Format] = {
    **{rule.value: MXFP4(scale_rule=rule) for rule in ScaleRule},
    "log256": Log256(),
    "fp32": FP32Scale(),
}
"""E2M1 under every scale rule; `log256` and `fp32` are not MXFP4."""


def recipe(name: str, scale_rule: str, rounding: str = "rtn") -> Recipe:
    """W4A4 under one scale rule for both sides, by the names of this file.

    Args:
      name: Of FITS or ALIASES, or `module:NAME` for a fit that a module of yours holds.

    Raises:
      ValueError: An unknown name; says the nearest known one.
    """
    format = SCALE_RULES[known("scale rule", scale_rule, SCALE_RULES)]
    return Recipe(
        fit=find_fit(name),
        rounding=ROUNDINGS[known("rounding", rounding, ROUNDINGS)],
        weight_format=format,
        activation_format=format,
    )


def find_fit(name: str) -> Fit:
    """The fit of this name: of FITS or ALIASES, or `module:NAME`, which imports the module.

    Raises:
      ValueError: There is none.
    """
    if ":" not in name:
        return FITS[ALIASES.get(name, known("recipe", name, [*FITS, *ALIASES]))]
    module, _, attribute = name.partition(":")
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever a module of the user's may raise
        raise ValueError(
            f"recipe {name!r}: cannot import {module} ({type(error).__name__}: {error}): "
            "is it installed, or its directory in PYTHONPATH?"
        ) from error
    fit = getattr(imported, attribute, None)
    if not callable(fit):
        raise ValueError(
            f"recipe {name!r}: module {module} has no fit {attribute} "
            "(called as fit(weights, stats, recipe, key))"
        )
    return cast(Fit, fit)


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
