"""Transforms come back from arrays and from files bit for bit, and bad files are refused."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from safetensors.numpy import save_file

from duquantpp_jax.core import Chain, Fitted, Transform
from duquantpp_jax.files import write_tensors
from duquantpp_jax.transforms import storage
from duquantpp_jax.transforms.basic import Identity, Smooth
from duquantpp_jax.transforms.block import lower
from tests.transforms.test_law import TRANSFORMS, single


@struct.dataclass
class Scaled(Transform):
    """A transform from outside the package: with a static field and arrays in a tuple."""

    factors: tuple[jax.Array, ...]
    power: int = struct.field(pytree_node=False)

    def activations(self, x):
        return x * self.factors[0] ** self.power

    def weights(self, w):
        return w / self.factors[0] ** self.power

    def inverse(self):
        return Scaled(self.factors, -self.power)


def _made(name):
    return single(TRANSFORMS[name](np.random.default_rng(0)))


def _cases():
    singles = {name: _made(name) for name in TRANSFORMS}
    nested = Chain((Chain((singles["smooth"], Identity())), *singles.values()))
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), nested)
    odd = Smooth(jnp.asarray([jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32))
    return singles | {
        "nested chain": nested,
        "stacked over layers": stacked,
        "bits of odd floats": odd,
        "lowered": lower(singles["smooth"], 64, 32),
        "from outside": Scaled((jnp.arange(1.0, 5.0), jnp.int8(3)), power=-2),
        "fitted": Fitted(singles["smooth"], weights=(jnp.ones((2, 4)),), clip=jnp.ones(2)),
        "half precision": Smooth(jnp.ones(4, jnp.bfloat16)),
    }


CASES = _cases()


def _same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for mine, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("name", sorted(CASES))
def test_arrays_and_structure_give_the_transform_back_bit_for_bit(name):
    arrays, structure = storage.to_arrays(CASES[name])
    _same(storage.from_arrays(arrays, structure), CASES[name])


def test_a_file_gives_every_transform_back_bit_for_bit(tmp_path):
    finite = {name: transform for name, transform in CASES.items() if "odd" not in name}
    storage.save(tmp_path / "all.safetensors", finite)
    loaded = storage.load(tmp_path / "all.safetensors")
    assert set(loaded) == set(finite)
    for name, transform in finite.items():
        _same(loaded[name], transform)
    assert [p.name for p in tmp_path.iterdir()] == ["all.safetensors"]


def test_a_file_is_read_in_a_process_that_imported_the_package_alone_which_is_light(tmp_path):
    place = tmp_path / "one.safetensors"
    storage.save(place, {"site": CASES["nested chain"]})
    code = (
        "import sys, duquantpp_jax; print(*{'optax', 'safetensors', 'tyro'} & {*sys.modules}); "
        f"from duquantpp_jax.transforms.storage import load; print(len(load({str(place)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["", "1", ""]


def test_a_class_whose_module_is_not_imported_is_named_and_not_imported():
    structure = json.dumps({"type": "antigravity:Fly", "fields": {}})
    with pytest.raises(ValueError, match=r"antigravity:Fly is not known.*--import antigravity"):
        storage.from_arrays({}, structure)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("structure", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not the structure"),
        ('{"value": 3}', "not the structure"),
        ('{"type": "Path", "fields": {}}', "Path is not known here"),
        ('{"type": "Smooth", "fields": {}}', "fields none: here it has scale"),
        ('{"type": "Smooth", "fields": {"scale": {"array": "s"}}}', "array s .* is missing"),
        ('{"type": "Smooth", "fields": {"scale": {"pickle": "s"}}}', "scale is not the structure"),
    ],
)
def test_what_is_no_transform_is_refused(structure, says):
    with pytest.raises(ValueError, match=says):
        storage.from_arrays({}, structure)


def test_files_that_save_did_not_write_are_refused(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"a": np.ones(2)}, other)
    with pytest.raises(ValueError, match="was not written by"):
        storage.load(other)
    write_tensors(other, {"a": np.ones(2)}, {"format": "another"})
    with pytest.raises(ValueError, match="says format 'another' and not 'duquantpp_jax transforms"):
        storage.load(other)
    other.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"other\.safetensors cannot be read .* make the"):
        storage.load(other)


def test_a_file_that_was_changed_is_of_something_else_or_holds_nan_is_refused(tmp_path):
    place = tmp_path / "one.safetensors"
    storage.save(place, {"site": CASES["smooth"]}, "layer 3")
    with pytest.raises(ValueError, match="holds transforms of 'layer 3', not of 'layer 2'"):
        storage.load(place, "layer 2")
    content = place.read_bytes()
    for spoilt in (
        content[:-1] + bytes([content[-1] ^ 1]),
        content.replace(b"layer 3", b"layer 2"),
    ):
        place.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"one.safetensors holds contents of SHA-256 \w{16}, "):
            storage.load(place, "layer 2")
    storage.save(place, {"site": CASES["bits of odd floats"]})
    with pytest.raises(ValueError, match="site/scale has NaN or Inf in 2 of 4 numbers"):
        storage.load(place)


def test_a_field_that_json_cannot_say_is_refused():
    with pytest.raises(ValueError, match="power of Scaled holds object"):
        storage.to_arrays(Scaled((jnp.ones(2),), power=object()))
