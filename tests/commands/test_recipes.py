"""`duquantpp recipes` lists whatever the registry has, each with a line, a cost and a source."""

import json

import pytest

from duquantpp_jax import cli
from duquantpp_jax.commands.recipes import KINDS, cost, line, source
from duquantpp_jax.recipes import FITS, FORMATS, ROUNDINGS
from duquantpp_jax.transforms.basic import FitInTurn
from duquantpp_jax.transforms.hadamard import FitHadamard
from duquantpp_jax.transforms.wush import FitWush


def test_every_name_has_a_line_a_cost_and_a_source(capsys):
    assert cli.main(["recipes", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {kind: [row["name"] for row in rows] for kind, rows in printed.items()} == {
        "recipes": [*FITS],
        "roundings": [*ROUNDINGS],
        "formats": [*FORMATS],
    }
    for rows in printed.values():
        assert [row["name"] for row in rows if not all(row.values())] == []
        lines = [row["line"] for row in rows]
        assert len(set(lines)) == len(lines)


def test_the_table_names_all(capsys):
    assert cli.main(["recipes"]) == 0
    words = capsys.readouterr().out.split()
    assert {name for values in KINDS.values() for name in values} <= set(words)


def test_a_line_has_the_settings_that_are_not_the_defaults_and_all_fits_in_turn():
    assert "(" not in line(FitHadamard())
    assert line(FitHadamard(size=64)).endswith("(size=64).")
    both = line(FitInTurn((FitHadamard(size=64), FitWush())))
    assert both == f"{line(FitHadamard(size=64))} {line(FitWush())}"
    assert "element=e3m2" in line(FORMATS["mxfp6_e3m2"])


def test_costs_are_what_is_declared():
    assert "Gram" in cost(FitWush())
    assert "Gram" not in cost(FitHadamard())
    assert "random" in cost(FitHadamard(random_signs=True))
    assert "100 steps" in cost(FITS["learned_affine"])


@pytest.mark.parametrize(
    ("name", "bits"), [("mxfp4", 4.25), ("mxfp6", 6.25), ("nvfp4", 4.5), ("fp32", 5), ("bf16", 16)]
)
def test_bits_of_a_number_are_those_of_its_element_and_of_its_share_of_the_scale(name, bits):
    assert cost(FORMATS[name]) == f"{bits} bits a number"


def test_sources_are_those_of_the_parts():
    assert "2604.17789" in source(FITS["duquantpp"])
    assert "2306.00978" in source(ROUNDINGS["gptq_clip"])
    assert "2306.00978" not in source(ROUNDINGS["gptq"])
