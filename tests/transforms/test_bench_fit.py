"""The benchmark of fits runs at toy size, and its loop finds what the fit finds."""

import re
import sys

import jax
import numpy as np
import pytest

from experiments import bench_fit


@pytest.mark.slow
def test_the_plain_loop_finds_the_rotations_of_the_fit():
    *_, fitted = bench_fit.fit_seconds(64, 64, 8)
    rotations = np.asarray(bench_fit.mixed_rotations(jax.random.key(bench_fit.SEED), 8, 32, "left"))
    tokens = np.asarray(bench_fit.tokens_of(64, 64))
    for block in (0, 1):
        found = bench_fit.plain(tokens[:, 32 * block : 32 * block + 32], rotations)
        np.testing.assert_allclose(found, fitted[block], atol=1e-5)


@pytest.mark.slow
def test_it_prints_the_ratio_the_layers_and_the_growth(monkeypatch, capsys):
    options = "--widths 64 64 256 --tokens 64 --steps 8 --plain-blocks 1"
    monkeypatch.setattr(sys, "argv", ["bench_fit", *options.split()])
    bench_fit.main()
    said = capsys.readouterr().out
    assert "one layer, 12 blocks: " in said
    assert re.search(r"loop in NumPy: .* times as long", said)
    assert [line.split(":")[0] for line in said.splitlines()[-3:]] == [
        f"{name} x 4" for name in ("width", "tokens", "steps")
    ]


def test_a_loop_that_finds_something_else_is_an_error():
    wrong = np.tile(np.eye(32, dtype=np.float32), (2, 1, 1))
    with pytest.raises(AssertionError, match="block 0: the loop ends at"):
        bench_fit.plain_seconds(64, 64, 8, 2, wrong)
