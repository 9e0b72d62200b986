"""Names of recipes, and the settings that papers and released code fix."""

import pytest

from duquantpp_jax import MXFP4, ScaleRule
from duquantpp_jax.formats import MXFP8, NVFP4, FP32Scale
from duquantpp_jax.formats.plain import BFloat16
from duquantpp_jax.recipes import (
    ALIASES,
    ELSEWHERE,
    FITS,
    FORMATS,
    ROUNDINGS,
    RULES,
    find_format,
    format_name,
    recipe,
    under_rule,
)
from duquantpp_jax.transforms.basic import FitSmooth
from duquantpp_jax.transforms.duquant import FitDuquantpp


@pytest.mark.parametrize("name", [*FITS, *ALIASES])
def test_every_name_makes_a_hashable_recipe(name):
    for format in (*RULES, *FORMATS):
        method = recipe(name, "mxfp4", activation_format=format)
        assert hash(method) == hash(recipe(name, activation_format=find_format(format)))


def test_scale_rules_belong_to_the_mx_formats_and_a_rule_alone_is_mxfp4s():
    for rule in ScaleRule:
        assert find_format(rule.value) == find_format(f"mxfp4:{rule.value}")
        assert recipe("rtn", rule.value).activation_format == MXFP4(scale_rule=rule)
        assert find_format(f"mxfp8:{rule.value}") == MXFP8(scale_rule=rule)


def test_sides_may_differ_in_format_and_in_scale_rule():
    method = recipe("rtn", "floor", weight_format="even", activation_format="mxfp8:rceil")
    assert method.weight_format == MXFP4(scale_rule=ScaleRule.EVEN)
    assert method.activation_format == MXFP8(scale_rule=ScaleRule.RCEIL)
    assert recipe("rtn", "floor", weight_format="even").activation_format == MXFP4()
    assert recipe("rtn", activation_format=BFloat16()).activation_format == BFloat16()


def test_every_format_has_one_name_in_full_which_finds_it():
    full = [format_name(name) for name in FORMATS]
    assert len(set(full)) == len(full)
    for name in (*full, *RULES):
        assert format_name(find_format(name)) == format_name(name)
    assert format_name("mxfp4") == format_name("floor") == format_name(MXFP4()) == "mxfp4:floor"
    assert format_name(NVFP4()) == "nvfp4"
    assert "block_size=16" in format_name(MXFP4(block_size=16))


@pytest.mark.parametrize(
    ("name", "rule", "full"),
    [
        ("mxfp4", "even", "mxfp4:even"),
        ("mxfp8_e5m2", "even", "mxfp8_e5m2:even"),
        ("mxfp8:ceil", "even", "mxfp8:ceil"),
        ("floor", "even", "floor"),
        ("nvfp4", "even", "nvfp4"),
        ("mxfp4", "log256", "log256"),
    ],
)
def test_a_scale_rule_holds_where_the_name_leaves_it_open(name, rule, full):
    assert under_rule(name, rule) == full


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mxfp5", "unknown format 'mxfp5': did you mean mxfp"),
        ("mxfp5:even", "unknown format 'mxfp5': did you mean mxfp"),
        ("nvfp4:even", "nvfp4 has no scale rule 'even': mxfp4, .* have the rules floor, ceil"),
        ("mxfp4:evn", "mxfp4 has no scale rule 'evn': mxfp4, .* have the rules floor, ceil, even"),
        ("nowhere:even_more", "format 'nowhere:even_more': cannot import nowhere"),
        ("math:pi", "module math has no format pi .an instance of"),
    ],
)
def test_a_format_that_there_is_not_is_refused(name, says):
    with pytest.raises(ValueError, match=says):
        find_format(name)


def test_bf16_is_refused_for_weights():
    with pytest.raises(ValueError, match=r"BFloat16 stores no weights: .* activations only"):
        recipe("rtn", "bf16")


@pytest.mark.parametrize("make", [MXFP4, MXFP8, NVFP4, FP32Scale])
def test_a_name_where_an_enumeration_is_meant_works_or_is_refused(make):
    assert make(rounding="away") == make(rounding=find_format("floor").rounding.AWAY)
    with pytest.raises(ValueError, match="'up' is no ElementRounding: choose one of nearest_even"):
        make(rounding="up")
    if hasattr(make, "scale_rule"):
        assert make(scale_rule="even") == make(scale_rule=ScaleRule.EVEN)
        with pytest.raises(ValueError, match="'evn' is no ScaleRule: choose one of floor"):
            make(scale_rule="evn")


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
        ("hadamard", "floor", "rtn", "'hadamard': did you mean block_hadamard"),
        ("hadamrd:shared", "floor", "rtn", "'hadamrd': did you mean block_hadamard"),
        ("DuQuant++", "floor", "rtn", "did you mean duquantpp[?]"),
        ("DuQuant", "floor", "rtn", "did you mean duquant[?]"),
        ("QuaRot", "floor", "rtn", "did you mean full_hadamard"),
        ("Smooth-Quant", "floor", "rtn", "did you mean smooth[?]"),
        ("rtn", "MXFP4", "rtn", "did you mean mxfp4[?]"),
        ("rtn", "floor", "GTPQ", "did you mean gptq[?]"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, rule, rounding, says):
    with pytest.raises(ValueError, match=says):
        recipe(name, rule, rounding)


def test_names_that_others_use_lead_to_names_that_are_known():
    assert set(ELSEWHERE.values()) <= {*FITS, *ROUNDINGS, *FORMATS}
    assert not set(ELSEWHERE) & {*FITS, *ROUNDINGS, *FORMATS}
