"""`duquantpp quantize`: reads a float checkpoint and writes a quantized one, layer by layer."""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Integer
from rich.console import Console

from duquantpp_jax import files
from duquantpp_jax.checkpoints import layouts, load_config, testbed, writer
from duquantpp_jax.checkpoints.directory import JOB, REPORT, is_quantized, layer_file, read_layer
from duquantpp_jax.checkpoints.directory import read_about as read_about_layer
from duquantpp_jax.checkpoints.ending import finish
from duquantpp_jax.checkpoints.fits import load_fits, other_formats, read_about
from duquantpp_jax.checkpoints.job import Job
from duquantpp_jax.checkpoints.lazy import Checkpoint, outline
from duquantpp_jax.checkpoints.readers import READERS
from duquantpp_jax.checkpoints.source import source as source_of
from duquantpp_jax.checkpoints.writer import REFINED, begin, write_layers, write_refined
from duquantpp_jax.commands.options.common import MODEL
from duquantpp_jax.commands.options.quantize import QuantizeOptions
from duquantpp_jax.commands.progress import Step, progress_bar
from duquantpp_jax.commands.sizes import ALONE, dry_line, formats_of, quantized_line, table
from duquantpp_jax.core import shared
from duquantpp_jax.evaluation.predict import evaluation_bytes
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import (
    check_rows,
    check_unchanged,
    environment,
    load_rows,
    model_and_hash,
    model_name,
)
from duquantpp_jax.files import read_json
from duquantpp_jax.files.processes import LOCK
from duquantpp_jax.learning import refine as refining
from duquantpp_jax.models import SITES
from duquantpp_jax.ptq.estimate import estimate
from duquantpp_jax.ptq.layout import kernels_here
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import layer_of
from duquantpp_jax.ptq.walk import QuantizedLayer, stack_layers
from duquantpp_jax.recipes import (
    ALIASES,
    SHARED,
    checked_seed,
    find_fit,
    format_name,
    import_modules,
    known,
    under_rule,
)
from duquantpp_jax.transforms import storage

SAME = ("rounding", "include", "exclude", "pad", "seed", "sequential", "fuse", "refine")
SAME += ("rotate_stream", "rotate_values")
"""Options that a job has under the same names."""

Tokens = Integer[np.ndarray, "rows length"]


def quantize(options: QuantizeOptions, progress: Step = lambda *_: None) -> dict[str, Any]:
    """Runs the job, or resumes it; returns the report.

    Raises:
      OSError: A file cannot be written; the finished layers are kept.
    """
    if options.text == MODEL:
        _planned(dataclasses.replace(options, dry_run=True))  # refuses most bad input first
        progress("the model writes its calibration rows", 0, options.rows)
    before = source_of(options.model or testbed.directory()).beside()
    job, plan, tokens, _ = _planned(options)
    checkpoint = Checkpoint(options.model or testbed.directory(), job.turn)
    # What is kept was made of the job's model: a file that is replaced has other times, at least.
    unchanged = functools.partial(check_unchanged, checkpoint.source.path, job.model)

    def check(number: int, layer: QuantizedLayer) -> None:
        unchanged()
        if options.serve is not None:
            what = job, plan.config, number, layer.parameters, layer.sites
            layouts.layer_as(READERS[options.serve].layout, *what, options.serve)

    with writer.only_writer(options.out):
        if not begin(options.out, job, overwrite=options.overwrite):
            write_layers(options.out, checkpoint, job, plan, tokens, progress, check)
            if options.refine:
                refine_layers(options, checkpoint, plan, tokens, progress, unchanged)
            finish(options.out, checkpoint, job, before, unchanged)
    return read_json(options.out / REPORT)


def dry_run(options: QuantizeOptions) -> dict[str, Any]:
    """The cost of the job, as `estimate` and `evaluation_bytes` give it; writes nothing.

    Of a model that is not at hand config.json is enough.
    """
    _, plan, tokens, stored = _planned(dataclasses.replace(options, dry_run=True))
    rows, length = tokens.shape
    found = estimate(plan, rows, length, stored)
    return found | {"evaluation_bytes": evaluation_bytes(plan.config, TARGETS + 1, stored)}


def _planned(options: QuantizeOptions) -> tuple[Job, Plan, Tokens, float]:
    """The job, the checked plan, the calibration inputs, and the bytes of a parameter."""
    import_modules(options.imports)
    check_out(options)
    tokens, source = calibration_tokens(options)
    job = job_of(options, tokens, source)
    what = options.model or testbed.directory(), job.turn
    config, packed, stored = outline(*what, weights=not options.dry_run)
    plan = job.plan(config)
    if packed != options.requantize:
        raise ValueError(
            f"{options.model} has packed weights, which are rounded a second time: give "
            "--requantize, or the float model"
            if packed
            else "--requantize is for packed weights, which the model does not have: leave it out"
        )
    if options.fits is not None:
        plan = dataclasses.replace(plan, fits=load_fits(options.fits, job.model["sha256"])[0])
    plan.check()
    if options.serve:
        layouts.check(READERS[options.serve].layout, plan.config, job, options.serve)
        if options.refine or options.pad:
            raise ValueError(
                f"--serve {options.serve} has no place for a matrix for each block and for zeros "
                "that widen inputs: leave --refine and --pad out"
            )
    if options.refine:
        refining.check(plan)
    return job, plan, tokens, stored


def refine_layers(
    options: QuantizeOptions,
    checkpoint: Checkpoint,
    plan: Plan,
    tokens: Tokens,
    progress: Step,
    unchanged: Callable[[], None] = lambda: None,
) -> None:
    """Refines the transforms of finished layers, or resumes it, to the same bits.

    The state of learning is kept at every check, and its result until all layers have it.
    `unchanged` is called when the model has been read.
    """
    begun, learned = options.out / "refine.safetensors", options.out / "refined.safetensors"
    paths = [options.out / layer_file(number) for number in range(plan.config.num_hidden_layers)]
    if not all(read_about_layer(path).get(REFINED) for path in paths):
        layers = [read_layer(path)[1] for path in paths]

        def callback(step: int, numbers: Mapping[str, float]) -> None:
            loss = numbers["held_out_loss"]
            progress(f"refining: held-out KL {loss:.5f}", step, options.refine)

        if not learned.is_file():
            decoder = checkpoint.decoder()
            unchanged()
            what = plan, decoder, stack_layers(layers), tokens, options.refine
            storage.save(learned, refining.refine(*what, checkpoint=begun, callback=callback))
        fits: Any = storage.load(learned)
        for number, path in enumerate(paths):
            write_refined(path, refining.refitted(layers[number], layer_of(fits, number)))
    for path in (learned, begun):
        path.unlink(missing_ok=True)


def check_out(options: QuantizeOptions) -> None:
    """Raises ValueError if --out cannot or must not be written."""
    out = options.out
    files.check_writable(out)
    source = options.model or testbed.directory()
    if out.exists() and out.resolve() == source.resolve():
        raise ValueError(f"--out {out} is the model itself: give another directory")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a directory")
    # A run that was killed before it wrote its job leaves only a temporary file.
    others = [path for path in out.glob("*") if not path.name.startswith((f".{JOB}.", LOCK))]
    if others and not is_quantized(out):
        raise ValueError(f"{out} holds other files: give an empty or new directory")


def calibration_tokens(options: QuantizeOptions) -> tuple[Tokens, str]:
    """Inputs to calibrate on, in a dry run zeros for what the model would write; their source."""
    if options.refine < 0:
        raise ValueError(f"--refine {options.refine}: give a number of steps, or 0 for none")
    if options.rows < 1 or (options.rows < 2 and options.refine):
        least = "two rows: --refine holds one out" if options.refine else "one row"
        raise ValueError(f"--rows {options.rows}: calibrate on at least {least}")
    checked_seed(options.seed)
    text = options.text
    if text == MODEL and options.dry_run:
        check_rows(directory := options.model or testbed.directory(), load_config(directory))
        return np.zeros((options.rows, TARGETS), np.int32), str(text)
    asked = text, options.rows * TARGETS, "calibration", options.text_key, options.seed
    rows = load_rows(options.model, *asked)
    return rows.tokens[:, :-1], "embedded rows" if text is None else text.name


def job_of(options: QuantizeOptions, tokens: Tokens, source: str) -> Job:
    """The job of the options; raises ValueError if two of them contradict one another."""
    tokens = np.asarray(tokens, np.int32)
    if options.recipe is not None and options.fits is not None:
        raise ValueError("--recipe and --fits both say how inputs are moved: give one of them")
    if options.fits is not None and (options.rotate_stream or options.rotate_values):
        raise ValueError(
            "--fits were learned for the model as it is: leave out --rotate-stream and "
            "--rotate-values"
        )
    about = None if options.fits is None else read_about(options.fits)
    name, formats = options.recipe or "block_hadamard", formats_by_site(options)
    name = ALIASES.get(name, name)
    if options.serve and shared(fit := find_fit(name)) != fit:
        name += SHARED
    parts = (name, options.rounding, *(n for names in formats.values() for n in names.values()))
    outside = files.module_hashes(*{part.partition(":")[0] for part in parts if ":" in part})
    same: dict[str, Any] = {name: getattr(options, name) for name in SAME}
    same["fuse"] |= options.serve is not None
    nameless = options.dry_run and options.fits is None  # a hash reads all of the weights
    return Job(
        model={"name": model_name(options.model)} if nameless else model_and_hash(options.model),
        recipe=name if about is None else "fits",
        **formats,
        calibration={
            "source": source,
            "rows": len(tokens),
            "length": tokens.shape[1],
            "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        },
        environment=environment() | ({"sources": outside} if outside else {}),
        fits=None if about is None else about["sha256"],
        **same,
    )


def formats_by_site(options: QuantizeOptions) -> dict[str, dict[str, str]]:
    """The full name of each site's format, of weights and of activations, as a job has them."""
    found, given = {}, options.scale_rule
    plain = dict[str, str](dict.fromkeys(SITES, given or "floor"))
    rules = {"weight_formats": plain, "activation_formats": plain}
    if options.serve:
        reader, model = READERS[options.serve], options.model or testbed.directory()
        mixture = reader.of_experts != reader.rule and load_config(model).num_experts > 0
        rules = {
            "weight_formats": dict[str, str](dict.fromkeys(SITES, given or "mse")),
            "activation_formats": {site: reader.rule_of(site, mixture) for site in SITES},
        }
    for side, by_site in rules.items():
        names = dict.fromkeys(SITES, "mxfp4")
        for option in (*options.formats, *getattr(options, side)):
            site, equals, name = option.rpartition("=")
            names |= dict.fromkeys([known("site", site, SITES)] if equals else SITES, name)
        found[side] = {s: format_name(under_rule(name, by_site[s])) for s, name in names.items()}
    return found


def run(options: QuantizeOptions) -> int:
    """Runs the command and prints the report; returns the exit code."""
    import_modules(options.imports)
    used = formats_of(formats_by_site(options))
    if options.fits and (warning := other_formats(read_about(options.fits), *used)):
        print(warning, file=sys.stderr)
    if options.dry_run:
        found = dry_run(options)
        if options.fuse and load_config(options.model or testbed.directory()).num_experts:
            print(ALONE, file=sys.stderr)
        line, said = dry_line(found), []
        if options.refine:
            said = [
                "Refining is not counted: it holds the whole model and its gradients in memory."
            ]
        if options.text == MODEL:
            said += ["Calibration rows are not counted: the whole model writes them, in memory."]
    else:
        alone = jax.device_count() == 1  # several share the rows, and kernels are not cut
        if alone and (kernels := kernels_here(inputs=options.sequential)) is not None:
            print(kernels, file=sys.stderr)
        with progress_bar(options.terminal) as progress:
            found = quantize(options, progress)
        line = quantized_line(found)
        said = [f"Written to {options.out}; report.json has every linear."]

    def show() -> None:
        Console(width=100).print(table(found["linears"]), line)
        print("\n".join(said), end="\n" if said else "")

    options.terminal.give(found, show)
    return 0
