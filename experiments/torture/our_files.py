"""The readers of files that this package writes, each with valid ones; fuzz.py tries them."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from duquantpp_jax import files
from duquantpp_jax.analysis.contents import sqnr
from duquantpp_jax.checkpoints import Quantized, load_tokenizer
from duquantpp_jax.checkpoints.directory import read_job
from duquantpp_jax.checkpoints.fits import load_fits, other_formats, save_fits
from duquantpp_jax.checkpoints.seal import write_seal
from duquantpp_jax.commands.quantize import QuantizeOptions, quantize
from duquantpp_jax.core import Fitted
from duquantpp_jax.evaluation.predict import RowSums
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.formats import MXFP4
from duquantpp_jax.formats.tensors import from_tensors, to_tensors
from duquantpp_jax.lab import Cell, claims, records, table
from duquantpp_jax.lab.bench import Found
from duquantpp_jax.lab.pivot import COMPARED, Layout, pivots
from duquantpp_jax.lab.running import Outcome
from duquantpp_jax.learning import state
from duquantpp_jax.models import SITES, DecoderConfig
from duquantpp_jax.transforms import storage
from experiments.torture import subjects
from experiments.torture.fuzz import Reader, contents

AGAIN = "make it again"


def quantized_model(place: Path, **changes: Any) -> Path:
    """A directory that `quantize` wrote."""
    model = subjects.write_model(place / "model")
    given = {"recipe": "smooth_hadamard", "exclude": ("*.down_proj",), "rows": 2}
    given |= {"weight_formats": ("mxfp4", "mlp_in=nvfp4"), "out": place / "out"}
    text = subjects.write_text(place / "text.txt")
    quantize(QuantizeOptions(model, calibration_text=text, **given | changes))
    return place / "out"


def quantized(place: Path) -> Reader:
    """Every file of a directory that `quantize` wrote."""

    def read(place: Path) -> None:
        model = Quantized(place)
        for number in range(model.config.num_hidden_layers):
            model.layer(number)
        model.outside()
        sqnr(model)
        load_tokenizer(place, model.config)

    return Reader(contents(quantized_model(place)), read, seal=lambda own: write_seal(own, {}))


def job(place: Path) -> Reader:
    """quantization.json alone."""
    described = json.loads((quantized_model(place) / "quantization.json").read_text())
    config = DecoderConfig.from_dict(subjects.fields_of())
    return Reader(
        {"quantization.json": files.to_json(described)},
        lambda own: read_job(own).plan(config, done=True),
    )


def mx(place: Path) -> Reader:
    """MX arrays in a safetensors file with their records."""
    x = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    tensors, record = to_tensors("x", MXFP4().quantize(jnp.asarray(x)))
    files.write_tensors(place / "x.safetensors", tensors, {"x": record})

    def read(own: Path) -> None:
        path = own / "x.safetensors"
        with files.refusing(path, AGAIN):
            found, about = files.read_tensors(path, AGAIN)
            from_tensors("x", about["x"], found)

    return Reader(contents(place), read, believe=(files,))


def _fits(place: Path) -> dict[str, Fitted]:
    _, sites = Quantized(quantized_model(place)).layer(0)
    clip = jnp.ones((1, 1), jnp.float32)
    return {site: Fitted(sites[site].transform, None, clip, None) for site in SITES}


def transforms(place: Path) -> Reader:
    """A file of transforms."""
    storage.save(place / "own" / "t.safetensors", _fits(place), "a site")
    return Reader(
        contents(place / "own"),
        lambda own: storage.load(own / "t.safetensors", "a site"),
        believe=(files,),
    )


def fits(place: Path) -> Reader:
    """A directory of fits."""
    formats = {"weight": "mxfp4:floor", "activation": "mxfp4:floor"}
    about = {"model": {"name": "m", "sha256": "0"}, "formats": formats}
    save_fits(place / "own", _fits(place), about)

    def read(own: Path) -> None:
        _, about = load_fits(own, "0")
        other_formats(about, "mxfp4:floor", "mxfp4:even")

    return Reader(contents(place / "own"), read, believe=(files,))


def learning(place: Path) -> Reader:
    """The state of a learning that goes on."""
    learned = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}
    like = {"learned": learned, "optimizer": optax.adam(1e-3).init(learned)}
    settings = {"objective": "x", "optimizer": "y"}
    state.save(place / "s.safetensors", like, 1.0, [(0, 1.0, 2.0), (5, 0.5, 1.0)], settings)
    return Reader(
        contents(place),
        lambda own: state.load(own / "s.safetensors", like, settings),
        believe=(files,),
    )


def record(place: Path) -> Reader:
    """Records of a finished and of a failed cell, and the table of them."""
    cells = [Cell("rtn", seed=seed, tokens=3 * TARGETS) for seed in range(2)]
    rows = np.asarray([1.5, 2.5, 3.5])
    online = {site: {"multiply_adds": 32.0, "bytes": 4096} for site in SITES}
    sums = RowSums(rows * 500, rows * 499, rows, rows * 100)
    found = Found(sums, np.arange(3), 20.0, online, {"fit": 1.0, "total": 2.0})
    records.write(place, cells[0], found)
    records.write_error(place, cells[1], ValueError("no"))

    def read(own: Path) -> None:
        records.read(own, cells[1], failed=True)
        if (read := records.read(own, cells[0])) is not None:
            for pivot in pivots(Outcome({cells[0]: read}, {}), Layout()):
                for measure in COMPARED:
                    table.terminal(pivot, measure)
                for entry in pivot["entries"]:
                    table.online(entry)
            records.mixed([read, read])

    return Reader(contents(place), read, believe=(records,))


def claim(place: Path) -> Reader:
    """The claim of another process."""

    def read(own: Path) -> None:
        with claims.claim(own, "cell"):
            pass

    return Reader({"cell.0": files.to_json(files.process() | {"pid": 2**22 + 1})}, read)
