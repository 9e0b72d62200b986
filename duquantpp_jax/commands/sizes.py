"""Size, sensitivity and online cost of a quantized model: a row for each kind of linear.

A kind is e.g. up_proj of all layers. Its row has the bytes, and the cost of quantizing it alone:
the SQNR of its output on a sample of the calibration tokens, and the share of the output's energy
that rounding the weights takes, each as mean and worst over layers. Last comes the online cost of
moving its input, which all linears of one input share: multiply-adds for each value (mean over
layers) and KiB of all layers. report.json has every linear.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from duquantpp_jax.lab.table import empty

MIB, GIB = 2**20, 2**30

ALONE = "--fuse leaves the inputs of experts alone."
"""Said of a mixture of experts."""


def table(linears: Sequence[Mapping[str, Any]]) -> Table:
    """The table of the linears in report.json, or in a dry run."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for linear in linears:
        kinds.setdefault(linear["linear"].rpartition(".")[2], []).append(linear)
    measured, online = (
        all(name in linear for linear in linears) for name in ("sqnr_db", "online_bytes")
    )
    headings = ["of them", "MiB"]
    headings += ["SQNR dB", "worst", "weight error", "worst", "in"] if measured else []
    headings += ["online", "KiB"] if online else []
    shown = empty("linear", right=headings, wrap=True)
    for kind, rows in kinds.items():
        cells = [kind, f"{len(rows)}", f"{sum(row['bytes'] for row in rows) / MIB:.2f}"]
        if measured:
            sqnr = [row["sqnr_db"] for row in rows if row["sqnr_db"] is not None]
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


def formats_of(job: Mapping[str, Any]) -> tuple[str, str]:
    """Formats of the weights and of the activations of all sites, each name once."""
    weights, activations = job["weight_formats"].values(), job["activation_formats"].values()
    return "/".join(dict.fromkeys(weights)), "/".join(dict.fromkeys(activations))


def quantized_line(report: Mapping[str, Any]) -> str:
    """What was done, in a sentence."""
    job, calibration = report["job"], report["job"]["calibration"]
    weights, activations = formats_of(job)
    places = {"rotate_stream": "the residual stream", "rotate_values": "value heads"}
    stacks = {r["linear"].rpartition(".")[0]: r for r in report["linears"] if "pooled" in r}
    few = sum(row["pooled"] for row in stacks.values())
    turned = "".join(f"{what} turned by {job[n]}, " for n, what in places.items() if job.get(n))
    return (
        f"{job['model']['name']}: {turned}{job['recipe']}, {job['rounding']}; weights "
        f"{weights}, activations {activations}; calibrated on "
        f"{calibration['rows']} rows of {calibration['length']} tokens ({calibration['source']}). "
        f"{'Packed weights were decoded and rounded again. ' if report.get('requantized') else ''}"
        f"{'The tied head became a matrix of its own. ' if report.get('untied_head') else ''}"
        f"{report['float_bytes'] / MIB:.1f} MiB became {report['bytes'] / MIB:.1f} MiB."
        + (f" {few} of {len(stacks)} experts saw few tokens and took their layer's." if few else "")
        + (f" {ALONE}" if stacks and job.get("fuse") else "")
        + (f" Refined {job['refine']} steps; SQNR is from before." if job.get("refine") else "")
    )


def used(seconds: float) -> str:
    """The time of a command, and, where the system tells, the most memory of its process."""
    try:
        import resource  # which Windows does not have
    except ImportError:
        return f"{seconds:.0f} s"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return f"{seconds:.0f} s, at most {peak / GIB:.1f} GiB of memory"


def dry_line(found: Mapping[str, Any]) -> str:
    """What would be done, in a sentence."""
    return (
        f"{found['layers']} layers; their linears take {found['float_bytes'] / MIB:.1f} MiB in "
        f"bf16 and would take {found['bytes'] / MIB:.1f} MiB, transforms included. Roughly "
        f"{found['device_bytes'] / GIB:.1f} GiB on the device, {found['host_bytes'] / GIB:.1f} GiB "
        f"in the host's memory and {found['seconds'] / 60:.1f} minutes of matrix products on this "
        "device. To evaluate the float model, or to compare, takes roughly "
        f"{found['evaluation_bytes'] / GIB:.1f} GiB on the device. Nothing was written."
    )
