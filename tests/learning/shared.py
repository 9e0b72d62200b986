"""Run by test_sharing.py in processes of their own, as devices are counted before their first use.

    python -m tests.learning.shared DEVICES

Devices add up the gradients of their rows in another order than one device does; nothing else
differs. A number at a border between two elements may then round the other way, so that what two
ways have learned is compared after two steps.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from duquantpp_jax.formats import MXFP4
from duquantpp_jax.learning.model import learn_model
from duquantpp_jax.learning.moves import moves_named
from duquantpp_jax.learning.sharing import Sharing
from duquantpp_jax.models import SITES
from duquantpp_jax.transforms.block import BlockAffine
from tests.conftest import tiny_decoder

FORMATS = (MXFP4(), MXFP4())
MOVES = moves_named(["affine", "clip_site"])


def main() -> None:
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    devices = jax.devices()
    assert Sharing.of(12, 2).mesh.size == 6
    assert Sharing.of(7, 1, devices[:6]).mesh.size == 1
    alone = learned(devices=devices[:1])
    for found, wanted in zip(learned(accumulate=2), alone, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-6)
    print(len(devices), "devices agree")


def learned(**options) -> list[np.ndarray]:
    """What is learned through the model, and the losses."""
    model, draw = tiny_decoder(), np.random.default_rng(0)
    tokens = draw.integers(0, 257, (21, 16)).astype(np.int32)
    options |= {"steps": 2, "check_every": 2, "optimizer": optax.sgd(0.1), "batch_rows": 16}
    start, random = {}, np.random.default_rng(1)
    for site in SITES:
        layers, _, width = model.weights(site)[0].shape
        normal = random.standard_normal((layers, width // 32, 32, 32), np.float32)
        r = np.linalg.qr(normal)[0]
        start[site] = BlockAffine(jnp.asarray(r), jnp.asarray(r.swapaxes(-1, -2)))
    key, rows = jax.random.key(0), (tokens[:16], tokens[16:])
    found = learn_model(model, start, MOVES, FORMATS, *rows, key, dtype=jnp.float32, **options)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((found.fits, found.history))]


if __name__ == "__main__":
    main()
