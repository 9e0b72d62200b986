"""Does the winner among transforms depend on the scale rule?

Hypothesis: yes. Under power-of-two scales an outlier doubles the step of 31 neighbours, and
  spreading it helps; under a near-continuous scale (log256, fp32) there is less to gain.
Command: python -m experiments.rotations --model DIR --text FILE --calibration-text FILE
    [--tokens N] [--seeds 0 1 2] [--rules ...] [--recipes ...]
    [--rounding rtn|gptq] --out FILE
  Without --model: the embedded model. Recipes that draw random numbers run once for each seed, the
  others once. Every seed's file holds what `duquantpp compare` would write.
  The same cells as a grid that can be killed and resumed, over all recipes there are by now:
  duquantpp ablate experiments/rotations.py --table [--workers N] [--report FILE.html]
Cost: see the files' `seconds`; 12 recipes x 6 rules on gutenberg-27m are minutes on one GPU.
Last result, 2026-11-28, all 29 recipes, 65,408 targets, three seeds, gutenberg-27m on H200s and the
  embedded model on two CPU cores (results/rotations.md): yes. learned_affine wins under floor
  (.1039; WUSH .1087, block_hadamard .1191), rceil and fp32, WUSH under even (.0955; learned_affine
  .0974, block_hadamard .1064) and mse; under log256 they are level. Plain rounding, behind nearly
  all under the four MXFP4 rules, is ahead of Hadamard under log256 and fp32: confirmed. What a
  rotation spreads then costs its block nothing, and what it takes away are blocks without outlier.
"""

import argparse
from pathlib import Path

from duquantpp_jax import files
from duquantpp_jax.commands.compare import BASELINE, CompareOptions, compare, verdict
from duquantpp_jax.lab import Cell
from duquantpp_jax.recipes import FITS
from experiments.seeding import draws, seeded

RULES = ("floor", "even", "rceil", "mse", "log256", "fp32")
SEEDED = tuple(name for name, fit in FITS.items() if draws(fit))
"""Recipes whose fit draws random numbers."""

CELLS = [cell for name in FITS for rule in RULES for cell in seeded(Cell(name, rule))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--model", "--text", "--calibration-text"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tokens", type=int, default=65_408)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--recipes", nargs="+", default=list(FITS))
    parser.add_argument("--rounding", default="rtn")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    arguments = parser.parse_args()

    runs = []
    for seed in arguments.seeds:
        first = seed == arguments.seeds[0]
        names = [n for n in arguments.recipes if first or n in (BASELINE, *SEEDED)]
        if not first and not set(names) & set(SEEDED):
            break
        options = CompareOptions(
            model=arguments.model,
            text=arguments.text,
            calibration_text=arguments.calibration_text,
            tokens=arguments.tokens,
            recipes=tuple(names),
            scale_rules=tuple(arguments.rules),
            rounding=arguments.rounding,
            seed=seed,
        )
        comparison = compare(options)
        unit, count = comparison.clusters
        clustering = {"unit": unit, "count": count}
        runs.append({**comparison.results, "clusters": clustering, "timings": comparison.timings})
        print(f"seed {seed}: {verdict(comparison.results)}", flush=True)
        for row in comparison.results["rows"]:
            interval = row["kl_difference_ci95"] or (float("nan"),) * 2
            print(
                f"{row['recipe']:26s} {row['scale_rule']:7s} KL {row['kl']:.4f} "
                f"[{interval[0]:+.4f}, {interval[1]:+.4f}] excess {row['excess_nll']:.4f} "
                f"PPL {row['perplexity']:.3f} SQNR {row['sqnr_db']:.2f}",
                flush=True,
            )
    files.write_whole(arguments.out, files.to_json(runs))


if __name__ == "__main__":
    main()
