"""Makes the figures of the README and the docs: `python -m experiments.make_figures [NAME ...]`.

compare: KL from experiments/results/compare_testbed_128rows.json, which is the results.json of
  `duquantpp compare --tokens 65408 --scale-rules floor even log256` (2 CPU cores, 2026-11-25); the
  channels are computed anew, since they need no evaluation text.
surface: |x| of the first 64 tokens of a calibration row, before the linear whose input has the
  largest channel maximum over the median of channels: as it is, and moved by two recipes.
blocks: what MXFP4 under floor does to each block of the moved inputs of all linears, for 64
  tokens of the calibration rows. The error is that of the block over its energy, so that it does
  not matter how a recipe's smoothing shares sizes out between inputs and weights.

Each is docs/NAME.png. The same machine and versions give the same bytes; others may differ in the
last bits of a fit, and so in the shade of a few pixels.
Cost: two minutes on 2 CPU cores.
"""

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from duquantpp_jax import files
from duquantpp_jax.analysis import figures
from duquantpp_jax.analysis.outliers import moved_maxima
from duquantpp_jax.checkpoints import testbed
from duquantpp_jax.core import Fitted, Needs, Stats
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.models import linear_names
from duquantpp_jax.ptq.calibration import calibrate
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import layer_of
from duquantpp_jax.ptq.walk import fit_decoder
from duquantpp_jax.recipes import recipe
from experiments.figures import block_errors

ROOT = Path(__file__).parent.parent
RULE = "floor"
BLOCK_SIZE = 32
TOKENS = 64
"""Shown in a surface."""
EVERY = 32
"""Of the sampled tokens (2,048), one in so many is quantized for the errors of blocks."""


def comparison() -> Figure:
    """docs/compare.png."""
    path = ROOT / "experiments/results/compare_testbed_128rows.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    maxima = {}
    for name in results["rows"]:
        site, maxima["before"], maxima[name] = moved_maxima(_stats(), _fits(name))
    return figures.comparison(results, (site, maxima))


def surface() -> Figure:
    """docs/surface.png."""
    stats = _stats()
    site, layer = max(
        ((site, layer) for site in stats for layer in range(len(stats[site].absmax))),
        key=lambda at: _over_median(stats[at[0]].absmax[at[1]]),
    )
    x = _stats(rows=1, length=TOKENS)[site].sample[layer]
    inputs = {"before": x} | {
        name: layer_of(_fits(name)[site].transform, layer).activations(x)
        for name in ("block_hadamard", "duquantpp")
    }
    title = f"{linear_names(site, layer)[0]} input, the embedded model"
    return figures.surface(inputs, log2=True, title=title, points=(32, 48))


def blocks() -> Figure:
    """docs/blocks.png."""
    errors = {
        name: np.concatenate(list(_errors(name))) for name in ("rtn", "block_hadamard", "duquantpp")
    }
    return block_errors(
        errors,
        ("block_hadamard", "duquantpp"),
        label="squared error / energy of a block",
        title=f"activations of the embedded model in MXFP4 ({RULE}), all linears",
    )


FIGURES = {"compare": (comparison, 200), "surface": (surface, 160), "blocks": (blocks, 160)}
"""How each is made, and its dots per inch."""


@functools.cache
def _stats(rows: int | None = None, length: int = TARGETS) -> dict[str, Stats]:
    model = testbed.load()
    tokens = testbed.calibration_rows()[:rows, :length]
    return calibrate(model, tokens, needs=Needs.POSITIONS)


@functools.cache
def _fits(name: str) -> dict[str, Fitted]:
    model = testbed.load()
    return fit_decoder(Plan.of(model.config, recipe(name, RULE)), model, _stats())


def _errors(name: str) -> Iterator[Float[np.ndarray, " blocks"]]:
    """The relative error of each block, of every site and layer."""
    for site, fitted in _fits(name).items():
        for layer, sample in enumerate(_stats()[site].sample):
            x = layer_of(fitted.transform, layer).activations(sample[::EVERY])
            error = x - recipe(name, RULE).activation_format.fake_quantize(x)
            yield np.asarray(_energy(error) / _energy(x))


def _energy(x: Float[Array, "tokens k"]) -> Float[Array, " blocks"]:
    return jnp.sum(jnp.square(x).reshape(-1, BLOCK_SIZE), axis=-1)


def _over_median(maxima: Float[Array, " k"]) -> float:
    return float(jnp.max(maxima) / jnp.median(maxima))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in FIGURES]:
        parser.error(f"no figure {unknown[0]!r}: choose from {', '.join(FIGURES)}")
    for name in names or FIGURES:
        make, dpi = FIGURES[name]
        files.write_whole(ROOT / f"docs/{name}.png", figures.picture(make(), "png", dpi))


if __name__ == "__main__":
    main()
