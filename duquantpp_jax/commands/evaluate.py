"""`duquantpp evaluate`: perplexity of a model on a text, and its distance from a reference.

Protocols are in evaluation/rows.py, equations in evaluation/predict.py. Intervals are over text,
clustered by document or by row (evaluation/intervals.py).
"""

import contextlib
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from duquantpp_jax import files
from duquantpp_jax.checkpoints import load_any, load_tokenizer
from duquantpp_jax.checkpoints.packed import said
from duquantpp_jax.commands.hosts import as_one_of_several
from duquantpp_jax.commands.options.evaluate import EvaluateOptions
from duquantpp_jax.commands.progress import Step, progress_bar
from duquantpp_jax.evaluation import Predictor, Reference, RowSums, clusters, estimate, rows_of_text
from duquantpp_jax.evaluation.intervals import clustered
from duquantpp_jax.evaluation.predict import check_sums
from duquantpp_jax.evaluation.rows import PROTOCOLS, Protocol, Rows, read_text, rows_for_targets
from duquantpp_jax.evaluation.subject import (
    check_unchanged,
    environment,
    model_and_hash,
    name_and_hash,
)
from duquantpp_jax.files.processes import only_process
from duquantpp_jax.kernels.flash_attention.api import obstacle
from duquantpp_jax.lab.table import empty
from duquantpp_jax.models import DecoderConfig
from duquantpp_jax.models.decoder import COMPUTE
from duquantpp_jax.ptq import stores as cache
from duquantpp_jax.ptq.layout import CUT, implemented, kernels_here
from duquantpp_jax.ptq.sharding import host_memory, mesh_of
from duquantpp_jax.recipes import import_modules, known

MEASURES = {
    "perplexity": "perplexity",
    "nll": "NLL, nats",
    "reference_perplexity": "perplexity of the reference",
    "kl": "KL(reference || model), nats",
    "excess_nll": "NLL - reference's, nats",
    "agreement": "same first token, share",
}
"""Measures in the results, and their headings in the table."""


def evaluate(options: EvaluateOptions, progress: Step = lambda *_: None) -> dict[str, Any]:
    """Runs the evaluation; returns the results, as `--out` writes them."""
    import_modules(options.imports)
    if options.text is None:
        raise ValueError("give --text FILE to evaluate on, or --tasks NAME ...")
    if options.limit is not None or options.download:
        raise ValueError("--limit and --download are about --tasks: leave them out")
    if options.rotate_keys and options.cache is None:
        raise ValueError("--rotate-keys is about cached keys: give --cache too")
    text, about_text = read_text(options.text, options.text_key), name_and_hash(options.text)
    mesh = None if options.mesh is None else mesh_of(options.mesh)
    model = model_and_hash(options.model)
    predictor = _loaded(options, mesh, options.model, options.activation_format)
    check_unchanged(options.model, model)
    config = predictor.model.config
    protocol = _protocol(options, config)
    if options.attention == "triton":
        length, dtype = protocol.window - 1 + protocol.bos, COMPUTE[options.compute]
        if why := obstacle(length, config.head_dim, dtype):
            raise ValueError(f"--attention triton cannot run: {why}; leave it out")
    tokenizer = load_tokenizer(options.model, config)
    rows = rows_of_text(text, tokenizer, config.bos_token_id, protocol, targets=options.tokens)
    every = max(1, len(rows.documents)) * rows.targets  # a text without a row is refused
    targets = every if options.tokens is None else options.tokens
    rows = rows_for_targets(rows, targets, str(options.text))
    reference = about_reference = None
    if options.reference is not None:
        same = options.reference.resolve() == options.model.resolve()
        same = same and options.activation_format is None
        about_reference = model if same else model_and_hash(options.reference)
        reference = predictor if same else _loaded(options, mesh, options.reference)
        check_unchanged(options.reference, about_reference)
        if (size := reference.model.config.vocab_size) != config.vocab_size:
            raise ValueError(
                f"{options.reference} has {size} tokens and {options.model} has "
                f"{config.vocab_size}: give a --reference of the same vocabulary"
            )
    if options.cache is not None:
        store = cache.store(options.cache, config.head_dim, rotate_keys=options.rotate_keys)
        predictor = dataclasses.replace(predictor, store=store)
    step = functools.partial(progress, "evaluating")
    sums = reference and Reference(reference, rows.tokens, mesh=mesh).row_sums(predictor, step)
    nll = sums.nll if sums else Reference(predictor, rows.tokens, mesh=mesh).nll(step)
    unit, cluster = clusters(rows.documents)
    return {
        "schema": 2,
        "targets": rows.tokens.shape[0] * rows.targets,
        **_measures(nll, sums, rows, cluster),
        "clusters": {"unit": unit, "count": len(np.unique(cluster))},
        "interval": "text",
        "environment": environment(),
        "options": {
            "text": about_text,
            "text_key": options.text_key,
            "protocol": options.protocol,
            "window": protocol.window,
            "bos": protocol.bos,
            "cache": options.cache,
            "rotate_keys": options.rotate_keys,
            "compute": options.compute,
            "implementation": options.implementation,
            "attention": options.attention,
            "packed": said(options.model, predictor.linear),
        },
        "model": model,
        "reference": about_reference,
    }


def _loaded(
    options: EvaluateOptions, mesh: Mesh | None, directory: Path, inputs: str | None = None
) -> Predictor:
    """The model of a directory, whose matrix products are of the type that is asked for."""
    with host_memory(mesh):
        decoder, linear, state = load_any(directory, inputs)
    named = options.implementation  # the reference may be in float, which has no kernels
    if named == "xla" or directory == options.model:
        linear = implemented(linear, named)
    model = decoder.computing(COMPUTE[options.compute])
    attention = options.attention
    if attention == "triton" and directory != options.model:  # what it takes is asked of the model
        attention = None
    return Predictor(model, linear, state, attention=attention)


def _protocol(options: EvaluateOptions, config: DecoderConfig) -> Protocol:
    """The protocol of that name, with the options that change it."""
    preset = PROTOCOLS[known("protocol", options.protocol, PROTOCOLS)]
    if options.bos and options.no_bos:
        raise ValueError("--bos and --no-bos were both given: give one of them")
    bos = options.bos or (preset.bos and not options.no_bos)
    if bos and config.bos_token_id is None:
        raise ValueError(
            f"{options.model}/config.json names no bos_token_id to put before every row: "
            "give --no-bos"
        )
    room = config.max_position_embeddings - bos
    window = min(preset.window, room) if options.window is None else options.window
    if not 2 - bos <= window <= room:
        raise ValueError(
            f"--window {window} is out of range: this model has {config.max_position_embeddings} "
            f"positions, so that a row may have {2 - bos} to {room} ids of text"
        )
    return Protocol(preset.stream, window, bos)


def _measures(
    nll_sums: np.ndarray, sums: RowSums | None, rows: Rows, cluster: np.ndarray
) -> dict[str, Any]:
    """Means over targets, each with what is possible of its 95 % interval."""

    def mean(row_sums: np.ndarray, least: float = 0.0, most: float = np.inf) -> dict[str, Any]:
        check_sums(row_sums, "the model")
        value, ci95, *_ = estimate({0: row_sums / rows.targets}, cluster)
        # A t interval of few rows also covers values that no text can have.
        possible = ci95 and (max(ci95[0], min(least, value)), min(ci95[1], max(most, value)))
        return {"value": value, "ci95": possible}

    nll = mean(nll_sums)
    bounds = nll["ci95"] and np.exp(nll["ci95"]).tolist()
    measures = {"perplexity": {"value": float(np.exp(nll["value"])), "ci95": bounds}, "nll": nll}
    if sums is not None:
        before = float(np.exp(np.sum(sums.reference_nll) / rows.tokens[:, 1:].size))
        measures |= {
            "kl": mean(sums.kl),
            "excess_nll": mean(sums.nll - sums.reference_nll, -np.inf),
            "agreement": mean(sums.agreement, most=1.0),
            "reference_perplexity": {"value": before, "ci95": None},
        }
    return measures


def summary(results: dict[str, Any]) -> tuple[str, Table]:
    """A description of the evaluation and a table of its measures, for a terminal."""
    chosen, clusters = results["options"], results["clusters"]
    cached = f", cache in {chosen['cache']}" if chosen["cache"] else ""
    cached += ", keys rotated" if chosen["rotate_keys"] else ""
    cached += ", products in bf16" if chosen["compute"] == "bf16" else ""
    cached += f", {chosen['packed']}" if chosen["packed"] else ""
    said = (
        f"{results['model']['name']}{cached}: {results['targets']:,} targets of "
        f"{chosen['text']['name']}, {chosen['protocol']}, windows of {chosen['window']} "
        f"{'after a' if chosen['bos'] else 'without'} BOS.\n"
        f"95 % intervals {clustered(clusters['unit'], clusters['count'])}."
    )
    table = empty("", right=("mean", "95 % interval"), wrap=True)
    for name, what in MEASURES.items():
        if name in results:
            bounds = results[name]["ci95"]
            interval = "" if bounds is None else f"{bounds[0]:.5f} to {bounds[1]:.5f}"
            table.add_row(what, f"{results[name]['value']:.5f}", interval)
    return said, table


def run(options: EvaluateOptions) -> int:
    """Runs the command and prints the results; returns the exit code."""
    if options.distributed and (options.tasks or options.mesh):
        raise ValueError("--distributed shares the rows of a text: leave --tasks and --mesh out")
    for name in ("implementation", "attention"):
        if options.tasks and getattr(options, name) is not None:
            raise ValueError(f"--{name} is about --text: leave it out")
    if options.mesh and "triton" in (options.implementation, options.attention):
        raise ValueError(CUT)
    with as_one_of_several(options) as own:
        return _run(own)


def _run(options: EvaluateOptions) -> int:
    with contextlib.ExitStack() as stack:
        if options.out is not None:
            files.check_writable(options.out.parent)
            stack.enter_context(only_process(options.out, single=True))
        attention = None if options.attention is None else options.attention == "triton"
        used = kernels_here(attention=attention, inputs=options.implementation != "xla")
        if used is not None and not options.mesh:
            print(used, file=sys.stderr)
        if options.tasks:
            from duquantpp_jax.commands.tasks import scores_on_tasks, table_of_tasks

            results, described = scores_on_tasks(options), table_of_tasks
        else:
            described = summary
            with progress_bar(options.terminal) as progress:
                results = evaluate(options, progress)
        if options.out is not None:
            files.write_whole(options.out, files.to_json(results))

    def show() -> None:
        said, table = described(results)
        print(said)
        Console(width=100).print(table)

    options.terminal.give(results, show)
    return 0
