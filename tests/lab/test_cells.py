"""A cell's name says what its result depends on, and nothing else."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from duquantpp_jax.checkpoints import sha256 as model_sha256
from duquantpp_jax.checkpoints import testbed
from duquantpp_jax.commands.ablate import AblateOptions, grid
from duquantpp_jax.commands.options.common import MODEL
from duquantpp_jax.core import ScaleRule
from duquantpp_jax.formats import MXFP4, NVFP4
from duquantpp_jax.lab.cells import Cell, canonical
from duquantpp_jax.ptq.stores import HeadStore
from duquantpp_jax.recipes import FITS, FORMATS, ROUNDINGS, RULES
from duquantpp_jax.rounding.gptq import GPTQ
from duquantpp_jax.transforms.basic import FitSmooth


def test_a_name_and_what_it_stands_for_are_one_cell():
    floor = MXFP4(scale_rule=ScaleRule.FLOOR)
    for name, fit in FITS.items():
        same = Cell("mine", "my format", fit=fit, weight_format=floor, activation_format=floor)
        assert same.digest == Cell(name).digest
    assert Cell("identity").digest == Cell("rtn").digest
    assert Cell("rtn", rounding=GPTQ()).digest == Cell("rtn", rounding="gptq").digest


def test_known_names_are_distinct_cells():
    rules = [rule for rule in (*RULES, *FORMATS) if rule not in ("mxfp4", "bf16")]
    cells = [Cell(name, rule) for name in FITS for rule in rules]
    cells += [Cell("rtn", rounding=rounding) for rounding in ROUNDINGS if rounding != "rtn"]
    assert len({cell.digest for cell in cells}) == len(cells)


@dataclasses.dataclass(frozen=True)
class Change:
    strength: float

    def __call__(self, model):
        return model


CHANGES = {
    "recipe": "smooth",
    "format": "even",
    "fit": FitSmooth(alpha=0.25),
    "rounding": "gptq",
    "weight_format": NVFP4(),
    "activation_format": NVFP4(),
    "store": HeadStore(MXFP4()),
    "seed": 1,
    "change": Change(1.0),
    "tokens": 1022,
    "calibration_tokens": 511,
    "batch_rows": 8,
    "pad": True,
    "refine": 5,
    "include": ("*.mlp.*",),
    "exclude": ("*.down_proj",),
    "fuse": True,
    "sequential": True,
    "rotate_stream": "hadamard",
    "rotate_values": "random_orthogonal",
    "text_key": "body",
}


@pytest.fixture
def fits(tmp_path):
    """What names fits of the embedded model; their arrays are not read for a cell's name."""
    about = {"schema": 1, "sha256": "0", "formats": {"weight": "mxfp4", "activation": "mxfp4:even"}}
    about |= {"model": {"name": "testbed", "sha256": model_sha256(testbed.directory())}}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "fits.json").write_text(json.dumps(about))
    return tmp_path / "mine"


def test_fits_change_the_name_by_their_contents_and_are_of_this_model(fits, tiny_directory):
    cell = Cell("mine", "floor", fits=fits)
    assert cell.configuration() == Cell("rtn", "floor").configuration() | {"fits": "0"}
    other = shutil.copytree(fits, fits.parent / "other")
    assert Cell("mine", "floor", fits=other).digest == cell.digest
    assert "were learned for weights mxfp4 and activations mxfp4:even" in cell.warning
    with pytest.raises(ValueError, match=r"of another model \(testbed\): learn them"):
        dataclasses.replace(cell, model=tiny_directory).configuration()
    for wrong in (
        {"fit": FitSmooth()},
        {"change": Change(1.0)},
        {"rotate_values": "hadamard"},
        {"format": "float"},
    ):
        with pytest.raises(ValueError, match="no fit, change or rotation"):
            dataclasses.replace(cell, **wrong).configuration()


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 10**5, "{}", '{"schema": 1}', '{"schema": 1, "model": 3}']
)
def test_fits_that_say_nothing_of_themselves_are_refused_in_a_line(content, fits):
    (fits / "fits.json").write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*fits\.json [^\n]*$"):
        Cell("mine", "floor", fits=fits).configuration()


@pytest.mark.parametrize("field", CHANGES)
def test_everything_that_decides_the_result_changes_the_name(field):
    changed = dataclasses.replace(Cell("rtn"), **{field: CHANGES[field]})
    assert changed.digest != Cell("rtn").digest


def test_every_field_is_named_or_a_place_of_contents():
    fields = {field.name for field in dataclasses.fields(Cell)}
    assert fields == set(CHANGES) | {"model", "text", "calibration_text", "fits"}


def test_rows_that_the_model_writes_change_the_name_and_have_no_file():
    cell = Cell("rtn", calibration_text=MODEL)
    assert cell.configuration() == Cell("rtn").configuration() | {"calibration_text": "model"}


def test_numbers_inside_parts_change_the_name():
    digests = {Cell("x", fit=FitSmooth(alpha=a)).digest for a in (0.1, 0.2)}
    digests |= {Cell("rtn", change=Change(s)).digest for s in (1.0, 2.0)}
    assert len(digests) == 4


def test_targets_count_in_whole_rows():
    assert Cell("rtn", tokens=1024).digest == Cell("rtn", tokens=1022).digest


def test_files_count_by_contents_not_by_place(tiny_directory, tiny_text, tmp_path):
    model, text = tmp_path / "model", tmp_path / "text"
    shutil.copytree(tiny_directory, model)
    shutil.copy(tiny_text, text)
    here = Cell("rtn", model=tiny_directory, text=tiny_text, calibration_text=tiny_text)
    there = Cell("rtn", model=model, text=text, calibration_text=tiny_text)
    assert there.digest == here.digest
    text.write_text("something else", encoding="utf-8")
    assert dataclasses.replace(there).digest != here.digest
    tokenizer = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(tokenizer + " ")  # other tokens, and so other numbers
    assert dataclasses.replace(there, text=tiny_text).digest != here.digest
    (model / "tokenizer.json").write_text(tokenizer)
    assert dataclasses.replace(there, text=tiny_text).digest == here.digest
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1] + b"!")  # in place
    assert dataclasses.replace(there, text=tiny_text).digest != here.digest


def test_a_configuration_is_json():
    for name in FITS:
        configuration = Cell(name, "log256", rounding="gptq", change=Change(2.0)).configuration()
        assert json.loads(json.dumps(configuration)) == configuration


@pytest.mark.parametrize("value", [jnp.ones(3), lambda x: x, object(), {"a": object()}])
def test_what_has_no_name_is_refused(value):
    with pytest.raises(ValueError, match="give a frozen dataclass"):
        canonical(value)


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (Cell("hadamrd"), "unknown recipe 'hadamrd'"),
        (Cell("rtn", "flor"), "unknown format 'flor': did you mean floor"),
        (Cell("rtn", rounding="gtpq"), "unknown rounding"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(cell, says):
    with pytest.raises(ValueError, match=says):
        _ = cell.digest


def test_a_missing_text_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*nowhere\.txt"):
        _ = Cell("rtn", text=tmp_path / "nowhere.txt").digest


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, ["mxfp4", "even", "float"]),
        ({"formats": ("nvfp4",), "scale_rules": ("ceil",)}, ["nvfp4", "ceil", "even", "float"]),
        (
            {"weight_formats": ("even",), "activation_formats": ("floor",)},
            ["even weights, floor activations", "even", "float"],
        ),
    ],
)
def test_formats_as_options_reach_the_cells_that_leave_them_open(options, labels):
    cells = [Cell("rtn"), Cell("rtn", "even"), Cell("rtn", "float")]
    assert [cell.format_label for cell in grid(cells, AblateOptions(**options))] == labels


def test_parts_of_two_modules_with_the_same_names_are_two_cells(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = (Path(__file__).parents[1] / "outside_parts.py").read_text(encoding="utf-8")
    for name, text in {"parts_a": source, "parts_b": source + "\n", "parts_c": source}.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    for field, part in {"recipe": "MIRROR", "rounding": "SHRUNK"}.items():
        fields = [{"recipe": "rtn", field: f"parts_{name}:{part}"} for name in "abc"]
        a, b, c = (Cell(**given).digest for given in fields)
        assert a != b
        assert a == c
