"""What the attempts of beat_hadamard.py gave, side by side: `--summary` there.

Rows of text are paired, and seeds where both were run with the same; the 95 % intervals of
differences are over text and seeds (evaluation/intervals.py).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from duquantpp_jax.evaluation.intervals import clusters, estimate
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab.pivot import distinct
from duquantpp_jax.recipes import FORMATS, RULES

COMPARED = {
    "a": ("a_hadamard", "a_affine_400"),
    "b": ("b_hadamard_descent", "b_affine_400_gptq"),
    "c": ("c_hadamard", "c_wush_400"),
}
"""Of each row, Hadamard with the same treatment, and the best method known before."""


def summary(place: Path) -> list[dict]:
    """All results of a directory: of each attempt and rule the mean over its seeds on each text,
    and its differences to those of COMPARED, paired row by row, with 95 % intervals."""
    found: dict[tuple[str, str], list[dict]] = {}
    for file in sorted(place.glob("*.json")):
        one = json.loads(file.read_text(encoding="utf-8"))
        name = file.stem.removesuffix(f"_{one['scale_rule']}_{one['seed']}")
        found.setdefault((name, one["scale_rule"]), []).append(one)

    def by_seed(name: str, rule: str, text: str) -> dict[int, np.ndarray]:
        return {
            one["seed"]: np.asarray(one["measured"][text]["row_kl"]) for one in found[name, rule]
        }

    entries = []
    for (name, rule), ones in found.items():
        entry: dict[str, Any] = {
            "attempt": name,
            "scale_rule": rule,
            "what": ones[0]["attempt"],
            "seeds": [one["seed"] for one in ones],
            "condition": max(one["condition"] for one in ones),
            "learning_rows": ones[0]["learning_rows"],
            "learning_seconds": [one["learning_seconds"] for one in ones],
            "environments": distinct(one["environment"] for one in ones),
            "texts": {},
        }
        for text, first in ones[0]["measured"].items():
            kl = [one["measured"][text]["kl"] for one in ones]
            unit, numbers = clusters(np.asarray(first["document"]))
            differences = {}
            for other in COMPARED[name[0]]:
                if other != name and (other, rule) in found:
                    off = estimate(by_seed(name, rule, text), numbers, by_seed(other, rule, text))
                    differences[other] = off.mean, *(off.ci95 or (float("nan"),) * 2)
            entry["texts"][text] = {
                "kl": float(np.mean(kl)),
                "kl_of_seeds": kl,
                "excess_nll": float(np.mean([one["measured"][text]["excess_nll"] for one in ones])),
                "targets": len(first["row_kl"]) * TARGETS,
                "clustered_by": unit,
                "differences": differences,
            }
        entries.append(entry)
    return entries


def table(entries: list[dict]) -> str:
    """Markdown: of each attempt KL, its differences to those of COMPARED, and the share of its
    gain over RTN Hadamard, relative to that, that is left on the other text."""
    there = {(one["attempt"], one["scale_rule"]): one["texts"] for one in entries}
    rules = [
        rule for rule in (*RULES, *FORMATS) if any(one["scale_rule"] == rule for one in entries)
    ]
    heads = ("KL", "- Hadamard", "- known", "transfer KL", "gain kept")
    lines = [
        "| attempt | " + " | ".join(f"{rule}: {head}" for rule in rules for head in heads) + " |",
        "| --- |" + " ---: |" * (len(rules) * len(heads)),
    ]
    for name in dict.fromkeys(one["attempt"] for one in entries):
        cells = [
            cell
            for rule in rules
            for cell in _cells(name, there.get((name, rule)), there.get(("a_hadamard", rule)))
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(name: str, texts: dict[str, Any] | None, plain: dict[str, Any] | None) -> list[str]:
    """One attempt under one rule, as `table` has it; nothing where it was not run."""
    if texts is None:
        return [""] * 5
    home, away = texts["text"], texts.get("transfer")
    seeds = home["kl_of_seeds"]
    spread = f" ({min(seeds):.4f}-{max(seeds):.4f})" if len(seeds) > 1 else ""
    cells = [f"{home['kl']:.4f}{spread}"]
    for other in COMPARED[name[0]]:
        mean, low, high = home["differences"].get(other, (0, 0, 0))
        cells.append(f"{mean:+.4f} ± {(high - low) / 2:.4f}" if mean else "")
    kept = ""
    if plain and away and name != "a_hadamard":
        gain = 1 - home["kl"] / plain["text"]["kl"]
        kept = f"{(1 - away['kl'] / plain['transfer']['kl']) / gain:.0%}"
    return [*cells, f"{away['kl']:.4f}" if away else "", kept]
