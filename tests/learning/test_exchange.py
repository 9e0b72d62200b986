"""The state of learning goes to orbax and back to the same bytes."""

import numpy as np
import pytest

from duquantpp_jax import files
from duquantpp_jax.learning.exchange import from_orbax, to_orbax

TENSORS = {".step": np.int32(3), ".learned['mlp_in'].w[0]": np.arange(6, dtype=np.float32)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_a_state_comes_back_from_orbax_to_the_same_bytes(tmp_path):
    files.write_tensors(tmp_path / "state", TENSORS, {"format": "x", "pace": "3 steps"})
    to_orbax(tmp_path / "state", tmp_path / "orbax")
    from_orbax(tmp_path / "orbax", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "state").read_bytes()
    with pytest.raises(ValueError, match="give a directory that to_orbax wrote"):
        from_orbax(tmp_path / "nothing", tmp_path / "other")
