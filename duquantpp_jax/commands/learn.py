"""`duquantpp learn`: learns the fits of a model with gradients, for `duquantpp quantize --fits`.

A run keeps its progress in the output directory. After a kill the same command resumes and gives
the same bits; another command is refused in that directory.
"""

import contextlib
import dataclasses
import functools
import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optax

from duquantpp_jax import files
from duquantpp_jax.checkpoints import load, load_config, testbed
from duquantpp_jax.checkpoints.fits import ABOUT, ARRAYS, read_about, save_fits
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.checkpoints.packed import decoded
from duquantpp_jax.commands.hosts import as_one_of_several, is_first, wait_for_all
from duquantpp_jax.commands.options.learn import LearnOptions, LearnSettings
from duquantpp_jax.commands.progress import progress_bar
from duquantpp_jax.core import Fitted, Recipe
from duquantpp_jax.evaluation.predict import Predictor, Reference, check_sums
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import (
    check_unchanged,
    environment,
    load_rows,
    model_and_hash,
    name_and_hash,
)
from duquantpp_jax.files import read_json
from duquantpp_jax.files.processes import LOCK, only_process
from duquantpp_jax.learning.callbacks import Callback, each, tensorboard, wandb
from duquantpp_jax.learning.named import (
    CALIBRATION_ROWS,
    MakeOptimizer,
    Report,
    Tokens,
    check_learnable,
    check_settings,
    fingerprint,
    learn,
    optimizer_of,
)
from duquantpp_jax.models import Decoder
from duquantpp_jax.models.decoder import fuses_attention
from duquantpp_jax.ptq import Plan, quantize_decoder
from duquantpp_jax.recipes import format_name, import_modules, recipe, under_rule

SETTINGS = dataclasses.fields(LearnSettings)
PROGRESS, BEGUN = "progress", "begun.json"
"""The directory of an unfinished run inside --out, and its file that holds the command."""


def learn_fits(
    options: LearnOptions,
    report: Report = lambda *_: None,
    callback: Callback = lambda *_: None,
    optimizer: MakeOptimizer | optax.GradientTransformation | None = None,
) -> dict[str, Any]:
    """Learns fits, or resumes learning, and writes them; returns the contents of fits.json.

    Args:
      callback, optimizer: As of `learning.learn`.

    Raises:
      OSError: A file cannot be written; progress is kept.
    """
    if options.model is not None and not options.text:
        raise ValueError(
            "--model needs --text: text of the kind that the model was trained on, or model for "
            "rows that it writes itself"
        )
    files.check_writable(options.out)
    import_modules(options.imports)
    check_settings(options)
    make = optimizer_of(options, optimizer)
    directory = options.model or testbed.directory()
    checkpoint = Checkpoint(directory)
    check_learnable(checkpoint)
    weight, activation = (
        format_name(under_rule(name or options.formats, options.scale_rule))
        for name in (options.weight_formats, options.activation_formats)
    )
    method = recipe(options.start, weight_format=weight, activation_format=activation)
    tokens = _tokens(options)
    rows, held_out = split(tokens, options.held_out)
    if len(rows) < options.batch_rows and options.through != "site":
        batch = f"a batch of {options.batch_rows}: give more --rows, or fewer --batch-rows"
        raise ValueError(f"{len(rows)} rows are less than {batch}")
    counts = {"rows": len(rows), "held_out": len(held_out)}
    counts |= {"tokens": hashlib.sha256(tokens.tobytes()).hexdigest()}
    learned_by = {field.name: getattr(options, field.name) for field in SETTINGS}
    learned_by |= {"moves": list(options.moves)}
    if optimizer is not None:
        learned_by["optimizer"] = f"object {fingerprint(make, options)[:16]}"
    asked = {
        "model": model_and_hash(options.model),
        "formats": {"weight": weight, "activation": activation},
        "learn": learned_by,
        "text": _names_and_hashes(options.text) | counts,
        "environment": environment(),
    }
    place = options.out / PROGRESS
    with only_process(options.out) if is_first() else contextlib.nullcontext():
        finished = is_first() and _begin(options, asked)
        wait_for_all("begun")
        if finished or (not is_first() and (options.out / ABOUT).is_file()):
            if is_first():  # left by a run that was killed at its end
                shutil.rmtree(place, ignore_errors=True)
            return read_about(options.out)
        unchanged = functools.partial(check_unchanged, checkpoint.source.path, asked["model"])
        found = learn(options, checkpoint, method, rows, held_out, place=place, report=report,
                      callback=callback, optimizer=optimizer, unchanged=unchanged)  # fmt: skip
        kl = {}
        if options.measure:
            report("measuring", options.steps, options.steps)
            kl = held_out_kl(load(directory), method, found.fits, rows, held_out, options.seed)
        unchanged()
        history = [[x if np.isfinite(x) else None for x in check] for check in found.history]
        about = asked | {"start_loss": found.start_loss, "history": history, "held_out_kl": kl}
        if is_first():
            save_fits(options.out, found.fits, about)
            shutil.rmtree(place)
        wait_for_all("saved")
    return read_about(options.out)


def _tokens(options: LearnOptions) -> Tokens:
    """The rows of all texts, one of each by turns."""
    texts = options.text or (None,)
    if len({text and text.resolve() for text in texts}) < len(texts):
        raise ValueError(f"--text names a text twice: {' '.join(map(str, texts))}")
    if options.rows % len(texts):
        raise ValueError(
            f"--rows {options.rows} are not the same number of each of {len(texts)} texts: give "
            f"--rows {max(options.rows // len(texts), 1) * len(texts)}"
        )
    wanted = options.rows // len(texts) * TARGETS, "calibration", options.text_key, options.seed
    each = [np.asarray(load_rows(options.model, t, *wanted).tokens, np.int32) for t in texts]
    return np.stack(each, axis=1).reshape(-1, each[0].shape[-1])


def _names_and_hashes(texts: tuple[Path, ...]) -> dict[str, str]:
    """`name_and_hash` of each text, joined."""
    each = [name_and_hash(text) for text in texts or (None,)]
    keys = dict.fromkeys(key for e in each for key in e)  # in this order in every process
    return {key: " + ".join(e[key] for e in each if key in e) for key in keys}


def split(tokens: Tokens, held_out: float) -> tuple[Tokens, Tokens]:
    """Splits rows into those to learn from and the last ones, which are held out.

    Args:
      held_out: A share below 1, or a number of rows.

    Raises:
      ValueError: One part would be empty, or the number is not whole.
    """
    count = round(held_out * len(tokens)) if held_out < 1 else held_out
    if count != int(count) or not 0 < count < len(tokens):
        raise ValueError(
            f"--held-out {held_out:g} of --rows {len(tokens)} is {count:g}: give more --rows, or a "
            "share below 1, or a number of rows, that leaves rows on both sides"
        )
    return tokens[: -int(count)], tokens[-int(count) :]


def held_out_kl(
    model: Decoder,
    method: Recipe,
    fits: dict[str, Fitted],
    rows: Tokens,
    held_out: Tokens,
    seed: int,
) -> dict[str, float]:
    """KL to the float model in nats per target, before and after learning, rounded to nearest."""
    reference = Reference(Predictor(model), held_out)
    targets = held_out.shape[0] * (held_out.shape[1] - 1)
    start = Plan.of(model.config, method, seed=seed)
    kl = {}
    for name, plan in {"start": start, "end": dataclasses.replace(start, fits=fits)}.items():
        predictor = Predictor(*quantize_decoder(plan, model, rows[:CALIBRATION_ROWS, :-1]))
        sums = reference.row_sums(predictor)
        check_sums(sums.kl, f"the {name} of learning")
        kl[name] = float(np.sum(sums.kl)) / targets
    return kl


def _begin(options: LearnOptions, asked: dict[str, Any]) -> bool:
    """Prepares --out for this run; returns whether it already holds the finished fits."""
    out, place = options.out, options.out / PROGRESS
    logs = _logs(options)
    if options.overwrite:
        _check_no_others(out, PROGRESS, ABOUT, ARRAYS, *logs)
        shutil.rmtree(place, ignore_errors=True)
        for name in (ABOUT, ARRAYS):
            (out / name).unlink(missing_ok=True)
    finished = (out / ABOUT).is_file()
    if not finished and not (place / BEGUN).is_file():
        _check_no_others(out, PROGRESS, *logs)
        files.write_whole(place / BEGUN, files.to_json(asked))
        return False
    begun = read_about(out) if finished else read_json(place / BEGUN)
    for name, value in asked.items():
        was = begun.get(name)
        if was != value:
            was = was if isinstance(was, dict) else {}
            part = next((n for n in value if was.get(n) != value[n]), "")
            what = f"--{part.replace('_', '-')}" if name == "learn" else f"{name} {part}"
            raise ValueError(
                f"{out} was begun with {what} {_words(was.get(part))}, not "
                f"{_words(value.get(part))}: give that, another --out, or --overwrite to start anew"
            )
    return finished


def _logs(options: LearnOptions) -> tuple[str, ...]:
    """The name in --out of what --tensorboard writes, if it writes there.

    Raises:
      ValueError: It would be among the files of learning.
    """
    if options.tensorboard is None:
        return ()
    logs, out = options.tensorboard.resolve(), options.out.resolve()
    if logs in (out, out / PROGRESS) or out / PROGRESS in logs.parents:
        raise ValueError(
            f"--tensorboard {options.tensorboard} has files of learning: give a directory of its "
            f"own, as {options.out / 'logs'}"
        )
    return logs.relative_to(out).parts[:1] if out in logs.parents else ()


def _check_no_others(out: Path, *names: str) -> None:
    """Raises ValueError if a directory holds more than these, the lock and what a kill left."""
    found = {path.name for path in out.iterdir() if not path.name.startswith(".fits.")}
    if found - {*names, LOCK}:
        raise ValueError(f"{out} holds other files: give an empty or new directory")


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def run(options: LearnOptions) -> int:
    """Runs the command and prints the held-out KL; returns the exit code."""
    if options.distributed and options.through == "site":
        raise ValueError(
            "--distributed shares the rows of a batch, and those of a site are small: leave it "
            "out, or learn --through block or model"
        )
    with as_one_of_several(options, shared=True) as own:
        return _run(own)


def _run(options: LearnOptions) -> int:
    if options.text and (used := decoded(options.model)) is not None:
        print(used, file=sys.stderr)
    directory = options.model or testbed.directory()
    if options.through == "model" and fuses_attention(load_config(directory)):
        print("attention runs in cuDNN's kernels, in bfloat16", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        _logs(options)  # refuses what it must not write to
        if (options.tensorboard or options.wandb) and options.through == "site":
            raise ValueError(
                "--tensorboard and --wandb show losses, which learning site by site does not give: "
                "leave them out, or give --through block or model"
            )
        loggers: list[Callback] = []
        if options.tensorboard and is_first():
            loggers.append(stack.enter_context(tensorboard(options.tensorboard)))
        if options.wandb and is_first():
            config = {field.name: getattr(options, field.name) for field in SETTINGS}
            loggers.append(stack.enter_context(wandb(options.wandb, config=config)))
        progress = stack.enter_context(progress_bar(options.terminal))
        about = learn_fits(options, progress, each(*loggers))
    options.terminal.give(about, lambda: _show(about, options.out))
    return 0


def _show(about: dict[str, Any], out: Path) -> None:
    """Prints what was learned, and the held-out KL."""
    how = about["learn"]
    what = f"{' and '.join(how['moves'])} from {how['start']}, through the {how['through']}"
    print(f"{about['model']['name']}: {what}, {how['steps']} steps")
    if kl := about["held_out_kl"]:
        print(f"held-out KL: {kl['start']:.5f} at the start, {kl['end']:.5f} at the end")
    print(f"Written to {out}; give it to duquantpp quantize --fits.")
