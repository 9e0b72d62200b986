"""A cell: all choices of one measurement, frozen, and named by the hash of its configuration.

The hash covers contents: of the model and the texts the bytes, of the fit, the rounding and the
formats the class, the fields and, from outside the package, the source file. It leaves out labels
and places. So files may move, and a recipe by its name and the same fit as an object are one cell.
"""

import dataclasses
import enum
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from duquantpp_jax import files
from duquantpp_jax.checkpoints import sha256 as model_sha256
from duquantpp_jax.checkpoints import testbed
from duquantpp_jax.checkpoints.fits import other_formats, read_about
from duquantpp_jax.checkpoints.source import PACKAGES, source
from duquantpp_jax.commands.options.common import MODEL, Plain
from duquantpp_jax.core import Element, Fit, Format, Recipe, Rounding
from duquantpp_jax.evaluation.rows import TARGETS, is_lines
from duquantpp_jax.formats.tensors import ELEMENTS
from duquantpp_jax.models import Decoder, Store
from duquantpp_jax.ptq import stream
from duquantpp_jax.recipes import checked_seed, format_name, recipe

SCHEMA = 2
"""Version of tables."""
RECORDS = 4
"""Version of configurations and records; cells with records of another version run again."""
FLOAT = "float"
"""The format of cells whose linears stay in float."""
DEFAULT_FORMAT = "mxfp4"


@dataclasses.dataclass(frozen=True)
class Cell(Plain):
    """One configuration to measure. Frozen and hashable, without arrays.

    Attributes:
      recipe: Name of the method in tables, and in duquantpp_jax.recipes unless `fit` or `fits` is
        given.
      format: Format of weights and activations, by its name for `recipes.find_format`; only a
        label if both formats are given. "float" leaves all linears as they are, so that only
        `store` is measured.
      fits: Directory that `duquantpp learn` wrote for this model, in place of a fit.
      rounding: How moved weights are rounded, or its name.
      weight_format, activation_format: Name or format of one side, in place of `format`.
      store: How keys and values are kept; None keeps them as they are.
      change: Called with the float model before anything else; its result is the float model. A
        frozen dataclass, so that it has a name and numbers.
      model: Hugging Face directory; None is the embedded model.
      text, calibration_text: Text or .jsonl files (docs/evaluate.md); None is what the package
        embeds. To calibrate, "model" is rows that the model, as it is stored, writes itself.
      tokens: Targets to evaluate on, cut down to whole rows of 511.
      calibration_tokens: Inputs from the start of the calibration text: whole rows of 511, or the
        start of one row.
      batch_rows: Rows evaluated at once; under log256, whose scale spans a batch, part of the
        result.
      pad: Widen linear inputs that blocks do not divide, with zeros (exact).
      fuse, sequential, include, exclude: As in `ptq.plan.Plan`.
      rotate_stream, rotate_values: By what the model is turned before it is quantized, as of
        `ptq.stream.Turn`; it is compared with the float model as it is.
      refine: Steps that the transforms learn after rounding, as in `learning.refine`.
      text_key: Of the text in .jsonl files.
    """

    recipe: str
    format: str = DEFAULT_FORMAT
    _: dataclasses.KW_ONLY
    fit: Fit | None = None
    fits: Path | None = None
    rounding: str | Rounding = "rtn"
    weight_format: str | Format | None = None
    activation_format: str | Format | None = None
    store: Store | None = None
    seed: int = 0
    change: Callable[[Decoder], Decoder] | None = None
    model: Path | None = None
    text: Path | None = None
    calibration_text: Path | None = None
    tokens: int = 128 * TARGETS
    calibration_tokens: int = 64 * TARGETS
    batch_rows: int = 16
    pad: bool = False
    fuse: bool = False
    sequential: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    rotate_stream: str | None = None
    rotate_values: str | None = None
    refine: int = 0
    text_key: str = "text"

    def method(self) -> Recipe | None:
        """The recipe that this cell measures; None if linears stay in float."""
        if self.format == FLOAT and self.weight_format is self.activation_format is None:
            return None
        fit = self.fit or (self.recipe if self.fits is None else "rtn")  # given fits replace it
        sides = {"weight_format": self.weight_format, "activation_format": self.activation_format}
        return recipe(fit, self.format, self.rounding, **sides)

    @property
    def format_label(self) -> str:
        """The formats in a table: `format`, unless names of the sides' formats replace it."""
        sides = (self.weight_format, self.activation_format)
        if not any(isinstance(side, str) for side in sides):
            return self.format
        weight, activation = (
            format_name(side) if isinstance(side, Format) else side or self.format for side in sides
        )
        return weight if weight == activation else f"{weight} weights, {activation} activations"

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn, so that the result depends on the seed."""
        method, drawn = self.method(), self.refine > 0 or self.calibration_text == MODEL
        return self.turn.draws or (method is not None and (method.draws or drawn))

    @property
    def turn(self) -> stream.Turn:
        """The rotations of the model; their seed is 0 if none is random."""
        turn = stream.Turn(self.rotate_stream, self.rotate_values)
        if turn != stream.Turn() and self.change is not None:
            raise ValueError("rotations turn a model as it is stored: give no change with them")
        return dataclasses.replace(turn, seed=self.seed) if turn.draws else turn

    @property
    def row(self) -> str:
        """The method in a table: the recipe, and how long it was refined."""
        return f"{self.recipe}, refined {self.refine} steps" if self.refine else self.recipe

    @property
    def warning(self) -> str | None:
        """One line if the fits were learned for other formats than the cell's; else None."""
        if self.fits is None or (method := self.method()) is None:
            return None
        formats = map(format_name, (method.weight_format, method.activation_format))
        return other_formats(self._about_fits(), *formats)

    def _about_fits(self) -> dict[str, Any]:
        given = self.fit is not None or self.change is not None or self.method() is None
        given |= self.turn != stream.Turn()
        if self.fits is None or given:
            raise ValueError(
                f"{self.labels()}: fits move linears of the model as it is: give a format, and no "
                "fit, change or rotation"
            )
        return read_about(self.fits, _model_hash(self.model))

    def configuration(self) -> dict[str, Any]:
        """All that the result depends on, as JSON; equal for cells of equal results.

        Raises:
          ValueError: A name is unknown, a file is missing, or a part is not a frozen dataclass of
            plain values.
        """
        method, own = self.method(), self.calibration_text == MODEL
        found = {
            "schema": RECORDS,
            "method": canonical(method),
            "store": canonical(self.store),
            "seed": checked_seed(self.seed),
            "change": canonical(self.change),
            "model": _model_hash(self.model),
            "text": _text_hash(self.text),
            "calibration_text": str(MODEL) if own else _text_hash(self.calibration_text),
            "rows": self.tokens // TARGETS,
            "calibration_tokens": self.calibration_tokens,
            "batch_rows": self.batch_rows,
            "pad": self.pad,
        }
        found["beside"] = source(self.model or testbed.directory()).beside()
        # Fields that came later appear only if they are given: names of recorded cells stay.
        turn = self.turn
        later = {"fuse": self.fuse, "rotate_stream": turn.stream, "rotate_values": turn.values}
        later |= {"sequential": self.sequential}
        later |= {"refine": self.refine, "fits": self.fits and self._about_fits()["sha256"]}
        later |= {"include": self.include != ("*",) and self.include, "exclude": self.exclude}
        later |= {"text_key": self.text_key != "text" and self.text_key}
        return found | {name: canonical(value) for name, value in later.items() if value}

    @functools.cached_property
    def digest(self) -> str:
        """Name of the cell's files: 16 hexadecimal digits of the configuration's SHA-256, when it
        was first asked for."""
        return digest_of(self.configuration())

    def check_unchanged(self) -> None:
        """Raises ValueError if what it reads is other than when `digest` was first asked for."""
        with files.refusing(self.model or Path("the model"), "give a model and texts that stay"):
            now = dataclasses.replace(self).digest
        if now != self.digest:
            raise ValueError(
                f"{self.labels()}: model, texts or fits were changed while they were read: give "
                "those that stay"
            )

    def labels(self) -> str:
        """The cell in a few words."""
        return f"{self.row}, {self.format_label}, seed {self.seed}"


def digest_of(configuration: Mapping[str, Any]) -> str:
    """The name of the files of a configuration."""
    text = json.dumps(configuration, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def canonical(value: Any) -> Any:
    """A frozen value as JSON: a dataclass by its class name and fields, a function by its name.

    Raises:
      ValueError: The value has no such form (an array, a lambda, an object of another kind).
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Element() if ELEMENTS.get(value.name) == value:
            return value.name
        case enum.Enum():
            return value.value
        case tuple() | list():
            return [canonical(item) for item in value]
        case Mapping():
            return {str(key): canonical(item) for key, item in value.items()}
        case Path():
            hashed = _model_hash if value.is_dir() or str(value) in PACKAGES else _text_hash
            return str(MODEL) if value == MODEL else hashed(value)
        case np.dtype():
            return value.name
        case type():
            return {"is": value.__qualname__}
    if dataclasses.is_dataclass(value):
        fields = {f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return _named(type(value)) | fields
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):
        return _named(value)
    raise ValueError(
        f"{value!r:.60} has no name for a configuration: give a frozen dataclass of plain values"
    )


def _named(kind: Any) -> dict[str, str]:
    """The name of a class or function, and the hash of its file if that is not in the package."""
    sources = files.module_hashes(kind.__module__)
    return {"is": kind.__qualname__} | ({"source": sources[kind.__module__]} if sources else {})


def _model_hash(model: Path | None) -> str:
    return model_sha256(model or testbed.directory())


def _text_hash(text: Path | None) -> str:
    path = text or testbed.directory() / "tokens.npz"
    try:
        return files.sha256(path) + (" by lines" if is_lines(path) else "")
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): give a text file") from None
