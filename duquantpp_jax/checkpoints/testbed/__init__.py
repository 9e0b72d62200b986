"""The embedded model: a Llama of 4.2M parameters that trained on public-domain books, and the
rows it wrote itself. README.md beside this file says where both come from.

The rows were drawn from the model at temperature 1, so on them the excess NLL of any change to
the model has the KL divergence as its expectation: E[log p - log q] = KL(p || q).

Source: experiments/pretrain_testbed.py and its record, experiments/results/pretrain_testbed.json.
"""

from importlib.resources import files
from pathlib import Path

import numpy as np
from jaxtyping import UInt16

from duquantpp_jax.checkpoints.lazy import load as _load
from duquantpp_jax.models.decoder import Decoder


def directory() -> Path:
    """The model as a Hugging Face directory: config.json, model.safetensors, tokenizer.json."""
    return Path(str(files(__name__)))


def load() -> Decoder:
    """The float decoder; its weights are stored, and stay, in bfloat16."""
    return _load(directory())


def evaluation_rows() -> UInt16[np.ndarray, "128 512"]:
    """Rows to measure on: token 0 and 511 sampled ids, each row a document of its own."""
    return _rows("evaluation")


def calibration_rows() -> UInt16[np.ndarray, "64 512"]:
    """Rows to fit on, sampled with other seeds than `evaluation_rows`."""
    return _rows("calibration")


def _rows(name: str) -> UInt16[np.ndarray, "rows 512"]:
    with np.load(directory() / "tokens.npz", allow_pickle=False) as rows:
        return rows[name]
