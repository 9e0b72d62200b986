"""What --mesh takes; tests/evaluation/sharded.py runs models on meshes of eight devices."""

import pytest

from duquantpp_jax.ptq.sharding import mesh_of


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
