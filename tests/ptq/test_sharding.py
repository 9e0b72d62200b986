"""What --mesh takes; tests/evaluation/sharded.py runs models on meshes of eight devices."""

import jax
import numpy as np
import pytest

from duquantpp_jax.formats import MXFP4
from duquantpp_jax.models import dense
from duquantpp_jax.ptq.sharding import cut, host_memory, mesh_of
from duquantpp_jax.ptq.site import QuantizedSite
from duquantpp_jax.transforms.basic import Identity
from tests.conftest import tiny_decoder


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ("model", "--mesh model: give data=N, model=N or both, as in data=2,model=4"),
        ("rows=2", "give data=N, model=N or both"),
        ("model=0", "give data=N, model=N or both"),
        ("model=1,model=1", "give data=N, model=N or both"),
        ("data=1,model=99", "asks for 99 devices and there are 1: give sizes whose product is"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, says):
    with pytest.raises(ValueError, match=says):
        mesh_of(sizes)


def test_on_a_mesh_of_one_device_a_model_is_what_it_was():
    mesh, model = mesh_of("model=1"), tiny_decoder()
    weights = tuple(MXFP4().quantize(w) for w in model.weights("mlp_in"))
    state = {"mlp_in": QuantizedSite(Identity(), weights), "mlp_out": None}
    with host_memory(mesh):
        moved = cut(mesh, model, dense, state)
    given = jax.tree.leaves((model, state))
    for before, after in zip(given, jax.tree.leaves((moved[0], moved[2])), strict=True):
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
        assert after.sharding.mesh == mesh
    assert (moved[1].linear, moved[1].parts) == (dense, ("mlp_in", "attention_in"))
