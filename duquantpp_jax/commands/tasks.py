"""`duquantpp evaluate --tasks`: a model's scores on tasks of lm-eval.

Nothing is downloaded unless it is asked for; the tasks gutenberg_... are in the package.
"""

import contextlib
import dataclasses
import os
import sys
from typing import Any

from rich.table import Table

from duquantpp_jax.checkpoints.packed import said
from duquantpp_jax.commands.options.evaluate import EvaluateOptions
from duquantpp_jax.evaluation import harness
from duquantpp_jax.evaluation.subject import environment, model_and_hash
from duquantpp_jax.lab.table import empty

USED = {"model", "tasks", "limit", "download", "cache", "activation_format", "out", "imports"}
USED |= {"terminal"}
"""Options that say something of tasks; the others are about --text."""
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def scores_on_tasks(options: EvaluateOptions) -> dict[str, Any]:
    """The results of a model on tasks, as `--out` writes them.

    Raises:
      ValueError: lm-eval is not installed, a task is unknown or cannot be read, or an option has
        nothing to do with tasks.
    """
    for field in dataclasses.fields(options):
        if field.name not in USED and getattr(options, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise ValueError(f"--{name} is about --text, and --tasks was given: leave one out")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit {options.limit}: give at least one item")
    harness.needed()
    for name in () if options.download else OFFLINE:
        os.environ[name] = "1"
    os.environ["DISABLE_MULTIPROC"] = "1"  # it would fork, and JAX has threads

    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    own = all(name.startswith("gutenberg") for name in options.tasks)
    manager = TaskManager(include_path=str(harness.TASKS), include_defaults=not own)
    known = {*manager.all_tasks}
    if unknown := [name for name in options.tasks if name not in known]:
        raise ValueError(
            f"unknown task {unknown[0]!r}: give names that `lm-eval ls tasks` prints, or gutenberg "
            "for the five that need no network"
        )
    model = harness.model_class()(
        str(options.model),
        activation_format=options.activation_format,
        cache=options.cache or "float32",
        imports="+".join(options.imports),
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout has the result alone
            found = lm_eval.simple_evaluate(
                model, tasks=list(options.tasks), task_manager=manager, limit=options.limit,
                log_samples=False, bootstrap_iters=1000,
            )  # fmt: skip
    except ConnectionError as error:
        raise ValueError(
            f"{error}: the data is not on this machine: give --download to fetch it"
        ) from None
    return {
        "schema": 2,
        "tasks": {name: _measures(found["results"][name]) for name in sorted(found["results"])},
        "items": {name: counts["effective"] for name, counts in found["n-samples"].items()},
        "environment": environment(),
        "options": {
            "cache": options.cache or "float32",
            "limit": options.limit,
            "packed": said(options.model, model.predictor.linear),
        },
        "model": model_and_hash(options.model),
    }


def _measures(result: dict[str, Any]) -> dict[str, Any]:
    """Value and standard error (None where lm-eval has none) of each measure of a task."""
    measures = {}
    for name, value in result.items():
        metric, _, chosen = name.partition(",")
        if chosen and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = result.get(f"{metric}_stderr,{chosen}")
            error = float(error) if isinstance(error, int | float) else None
            measures[metric] = {"value": float(value), "stderr": error}
    return measures


def table_of_tasks(results: dict[str, Any]) -> tuple[str, Table]:
    """A description of the scores and their table, for a terminal."""
    table = empty("", right=("items", "value", "standard error"), wrap=True)
    for task, measures in results["tasks"].items():
        for name, measure in measures.items():
            error = measure["stderr"]
            row = str(results["items"].get(task, "")), f"{measure['value']:.4f}"
            table.add_row(f"{task}: {name}", *row, "" if error is None else f"{error:.4f}")
    options = results["options"]
    about = f"{results['model']['name']}, key-value cache in {options['cache']}"
    return f"{about}{', ' + options['packed'] if options['packed'] else ''}.", table
