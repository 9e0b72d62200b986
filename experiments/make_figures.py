"""Makes the figures of the README and the docs: `python -m experiments.make_figures`.

docs/compare.png: KL from experiments/results/compare_testbed_128rows.json, which is the
results.json of `duquantpp compare --tokens 65408` (2 CPU cores, 2026-11-25); the channels are
computed anew, since they need no evaluation text.
Cost: a minute on 2 CPU cores.
"""

import io
import json
from pathlib import Path

import numpy as np

from duquantpp_jax import files
from duquantpp_jax.analysis import figures
from duquantpp_jax.compare import CompareOptions, compare
from duquantpp_jax.evaluation.intervals import clusters
from duquantpp_jax.evaluation.text import TARGETS
from duquantpp_jax.models import testbed

ROOT = Path(__file__).parent.parent


def main() -> None:
    path = ROOT / "experiments/results/compare_testbed_128rows.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    options = CompareOptions(
        recipes=tuple(results["options"]["recipes"]), scale_rules=("floor",), tokens=TARGETS
    )
    channels = compare(options).channels
    unit, numbers = clusters(np.arange(len(testbed.evaluation_rows())))
    figure = figures.comparison(results, channels, (unit, len(numbers)))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=200, metadata={"Software": None})
    files.write_whole(ROOT / "docs/compare.png", picture.getvalue())


if __name__ == "__main__":
    main()
