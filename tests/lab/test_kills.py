"""A sweep killed at any moments ends as an undisturbed one: nothing lost, nothing done twice."""

import collections
import json
import os
import subprocess
import sys

import pytest

from duquantpp_jax.checkpoints import save
from tests.conftest import byte_tokenizer, tiny_decoder
from tests.lab import sweeps

KILLS = 9
"""Three of each kind, see sweeps.py."""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="sweeps are forked")
def test_a_sweep_killed_nine_times_ends_as_an_undisturbed_one(tiny_text, tmp_path):
    save(tiny_decoder(num_hidden_layers=1), byte_tokenizer().to_str(), tmp_path / "model")
    # Programs are compiled once, by the first sweep, and read from a cache after that.
    compiled = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    run = [str(tmp_path / "model"), str(tiny_text), str(tmp_path), str(KILLS), "0"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.lab.sweeps", *run],
        env=os.environ | compiled,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["status"] == 0
    assert seen["rewritten"] == 0
    # The kills hit: some found cells under way, and the sweep went on between them.
    assert sum(count > 0 for count in seen["held"]) >= KILLS // 4
    assert 0 < seen["done"][-1] < len(sweeps.grid(tmp_path / "model", tiny_text))

    times = collections.Counter((tmp_path / "log").read_text().split())
    assert max(times.values()) == 1
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    assert not list((killed / ".claims").glob("*.0"))
    for cell in sweeps.grid(tmp_path / "model", tiny_text):
        records = [
            json.loads((place / f"{cell.digest}.json").read_text())
            for place in (killed, undisturbed)
        ]
        for record in records:
            del record["seconds"], record["sha256"]  # the latter is of the former, too
        assert records[0] == records[1]
