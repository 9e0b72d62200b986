"""Run by test_training.py in a process of its own: devices are counted before their first use."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from duquantpp_jax.formats import MXFP4
from duquantpp_jax.learning.model import Divergence
from duquantpp_jax.learning.moves import Moves
from duquantpp_jax.learning.site import SiteError
from duquantpp_jax.learning.training import held_out_loss, train
from duquantpp_jax.models import SITES
from duquantpp_jax.ptq.calibration import rows_mesh
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.hadamard import hadamard
from duquantpp_jax.transforms.learned import Affine
from tests.conftest import tiny_decoder

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
FORMATS = (MXFP4(), MXFP4())
MOVES = Moves(Affine())


def start(*blocks):
    h = jnp.broadcast_to(hadamard(32), (*blocks, 32, 32))
    return BlockAffine(h, jnp.swapaxes(h, -1, -2))


def site() -> None:
    """One step down the gradient, which is a mean over tokens."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (72, 64)), jax.random.normal(keys[1], (16, 64))
    objective = SiteError((w,), start(2), MOVES, FORMATS, "both")
    zero = MOVES.init(start(2), (w,))

    def moved(mesh):
        options = {"steps": 1, "batch_rows": 64, "check_every": 1, "mesh": mesh}
        rows = x[:64], x[64:]
        trained = train(
            objective, zero, *rows, jax.random.key(1), optimizer=optax.sgd(1.0), **options
        )
        return np.asarray(trained.learned.transform["d"], np.float64)

    with pytest.raises(ValueError, match="a batch of 64 rows cannot be spread over 7 devices"):
        moved(rows_mesh(jax.devices()[:7]))
    found, wanted = moved(rows_mesh()), moved(None)
    assert np.abs(wanted).max() > 1e-4
    # 64 addends, each a chain of two products of 32 terms, summed in another order.
    each = jax.vmap(lambda token: jax.grad(objective.loss)(zero, token[None]))(x[:64])
    magnitude = np.mean(np.abs(np.asarray(each.transform["d"], np.float64)), axis=0).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=(64 + 2 * 32) * 2.0**-24 * magnitude)


def model() -> None:
    """The loss of the whole model: rows are whole on a device, their mean is not."""
    decoder = tiny_decoder()
    starts = {site: start(2, decoder.weights(site)[0].shape[-1] // 32) for site in SITES}
    learned = {site: MOVES.init(start, decoder.weights(site)) for site, start in starts.items()}
    tokens = np.random.default_rng(0).integers(0, 257, (8, 24)).astype(np.int32)
    objective = Divergence(decoder, starts, MOVES, FORMATS)
    everywhere = jax.device_put((objective, learned), NamedSharding(rows_mesh(), P()))
    found = held_out_loss(*everywhere, tokens, 8, rows_mesh())
    wanted = held_out_loss(objective, learned, tokens, 8)
    # 8 * 23 targets summed in another order, each from sums of at most 257 terms.
    np.testing.assert_allclose(found, wanted, rtol=(8 * 23 + 257) * 2.0**-24)


if __name__ == "__main__":
    site()
    model()
    print(len(jax.devices()), "devices agree")
