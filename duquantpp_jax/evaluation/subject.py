"""Models and texts of a comparison, their names and hashes, and the environment of results."""

import functools
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import duquantpp_jax
from duquantpp_jax import files
from duquantpp_jax.checkpoints import load_config, load_tokenizer, sha256, testbed
from duquantpp_jax.commands.options.common import MODEL
from duquantpp_jax.evaluation.own_text import own_rows
from duquantpp_jax.evaluation.rows import TARGETS, Rows, read_text, rows_for_targets, rows_of_text
from duquantpp_jax.models import DecoderConfig


def model_name(model: Path | None) -> str:
    """Name of a model in results."""
    return "testbed" if model is None else model.resolve().name


def model_and_hash(model: Path | None) -> dict[str, str]:
    """Name and SHA-256 of a model for results; None is the embedded model."""
    return {"name": model_name(model), "sha256": sha256(model or testbed.directory())}


def check_unchanged(model: Path | None, before: Mapping[str, str]) -> None:
    """Raises ValueError unless a model still is what `model_and_hash` gave before it was read."""
    with files.refusing(model or testbed.directory(), "give a model that stays"):
        now = model_and_hash(model)["sha256"]
    if now != before["sha256"]:
        raise ValueError(
            f"{model} was changed while it was read (SHA-256 {now[:16]}, and "
            f"{before['sha256'][:16]} before): give a model that stays, and another --out"
        )


def check_texts(model: Path | None, text: Path | None, calibration_text: Path | None) -> None:
    """Raises ValueError if a model is given without texts: the embedded ones are not its own."""
    given = {"--text": text, "--calibration-text": calibration_text}
    if model is not None and (missing := [name for name, value in given.items() if not value]):
        raise ValueError(
            f"--model needs {' and '.join(missing)}: text of the kind that the model was trained "
            "on, to evaluate and to calibrate with (or --calibration-text model: rows that it "
            "writes itself)"
        )


def load_rows(
    model: Path | None,
    text: Path | None,
    targets: int,
    use: Literal["evaluation", "calibration"],
    text_key: str = "text",
    seed: int = 0,
    config: DecoderConfig | None = None,
) -> Rows:
    """The first rows of a text in a model's tokens, by the protocol of `compare`.

    Args:
      text: None for the embedded rows; to calibrate also `MODEL`, what the model itself writes.
      targets: Cut down to whole rows.
      text_key, seed: Of a text in a .jsonl file, and of what the model writes.
      config: Of a model that is quantized already.

    Raises:
      ValueError: The text cannot be read or is too short, or the model does not take such rows.
    """
    if text is None:
        embedded = {"evaluation": testbed.evaluation_rows, "calibration": testbed.calibration_rows}
        tokens = embedded[use]()
        return rows_for_targets(Rows(tokens, np.arange(len(tokens))), targets, "the embedded text")
    own = text == MODEL and use == "calibration"
    content, directory = "" if own else read_text(text, text_key), model or testbed.directory()
    config = config or load_config(directory)
    check_rows(directory, config)
    if own:
        tokens = own_rows(directory, max(1, targets // TARGETS), seed)
        return rows_for_targets(Rows(tokens, np.arange(len(tokens))), targets, str(text))
    tokenizer, bos = load_tokenizer(directory, config), config.bos_token_id
    rows = rows_of_text(content, tokenizer, bos, targets=targets)
    return rows_for_targets(rows, targets, str(text))


def check_rows(directory: Path, config: DecoderConfig) -> None:
    """Raises ValueError if a model does not take rows of BOS and 510 tokens."""
    if config.bos_token_id is None:
        raise ValueError(
            f"{directory}/config.json names no bos_token_id, which stands before every row: "
            "add the token that the model saw at the start of its text"
        )
    if config.max_position_embeddings < TARGETS:
        raise ValueError(
            f"{directory} has {config.max_position_embeddings} positions, and rows here have "
            f"{TARGETS} inputs: duquantpp evaluate takes shorter ones (--window)"
        )


def name_and_hash(path: Path | None) -> dict[str, str]:
    """Name and SHA-256 of a text for results; None is the embedded text; `MODEL` has no hash."""
    if path == MODEL:
        return {"name": str(MODEL)}
    path = path or testbed.directory() / "tokens.npz"
    return {"name": path.name, "sha256": files.sha256(path)}


MIXED = ("python", "cores", "code")
"""What of the environment keeps no results apart: the first two change no number, and of other code
the legend of a table says so."""


def difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Where two environments whose results are not mixed first differ, in words; else None."""
    for name in {**first, **other}:
        if name not in MIXED and first.get(name) != other.get(name):
            return f"{name} {first.get(name)}, not {other.get(name)}"
    return None


def environment() -> dict[str, Any]:
    """Versions, device and threads of this process, for results.

    On a CPU XLA splits sums over a pool of threads, one for each core that this process may use, or
    as many as PJRT_NPROC or NPROC says; LAPACK has a pool of its own, no larger than the cores. The
    last digits of numbers depend on these `threads`, and not on `cores`. `xla_flags` is without
    flags that only write files. Of a GPU or TPU `runtime` has the versions of what runs it. `code`
    tells commits of one version apart.
    """
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes", "tokenizers")
    device = jax.devices()[0]
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    flags = os.environ.get("XLA_FLAGS", "").split()
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1

    def threads(*variables: str) -> int:
        return int(next(filter(None, map(os.environ.get, variables)), cores))

    pools = {"xla": threads("PJRT_NPROC", "NPROC")}
    pools["lapack"] = min(cores, threads("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
    return {
        "duquantpp_jax": duquantpp_jax.__version__,
        "code": _code(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": cores,
        "threads": pools,
        "xla_flags": " ".join(sorted(flag for flag in flags if "dump" not in flag)),
        **({} if device.platform == "cpu" else {"runtime": _runtime(device)}),
        "machine": platform.machine(),
        "matmul_precision": "float32 (highest)",
    }


@functools.cache
def _code() -> str:
    """The first 16 digits of a SHA-256 over the package's source files, when it is first asked."""
    place, total = Path(duquantpp_jax.__file__).parent, hashlib.sha256()
    for path in sorted(place.rglob("*.py")):
        total.update(f"{path.relative_to(place)} {files.sha256(path)}\n".encode())
    return total.hexdigest()[:16]


def _runtime(device: Any) -> str:
    return " ".join(device.client.platform_version.split())
