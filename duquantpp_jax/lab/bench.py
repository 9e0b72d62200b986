"""What measurements on one subject share, so that none of it is done twice.

    calibrate -> fit -> quantize -> (refine) -> measure

`Bench` does these for one cell after another and keeps what the next may want: the model, the
rows, the Stats, the last fit, and the float model's log-probabilities up to a stated number of
bytes (batches beyond it are computed anew, cell by cell). Everything else that cells share is
compiled code, which is kept for as long as only arrays differ.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Integer

from duquantpp_jax.checkpoints import load, sha256, testbed
from duquantpp_jax.checkpoints.fits import load_fits
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.core import Fitted, Needs, Stats
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.evaluation.rows import TARGETS, Rows
from duquantpp_jax.evaluation.sqnr import mean_sqnr
from duquantpp_jax.evaluation.subject import check_texts, load_rows
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.learning.refine import refine
from duquantpp_jax.models import Decoder
from duquantpp_jax.ptq.calibration import calibrate
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.report import costs_by_site
from duquantpp_jax.ptq.stream import Turn
from duquantpp_jax.ptq.walk import fit_decoder, quantize_decoder

CACHE_BYTES = 2 << 30
"""Default bound on log-probabilities kept, on each device that computes."""


def fit(plan: Plan, model: Decoder, stats: Mapping[str, Stats]) -> tuple[dict[str, Fitted], float]:
    """What the plan's recipes fit at every site, and in how many seconds."""
    began = time.perf_counter()
    fits = jax.block_until_ready(fit_decoder(plan, model, stats))
    return fits, time.perf_counter() - began


def quantize(
    plan: Plan,
    model: Decoder,
    rows: Integer[np.ndarray, "rows length"],
    stats: Mapping[str, Stats],
    fits: Mapping[str, Fitted],
) -> Predictor:
    """Moves and rounds every site, as `duquantpp quantize` does.

    Args:
      plan: What is done.
      model: The float model.
      rows: Inputs of the calibration.
      stats: Of these inputs, stacked over layers.
      fits: As `fit` gives them.
    """
    plan = dataclasses.replace(plan, fits=fits)
    return Predictor(*quantize_decoder(plan, model, rows, stats=stats))


class Found(NamedTuple):
    """What one cell gave.

    Attributes:
      kl, nll, float_nll: Sums over each row's targets, in nats.
      agreement: Targets of each row at which both models put the same token first.
      documents: Number of each row's document.
      sqnr: In dB, mean over the linears that have one; None where all stay in float.
      online: As of `ptq.report.costs_by_site`; None where all stay in float.
      seconds: To fit (of the cell that fitted what this one may share), and in all.
    """

    kl: Float32[np.ndarray, " rows"]
    nll: Float32[np.ndarray, " rows"]
    float_nll: Float32[np.ndarray, " rows"]
    agreement: Float32[np.ndarray, " rows"]
    documents: Integer[np.ndarray, " rows"]
    sqnr: float | None
    online: dict[str, dict[str, float]] | None
    seconds: dict[str, float]


class Bench:
    """Measures one cell after another; cells in `order` share most.

    What a cell gives does not depend on which cells were measured before it.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES):
        self._cache_bytes = cache_bytes
        self._kept: dict[str, tuple[Any, Any]] = {}

    def _latest(self, what: str, key: Any, make: Callable[[], Any]) -> Any:
        """make(), or what it gave last time if the key is the same; one value of each kind."""
        if self._kept.get(what, (None,))[0] != (key,):
            self._kept.pop(what, None)  # before the new one is made: both may not fit
            self._kept[what] = ((key,), make())
        return self._kept[what][1]

    def run(self, cell: Cell) -> Found:
        """Measures one cell.

        Raises:
          ValueError: Bad input, or a result that is NaN or Inf; one line.
        """
        began = time.perf_counter()
        model = self._latest("model", _of_model(cell), lambda: _model(cell))
        rows = self._latest("rows", _of_rows(cell), lambda: _evaluation(cell))
        reference = self._latest(
            "reference",
            (_of_model(cell), _of_rows(cell), cell.batch_rows),
            lambda: Reference(
                Predictor(model),
                rows.tokens,
                batch_rows=cell.batch_rows,
                keep_bytes=self._cache_bytes,
            ),
        )
        start, plan = self._start(cell)
        predictor, fit_seconds, sqnr, online = Predictor(start), 0.0, None, None
        if plan:
            fits, fit_seconds, calibration, stats = self._fit(cell, plan, start)
            predictor = quantize(plan, start, calibration, stats, fits)
            if cell.refine:
                state = refine(plan, start, predictor.state, calibration, cell.refine)
                predictor = dataclasses.replace(predictor, state=state)
            sqnr = mean_sqnr(predictor, rows.tokens[: reference.batch_rows])
            online = costs_by_site(predictor.state)
        predictor = dataclasses.replace(predictor, store=cell.store)
        sums = reference.row_sums(predictor)
        if not np.isfinite([np.sum(sums.kl), np.sum(sums.nll), sqnr or 0.0]).all():
            raise ValueError(f"{cell.labels()} gave NaN or Inf: no result is reported")
        return Found(
            kl=sums.kl.astype(np.float32),
            nll=sums.nll.astype(np.float32),
            float_nll=sums.reference_nll.astype(np.float32),
            agreement=sums.agreement.astype(np.float32),
            documents=rows.documents,
            sqnr=sqnr,
            online=online,
            seconds={"fit": fit_seconds, "total": time.perf_counter() - began},
        )

    def fitted(self, cell: Cell) -> tuple[dict[str, Fitted], dict[str, Stats]]:
        """What the cell's recipe fits at every site, and the Stats that it saw; for nothing right
        after `run` of the cell.

        Raises:
          ValueError: The cell's linears stay in float.
        """
        start, plan = self._start(cell)
        if plan is None:
            raise ValueError(f"{cell.labels()} fits nothing: its linears stay in float")
        fits, _, _, stats = self._fit(cell, plan, start)
        return fits, stats

    def _start(self, cell: Cell) -> tuple[Decoder, Plan | None]:
        """The float model that is quantized, turned if the cell says so, and the plan for it."""
        model = self._latest("model", _of_model(cell), lambda: _model(cell))
        if cell.turn != Turn():
            checkpoint = Checkpoint(cell.model or testbed.directory(), cell.turn)
            model = self._latest("turned", (cell.model, cell.turn), checkpoint.decoder)
        if (recipe := cell.method()) is None:
            return model, None
        plan = Plan.of(model.config, recipe, pad=cell.pad, seed=cell.seed, fuse=cell.fuse)
        return model, plan

    def _fit(
        self, cell: Cell, plan: Plan, model: Decoder
    ) -> tuple[dict[str, Fitted], float, np.ndarray, dict[str, Stats]]:
        """The fit, its seconds, and the calibration inputs and Stats that it saw."""
        rows = self._latest("calibration", _of_calibration(cell), lambda: _calibration(cell))
        widths, recipe = plan.widths(0), plan.recipes["mlp_in"]
        inputs = (_of_model(cell), cell.turn, _of_calibration(cell), tuple(widths.items()))
        stats = self._latest("stats", inputs, dict)
        if recipe.needs not in stats:
            stats[recipe.needs] = calibrate(model, rows, widths, needs=recipe.needs)
        # A fit that does not look at the formats is the same under every rule.
        formats = (recipe.weight_format, recipe.activation_format)
        seen = formats if Needs.FORMATS in recipe.needs else recipe.activation_format.block_size
        fits, seconds = self._latest(
            "fit",
            (inputs, recipe.fit, cell.fits, cell.seed, seen),
            lambda: _load(cell) if cell.fits else fit(plan, model, stats[recipe.needs]),
        )
        return fits, seconds, rows, stats[recipe.needs]


def order(cells: list[Cell]) -> list[Cell]:
    """The cells so that neighbours share: the model, then the rows, the calibration, the fit."""

    def key(cell: Cell) -> tuple[str, ...]:
        parts = (_of_model(cell), _of_rows(cell), _of_calibration(cell), cell.pad)
        recipe = cell.method()
        fit = (cell.turn, recipe and recipe.fit, cell.fits)
        return (*map(repr, parts), repr(fit), f"{cell.seed:09d}")

    return sorted(cells, key=key)  # stable: within a fit, as given


def _of_model(cell: Cell) -> Any:
    return cell.model, cell.change


def _of_rows(cell: Cell) -> Any:
    return cell.model, cell.text, cell.tokens


def _of_calibration(cell: Cell) -> Any:
    return cell.model, cell.calibration_text, cell.calibration_tokens


def _model(cell: Cell) -> Decoder:
    check_texts(cell.model, cell.text, cell.calibration_text)
    model = load(cell.model or testbed.directory())
    return model if cell.change is None else cell.change(model)


def _load(cell: Cell) -> tuple[dict[str, Fitted], float]:
    """The fits that are given, which take no time to fit."""
    directory = cell.model or testbed.directory()
    return load_fits(Path(cell.fits or ""), sha256(directory))[0], 0.0


def _evaluation(cell: Cell) -> Rows:
    return load_rows(cell.model, cell.text, cell.tokens, "evaluation")


def _calibration(cell: Cell) -> Integer[np.ndarray, "rows length"]:
    """Inputs to calibrate on: whole rows, or the start of one.

    Raises:
      ValueError: The number is neither.
    """
    wanted = cell.calibration_tokens
    if wanted < 1 or (wanted > TARGETS and wanted % TARGETS):
        raise ValueError(
            f"{wanted} calibration tokens are not whole rows: give a multiple of {TARGETS}, "
            "or fewer for the start of one row"
        )
    rows = load_rows(cell.model, cell.calibration_text, max(wanted, TARGETS), "calibration")
    return rows.tokens[:, : min(wanted, TARGETS)]
