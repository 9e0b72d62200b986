"""`duquantpp quantize`: a float checkpoint in, a quantized one out, a layer at a time.

Beside the finished layers lies a file with the hidden states that the next layer is given. Both
appear whole, the layer first: a run that was killed goes on from the layer whose hidden states it
finds, and writes the bytes that it would have written. (On one machine. A GPU whose compiler times
its kernels may choose others in another process: XLA_FLAGS=--xla_gpu_autotune_level=0 rules that
out.)
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer
from safetensors import safe_open
from safetensors.numpy import load_file

from duquantpp_jax import files
from duquantpp_jax.estimate import estimate
from duquantpp_jax.evaluation.text import TARGETS
from duquantpp_jax.layerwise import BATCH_ROWS, Plan, quantize_layer
from duquantpp_jax.models import SITES, load_config, sha256, testbed
from duquantpp_jax.models.lazy import Checkpoint
from duquantpp_jax.models.shards import INDEX, SINGLE, read_json
from duquantpp_jax.quantized.directory import (
    CONFIG,
    JOB,
    METHOD,
    REPORT,
    is_quantized,
    layer_file,
)
from duquantpp_jax.quantized.job import (
    ACTIVATION_FORMATS,
    SCHEMA,
    WEIGHT_FORMATS,
    Job,
    format_named,
)
from duquantpp_jax.quantized.storage import layer_tensors, read_about, write_tensors
from duquantpp_jax.recipes import ALIASES, known
from duquantpp_jax.subject import environment, load_rows, model_name

ROWS = 64

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, steps in all."""


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """Quantizes a Hugging Face model layer by layer; killed, the same command goes on.

    Without --model it is the small model inside the package.

    Attributes:
      model: Hugging Face directory (config.json, safetensors, tokenizer.json).
      recipe: How linear inputs are moved, by its name in duquantpp_jax.recipes.
      rounding: How moved weights are rounded.
      scale_rule: How a block's scale is chosen: floor, ceil, even, rceil, mse; for mxfp4 also
        log256, fp32.
      calibration_text: UTF-8 text to calibrate on, documents separated by <|endoftext|>; without
        it random token ids (or, without --model, the embedded rows).
      seed: For random ids, and for recipes that draw.
      rows: Rows of 511 tokens to calibrate on (512 of random ids).
      include: Linears to quantize, by name, as in '*.mlp.*'.
      exclude: Of those, the ones to leave in float.
      weight_format: mxfp4, mxfp6, mxfp6_e3m2, mxfp8, mxfp8_e5m2 or nvfp4; SITE=FORMAT for one
        of the sites attention_in, attention_out, mlp_in, mlp_out.
      activation_format: As --weight-format, and bf16 (W4A16).
      sequential: Calibrate each layer on what the quantized layers before it give.
      pad: Widen linear inputs that blocks do not divide, with zeros (exact).
      dry_run: Say sizes, memory and time; write nothing.
      overwrite: Start anew where --out holds another quantized model.
      out: Directory for the quantized model.
    """

    model: Path | None = None
    recipe: str = "block_hadamard"
    rounding: str = "rtn"
    scale_rule: str = "floor"
    calibration_text: Path | None = None
    seed: int = 0
    rows: int = ROWS
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    weight_format: tuple[str, ...] = ("mxfp4",)
    activation_format: tuple[str, ...] = ("mxfp4",)
    sequential: bool = False
    pad: bool = False
    dry_run: bool = False
    overwrite: bool = False
    out: Path = Path("quantized")


def quantize(options: QuantizeOptions, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Carries the job out, or what is left of it; the report.

    Raises:
      ValueError: Bad input; one line that says what was wrong and what would be right.
      OSError: A file cannot be written; the finished layers are kept.
    """
    check_out(options)
    checkpoint = Checkpoint(options.model or testbed.directory())
    tokens, source = calibration_tokens(options)
    job = job_of(options, tokens, source)
    plan = job.plan(checkpoint.config)
    plan.check()
    finished = begin(options.out, job, overwrite=options.overwrite)
    if not finished:
        _layers(options.out, checkpoint, job, plan, tokens, progress)
        _finish(options.out, checkpoint, job)
    return read_json(options.out / REPORT)


def dry_run(options: QuantizeOptions) -> dict[str, Any]:
    """What the job would cost, as `estimate` has it; writes nothing.

    Raises:
      ValueError: As `quantize`.
    """
    check_out(options)
    checkpoint = Checkpoint(options.model or testbed.directory())
    tokens, source = calibration_tokens(options)
    plan = job_of(options, tokens, source).plan(checkpoint.config)
    plan.check()
    return estimate(plan, checkpoint, *tokens.shape)


def check_out(options: QuantizeOptions) -> None:
    """Raises ValueError where --out must not or cannot be written."""
    out = options.out
    files.check_writable(out)
    source = options.model or testbed.directory()
    if out.exists() and out.resolve() == source.resolve():
        raise ValueError(f"--out {out} is the model itself: give another directory")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a directory")
    # A run that was killed before its job was written leaves no more than a temporary file.
    others = [path for path in out.glob("*") if not path.name.startswith(f".{JOB}.")]
    if others and not is_quantized(out):
        raise ValueError(f"{out} holds other files: give an empty or new directory")


def calibration_tokens(
    options: QuantizeOptions,
) -> tuple[Integer[np.ndarray, "rows length"], str]:
    """The rows to calibrate on, all of whose positions are inputs, and where they are from.

    Raises:
      ValueError: The text cannot be read or is too short, or no row is asked for.
    """
    if options.rows < 1:
        raise ValueError(f"--rows {options.rows}: calibrate on at least one row")
    if options.calibration_text is None and options.model is not None:
        config = load_config(options.model)
        random = np.random.default_rng(options.seed)
        tokens = random.integers(0, config.vocab_size, (options.rows, TARGETS + 1), np.int32)
        if config.bos_token_id is not None:
            tokens[:, 0] = config.bos_token_id
        return tokens, "random ids"
    targets = options.rows * TARGETS
    rows = load_rows(options.model, options.calibration_text, targets, "calibration")
    text = options.calibration_text
    return rows.tokens[:, :-1], "embedded rows" if text is None else text.name


def job_of(
    options: QuantizeOptions, tokens: Integer[np.ndarray, "rows length"], source: str
) -> Job:
    """The job that the options ask for.

    Raises:
      ValueError: A name is not known.
    """
    directory = options.model or testbed.directory()
    tokens = np.asarray(tokens, np.int32)
    return Job(
        model={"name": model_name(options.model), "sha256": sha256(directory)},
        recipe=ALIASES.get(options.recipe, options.recipe),
        rounding=options.rounding,
        scale_rule=options.scale_rule,
        weight_formats=_by_site(options.weight_format, WEIGHT_FORMATS, options.scale_rule),
        activation_formats=_by_site(
            options.activation_format, ACTIVATION_FORMATS, options.scale_rule
        ),
        include=options.include,
        exclude=options.exclude,
        pad=options.pad,
        seed=options.seed,
        sequential=options.sequential,
        calibration={
            "source": source,
            "rows": len(tokens),
            "length": tokens.shape[1],
            "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        },
        environment=environment(),
    )


def _by_site(given: tuple[str, ...], names: tuple[str, ...], scale_rule: str) -> dict[str, str]:
    """The format of each site: the last that names it, or all."""
    formats: dict[str, str] = dict.fromkeys(SITES, names[0])
    for one in given:
        site, equals, name = one.rpartition("=")
        format_named(known("format", name, names), scale_rule)
        formats |= dict.fromkeys([known("site", site, SITES)] if equals else SITES, name)
    return formats


def begin(out: Path, job: Job, *, overwrite: bool) -> bool:
    """Makes the directory this job's; whether it has been finished already.

    Raises:
      ValueError: It belongs to another job; says what differs.
    """
    if is_quantized(out) and overwrite:
        _remove(out, CONFIG, "*.safetensors", INDEX, REPORT, JOB)
    if is_quantized(out):
        described = read_json(out / JOB)
        begun = Job.from_dict(described.get("job", {}))
        if described.get("schema") != SCHEMA or (other := begun.difference(job)):
            what = f"with {other}" if described.get("schema") == SCHEMA else "by another version"
            raise ValueError(
                f"{out} was begun {what}: give another --out, or --overwrite to start anew"
            )
        return (out / CONFIG).is_file()
    out.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "job": job.to_dict()}
    files.write_whole(out / JOB, files.to_json(content))
    return False


def _layers(
    out: Path,
    checkpoint: Checkpoint,
    job: Job,
    plan: Plan,
    tokens: Integer[np.ndarray, "rows length"],
    progress: Progress,
) -> None:
    """Writes the layers that are not finished."""
    count = checkpoint.config.num_hidden_layers
    # What a killed run was writing; safetensors has a temporary name of its own, .tmpXXXXXX.
    _remove(out, ".*.safetensors.*", ".*.json.*", ".tmp??????")
    first, hidden = _resume(out, count)
    if first == count:
        return
    if hidden is None:
        hidden = checkpoint.embed(tokens)
    steps = steps_of_layer(plan, len(tokens))
    done = itertools.count(first * steps + 1)
    for number in range(first, count):
        what = f"layer {number + 1} of {count}"
        progress(what, number * steps, count * steps)
        parameters = checkpoint.layer(number)
        layer = quantize_layer(
            plan,
            number,
            parameters,
            hidden,
            lambda doing: progress(f"{what}: {doing}", next(done), count * steps),  # noqa: B023
        )
        names = {inside: name for name, inside in checkpoint.layer_tensors(number).items()}
        tensors, about = layer_tensors(number, parameters, names, layer)
        about = {"schema": SCHEMA, "job": job.to_dict(), **about}
        write_tensors(out / layer_file(number), tensors, about)
        if number + 1 < count:
            write_tensors(_hidden_file(out, number + 1), {"hidden": hidden}, {"schema": SCHEMA})
        for past in range(number + 1):  # last the one that a killed run goes on from
            _hidden_file(out, past).unlink(missing_ok=True)


def _remove(directory: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in directory.glob(pattern):
            path.unlink()


def _hidden_file(out: Path, number: int) -> Path:
    return out / f"hidden-{number:05d}.safetensors"


def _resume(out: Path, count: int) -> tuple[int, Float32[np.ndarray, "rows length k"] | None]:
    """The first layer that is left to do, and what it is given, if that has been stored."""
    finished = 0
    while finished < count and (out / layer_file(finished)).is_file():
        finished += 1
    if finished == count and not _hidden_file(out, count - 1).is_file():
        return count, None
    for number in range(min(finished, count - 1), 0, -1):
        if (path := _hidden_file(out, number)).is_file():
            return number, load_file(path)["hidden"]
    return 0, None


def steps_of_layer(plan: Plan, rows: int) -> int:
    """How often `quantize_layer` reports progress, at most."""
    needs = any(getattr(recipe.rounding, "needs", None) for recipe in plan.recipes.values())
    passes = 1 + needs + plan.sequential
    return passes * -(-rows // BATCH_ROWS) + 2 * len(SITES)


def _finish(out: Path, checkpoint: Checkpoint, job: Job) -> None:
    """Writes what is not in layers; config.json last."""
    place = {}
    for number, (name, array) in enumerate(checkpoint.outside()):
        file = f"outside-{number}.safetensors"
        write_tensors(out / file, {name: array}, {})
        place[name] = file
    count = checkpoint.config.num_hidden_layers
    rows = []
    for number in range(count):
        about = read_about(out / layer_file(number))
        rows += about["report"]
        place |= dict.fromkeys(_tensor_names(out / layer_file(number)), layer_file(number))
    total = sum((out / file).stat().st_size for file in set(place.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
    report = {
        "schema": SCHEMA,
        "job": job.to_dict(),
        "bytes": total,
        "float_bytes": sum(path.stat().st_size for path in _shards(checkpoint.directory)),
        "linears": rows,
    }
    files.write_whole(out / REPORT, files.to_json(report))
    for path in copied(checkpoint.directory):
        files.write_whole(out / path.name, path.read_bytes())
    files.write_whole(out / INDEX, files.to_json(index))
    fields = read_json(checkpoint.directory / CONFIG)
    fields["quantization_config"] = {"quant_method": METHOD, "schema": SCHEMA, "recipe": job.recipe}
    files.write_whole(out / CONFIG, files.to_json(fields))


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="numpy") as file:
        return list(file.keys())


def _shards(directory: Path) -> Iterator[Path]:
    return directory.glob("*.safetensors")


def copied(directory: Path) -> list[Path]:
    """What a model directory holds besides weights and config.json: tokenizer, generation config,
    templates, licence."""
    kinds = (".json", ".jinja", ".txt", ".model", ".md")
    names = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
    left = (CONFIG, INDEX, SINGLE, JOB, REPORT)
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file()
        and (path.suffix in kinds or path.name.startswith(names))
        and path.name not in left
        and not path.name.startswith(".")
    )
