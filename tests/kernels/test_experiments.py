"""The experiments about kernels run as their docstrings say, at toy size."""

import dataclasses
import json
import sys

import pytest

from duquantpp_jax.kernels import proof, target
from duquantpp_jax.kernels.rotate_quantize import cases as rotations
from duquantpp_jax.kernels.scaled_matmul import cases as matmuls
from experiments import bench_blackwell, roofline

SQUARE = next(case for case in matmuls.PROOF if case.label == "square")
FIELDS = dataclasses.fields(proof.Record)
ACTIVATIONS = rotations.Case(16384, 8192)


def record(kernel: str, case, **counts) -> proof.Record:
    """A record of the size that the kernels have; tests with wheels use what was compiled."""
    loops = {
        "load": {"UTMALDG": 4, "UMOV": 120},
        "multiply": {"UTCOMMA": 16, "UMOV": 330},
        "write": {"LDTM": 16, "F2FP": 128, "STSM": 220},
    }
    empty = {"int": 0, "float": 0.0, "str": ""}
    fields = {f.name: empty.get(getattr(f.type, "__name__", str(f.type)), {}) for f in FIELDS}
    fields |= {"kernel": kernel, "case": case.name, "label": case.label, "found": 16, "ctas": 148}
    return proof.Record(**fields | {"loops": loops, "failures": []} | counts)


def test_the_square_matmul_is_predicted_above_nine_tenths_of_the_tensor_cores():
    prediction = roofline.predict_matmul(SQUARE, record("scaled_matmul", SQUARE))
    assert prediction.of == prediction.bound == "tensor cores"
    assert 0.9 < prediction.share < 1
    assert prediction.share_with_fills < 0.9  # and the table says so
    assert abs(prediction.share - 1 + sum(prediction.loses.values())) < 0.01


def test_the_prediction_knows_what_a_slow_part_costs():
    case = SQUARE
    fast = roofline.predict_matmul(case, record("scaled_matmul", case))
    loops = {"load": {}, "multiply": {"UMOV": 8000}, "write": {}}
    slow = roofline.predict_matmul(case, record("scaled_matmul", case, loops=loops))
    assert slow.bound == "multiplying warp"
    assert slow.seconds > 2 * fast.seconds
    narrow = dataclasses.replace(case, m=1, tiling=None)
    assert roofline.predict_matmul(narrow, record("scaled_matmul", narrow)).bound == "DRAM"


def test_rotation_is_predicted_above_nine_tenths_of_a_copy():
    prediction = roofline.predict_rotation(ACTIVATIONS, record("rotate_quantize", ACTIVATIONS))
    assert prediction.bound == "DRAM"
    assert prediction.share_of_copy is not None
    assert 0.9 < prediction.share_of_copy < 1
    assert prediction.share < 0.9  # of the data sheet's 8 TB/s, which copies do not reach either


def test_the_clock_follows_from_the_data_sheet():
    assert 1.8e9 < roofline.CLOCK < 1.965e9


@pytest.mark.skipif(bool(target.missing_wheels()), reason="no wheels of the extra blackwell")
@pytest.mark.parametrize("json_wanted", [False, True])
def test_the_roofline_runs(monkeypatch, capsys, json_wanted):
    monkeypatch.setattr(
        sys, "argv", ["roofline", "--only", "128x4096", *(["--json"] if json_wanted else [])]
    )
    assert roofline.main() == 0
    out = capsys.readouterr().out
    if json_wanted:
        assert {row["kernel"] for row in json.loads(out)} == {"scaled_matmul", "rotate_quantize"}
    else:
        assert "NOT VALIDATED" in out


@pytest.mark.slow
def test_the_benchmark_rehearses_and_writes_its_file(monkeypatch, tmp_path, capsys):
    place = tmp_path / "bench.json"
    monkeypatch.setattr(
        sys, "argv", ["bench", "--rehearse", "--only", "one token", "--out", str(place)]
    )
    assert bench_blackwell.main() == 0
    report = json.loads(place.read_text())
    assert [case["kernel"] for case in report["cases"]] == ["scaled_matmul", "rotate_quantize"]
    assert all(case["result"]["right"] for case in report["cases"])
    assert "2 cases, 0 wrong" in capsys.readouterr().out


def test_the_benchmark_says_when_there_is_no_blackwell(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert bench_blackwell.main() == 2
    assert "compute capability 10.x" in capsys.readouterr().out
