"""What does a quantized model lose on its way into other programs?

Hypothesis: nothing where the program moves inputs by one matrix a site and rounds activations by
  the rule that the model was quantized for; one matrix for all blocks costs a fitted recipe most of
  what it gained on the Hadamard matrix.
Method: each recipe is quantized with --serve transformers (weights under mse, activations under
  even, smoothing folded), exported and loaded by `interop.load_transformers`. KL is to the float
  model, of
    ours          the quantized model here
    loaded        the export in transformers and compressed-tensors, float32 on a CPU
    apart         of the model that is loaded to ours, and not to the float model
    last bits     of ours to ours, with each input of a linear moved by 2^-24 of the largest number
                  of its token: what rounding makes of the last bit, in which sums in another order
                  differ, too
    left out      the same without its transform_config, which is what from_pretrained would give
    vLLM's rule   the quantized model here, with activations under rceil, as in vLLM's source
    QuTLASS       what --serve qutlass quantizes, here: activations under fpquant, weights as above
    in bfloat16   the same with inputs and matrices in bfloat16, as its kernels have them
    dequantized   the export of plain bfloat16 weights, activations as they are
  NAME/nvfp4_calibrated has weights and activations in NVFP4, which vLLM takes otherwise (docs).
  A recipe with a matrix for each block is refused by compressed-tensors; its row is there for what
  sharing costs.
Command: python -m experiments.elsewhere --out FILE, with the extra interop; and
  [--model DIR --text FILE --calibration-text FILE --tokens N --recipes NAME ..]
Cost: a minute a recipe on gutenberg-27m, on two cores that nothing else uses.
Last result: docs/serving.md, made of results/elsewhere_*.json.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duquantpp_jax import files
from duquantpp_jax.checkpoints import load, load_any
from duquantpp_jax.checkpoints.layouts import write_export
from duquantpp_jax.commands.options.quantize import QuantizeOptions
from duquantpp_jax.commands.quantize import quantize
from duquantpp_jax.evaluation.predict import Predictor, Reference, kl_divergence
from duquantpp_jax.evaluation.subject import environment, load_rows, model_and_hash, name_and_hash
from duquantpp_jax.interop import load_transformers
from duquantpp_jax.models import SITES
from duquantpp_jax.ptq.site import QuantizedLinear, QuantizedSite
from duquantpp_jax.recipes import SHARED, find_format

RECIPES = (
    "identity",
    "block_hadamard",
    "smooth_hadamard",
    "duquantpp",
    "wush_conditioned",
    "learned_rotation",
    "learned_affine",
    "identity/nvfp4_calibrated",
    "block_hadamard/nvfp4_calibrated",
)
FITTED = RECIPES[3:7]
"""Those with a matrix for each block, and a shared form."""
COLUMNS = {
    "ours": "KL of ours",
    "loaded": "loaded in transformers",
    "apart": "loaded \\|\\| ours",
    "last_bits": "last bits of ours",
    "left_out": "matrices left out",
    "vllm_rule": "vLLM's rule, ours",
    "qutlass": "QuTLASS's rule, ours",
    "qutlass_bfloat16": "in bfloat16, ours",
    "dequantized": "dequantized, W4A16",
}


def measure(
    recipe: str, how: dict[str, Any], reference: Reference, place: Path, *, per_block: bool
) -> dict[str, Any]:
    """The KL of a recipe, by column, and bytes; with a matrix for each block of ours alone.

    Args:
      recipe: Its name, or NAME/FORMAT for another format than MXFP4.
    """
    recipe, _, format = recipe.partition("/")
    same = {"recipe": recipe, "out": place / "q", **how}
    if format:
        same["formats"] = (format,)
    if per_block:
        formats = {"weight_formats": ("mse",), "activation_formats": ("even",)}
        quantize(QuantizeOptions(fuse=True, **formats, **same))
    else:
        quantize(QuantizeOptions(serve="transformers", **same))
    decoder, linear, state = load_any(place / "q")
    targets = reference.tokens[:, 1:].size

    def kl(predictor: Predictor, to: Reference = reference) -> float:
        return float(to.row_sums(predictor).kl.sum() / targets)

    rceil = QuantizedLinear(tuple((site, find_format("mxfp4:rceil")) for site in SITES))
    own = Reference(Predictor(decoder, linear, state), reference.tokens, keep_bytes=2**30)
    found: dict[str, Any] = {
        "ours": kl(Predictor(decoder, linear, state)),
        "last_bits": kl(Predictor(decoder, LastBits(linear), state), own),
    }
    if not format:
        found["vllm_rule"] = kl(Predictor(decoder, rceil, state))
    write_export(place / "q", "dequantized", place / "d")
    found["dequantized"] = kl(Predictor(load(place / "d")))
    found["dequantized_bytes"] = _bytes(place / "d")
    if per_block:
        return found
    write_export(place / "q", "compressed-tensors", place / "e")
    found["bytes"] = _bytes(place / "e")
    found |= in_transformers(place / "e", reference, own)
    return found if format else found | for_qutlass(recipe, how, reference, place)


def for_qutlass(
    recipe: str, how: dict[str, Any], reference: Reference, place: Path
) -> dict[str, float]:
    """The KL of a recipe that is quantized for QuTLASS, as simulated and with its bfloat16."""
    quantize(QuantizeOptions(recipe=recipe, out=place / "f", serve="qutlass", **how))
    decoder, linear, state = load_any(place / "f")

    def of(site: QuantizedSite) -> QuantizedSite:
        return dataclasses.replace(site, transform=jax.tree.map(_in_bfloat16, site.transform))

    rounded = jax.tree.map(of, state, is_leaf=lambda part: isinstance(part, QuantizedSite))
    found = {
        "qutlass": Predictor(decoder, linear, state),
        "qutlass_bfloat16": Predictor(decoder, InBFloat16(linear), rounded),
    }
    targets = reference.tokens[:, 1:].size
    return {name: float(reference.row_sums(p).kl.sum() / targets) for name, p in found.items()}


def _in_bfloat16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class InBFloat16:
    """A linear whose input and outputs are rounded to bfloat16."""

    linear: QuantizedLinear

    def __call__(self, site: str, x: jax.Array, weights: Any, state: Any) -> Any:
        outputs, kept = self.linear(site, _in_bfloat16(x), weights, state)
        return tuple(map(_in_bfloat16, outputs)), kept


@dataclasses.dataclass(frozen=True)
class LastBits:
    """A linear whose input is moved up or down by half a unit in the last place of the largest
    number of each token, which is what one float32 addition of such numbers may lose."""

    linear: QuantizedLinear
    seed: int = 0

    def __call__(self, site: str, x: jax.Array, weights: Any, state: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(self.seed), SITES.index(site))
        signs = jax.random.rademacher(key, x.shape, jnp.float32)
        step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) * np.float32(2**-24)
        return self.linear(site, x + signs * step, weights, state)


_LOG_P = jax.jit(Predictor.log_probabilities)


def in_transformers(directory: Path, reference: Reference, own: Reference) -> dict[str, float]:
    """The KL of an export as loaded, to both, and with its matrices left out, if it has some."""
    import torch

    model = load_transformers(directory)
    rows = [jnp.asarray(row[None]) for row in reference.tokens]
    given = [[_LOG_P(to._given, row) for row in rows] for to in (reference, own)]

    def kl() -> np.ndarray:
        total = np.zeros(2)
        for number, row in enumerate(reference.tokens):
            with torch.no_grad():
                logits = model(torch.from_numpy(row[None, :-1].astype(np.int64))).logits.numpy()
            log_q = jax.nn.log_softmax(jnp.asarray(logits))
            total += [kl_divergence(log_p[number], log_q).sum() for log_p in given]
        return total / reference.tokens[:, 1:].size

    found = dict(zip(("loaded", "apart"), map(float, kl()), strict=True))
    hooked = [m for m in model.modules() if m._forward_pre_hooks]
    if hooked:
        for module in hooked:
            module._forward_pre_hooks.clear()
        found["left_out"] = float(kl()[0])
    return found


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def table(results: dict[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        "| | " + " | ".join(COLUMNS.values()) + " | MB packed | MB dequantized |",
        "| --- |" + " ---: |" * (len(COLUMNS) + 2),
    ]
    order = [name for recipe in RECIPES for name in (recipe, recipe + SHARED)]
    for name in sorted(results["rows"], key=[*order, *results["rows"]].index):
        row = results["rows"][name]
        cells = [f"{row[c]:.4f}" if c in row else "-" for c in COLUMNS]
        sizes = [row.get(c) for c in ("bytes", "dequantized_bytes")]
        cells += [f"{size / 1e6:.1f}" if size else "refused" for size in sizes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures what is not in the file yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--tokens", type=int, default=2044)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounding", default="rtn")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = load_rows(options.model, options.text, options.tokens, "evaluation")
    given = Predictor(load_any(options.model or _testbed())[0])
    reference = Reference(given, rows.tokens, keep_bytes=2**30)
    how = {
        "model": options.model,
        "calibration_text": options.calibration_text,
        "rounding": options.rounding,
        "rows": options.rows,
    }
    about = {
        "model": model_and_hash(options.model),
        "text": name_and_hash(options.text),
        "calibration_text": name_and_hash(options.calibration_text),
        "targets": rows.tokens[:, 1:].size,
        "calibration_rows": options.rows,
        "rounding": options.rounding,
    }
    results: dict[str, Any] = {**about, "rows": {}}
    if options.out.is_file():
        results = json.loads(options.out.read_text(encoding="utf-8"))
        if {name: results[name] for name in about} != about:
            raise SystemExit(f"{options.out} is of another model, text or number of rows")
    for recipe in options.recipes:
        names = (recipe, recipe + SHARED) if recipe in FITTED else (recipe,)  # or NAME:shared alone
        for name in names:
            if name in results["rows"]:
                continue
            per_block, given, begin = name in FITTED, name.removesuffix(SHARED), time.monotonic()
            with tempfile.TemporaryDirectory() as place:
                row = measure(given, how, reference, Path(place), per_block=per_block)
            seconds = round(time.monotonic() - begin)
            results["rows"][name] = {**row, "seconds": seconds, "environment": environment()}
            files.write_whole(options.out, files.to_json(results))
            print(name, row, flush=True)
    print(table(results))


def _testbed() -> Path:
    from duquantpp_jax.checkpoints import testbed

    return testbed.directory()


if __name__ == "__main__":
    main()
