"""The size and sensitivity report of a quantized model, as a table.

A row for each kind of linear (up_proj of all layers): its bytes, and what quantizing it alone
costs, as SQNR of its output on a sample of the calibration tokens and as the share of the output's
energy that rounding the weights takes, mean and worst over layers. Last what moving its input
costs online, which linears of one input share: multiply-adds for each value, mean over layers, and
KiB of all layers. report.json has every linear.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

MIB = 2**20


def table(linears: Sequence[Mapping[str, Any]]) -> Table:
    """The table, of rows as report.json or a dry run has them."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for one in linears:
        kinds.setdefault(one["linear"].rpartition(".")[2], []).append(one)
    measured = all("sqnr_db" in one for one in linears)
    shown = Table(box=box.SIMPLE_HEAD)
    online = all("online_bytes" in one for one in linears)
    headings = ["linear", "of them", "MiB"]
    headings += ["SQNR dB", "worst", "weight error", "worst", "in"] if measured else []
    headings += ["online", "KiB"] if online else []
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "linear" else "right")
    for kind, rows in kinds.items():
        cells = [kind, f"{len(rows)}", f"{sum(row['bytes'] for row in rows) / MIB:.2f}"]
        if measured:
            known = [row for row in rows if row["sqnr_db"] is not None]
            sqnr = [row["sqnr_db"] for row in known]
            worst = max(rows, key=lambda row: row["weight_error"])
            mean = sum(row["weight_error"] for row in rows) / len(rows)
            cells += [f"{sum(sqnr) / len(sqnr):.2f}", f"{min(sqnr):.2f}"] if sqnr else ["", ""]
            cells += [f"{mean:.5f}", f"{worst['weight_error']:.5f}"]
            cells.append(f"layer {worst['linear'].split('.')[2]}")
        if online:
            multiply_adds = sum(row["online_multiply_adds"] for row in rows) / len(rows)
            kib = sum(row["online_bytes"] for row in rows) / 1024
            cells += [f"{multiply_adds:.4g}", f"{kib:.1f}"]
        shown.add_row(*cells)
    return shown


def quantized_line(report: Mapping[str, Any]) -> str:
    """What was done, in a sentence."""
    job = report["job"]
    bits = {
        side: "/".join(dict.fromkeys(job[f"{side}_formats"].values()))
        for side in ("weight", "activation")
    }
    calibration = job["calibration"]
    places = {"rotate_stream": "the residual stream", "rotate_values": "value heads"}
    turned = "".join(f"{what} turned by {job[n]}, " for n, what in places.items() if job.get(n))
    return (
        f"{job['model']['name']}: {turned}{job['recipe']}, {job['rounding']}; weights "
        f"{bits['weight']}, activations {bits['activation']}; calibrated on "
        f"{calibration['rows']} rows of {calibration['length']} tokens ({calibration['source']}). "
        f"{'The tied head became a matrix of its own. ' if report.get('untied_head') else ''}"
        f"{report['float_bytes'] / MIB:.1f} MiB became {report['bytes'] / MIB:.1f} MiB."
        + (f" Refined {job['refine']} steps; SQNR is from before." if job.get("refine") else "")
    )


def dry_line(found: Mapping[str, Any]) -> str:
    """What would be done, in a sentence."""
    return (
        f"{found['layers']} layers; their linears take {found['float_bytes'] / MIB:.1f} MiB in "
        f"bf16 and would take {found['bytes'] / MIB:.1f} MiB, transforms included. Roughly "
        f"{found['memory_bytes'] / 2**30:.1f} GiB of memory and {found['seconds'] / 60:.1f} "
        "minutes of matrix products on this device. Nothing was written."
    )
