"""The known fits, roundings and formats, a line each. A new one is one file and one line here.

NAME:shared is the fit NAME with a single matrix for all blocks of a site, which is all that serving
programs hold (docs/serving.md). What is outside the package needs no line: `module:NAME` names a
fit, a rounding or a format wherever one is named. A name that a file says imports nothing:
`import_modules` first.
"""

import dataclasses
import difflib
import importlib
import re
import sys
from collections.abc import Iterable
from typing import Any

import jax

from duquantpp_jax import formats
from duquantpp_jax.core import Fit, Format, Needs, Recipe, Rounding, ScaleRule, shared
from duquantpp_jax.formats.plain import BFloat16
from duquantpp_jax.learning.moves import Moves
from duquantpp_jax.learning.site import FitLearned
from duquantpp_jax.rounding import GPTQ, SCALE, Asymmetric, GPTQDescent, Rtn, Search
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
    "learned_rotation": FitLearned(Moves(Cayley(), through_amax=True), FitHadamard()),
    "learned_affine": FitLearned(_AFFINE, FitWush(max_condition=10.0), rate=3e-3),
}
"""How each named recipe is fitted; all are rounded by any of ROUNDINGS, in any format."""

ALIASES = {"identity": "rtn"}

ELSEWHERE = {
    "hadamard": "block_hadamard",
    "quarot": "full_hadamard",
    "smoothquant": "smooth",
    "spinquant": "learned_rotation",
    "flatquant": "learned_affine",
    "bfloat16": "bf16",
}
"""Names that others use; an error suggests the nearest one that is known here."""

SHARED = ":shared"

ROUNDINGS: dict[str, Rounding] = {
    "rtn": Rtn(),
    "clip": Search(),
    "clip_row": Search(per="row"),
    "scale": SCALE,
    "gptq": GPTQ(),
    "gptq_clip": GPTQ(search=Search()),
    "gptq_scale": GPTQ(search=SCALE),
    "descent": GPTQDescent(),
    "asymmetric": Asymmetric(),
    "asymmetric_descent": Asymmetric(rounding=GPTQDescent()),
}

FORMATS: dict[str, Format] = {
    "mxfp4": formats.MXFP4(),
    "mxfp6": formats.MXFP6(),
    "mxfp6_e3m2": formats.MXFP6(formats.E3M2),
    "mxfp8": formats.MXFP8(),
    "mxfp8_e5m2": formats.MXFP8(formats.E5M2),
    "nvfp4": formats.NVFP4(),
    "nvfp4_four_over_six": formats.NVFP4(four_over_six=True),
    "nvfp4_calibrated": formats.NVFP4(calibrated=True),
    "log256": formats.Log256(),
    "fp32": formats.FP32Scale(),
    "fpquant": formats.FPQuant(),
    "quest": formats.Quest(),
    "bf16": BFloat16(),
}
"""How numbers are rounded. MX formats are under FLOOR here; `NAME:RULE` names another rule."""

RULES = tuple(rule.value for rule in ScaleRule)
"""The scale rules of MX formats; each alone is short for `mxfp4:RULE`."""


def recipe(
    name: str | Fit,
    format: str | Format = "mxfp4",
    rounding: str | Rounding = "rtn",
    *,
    weight_format: str | Format | None = None,
    activation_format: str | Format | None = None,
) -> Recipe:
    """A whole method, by the names of this file or by the objects that they stand for.

    Names are those of `find_fit`, `find_format` and `find_rounding`.

    >>> method = recipe("duquantpp", "mxfp4:even", "gptq", activation_format="mxfp8")
    >>> method.rounding, method.activation_format.element.name
    (GPTQ(damping=0.01, search=None), 'e4m3')

    Args:
      format: Of both sides.
      weight_format, activation_format: Each, where given, in place of `format`.

    Raises:
      ValueError: An unknown name, or a format that stores no weights as the weights' format.
    """
    sides = (weight_format or format, activation_format or format)
    return Recipe(
        find_fit(name) if isinstance(name, str) else name,
        find_rounding(rounding) if isinstance(rounding, str) else rounding,
        *(side if isinstance(side, Format) else find_format(side) for side in sides),
    )


def fake_quantize(
    x: Any, format: str | Format, axis: int = -1, pad: bool = False, **options: Any
) -> Any:
    """`Format.fake_quantize` of every array of a pytree: the numbers of a format, in x's types.

    >>> import jax.numpy as jnp
    >>> weights = {"kernel": jnp.ones((32, 8), jnp.bfloat16), "bias": jnp.ones(8)}
    >>> rounded = fake_quantize(weights, "mxfp4:even", axis=0, pad=True)
    >>> rounded["kernel"].shape, rounded["kernel"].dtype.name
    ((32, 8), 'bfloat16')

    Args:
      x: An array, or a pytree of them.
      format: Or its name, as in `find_format`.
      axis, pad, options: As in `Format.fake_quantize`.
    """
    found = find_format(format) if isinstance(format, str) else format
    return jax.tree.map(lambda a: found.fake_quantize(a, axis=axis, pad=pad, **options), x)


def find_fit(name: str) -> Fit:
    """The fit of a name of FITS or ALIASES, or of `module:NAME`, or of such a name and `:shared`;
    ValueError if there is none.

    >>> find_fit("block_hadamard").size, find_fit("pca:shared").sharing
    (32, 'shared')
    """
    if name.endswith(SHARED):
        return shared(find_fit(name.removesuffix(SHARED)))
    if ":" not in name:
        return FITS[ALIASES.get(name, known("recipe", name, [*FITS, *ALIASES]))]
    return _outside("recipe", name, Fit, "called as fit(weights, stats, recipe, key)")


def find_rounding(name: str) -> Rounding:
    """The rounding of a name of ROUNDINGS, or of `module:NAME`; ValueError if there is none.

    >>> find_rounding("gptq").damping
    0.01
    """
    if ":" not in name:
        return ROUNDINGS[known("rounding", name, ROUNDINGS)]
    return _outside("rounding", name, Rounding, "called as rounding(weight, format, stats)")


def find_format(name: str, *, imports: bool = True) -> Format:
    """The format of this name.

    >>> find_format("mxfp8:even").block_size, find_format("even") == find_format("mxfp4:even")
    (32, True)

    Args:
      name: Of FORMATS; of FORMATS with a scale rule, `mxfp8:even`; a rule of RULES alone, which is
        that of mxfp4; or `module:NAME`, which imports the module.
      imports: Whether it may; not for a name that a file says.

    Raises:
      ValueError: There is none, or the format has no such scale rule.
    """
    if name in RULES:
        name = f"mxfp4:{name}"
    base, colon, rule = name.partition(":")
    if not colon:
        return FORMATS[known("format", name, [*FORMATS, *RULES])]
    if base not in FORMATS and rule not in RULES:
        if not imports and base not in sys.modules:
            raise ValueError(f"the format {name} is not known here: give --import {base}")
        return _outside("format", name, Format, "an instance of duquantpp_jax.core.Format")
    format = FORMATS[known("format", base, FORMATS)]
    if not isinstance(format, formats.MX) or rule not in RULES:
        have = ", ".join(key for key, value in FORMATS.items() if isinstance(value, formats.MX))
        rules = f"{have} have the rules {', '.join(RULES)}"
        raise ValueError(f"{base} has no scale rule {rule!r}: {rules}")
    return dataclasses.replace(format, scale_rule=ScaleRule(rule))


def format_name(format: str | Format) -> str:
    """The name of a format in full: `mxfp4:floor` for `mxfp4`, for `floor` and for MXFP4().

    >>> format_name("floor"), format_name(formats.NVFP4())
    ('mxfp4:floor', 'nvfp4')

    Returns:
      A name that `find_format` knows; for an object that no name stands for, its repr.

    Raises:
      ValueError: An unknown name.
    """
    found = find_format(format) if isinstance(format, str) else format
    for name, value in FORMATS.items():
        if isinstance(found, formats.MX) and isinstance(value, formats.MX):
            if found == dataclasses.replace(value, scale_rule=found.scale_rule):
                return f"{name}:{found.scale_rule.value}"
        elif found == value:
            return name
    return format if isinstance(format, str) else repr(format)


def under_rule(name: str, rule: str) -> str:
    """The name of a format under a scale rule.

    >>> under_rule("mxfp8", "even"), under_rule("nvfp4", "even")
    ('mxfp8:even', 'nvfp4')

    Args:
      name: As in `find_format`. One that names a rule itself, or has none to choose, stays.
      rule: Of RULES. For mxfp4 also a whole format, such as log256.

    Raises:
      ValueError: An unknown name, or a rule that the format has not.
    """
    if ":" in name or name in RULES or not isinstance(find_format(name), formats.MX):
        return name
    return format_name(rule if name == "mxfp4" else f"{name}:{rule}")


def _outside(kind: str, name: str, noun: type, about: str) -> Any:
    """What `module:NAME` names, an instance of the type or protocol; imports the module."""
    module, _, attribute = name.partition(":")
    found = getattr(_imported(module, f"{kind} {name!r}"), attribute, None)
    right = isinstance(found, noun) and not isinstance(found, type)
    if noun is not Format and callable(found) and not (right and isinstance(found.needs, Needs)):
        raise ValueError(
            f"{kind} {name!r} does not say what it needs: give it an attribute needs = "
            "Needs.NOTHING, or what it reads of Stats, of duquantpp_jax.core.Needs"
        )
    if not right:
        what = f"{noun.__name__.lower()} {attribute} ({about})"
        raise ValueError(f"{kind} {name!r}: module {module} has no {what}")
    return found


def import_modules(names: Iterable[str]) -> None:
    """Imports modules, whose transforms and formats can be read from files from then on; ValueError
    if one cannot be imported.

    >>> import_modules(["duquantpp_jax.transforms"])
    """
    for name in names:
        _imported(name, f"--import {name}")


def _imported(module: str, wanted: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a module of the user's may raise
        raise ValueError(
            f"{wanted}: cannot import {module} ({type(error).__name__}: {error}): "
            "is it installed, or its directory in PYTHONPATH?"
        ) from error


def checked_seed(seed: int) -> int:
    """A seed, if jax.random.key tells it from all others; else ValueError.

    >>> checked_seed(7)
    7
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed {seed}: give a whole number from 0 to {2**32 - 1}")
    return seed


def known(kind: str, name: str, names: Iterable[str]) -> str:
    """`name`, if it is one of `names`; else ValueError, which says what was meant, or all.

    >>> known("recipe", "DuQuant++", FITS)
    Traceback (most recent call last):
    ValueError: unknown recipe 'DuQuant++': did you mean duquantpp?
    """
    names = list(names)
    if name in names:
        return name
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower().replace("+", "p")).strip("_")
    meant = {other: ours for other, ours in ELSEWHERE.items() if ours in names}
    meant |= dict(zip(names, names, strict=True))
    near = difflib.get_close_matches(plain, meant, n=1)
    longer = [ours for ours in names if ours.startswith(f"{name}, ")]  # of a table
    shown = map(repr if any("," in ours for ours in names) else str, names)
    hint = f"did you mean {meant[near[0]]}?" if near else f"choose one of {', '.join(shown)}"
    if longer:
        hint = f"did you mean {' or '.join(map(repr, longer))}?"
    raise ValueError(f"unknown {kind} {name!r}: {hint}")
