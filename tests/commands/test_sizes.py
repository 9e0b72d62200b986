"""The report's table against statistics worked out by hand."""

import pytest

from duquantpp_jax.commands.sizes import MIB, table

LINEARS = [
    {"linear": "model.layers.0.mlp.up_proj", "bytes": MIB, "sqnr_db": 20.0, "weight_error": 0.02},
    {"linear": "model.layers.1.mlp.up_proj", "bytes": MIB, "sqnr_db": 11.0, "weight_error": 0.01},
    {"linear": "model.layers.2.mlp.up_proj", "bytes": MIB, "sqnr_db": 17.0, "weight_error": 0.06},
    {"linear": "model.layers.0.mlp.down_proj", "bytes": 5, "sqnr_db": 9.0, "weight_error": 0.5},
    {"linear": "model.layers.1.mlp.down_proj", "bytes": 5, "sqnr_db": None, "weight_error": 0.25},
    {"linear": "model.layers.0.self_attn.o_proj", "bytes": MIB // 2, "sqnr_db": None,
     "weight_error": 0.0},
]  # fmt: skip


def cells(linears):
    shown = table(linears)
    columns = [list(column.cells) for column in shown.columns]
    return [column.header for column in shown.columns], list(zip(*columns, strict=True))


@pytest.mark.parametrize("step", [1, -1])
def test_means_and_worst_are_those_of_each_kind_in_any_order(step):
    _, rows = cells(LINEARS[::step])
    assert sorted(rows) == [
        ("down_proj", "2", "0.00", "9.00", "9.00", "0.37500", "0.50000", "layer 0"),
        ("o_proj", "1", "0.50", "", "", "0.00000", "0.00000", "layer 0"),
        ("up_proj", "3", "3.00", "16.00", "11.00", "0.03000", "0.06000", "layer 2"),
    ]


def test_online_costs_are_a_mean_of_multiply_adds_and_a_sum_of_bytes():
    costs = [{"online_multiply_adds": 30 + n, "online_bytes": 512 * n} for n in range(6)]
    headings, rows = cells([linear | cost for linear, cost in zip(LINEARS, costs, strict=True)])
    assert headings[-2:] == ["online", "KiB"]
    assert [row[-2:] for row in rows] == [("31", "1.5"), ("33.5", "3.5"), ("35", "2.5")]


def test_what_was_not_measured_has_no_columns():
    headings, rows = cells([{"linear": linear["linear"], "bytes": MIB} for linear in LINEARS])
    assert headings == ["linear", "of them", "MiB"]
    assert rows == [("up_proj", "3", "3.00"), ("down_proj", "2", "2.00"), ("o_proj", "1", "1.00")]
