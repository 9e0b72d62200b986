"""Names of recipes, and the settings that papers and released code fix."""

import pytest

from duquantpp_jax import MXFP4, ScaleRule
from duquantpp_jax.recipes import ALIASES, FITS, SCALE_RULES, recipe
from duquantpp_jax.transforms.basic import FitSmooth
from duquantpp_jax.transforms.duquant import FitDuquantpp


@pytest.mark.parametrize("name", [*FITS, *ALIASES])
@pytest.mark.parametrize("rule", sorted(SCALE_RULES))
def test_every_name_makes_a_hashable_recipe(name, rule):
    assert hash(recipe(name, rule)) == hash(recipe(name, rule))


def test_scale_rules_of_mxfp4_are_those_of_the_format():
    for rule in ScaleRule:
        assert recipe("rtn", rule.value).activation_format == MXFP4(scale_rule=rule)


def test_the_identity_is_an_alias_of_rtn():
    assert recipe("identity", "floor") == recipe("rtn", "floor")


def test_the_released_setting_is_that_of_the_released_code():
    smooth, greedy = FITS["duquantpp_released"].fits
    assert smooth == FitSmooth(alpha=0.6, weight_max="all", floor=1e-5)
    assert greedy == FitDuquantpp(
        index="released",
        criterion="range",
        sharing="shared",
        fresh_q=False,
        q_side="right",
        averaged=True,
        steps=128,
        size=32,
        polish=False,
    )
    exact, same = FITS["duquantpp_released_exact"].fits
    assert same == greedy
    assert exact == FitSmooth(alpha=0.6, weight_max="first", floor=1e-2)


def test_the_papers_setting_is_that_of_the_text():
    smooth, greedy = FITS["duquantpp"].fits
    assert smooth == FitSmooth(alpha=0.6)
    assert greedy == FitDuquantpp(
        index="channel",
        criterion="absmax",
        sharing="per_block",
        fresh_q=True,
        q_side="left",
        averaged=False,
        steps=128,
    )


@pytest.mark.parametrize(
    ("name", "rule", "rounding", "says"),
    [
        ("hadamrd", "floor", "rtn", "unknown recipe 'hadamrd'"),
        ("rtn", "rcel", "rtn", "did you mean rceil"),
        ("rtn", "floor", "nearest", "unknown rounding 'nearest': choose one of"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, rule, rounding, says):
    with pytest.raises(ValueError, match=says):
        recipe(name, rule, rounding)
