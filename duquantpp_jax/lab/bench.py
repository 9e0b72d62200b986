"""The bench measures cells one after another and keeps what the next cell may share.

    calibrate -> fit -> quantize -> (refine) -> measure

It keeps the last model, rows, Stats and fit, and the float model's log-probabilities up to a bound
in bytes; batches beyond the bound are computed again for each cell. Cells that differ in arrays
alone share compiled code, too.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Integer

from duquantpp_jax.checkpoints import load, sha256, testbed
from duquantpp_jax.checkpoints.fits import load_fits
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.commands.options.common import MODEL
from duquantpp_jax.core import Fitted, Needs, Stats
from duquantpp_jax.evaluation import Predictor, Reference, RowSums, mean_sqnr
from duquantpp_jax.evaluation.predict import check_sums
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import check_texts, load_rows
from duquantpp_jax.files.processes import give_back_memory
from duquantpp_jax.lab.cells import Cell
from duquantpp_jax.learning import refine as refining
from duquantpp_jax.models import Decoder, DecoderConfig
from duquantpp_jax.ptq import Plan, calibrate, fit_decoder, quantize_decoder
from duquantpp_jax.ptq.calibration import keep
from duquantpp_jax.ptq.report import costs_by_site
from duquantpp_jax.ptq.stream import Turn

SQNR_ROWS = 2
"""Rows of text that SQNR is measured on."""
CACHE_BYTES = 2 << 30
"""Default bound on the log-probabilities that each device keeps."""


class Found(NamedTuple):
    """The results of one cell.

    Attributes:
      sums: Over the targets of each row.
      documents: Number of each row's document.
      sqnr: In dB, mean over the linears that have one; None if all stay in float.
      online: See `ptq.report.costs_by_site`; None if all linears stay in float.
      seconds: "fit", of the cell that made the fit if cells share one (0 if it is sequential), and
        "total".
    """

    sums: RowSums
    documents: Integer[np.ndarray, " rows"]
    sqnr: float | None
    online: dict[str, dict[str, float]] | None
    seconds: dict[str, float]


class Bench:
    """Measures one cell after another; cells in `order` share most.

    The result of a cell does not depend on the cells before it.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES):
        self._cache_bytes = cache_bytes
        self._kept: dict[str, tuple[Any, Any]] = {}

    def _latest(self, what: str, key: Any, make: Callable[[], Any]) -> Any:
        """The kept value of this kind if its key is the same; else make(), which is kept."""
        if self._kept.get(what, (None,))[0] != (key,):
            self._kept.pop(what, None)  # first: there may be no memory for both
            self._kept[what] = ((key,), make())
        return self._kept[what][1]

    def run(self, cell: Cell) -> Found:
        """Measures one cell; raises ValueError for bad input, or a result that is NaN or Inf."""
        began = time.perf_counter()
        of_model, of_rows, _ = _keys(cell)
        model, start, plan = self._start(cell)
        rows = self._latest("rows", of_rows, lambda: load_rows(*of_rows))
        size, bound = cell.batch_rows, self._cache_bytes
        reference = self._latest(
            "reference",
            (of_model, of_rows, size),
            lambda: Reference(Predictor(model), rows.tokens, batch_rows=size, keep_bytes=bound),
        )
        predictor, fit_seconds, sqnr, online = Predictor(start), 0.0, None, None
        if plan:
            make = functools.partial(self._quantized, cell, plan, start)
            if cell.refine:  # which takes longer than all else: once for all texts
                predictor, fit_seconds = self._latest("refined", _off_text(cell), make)
            else:
                predictor, fit_seconds = make()
            sqnr = mean_sqnr(predictor, rows.tokens[:SQNR_ROWS])
            online = costs_by_site(predictor.state)
        predictor = dataclasses.replace(predictor, store=cell.store)
        sums = reference.row_sums(predictor)
        check_sums(sums.kl + sums.nll, cell.labels())
        if not np.isfinite(sqnr or 0.0):
            raise ValueError(f"{cell.labels()} has an SQNR of {sqnr} dB: no result is reported")
        give_back_memory()
        seconds = {"fit": fit_seconds, "total": time.perf_counter() - began}
        return Found(sums, rows.documents, sqnr, online, seconds)

    def _quantized(self, cell: Cell, plan: Plan, start: Decoder) -> tuple[Predictor, float]:
        """The quantized model, refined if the cell says so, and the seconds of its fit."""
        fit_seconds = 0.0
        if cell.sequential:  # each layer is calibrated and fitted after those before it
            fits, calibration, stats = _learned(cell), self._calibration(cell), None
        else:
            fits, fit_seconds, calibration, stats = self._fit(cell, plan, start)
        chosen = {"include": cell.include, "exclude": cell.exclude}
        if not cell.fits and (cell.include, cell.exclude) != (("*",), ()):  # fit these alone
            fits = None
        given = dataclasses.replace(plan, fits=fits, **chosen)
        predictor = Predictor(*quantize_decoder(given, start, calibration, stats=stats))
        if cell.refine:
            moves = refining.refine(given, start, predictor.state, calibration, cell.refine)
            state = refining.refitted(predictor.state, moves)
            predictor = dataclasses.replace(predictor, state=state)
        return predictor, fit_seconds

    def fitted(self, cell: Cell) -> tuple[dict[str, Fitted], dict[str, Stats]]:
        """The fits of the cell at every site, and the Stats that they were made from.

        A call after `run` of the same cell costs nothing. A cell without quantized linears raises
        ValueError, and so does a sequential one, whose fits are made while it is quantized.
        """
        _, start, plan = self._start(cell)
        if plan is None:
            raise ValueError(f"{cell.labels()} fits nothing: its linears stay in float")
        if cell.sequential:
            raise ValueError(f"{cell.labels()} keeps no fits: give a cell that is not sequential")
        fits, *_, stats = self._fit(cell, plan, start)
        return fits, stats

    def _start(self, cell: Cell) -> tuple[Decoder, Decoder, Plan | None]:
        """The float model; it as it is quantized, turned if the cell has rotations; its plan."""
        model = start = self._latest("model", _keys(cell)[0], lambda: _model(cell))
        if cell.turn != Turn():
            checkpoint = Checkpoint(cell.model or testbed.directory(), cell.turn)
            start = self._latest("turned", (cell.model, cell.turn), checkpoint.decoder)
        return model, start, _plan(cell, start.config)

    def _calibration(self, cell: Cell) -> Integer[np.ndarray, "rows length"]:
        return self._latest("calibration", _keys(cell)[2], lambda: _calibration(cell))

    def _fit(
        self, cell: Cell, plan: Plan, model: Decoder
    ) -> tuple[dict[str, Fitted], float, np.ndarray, dict[str, Stats]]:
        """The fits, their seconds, and the calibration inputs and Stats behind them."""
        of_model, _, of_calibration = _keys(cell)
        rows = self._calibration(cell)
        widths, recipe = plan.widths(0), plan.recipes["mlp_in"]
        inputs = (of_model, cell.turn, of_calibration, tuple(widths.items()))
        needs, made_for = recipe.needs & ~Needs.FORMATS, self._latest("stats", inputs, dict)
        wider = next((more for more in made_for if needs in more), needs)
        if wider not in made_for:
            made_for[needs] = calibrate(model, rows, widths, needs=needs)
        stats = {site: keep(kept, needs) for site, kept in made_for[wider].items()}
        # A fit that does not need the formats is the same under all of them.
        formats = (recipe.weight_format, recipe.activation_format)
        seen = formats if Needs.FORMATS in recipe.needs else recipe.activation_format.block_size

        def make() -> tuple[dict[str, Fitted], float]:
            if (learned := _learned(cell)) is not None:
                return learned, 0.0
            began = time.perf_counter()
            fits = jax.block_until_ready(fit_decoder(plan, model, stats))
            return fits, time.perf_counter() - began

        key = (inputs, recipe.fit, cell.fits, cell.seed, seen)
        fits, seconds = self._latest("fit", key, make)
        return fits, seconds, rows, stats


def check_cell(cell: Cell, config: DecoderConfig) -> None:
    """Raises ValueError, before anything is measured, where the cell is not for such a model."""
    if (plan := _plan(cell, cell.turn.config(config))) is not None:
        plan.check()
        if cell.refine:
            refining.check(plan)


def _plan(cell: Cell, config: DecoderConfig) -> Plan | None:
    """What the cell does to a model, but for its fits; None if it leaves all linears in float."""
    if (recipe := cell.method()) is None:
        return None
    given = {"pad": cell.pad, "seed": cell.seed, "fuse": cell.fuse, "sequential": cell.sequential}
    return Plan.of(config, recipe, **given)


def _learned(cell: Cell) -> dict[str, Fitted] | None:
    """The fits that `learn` wrote, if the cell gives them; they must be of its model."""
    if cell.fits is None:
        return None
    return load_fits(cell.fits, sha256(cell.model or testbed.directory()))[0]


def order(cells: list[Cell]) -> list[Cell]:
    """Sorts cells so that neighbours share: first the model, then rows, calibration and fit.

    Fits that need most of the Stats come first, so that one calibration serves all. Cells that are
    refined come last, those of one configuration but for the text next to each other.
    """

    def key(cell: Cell) -> tuple[str, ...]:
        recipe = cell.method()
        fit = (cell.turn, recipe and recipe.fit, cell.fits)
        needs = recipe.needs & ~Needs.FORMATS if recipe else Needs.NOTHING
        of_model, of_rows, of_calibration = _keys(cell)
        rows = _off_text(cell) if cell.refine else of_rows
        shared = (cell.refine > 0, of_model, rows, of_calibration, cell.pad, 99 - needs.value, fit)
        return (*map(repr, shared), f"{cell.seed:09d}")

    return sorted(cells, key=key)  # stable: cells of one fit stay in the order given


def _off_text(cell: Cell) -> Cell:
    """The cell without what only measuring it depends on."""
    return dataclasses.replace(cell, text=None, tokens=0, store=None)


def _keys(cell: Cell) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """All that decides the cell's model, its evaluation rows and its calibration rows."""
    rows = cell.model, cell.text, cell.tokens, "evaluation", cell.text_key
    seed = cell.seed if cell.calibration_text == MODEL else 0
    calibration = cell.model, cell.calibration_text, cell.calibration_tokens, cell.text_key, seed
    return (cell.model, cell.change), rows, calibration


def _model(cell: Cell) -> Decoder:
    check_texts(cell.model, cell.text, cell.calibration_text)
    model = load(cell.model or testbed.directory())
    return model if cell.change is None else cell.change(model)


def _calibration(cell: Cell) -> Integer[np.ndarray, "rows length"]:
    """Inputs to calibrate on: whole rows, or the start of one."""
    wanted = cell.calibration_tokens
    if wanted < 1 or (wanted > TARGETS and wanted % TARGETS):
        raise ValueError(
            f"{wanted} calibration tokens are not whole rows: give a multiple of {TARGETS}, "
            "or fewer for the start of one row"
        )
    asked = max(wanted, TARGETS), "calibration", cell.text_key, cell.seed
    rows = load_rows(cell.model, cell.calibration_text, *asked)
    return rows.tokens[:, : min(wanted, TARGETS)]
