"""A quantized directory as it comes into being: a layer at a time, killed and resumed at will.

Beside the finished layers lies a file with the hidden states that the next layer is given. Both
appear whole, the layer first: a run that was killed goes on from the layer whose hidden states it
finds, and writes the bytes that it would have written. (On one machine. A GPU whose compiler times
its kernels may choose others in another process: XLA_FLAGS=--xla_gpu_autotune_level=0 rules that
out.)
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer

from duquantpp_jax import files
from duquantpp_jax.checkpoints.directory import (
    AGAIN,
    JOB,
    REPORT,
    TENSOR_SCALE,
    about_layer,
    layer_file,
    read_job,
)
from duquantpp_jax.checkpoints.job import SCHEMA, Job
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.checkpoints.seal import SUMS, check_whole
from duquantpp_jax.checkpoints.shards import INDEX, OWN_INDEX
from duquantpp_jax.checkpoints.source import CONFIG
from duquantpp_jax.core import Fitted, MXArray
from duquantpp_jax.core.notices import NotFinite
from duquantpp_jax.files import ABOUT
from duquantpp_jax.files.processes import LOCK, only_process
from duquantpp_jax.formats.tensors import to_tensors
from duquantpp_jax.models.parameters import (
    SITE_WEIGHTS,
    SITES,
    layer_prefix,
    linear_names,
    tensor_name,
)
from duquantpp_jax.ptq.calibration import BATCH_ROWS
from duquantpp_jax.ptq.fuse import online_cost
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.report import report_layer
from duquantpp_jax.ptq.site import QuantizedSite
from duquantpp_jax.ptq.walk import QuantizedLayer, quantize_layer, streams
from duquantpp_jax.transforms.storage import to_arrays

REFINED = "refined"
"""In the metadata of a layer whose transforms were learned once more."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, steps in all."""


def begin(out: Path, job: Job, *, overwrite: bool) -> bool:
    """Makes the directory this job's; whether it has been finished already.

    Raises:
      ValueError: It belongs to another job, or a file of a finished one is not what was written;
        says what differs.
    """
    begun = (out / JOB).is_file()
    if begun and overwrite:
        remove_files(out, CONFIG, SUMS, "*.safetensors", INDEX, OWN_INDEX, REPORT)
        remove_files(out, "generation_config.json", "tokenizer*", "*.jinja")  # of another model
    if overwrite or not begun:
        files.write_whole(out / JOB, files.to_json({"schema": SCHEMA, "job": job.to_dict()}))
        return False
    if other := read_job(out).difference(job):
        raise ValueError(
            f"{out} was begun with {other}: give another --out, or --overwrite to start anew"
        )
    finished = (out / CONFIG).is_file() and (out / SUMS).is_file()
    if finished:
        check_whole(out)
    return finished


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """While no other process writes the directory; removes what killed ones were writing.

    Where the block ends with a ValueError before a layer is finished, nothing is left either, and
    after NotFinite no layer, for another run of the same would end alike.

    Raises:
      ValueError: Another process writes it.
    """
    with only_process(out) as alone:
        if alone:
            remove_files(out, ".*.safetensors.*", ".*.json.*", ".SHA256SUMS.*")
        begun = (out / JOB).exists()
        try:
            yield
        except ValueError as error:
            if not begun and isinstance(error, NotFinite):
                remove_files(out, "*.safetensors")
            if not begun and {path.name for path in out.iterdir()} <= {JOB, LOCK}:
                remove_files(out, JOB)
            raise


def write_layers(
    out: Path,
    checkpoint: Checkpoint,
    job: Job,
    plan: Plan,
    tokens: Integer[np.ndarray, "rows length"],
    progress: Progress,
    check: Callable[[int, QuantizedLayer], Any] = lambda *_: None,
) -> None:
    """Writes the layers that are not finished; `check` is called with each before it is written."""
    count = checkpoint.config.num_hidden_layers
    first, hidden = _resume(out, count)
    for number in range(first):
        layer_as_written(out, number, job)
    if first == count:
        return
    if hidden is None:
        hidden = streams(plan, checkpoint.embed(tokens))
    steps = plan.passes * -(-len(tokens) // BATCH_ROWS) + 2 * len(SITES)  # of a layer, at most
    done = itertools.count(first * steps + 1)
    # While a layer is made, the one before it is written and the one after it is read.
    with ThreadPoolExecutor(1) as behind, ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(checkpoint.layer, first)
        written: Future[None] | None = None
        after = np.empty_like(hidden)
        for number in range(first, count):
            what = f"layer {number + 1} of {count}"
            progress(what, number * steps, count * steps)

            def says(doing: str) -> None:
                progress(f"{what}: {doing}", next(done), count * steps)  # noqa: B023

            parameters = following.result()
            if number + 1 < count:
                following = ahead.submit(checkpoint.layer, number + 1)
            layer = quantize_layer(plan, number, parameters, hidden, says)
            del parameters
            if not files.all_finite(hidden):
                wrong = np.count_nonzero(~np.isfinite(hidden))
                raise NotFinite(  # and the inputs of all sites are finite: `check_input` has looked
                    f"{layer_prefix(number)}mlp: on the calibration rows the output is NaN or Inf "
                    f"in {wrong} of {hidden.size} numbers: the model overflows in float32, and "
                    "cannot be calibrated on them"
                )
            check(number, layer)
            stored = checkpoint.layer_as_stored(number)[1] if checkpoint.packed else {}
            tensors, about = layer_tensors(number, layer, stored)
            about = {"schema": SCHEMA, "job": job.to_dict(), **about}
            about["report"] = report_layer(plan, number, layer)
            if written is not None:
                written.result()
            np.copyto(after, hidden)
            last = number + 1 == count
            written = behind.submit(
                _write_layer, out, number, tensors, about, None if last else after
            )
        if written is not None:
            written.result()


def _write_layer(
    out: Path,
    number: int,
    tensors: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
    hidden: Float32[np.ndarray, "rows length k"] | None,
) -> None:
    """Writes a finished layer and what the next is given, and drops what earlier ones were."""
    files.write_tensors(out / layer_file(number), tensors, about)
    if hidden is not None:
        files.write_tensors(_hidden_file(out, number + 1), {"hidden": hidden}, {})
    for past in range(number + 1):  # last the one that a killed run goes on from
        _hidden_file(out, past).unlink(missing_ok=True)


def layer_tensors(
    number: int, layer: QuantizedLayer, stored: Mapping[str, MXArray]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a layer's file, and what its metadata says besides schema and job.

    Args:
      stored: Weights that were packed; where they are neither quantized nor turned, or folded
        into, they are kept so.
    """
    prefix, (tensors, structures) = layer_prefix(number), _moves(number, layer.sites)
    kept, weights = dict(layer.parameters), {}
    for site in SITES:
        weights |= zip(SITE_WEIGHTS[site], layer.sites[site].weights, strict=True)
    quantized = {name: w for name, w in weights.items() if isinstance(w, MXArray)}
    about: dict[str, Any] = {"layer": number, "sites": structures}
    as_stored = {
        name: array
        for name, array in stored.items()
        if name not in quantized and np.array_equal(array.dequantize(), kept[name])
    }
    for key, packed in {"arrays": quantized, "stored": as_stored}.items():
        about[key] = {}
        for name, array in packed.items():
            added, about[key][name] = to_tensors(prefix + name, array)
            tensors |= added
            del kept[name]
    tensors |= {prefix + tensor_name(name): np.asarray(array) for name, array in kept.items()}
    return tensors, about


def write_refined(path: Path, sites: Mapping[str, QuantizedSite]) -> None:
    """Gives a layer's file the transforms, clips and scale offsets of `sites`, and marks it."""
    tensors, about = files.read_tensors(path, AGAIN)
    number = about["layer"]
    moved, structures = _moves(number, sites)
    old = tuple(f"{layer_prefix(number)}{site}/" for site in SITES)
    kept = {name: array for name, array in tensors.items() if not name.startswith(old)}
    for row in about["report"]:
        site = next(site for site in SITES if row["linear"] in linear_names(site, number))
        online = online_cost(sites[site].transform, sites[site].weights[0].shape[-1])
        row |= {"online_multiply_adds": online.multiply_adds, "online_bytes": online.bytes}
    files.write_tensors(path, kept | moved, about | {"sites": structures, REFINED: True})


def _moves(
    number: int, sites: Mapping[str, QuantizedSite]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What moves the inputs of a layer's sites, as tensors, and their structures."""
    tensors, structures = {}, {}
    for site in SITES:
        moves = Fitted(sites[site].transform, None, sites[site].clip, sites[site].scale_offset)
        arrays, structures[site] = to_arrays(moves)
        if (scale := sites[site].tensor_scale) is not None:
            arrays[TENSOR_SCALE] = scale
        prefix = f"{layer_prefix(number)}{site}/"
        tensors |= {prefix + path: np.asarray(array) for path, array in arrays.items()}
    return tensors, structures


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes a safetensors file, whole or not at all; raises OSError if the disk is full."""
    metadata = {"format": "pt"} if not about else {ABOUT: files.to_json(about).decode()}
    ordered = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    files.save(path, ordered, metadata)


def remove_files(directory: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in directory.glob(pattern):
            files.remove(path)


def _hidden_file(out: Path, number: int) -> Path:
    return out / f"hidden-{number:05d}.safetensors"


def _resume(out: Path, count: int) -> tuple[int, Float32[np.ndarray, "rows length k"] | None]:
    """The first layer that is left to do, and what it is given, if that has been stored."""
    layers = (out / layer_file(number) for number in range(count))
    finished = sum(1 for _ in itertools.takewhile(Path.is_file, layers))
    if finished == count and not _hidden_file(out, count - 1).is_file():
        return count, None
    for number in range(min(finished, count - 1), 0, -1):
        if (path := _hidden_file(out, number)).is_file():
            remedy = "remove it, and all layers are done again"
            return number, files.read_tensors(path, remedy)[0]["hidden"]
    return 0, None


def layer_as_written(
    out: Path, number: int, job: Job
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a finished layer, and what its file says of it.

    Raises:
      ValueError: The file holds another layer, or anything but what was written.
    """
    path = out / layer_file(number)
    tensors, _ = files.read_tensors(path, "remove it, and the layers are done again")
    return tensors, about_layer(path, number, job)
