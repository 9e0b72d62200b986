"""Rows that the float model writes itself, to calibrate on where there is no text.

    x_0 = BOS,    x_t ~ p(x_t | x_0 .. x_t-1),    t = 1 .. 511

An end of sequence ends no row: the model goes on, as in training. Rows are written in batches of
one size, however many are asked for: on one machine a row depends on model, seed and number alone.
Batches are kept in $DUQUANTPP_CACHE, else ~/.cache/duquantpp_jax, and not written a second time.

Source: Liu et al., LLM-QAT: Data-Free Quantization Aware Training (arXiv:2305.17888), section 3.1.
"""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32

from duquantpp_jax import files
from duquantpp_jax.checkpoints import load, load_config, sha256
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.models import Decoder, DecoderConfig, dense
from duquantpp_jax.models.sampling import Sampling, generate
from duquantpp_jax.ptq import stores

CACHE_BYTES = 8 << 30
"""Most bytes of a batch's key-value cache on a GPU or TPU, which writes more rows together."""


def batch_rows(config: DecoderConfig) -> int:
    """Rows that are written together: 16 on a CPU; else the power of two, up to 256, whose cache in
    float32 takes no more than CACHE_BYTES, but 16 at least."""
    if jax.default_backend() == "cpu":
        return 16
    heads = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    fit = CACHE_BYTES // (8 * heads * (TARGETS + 1))  # keys and values, of 4 bytes each
    return min(256, max(16, 1 << fit.bit_length() >> 1))


def own_rows(directory: Path, rows: int, seed: int) -> Int32[np.ndarray, "rows length"]:
    """BOS and 511 ids each, drawn at temperature 1; raises ValueError as `load`, and for NaN."""
    place = files.cache_directory()
    config, model, batches = load_config(directory), functools.cache(load), []
    together = batch_rows(config)
    name = f"{sha256(directory)}-{seed}-{together}"
    for number in range(-(-rows // together)):
        path = Path(place, f"{name}-{number}.safetensors")
        if (batch := _kept(path, config)) is None:
            key = jax.random.fold_in(jax.random.key(seed), number)
            batch = _written(model(directory), key)
            with contextlib.suppress(OSError):  # rows that cannot be kept are written again
                files.write_tensors(path, {"tokens": batch}, {})
        batches.append(batch)
    return np.concatenate(batches)[:rows]


def _kept(path: Path, config: DecoderConfig) -> Int32[np.ndarray, "batch length"] | None:
    """The rows of a file; None where there is no file, or one of no such rows."""
    try:
        tokens = files.read_tensors(path, "write the rows again")[0]["tokens"]
    except (OSError, ValueError, KeyError):
        return None
    right = (tokens.dtype, tokens.shape) == (np.int32, (batch_rows(config), TARGETS + 1))
    right = right and (tokens[:, 0] == config.bos_token_id).all() and tokens.min() >= 0
    return tokens if right and tokens.max() < config.vocab_size else None


def _written(model: Decoder, key: jax.Array) -> Int32[np.ndarray, "batch length"]:
    model.config = dataclasses.replace(model.config, eos_token_id=None)
    begin: Any = [model.config.bos_token_id]
    how: Any = {"store": stores.store("float32", model.config.head_dim), "linear": dense}
    prompts = [begin] * batch_rows(model.config)
    new = generate(model, prompts, key, new=TARGETS, sampling=Sampling(1.0), **how)
    if wrong := sum(min(row) < 0 for row in new):
        raise ValueError(
            f"the model gave NaN where it wrote rows to calibrate on, in {wrong} of {len(new)}: "
            "give a text file, with which the layer is named"
        )
    return np.asarray([begin + row for row in new], np.int32)
