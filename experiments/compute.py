"""What does running evaluation in bfloat16 move, and is it more than noise?

Hypothesis: nothing that matters: matrix products outside of the quantized linears (attention, the
  head, what moves inputs) round to 8 bits, which averages out over targets; where a number lies on
  a border between two elements, it flips, as it does between two machines.
Method: each recipe is calibrated, fitted and rounded in float32, and predicts once in float32 and
  with matrix products in bfloat16 (--compute bf16 of evaluate), where the float model that it is
  compared with computes in bfloat16 as well ("both") or stays in float32 ("model alone"). Beside
  them what noise moves: norm weights of the quantized model times 1 + 1e-6 N(0, 1), three seeds;
  and calibration on the next 64 rows. Differences are paired with float32 row by row.
Command: python -m experiments.compute --out FILE [--model DIR --text FILE
  --calibration-text FILE --tokens N --recipes NAME .. --rules RULE ..]
Cost: 7 evaluations a recipe and rule; all in four minutes on one H200.
Last result, 2026-11-30, one H200 that two runs shared, jax 0.11.2, SmolLM2, 65,408 targets of the
  development books (results/compute_smollm2.json): KL in float32, what bfloat16 ("both") adds with
  its 95 % interval, and what the three seeds of moved norms add:
    rtn, even               1.094   +.030 (+.016, +.044)   -.002, -.001, +.001
    block_hadamard, even     .934   +.007 (+.002, +.013)   +.001, -.000, -.002
    smooth_hadamard, even    .483   -.003 (-.009, +.004)   +.002, +.002, +.002
    wush, even               .341   -.001 (-.005, +.002)   +.003, +.000, -.001
    rtn, rceil              1.204   +.022 (+.013, +.031)   +.001, +.002, +.006
    block_hadamard, rceil   1.031   +.003 (-.005, +.011)   -.002, +.001, -.003
    smooth_hadamard, rceil   .511   +.001 (-.005, +.007)   -.001, -.001, -.001
    wush, rceil              .373   +.002 (-.002, +.006)   +.000, -.000, +.004
  The float model itself moves by a KL of .0006, and has another first token at 1.3 % of targets. So
  the hypothesis holds for what smooths or balances its inputs; plain rounding gets worse by ten
  times the noise, NLL with it (+.029 / +.022), and block_hadamard by a little under even. What
  bfloat16 adds depends on the recipe, so numbers of the two types are not to be compared, and
  tables are in float32. Other calibration rows move smoothed Hadamard by .007 and WUSH by .002.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from duquantpp_jax import files
from duquantpp_jax.checkpoints import load, testbed
from duquantpp_jax.evaluation import Predictor, Reference, RowSums, clusters, estimate
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.evaluation.subject import environment, load_rows, model_and_hash, name_and_hash
from duquantpp_jax.models import Decoder
from duquantpp_jax.models.parameters import LAYER, NORM, input_norms
from duquantpp_jax.ptq import Plan, quantize_decoder
from duquantpp_jax.recipes import recipe

RECIPES = ("rtn", "block_hadamard", "smooth_hadamard", "wush")
RULES = ("even", "rceil")
FLOAT32 = "float32"
NOISE = 1e-6
SEEDS = (0, 1, 2)


def moved_norms(model: Decoder, seed: int) -> Decoder:
    """The decoder with its norm weights times 1 + NOISE N(0, 1)."""
    random, parameters = np.random.default_rng(seed), model.parameters()
    for name in (NORM, *(LAYER + norm for norm in input_norms(model.config).values())):
        factor = 1 + NOISE * random.standard_normal(parameters[name].shape)
        moved = parameters[name].astype(jnp.float32) * jnp.asarray(factor, jnp.float32)
        parameters[name] = moved
    return Decoder(model.config, parameters)


def ways(
    name: str,
    rule: str,
    model: Decoder,
    references: dict[str, Reference],
    calibration: Integer[np.ndarray, "rows length"],
) -> Iterator[tuple[str, RowSums]]:
    """Sums over rows of a recipe, float32 first, by what is done another way."""
    half = len(calibration) // 2
    plan = Plan.of(model.config, recipe(name, rule))
    quantized = Predictor(*quantize_decoder(plan, model, calibration[:half]))
    usual, bfloat16 = references[FLOAT32], references["bf16"]
    yield FLOAT32, usual.row_sums(quantized)
    in_bfloat16 = dataclasses.replace(quantized, model=quantized.model.computing(jnp.bfloat16))
    yield "bf16, both", bfloat16.row_sums(in_bfloat16)
    yield "bf16, model alone", usual.row_sums(in_bfloat16)
    for seed in SEEDS:
        moved = dataclasses.replace(quantized, model=moved_norms(quantized.model, seed))
        yield f"norms times 1 + 1e-6 N, seed {seed}", usual.row_sums(moved)
    other = Predictor(*quantize_decoder(plan, model, calibration[half:]))
    yield "calibrated on the next rows", usual.row_sums(other)


def compared(
    name: str, rule: str, found: dict[str, RowSums], documents: Integer[np.ndarray, " rows"]
) -> Iterator[dict[str, Any]]:
    """Measures of each way as means over targets, and paired differences to float32."""
    unit, cluster = clusters(documents)

    def means(sums: RowSums) -> dict[str, np.ndarray]:
        rows = {"kl": sums.kl, "nll": sums.nll, "excess_nll": sums.nll - sums.reference_nll}
        rows |= {"agreement": sums.agreement}
        return {measure: values / TARGETS for measure, values in rows.items()}

    base = means(found[FLOAT32])
    for way, sums in found.items():
        rows = means(sums)
        entry: dict[str, Any] = {"recipe": name, "rule": rule, "way": way, "clusters": unit}
        entry |= {measure: float(np.mean(values)) for measure, values in rows.items()}
        if way != FLOAT32:
            paired = {m: estimate({0: rows[m] - base[m]}, cluster) for m in rows}
            entry["difference"] = {m: {"value": e.mean, "ci95": e.ci95} for m, e in paired.items()}
        yield entry


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--tokens", type=int, default=128 * TARGETS)
    parser.add_argument("--rows", type=int, default=64, help="to calibrate on")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--rules", nargs="+", default=RULES)
    options = parser.parse_args()
    model = load(options.model or testbed.directory())
    rows = load_rows(options.model, options.text, options.tokens, "evaluation", "text")
    wanted = 2 * options.rows * TARGETS
    calibration = load_rows(options.model, options.calibration_text, wanted, "calibration", "text")
    inputs = np.asarray(calibration.tokens, np.int32)[:, :-1]
    references = {
        name: Reference(Predictor(model.computing(dtype)), rows.tokens, keep_bytes=2**30)
        for name, dtype in ((FLOAT32, jnp.float32), ("bf16", jnp.bfloat16))
    }
    about = {"model": model_and_hash(options.model), "text": name_and_hash(options.text)}
    about |= {"calibration_text": name_and_hash(options.calibration_text)}
    about |= {"targets": rows.tokens[:, 1:].size, "calibration_rows": options.rows}
    entries: list[dict[str, Any]] = []
    plain = references[FLOAT32].row_sums(Predictor(model))
    half = references[FLOAT32].row_sums(Predictor(model.computing(jnp.bfloat16)))
    both = {FLOAT32: plain, "bf16, model alone": half}
    entries += compared("float", "-", both, rows.documents)
    for rule in options.rules:
        for name in options.recipes:
            found = dict(ways(name, rule, model, references, inputs))
            entries += compared(name, rule, found, rows.documents)
            done = {"schema": 1, **about, "entries": entries, "environment": environment()}
            files.write_whole(options.out, files.to_json(done))
            print(json.dumps(entries[-len(found) :]), flush=True)


if __name__ == "__main__":
    main()
