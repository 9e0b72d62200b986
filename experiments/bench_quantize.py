"""How long does `duquantpp quantize` take for a model of Llama-3.1-8B's size, from files to files?

Hypothesis: 32 layers in less than 3 minutes rounded to nearest, in less than 8 by GPTQ, on one H200
and 16 cores; most of it is neither the device's nor the disk's but the compiler's and the host's.

    python -m experiments.bench_quantize --directory PLACE --out RESULTS    # one GPU
    python -m experiments.bench_quantize --directory PLACE --tiny           # anywhere

Writes a checkpoint (synthetic_checkpoint.py: random weights, 15 GiB) to PLACE, and runs the command
as a user does, in a process of its own, without compiled programs of earlier runs. Each line of its
--verbose progress has a time here: `start` is until the first batch is calibrated (hashes of the
model, tokens, imports), `first` until the first layer is done, `layer` the median of later layers,
`finish` after the last. What a layer does is the sum, over later layers, of the time that ends in a
line of that name. The text has random letters, a token each.

Cost: six minutes on one H200; 20 GiB of disk.
Last result, 2026-11-30 (results/bench_quantize.json, 32 cores): 151 s rounded to nearest and 192 s
  by GPTQ, of which the first layer, which compiles, 62 and 95 s, each later one 1.7 and 2.1 s, the
  start 25 s and the end 10 s.
"""

import argparse
import collections
import os
import re
import resource
import shutil
import statistics
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from duquantpp_jax import files
from duquantpp_jax.evaluation.rows import TARGETS
from experiments import synthetic_checkpoint

ROUNDINGS = {"rtn": "< 180 s", "gptq": "< 480 s"}
"""How weights are rounded, and the goal."""
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "bos_token_id": 300,
}
BYTES = 2**30
"""Written and read to see how fast the disk is."""


def write_model(place: Path, layers: int, *, tiny: bool) -> None:
    """The checkpoint, with a tokenizer of one token a byte."""
    shapes = synthetic_checkpoint.SHAPES | (SMALL if tiny else {})
    synthetic_checkpoint.write(place, layers, 0, shapes)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (place / "tokenizer.json").write_text(tokenizer.to_str())


def write_text(place: Path, rows: int) -> None:
    """Random letters, enough for so many rows."""
    letters = np.frombuffer((string.ascii_letters + "    \n").encode(), np.uint8)
    drawn = np.random.default_rng(0).choice(letters, (rows + 1) * TARGETS)
    place.write_bytes(drawn.tobytes())


def disk(place: Path) -> dict[str, float]:
    """GB/s at which the disk takes a file, and gives it again, perhaps from memory."""
    file, content = place / "probe", np.random.default_rng(0).bytes(BYTES)
    start = time.perf_counter()
    file.write_bytes(content)
    files.sync(file)
    written = time.perf_counter()
    file.read_bytes()
    read = time.perf_counter()
    file.unlink()
    return {
        "write GB/s": BYTES / (written - start) / 1e9,
        "read GB/s": BYTES / (read - written) / 1e9,
    }


def quantized(place: Path, out: Path, rounding: str, rows: int) -> dict[str, Any]:
    """Runs the command, and says when each of its lines came."""
    command = [sys.executable, "-m", "duquantpp_jax", "quantize", "--model", str(place / "model")]
    command += ["--recipe", "block_hadamard", "--rounding", rounding, "--scale-rule", "even"]
    command += ["--calibration-text", str(place / "text"), "--rows", str(rows), "--verbose"]
    cache = place / f"programs-{rounding}"
    environment = os.environ | {"DUQUANTPP_CACHE": str(cache)}
    begun, lines = time.perf_counter(), []
    with subprocess.Popen(
        [*command, "--out", str(out)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True, env=environment,
    ) as run:  # fmt: skip
        assert run.stderr is not None
        for line in run.stderr:
            lines.append((time.perf_counter() - begun, line.strip()))
    total = time.perf_counter() - begun
    if run.returncode:
        raise ValueError(f"quantize ended with {run.returncode}: {lines[-1][1] if lines else ''}")
    shutil.rmtree(cache, ignore_errors=True)
    written = sum(path.stat().st_size for path in out.iterdir())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return {"seconds": total, **stages(lines, total), "written GB": written / 1e9,
            "peak host GiB": peak}  # fmt: skip


def stages(lines: list[tuple[float, str]], total: float) -> dict[str, Any]:
    """What the top of this file says, of lines and the seconds at which they came."""
    found = [(at, re.match(r"layer (\d+) of \d+(?:: ([a-z ]+))?", text)) for at, text in lines]
    steps = [(at, int(m[1]), m[2] or "between layers") for at, m in found if m]
    if not steps:
        raise ValueError("the command said nothing of layers")
    ends: dict[int, float] = {}
    doing: dict[str, float] = collections.defaultdict(float)
    before = steps[0][0]
    for at, number, what in steps:
        ends.setdefault(number, at)  # the line that begins it
        if number > 1 and (number, what) != (2, "between layers"):
            doing[what] += at - before
        before = at
    first = next(at for at, _, what in steps if what != "between layers")
    begins = [ends[number] for number in sorted(ends)]
    took = np.diff(begins[1:]).tolist()
    return {
        "start": first,
        "first": (begins[1] if len(begins) > 1 else steps[-1][0]) - first,
        "layer": statistics.median(took) if took else None,
        "finish": total - steps[-1][0],
        "layers": len(begins),
        "doing": dict(doing),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True, help="for the models")
    parser.add_argument("--tiny", action="store_true", help="a small shape, for any device")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=list(ROUNDINGS))
    parser.add_argument("--out", type=Path, help="roundings that it holds are not measured again")
    options = parser.parse_args()
    place = options.directory
    place.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    if options.out and options.out.is_file():
        results = files.read_json(options.out)
    results |= {"layers": options.layers, "rows": options.rows, "cores": os.cpu_count()}
    if not (place / "text").is_file():
        start = time.perf_counter()
        shutil.rmtree(place / "model", ignore_errors=True)
        write_model(place / "model", options.layers, tiny=options.tiny)
        write_text(place / "text", options.rows)
        results["making the model"] = time.perf_counter() - start
        results["disk"] = disk(place)
    for rounding in options.roundings:
        if rounding in results:
            continue
        out = place / rounding
        shutil.rmtree(out, ignore_errors=True)
        found = quantized(place, out, rounding, options.rows)
        results[rounding] = {"goal": ROUNDINGS[rounding], **found}
        print(f"{rounding}: {results[rounding]}", flush=True)
        if options.out:
            files.write_whole(options.out, files.to_json(results))
        shutil.rmtree(out)
    shutil.rmtree(place / "model")
    (place / "text").unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
