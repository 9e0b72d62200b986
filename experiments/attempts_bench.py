"""What runs an attempt of beat_hadamard.py: learns, rounds, learns again, measures and writes."""

import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from duquantpp_jax import files
from duquantpp_jax.core import Fitted, MXArray, Recipe, Stats, Weights
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.evaluation.rows import TARGETS, Rows
from duquantpp_jax.evaluation.subject import environment
from duquantpp_jax.learning.blocks import learn_model_by_blocks
from duquantpp_jax.learning.model import Learning, at_rates, learn_model
from duquantpp_jax.learning.moves import PARTS
from duquantpp_jax.models import Decoder
from duquantpp_jax.ptq.asymmetric import quantize_asymmetric
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite
from duquantpp_jax.ptq.walk import fit_decoder, quantize_decoder
from duquantpp_jax.recipes import recipe
from duquantpp_jax.rounding.descent import GPTQDescent
from duquantpp_jax.transforms import storage
from duquantpp_jax.transforms.block import BlockAffine
from duquantpp_jax.transforms.learned import block_affine
from experiments.attempts import AFFINE_AMAX, ATTEMPTS, Attempt

BATCH_ROWS = 16
SIZE = 32
"""Of every matrix."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all attempts on one model share."""

    model: Decoder
    rows: np.ndarray
    held_out: np.ndarray
    calibration: np.ndarray
    texts: dict[str, Rows]
    widths: dict[str, int]
    stats: dict[str, Stats]
    dtype: Any

    def cell(
        self,
        name: str,
        rule: str,
        seed: int,
        place: Path,
        attempts: Mapping[str, Attempt] = ATTEMPTS,
    ) -> dict:
        """What an attempt gave: read where it was measured before, or measured and written.

        Args:
          name: Of the attempt.
          rule: Scale rule.
          place: Directory of results, and of the transforms that were learned.
          attempts: By name.
        """
        file, learned = (place / f"{name}_{rule}_{seed}.{kind}" for kind in ("json", "safetensors"))
        if not file.exists():
            attempt = attempts[name]
            if attempt.start in attempts:
                self.cell(attempt.start, rule, seed, place, attempts)
                start: Any = storage.load(place / f"{attempt.start}_{rule}_{seed}.safetensors")
            else:
                start = self.start(attempt.start, rule, seed)
            result, fits = self.run(attempt, start, rule, seed)
            storage.save(learned, {site: one.transform for site, one in fits.items()})
            files.write_whole(file, files.to_json(result))
            kl = {text: round(one["kl"], 5) for text, one in result["measured"].items()}
            print(f"{file.stem}: KL {kl}, {result['seconds']:.0f} s", flush=True)
        return json.loads(file.read_text(encoding="utf-8"))

    def start(self, name: str, rule: str, seed: int) -> dict[str, BlockAffine]:
        """The transforms of a recipe."""
        plan = Plan.of(self.model.config, recipe(name, rule), seed=seed)
        fits = fit_decoder(plan, self.model, self.stats)
        return {
            site: jax.vmap(lambda t, width=width: block_affine(t, width, SIZE))(
                fits[site].transform
            )
            for site, width in self.widths.items()
        }

    def run(
        self, attempt: Attempt, start: dict[str, BlockAffine], rule: str, seed: int
    ) -> tuple[dict, dict[str, Fitted]]:
        """Learns, rounds and measures; what is written, and what was learned."""
        began = time.perf_counter()
        plain, learning = recipe("rtn", rule), 0.0
        fits, history = {site: Fitted(one) for site, one in start.items()}, []
        if attempt.steps:
            fits, _, history = self.learn(attempt, start, rule, seed)
            learning = time.perf_counter() - began
        state = self.rounded(attempt.rounding, plain, fits)
        if attempt.refine:
            again = time.perf_counter()
            fits, _, after = self.refine(attempt, fits, state, rule, seed)
            history, learning = [*history, *after], learning + time.perf_counter() - again
            state = {
                site: dataclasses.replace(one, transform=fits[site].transform)
                for site, one in state.items()
            }
        measured = {name: self.measure(state, plain, rows) for name, rows in self.texts.items()}
        result = {
            "attempt": repr(attempt),
            "scale_rule": rule,
            "seed": seed,
            "measured": measured,
            "history": history,
            "condition": max(worst_condition(one.transform) for one in fits.values()),
            "learning_rows": len(self.rows),
            "learning_seconds": learning,
            "seconds": time.perf_counter() - began,
            "environment": environment(),
        }
        return result, fits

    def refine(
        self,
        attempt: Attempt,
        fits: dict[str, Fitted],
        state: dict[str, QuantizedSite],
        rule: str,
        seed: int,
    ) -> Learning:
        """Learns the transform once more, for the weights as they have been rounded."""
        again = dataclasses.replace(
            attempt, steps=attempt.refine, moves=AFFINE_AMAX, by_blocks=False
        )
        held = {site: dequantized(one) for site, one in state.items()}
        start = {site: one.transform for site, one in fits.items()}
        return self.learn(again, start, rule, seed, held)

    def learn(
        self,
        attempt: Attempt,
        start: dict[str, BlockAffine],
        rule: str,
        seed: int,
        rounded: dict[str, Weights] | None = None,
    ) -> Learning:
        """Learns what the attempt moves; `rounded` as of `learn_model`."""
        through_model = functools.partial(learn_model, dtype=self.dtype, rounded=rounded)
        learn = learn_model_by_blocks if attempt.by_blocks else through_model
        steps = attempt.steps
        of_transform, of_weights, of_rest = (
            optax.warmup_cosine_decay_schedule(0, peak, max(1, steps // 20), steps + 1)
            for peak in attempt.rates
        )
        rates = dict.fromkeys(PARTS, of_rest)
        rates |= {"transform": of_transform, "weights": of_weights}
        plain = recipe("rtn", rule)
        return learn(
            self.model,
            start,
            attempt.moves,
            (plain.activation_format, plain.weight_format),
            self.rows,
            self.held_out,
            jax.random.key(seed),
            steps=steps,
            optimizer=at_rates(rates),
            batch_rows=BATCH_ROWS,
            report=lambda *check: print(*check, flush=True),
        )

    def rounded(
        self, rounding: str, plain: Recipe, fits: dict[str, Fitted]
    ) -> dict[str, QuantizedSite]:
        """The quantized sites."""
        if rounding == "rtn":
            plan = Plan.of(self.model.config, plain, fits=fits)
            return quantize_decoder(plan, self.model, self.calibration, stats=self.stats)[-1]
        one = recipe("rtn", "floor", "gptq").rounding
        if rounding.endswith("descent"):
            one = GPTQDescent()
        chosen = dataclasses.replace(plain, rounding=one)
        if rounding.startswith("asymmetric"):
            return quantize_asymmetric(self.model, chosen, self.calibration, fits)
        plan = Plan.of(self.model.config, chosen, fits=fits)
        return quantize_decoder(plan, self.model, self.calibration, stats=self.stats)[-1]

    def measure(self, state: dict[str, QuantizedSite], plain: Recipe, rows: Rows) -> dict:
        """KL and excess NLL in nats a target, row by row and as means."""
        predictor = Predictor(self.model, QuantizedLinear(plain.activation_format), state)
        sums = Reference(Predictor(self.model), rows.tokens).row_sums(predictor)
        return {
            "kl": float(np.mean(sums.kl / TARGETS)),
            "excess_nll": float(np.mean((sums.nll - sums.reference_nll) / TARGETS)),
            "row_kl": (sums.kl / TARGETS).tolist(),
            "document": rows.documents.tolist(),
        }


def dequantized(site: QuantizedSite) -> Weights:
    """The numbers that the rounded weights of a site are."""
    return tuple(w.dequantize() if isinstance(w, MXArray) else w for w in site.weights)


def worst_condition(transform: BlockAffine) -> float:
    """Of the matrices of all blocks and layers."""
    return float(np.linalg.cond(np.asarray(transform.matrices, np.float64)).max())
