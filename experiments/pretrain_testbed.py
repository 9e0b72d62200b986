"""The embedded model: a 4M-parameter Llama trained from scratch, and the rows it wrote itself.

Question: can a model small enough to ship (12 MB) show what a rotation does to MXFP4?
Hypothesis: minutes of ordinary training give activations with outlier channels nobody injected,
  so methods that move outliers differ measurably on it.
Data: gutenberg_train.txt.xz (public domain books separated by <|endoftext|>), less its last 10,
  for a byte-level BPE of its own and for training; the last 10 are only ever evaluated on. A row
  is token 0 and 511 ids of one book; every epoch cuts each book at a fresh random offset.
Rows shipped: x_t ~ p(. | x_<t) at temperature 1, nothing truncated, from the shipped bfloat16
  weights in float32. Text drawn from the model has two uses: no third-party text is shipped, and
  E[NLL_quantized - NLL_float] = KL(float || quantized) exactly. The check: mean(NLL - entropy) is
  a mean of martingale differences, so it is 0 within its standard error.
Command: python -m experiments.pretrain_testbed --data DIR --out DIR
  (DIR/text/gutenberg_train.txt.xz; or set DUQUANTPP_DATA). Writes OUT/testbed, which is
  duquantpp_jax/models/testbed, and OUT/pretrain_testbed.json, kept in experiments/results.
Cost: 4.3 minutes of one H200 (training 2.3, of 37 ms a step; sampling 1.3).
Last result (2026-11-25, jax 0.11.2, commit e718e74 with --steps 3200): 209M tokens, 8.9 epochs.
  Training loss 3.19. Loss on the 10 unseen books 3.631, its least value: it was still falling. (A
  run of 4,896 steps, 13.6 epochs, ended at 3.599 but flat from step 4,270 on.) Channel maximum /
  median before the first layer's down_proj 30 (3.5 without position 0: a massive activation of
  token 0 alone), elsewhere 1.5 to 3.9. NLL - entropy of the evaluation rows is -0.0005 +- 0.0081.
"""

import argparse
import dataclasses
import importlib.metadata
import io
import json
import lzma
import os
import platform
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Int32, PRNGKeyArray, UInt16
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from duquantpp_jax.checkpoints import load, save
from duquantpp_jax.files import to_json, write_whole
from duquantpp_jax.models import Decoder, DecoderConfig, dense, parameter_shapes

END, ROW = "<|endoftext|>", 512
STRIDE = 128
"""Positions that one program samples."""
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "safetensors")


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """The run: sizes of the model, of the data, and of the optimizer's steps."""

    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocab_size: int = 4096
    unseen_books: int = 10
    unseen_rows: int = 512
    batch_rows: int = 128
    steps: int = 3_200
    learning_rate: float = 3e-3
    warmup: int = 300
    weight_decay: float = 0.1
    b2: float = 0.95
    clip: float = 1.0
    records: int = 40
    evaluation_rows: int = 128
    calibration_rows: int = 64
    seed: int = 0


def train_tokenizer(books: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al., arXiv:1508.07909, over bytes) with END as token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(books, trainer)
    return tokenizer


def round_robin(books: list[np.ndarray], rows: int) -> UInt16[np.ndarray, "rows 512"]:
    """The first row of every book, then the second of every book, and so on."""
    cut = [book[: len(book) // (ROW - 1) * (ROW - 1)].reshape(-1, ROW - 1) for book in books]
    order = [book[i] for i in range(max(map(len, cut))) for book in cut if i < len(book)][:rows]
    return np.pad(np.stack(order), ((0, 0), (1, 0)))


def batches(books: list[np.ndarray], rows: int, seed: int) -> Iterator[np.ndarray]:
    """Row starts in the concatenated books, batch after batch, for ever."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum([len(book) for book in books])
    while True:
        starts = [
            np.arange(end - len(book) + rng.integers(ROW - 1), end - (ROW - 2), ROW - 1)
            for book, end in zip(books, ends, strict=True)
        ]
        shuffled = rng.permutation(np.concatenate(starts)).astype(np.int32)
        for i in range(0, len(shuffled) - rows + 1, rows):
            yield shuffled[i : i + rows]


def row_losses(model: Decoder, rows: Array) -> tuple[Float32[Array, "rows 511"], ...]:
    """NLL of every target, and the entropy of the distribution it was predicted with, in nats."""
    logits = jax.nn.log_softmax(model(rows)[0][:, :-1])
    targets = rows[:, 1:, None].astype(jnp.int32)
    nll = -jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
    return nll, -jnp.sum(jnp.exp(logits) * logits, axis=-1)


def initial(config: DecoderConfig, key: PRNGKeyArray) -> dict[str, Float32[Array, "..."]]:
    """Initial parameters: norms are 1, the rest is normal.

    The standard deviation is 0.02, divided by sqrt(2 layers) for the two matrices that write to
    the residual stream. Source: Radford et al., GPT-2 (2019), section 2.3.
    """
    shapes = parameter_shapes(config)
    parameters = {}
    for own_key, name in zip(jax.random.split(key, len(shapes)), shapes, strict=True):
        if name.endswith("norm"):
            parameters[name] = jnp.ones(shapes[name], jnp.float32)
            continue
        residual = name.endswith(("o_proj", "down_proj"))
        std = 0.02 / np.sqrt(2 * config.num_hidden_layers) if residual else 0.02
        parameters[name] = jnp.float32(std) * jax.random.normal(own_key, shapes[name], jnp.float32)
    return parameters


def train(
    run: Pretrain, config: DecoderConfig, books: list[np.ndarray], unseen: np.ndarray
) -> tuple[dict[str, Array], dict[str, Any]]:
    """AdamW on the mean NLL, bfloat16 matrix products over float32 parameters.

    Returns:
      The parameters, and what happened: steps, tokens, seconds and the curve of both losses.
    """
    ids = jnp.asarray(np.concatenate(books))
    unseen_rows = jnp.asarray(unseen)

    def loss(parameters: dict[str, Array], rows: Array) -> Array:
        logits, _ = Decoder(config, parameters, dtype=jnp.bfloat16)(rows)
        targets = rows[:, 1:].astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets).mean()

    optimizer = optax.chain(
        optax.clip_by_global_norm(run.clip),
        optax.scale_by_adam(b2=run.b2),
        optax.add_decayed_weights(
            run.weight_decay, {name: not name.endswith("norm") for name in parameter_shapes(config)}
        ),
    )

    @partial(jax.jit, donate_argnums=0)
    def step(carry: tuple, ids: Array, starts: Array) -> tuple:
        parameters, state, total, done = carry
        rows = jnp.pad(ids[starts[:, None] + jnp.arange(ROW - 1)], ((0, 0), (1, 0)))
        value, gradient = jax.value_and_grad(loss)(parameters, rows)
        direction, state = optimizer.update(gradient, state, parameters)
        rate = run.learning_rate * jnp.minimum(1.0, (done + 1) / run.warmup)
        rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * done / run.steps))
        parameters = jax.tree.map(lambda p, d: p - rate * d, parameters, direction)
        return parameters, state, total + value, done + 1

    feed, evaluate = batches(books, run.batch_rows, run.seed), jax.jit(loss)
    parameters = initial(config, jax.random.key(run.seed))
    carry = (parameters, optimizer.init(parameters), jnp.zeros(()), jnp.zeros((), jnp.int32))
    curve, every, begin = [], max(1, run.steps // run.records), time.perf_counter()
    for i in range(1, run.steps + 1):
        carry = step(carry, ids, next(feed))
        if i % every and i != run.steps:
            continue
        since = i - (curve[-1]["step"] if curve else 0)
        parts = [unseen_rows[j : j + run.batch_rows] for j in range(0, len(unseen), run.batch_rows)]
        unseen_loss = sum(float(evaluate(carry[0], p)) * len(p) for p in parts) / len(unseen)
        record = {"step": i, "training_loss": float(carry[2]) / since, "unseen_loss": unseen_loss}
        curve.append(record)
        carry = (*carry[:2], jnp.zeros(()), carry[3])
        print({**record, "seconds": round(time.perf_counter() - begin, 1)}, flush=True)
    measured = {
        "steps": run.steps,
        "tokens": run.steps * run.batch_rows * (ROW - 1),
        "epochs": run.steps * run.batch_rows * (ROW - 1) / sum(map(len, books)),
        "training_seconds": time.perf_counter() - begin,
        "curve": curve,
    }
    return carry[0], measured


@partial(jax.jit, static_argnames=("first", "last"), donate_argnums=1)
def _extend(model: Decoder, tokens: Array, key: PRNGKeyArray, first: int, last: int) -> Array:
    """Samples positions first .. last - 1. The model is causal: later tokens do not matter."""

    def step(tokens: Array, position: Array) -> tuple[Array, None]:
        logits, _ = model(tokens[:, :last])
        here = jax.lax.dynamic_index_in_dim(logits, position - 1, axis=1, keepdims=False)
        drawn = jax.random.categorical(jax.random.fold_in(key, position), here)
        return tokens.at[:, position].set(drawn.astype(tokens.dtype)), None

    return jax.lax.scan(step, tokens, jnp.arange(first, last))[0]


def sample(model: Decoder, rows: int, key: PRNGKeyArray) -> Int32[Array, "rows 512"]:
    """Token 0 and 511 ids drawn from the model, whole prefix recomputed for each: plain and exact.

    64 rows at a time, prefixes padded to a multiple of STRIDE: few programs, little wasted work.
    """
    parts = []
    for i in range(0, rows, 64):
        tokens = jnp.zeros((min(rows, 64), ROW), jnp.int32)
        for last in range(STRIDE, ROW + 1, STRIDE):
            part = jax.random.fold_in(key, i)
            tokens = _extend(model, tokens, part, max(1, last - STRIDE), last)
        parts.append(tokens)
    return jnp.concatenate(parts)[:rows]


def outliers(model: Decoder, rows: Array, skip: int) -> dict[str, list[float]]:
    """max_j m_j / median_j m_j by site and layer, m_j = max |x_j| over positions from `skip`."""

    def maxima(site: str, x: Array, weights: tuple[Array, ...], state: Any) -> tuple:
        return dense(site, x, weights, state)[0], jnp.max(jnp.abs(x[:, skip:]), axis=(0, 1))

    _, sites = jax.jit(lambda model, rows: model(rows, maxima))(model, rows)
    ratio = {site: jnp.max(m, axis=1) / jnp.median(m, axis=1) for site, m in sites.items()}
    return {site: [round(float(r), 2) for r in ratios] for site, ratios in ratio.items()}


def entropy_check(model: Decoder, rows: np.ndarray) -> dict[str, float]:
    """Mean NLL and entropy of sampled rows, and the standard error of their difference."""
    compiled = jax.jit(row_losses)
    parts = [compiled(model, jnp.asarray(rows[i : i + 16])) for i in range(0, len(rows), 16)]
    nll, entropy = (np.concatenate(side).astype(np.float64) for side in zip(*parts, strict=True))
    error = np.std(nll - entropy) / np.sqrt(nll.size)
    return {"nll": nll.mean(), "entropy": entropy.mean(), "standard_error": float(error)}


def main(run: Pretrain, data: Path, out: Path) -> dict[str, Any]:
    """Trains, saves, samples and checks; returns what it writes to OUT/pretrain_testbed.json."""
    begin = time.perf_counter()
    text = lzma.decompress((data / "text" / "gutenberg_train.txt.xz").read_bytes()).decode()
    books = text.split(END)
    seen_text = books[: -run.unseen_books]
    tokenizer = train_tokenizer(seen_text, run.vocab_size)
    print(f"{len(books)} books, tokenizer at {time.perf_counter() - begin:.0f} s", flush=True)
    encoded = tokenizer.encode_batch_fast(books, add_special_tokens=False)
    ids = [np.array(text.ids, np.uint16) for text in encoded]
    seen, unseen = ids[: -run.unseen_books], ids[-run.unseen_books :]
    print(f"{sum(map(len, seen))} tokens at {time.perf_counter() - begin:.0f} s", flush=True)

    config = DecoderConfig(
        hidden_size=run.hidden_size,
        intermediate_size=run.intermediate_size,
        num_hidden_layers=run.layers,
        num_attention_heads=run.heads,
        num_key_value_heads=run.kv_heads,
        head_dim=run.hidden_size // run.heads,
        vocab_size=run.vocab_size,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=ROW,
        bos_token_id=0,
        eos_token_id=0,
    )
    unseen_rows = round_robin(unseen, run.unseen_rows)
    parameters, measured = train(run, config, seen, unseen_rows)
    directory = out / "testbed"
    save(Decoder(config, parameters), tokenizer.to_str(), directory)
    model = load(directory)  # from here on, the weights as shipped

    sampling, key = time.perf_counter(), jax.random.key(run.seed)
    rows = {
        name: np.asarray(sample(model, count, jax.random.fold_in(key, i)), np.uint16)
        for i, (name, count) in enumerate(
            {"evaluation": run.evaluation_rows, "calibration": run.calibration_rows}.items(), 1
        )
    }
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **rows)
    write_whole(directory / "tokens.npz", packed.getvalue())
    measured["sampling_seconds"] = time.perf_counter() - sampling

    calibration = jnp.asarray(rows["calibration"])
    result = {
        "run": dataclasses.asdict(run),
        "parameters": sum(array.size for array in parameters.values()),
        "books": {"seen": len(seen), "unseen": len(unseen)},
        "tokens_seen": sum(map(len, seen)),
        **measured,
        "unseen_loss_float32": entropy_check(model, unseen_rows)["nll"],
        "sampled": {name: entropy_check(model, tokens) for name, tokens in rows.items()},
        "max_over_median": outliers(model, calibration, 0),
        "max_over_median_without_position_0": outliers(model, calibration, 1),
        "bytes": {file.name: file.stat().st_size for file in sorted(directory.iterdir())},
        "seconds": time.perf_counter() - begin,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    write_whole(out / "pretrain_testbed.json", to_json(result))
    print(json.dumps({k: v for k, v in result.items() if k != "curve"}), flush=True)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("DUQUANTPP_DATA"), help="holds text/")
    parser.add_argument("--out", required=True, help="a new testbed/ is written in it")
    for field in dataclasses.fields(Pretrain):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    place, target = options.pop("data"), options.pop("out")
    if place is None:
        parser.error("where is the text? give --data DIR or set DUQUANTPP_DATA")
    main(Pretrain(**options), Path(place), Path(target))
