"""The programs that read exports, and what each does with the input of a linear.

    transformers   compressed-tensors 0.20 rounds activations under EVEN. It leaves transform_config
                   out, so an export whose inputs are moved is refused by it (`STATUS`) and loaded
                   by `duquantpp_jax.interop.load_transformers`. NVFP4 it rounds as
                   nvfp4_calibrated, bit for bit.
    vllm           FlashInfer rounds them under RCEIL, on a GPU of compute capability 10; elsewhere
                   vLLM leaves them in bfloat16, whatever config.json says of activations. It
                   applies transform_config, with matrices in bfloat16, on one GPU, to linears
                   without a bias; q, k, v are one linear there, and so are gate and up.

Source: transformers 5.24, quantizer_compressed_tensors.py; compressed-tensors 0.20.1,
quantization/utils/mxfp_utils.py; vLLM, model_executor/layers/quantization/compressed_tensors (read,
not run).
"""

import dataclasses
from collections.abc import Iterable, Sequence

from duquantpp_jax.commands.options.common import Serve


@dataclasses.dataclass(frozen=True)
class Reader:
    """A program that serves exports.

    Attributes:
      rule: The scale rule under which it rounds activations to MXFP4.
      fuses: Whether linears that share an input are one linear to it: their weights in NVFP4 then
        have one tensor scale, and are not exported for it.
      biases: Whether it adds a bias behind an input that is moved.
    """

    rule: str
    fuses: bool
    biases: bool


READERS: dict[str, Reader] = {
    "transformers": Reader("even", fuses=False, biases=True),
    "vllm": Reader("rceil", fuses=True, biases=False),
}
ANY = Reader("", fuses=True, biases=True)
"""Of an export that is not for one of them: what the layout itself holds."""

NVFP4 = "nvfp4_calibrated"
"""The format of ours that is exported as NVFP4."""
STATUS = "inputs are moved: load by duquantpp_jax.interop"
"""Stands for quantization_status where inputs are moved. The library refuses it, and prints it;
vLLM does not read it."""


def check_formats(serve: Serve, weights: Iterable[str], activations: Iterable[str]) -> None:
    """Raises ValueError if a reader would round otherwise than formats say, by their full names."""
    rule = READERS[serve].rule
    takes = ("mxfp4",) if READERS[serve].fuses else ("mxfp4", NVFP4)
    for name in weights:
        if name.partition(":")[0] not in takes:
            raise ValueError(
                f"--serve {serve} takes weights in {' or '.join(takes)}, not in {name}"
            )
    for name in activations:
        if name not in (f"mxfp4:{rule}", "bf16", *takes[1:]):
            raise ValueError(
                f"{serve} rounds activations to mxfp4:{rule}, and the model is quantized for "
                f"{name}: quantize with --serve {serve}, or with --activation-formats mxfp4:{rule}"
            )


def says(activations: Iterable[str], moved: bool, biases: bool) -> dict[str, str]:
    """What each reader makes of an export as compressed-tensors, in a line.

    Args:
      activations: Their formats, by full names.
      moved: Whether inputs are moved online.
      biases: Whether such an input's linear has a bias.
    """
    own, found = sorted(set(activations)), {}
    for name, reader in READERS.items():
        wrong = [given for given in own if given not in (f"mxfp4:{reader.rule}", "bf16", NVFP4)]
        result = "gives this model's logits"
        if NVFP4 in own and reader.fuses:
            result = "gives other logits: it takes one tensor scale for q, k and v, up and gate"
        if wrong:
            rule = f"{reader.rule}, not as {', '.join(wrong)}"
            result = f"gives other logits: it rounds activations under {rule}"
        found[name] = result
    if moved:
        found["transformers"] = (
            "refuses it in from_pretrained, which would leave transform_config out; by "
            f"duquantpp_jax.interop.load_transformers it {found['transformers']}"
        )
    else:
        found["transformers"] += (
            " (by load_transformers in float32; from_pretrained computes in bfloat16)"
        )
    if moved and biases:
        found["vllm"] = "fails: it moves no input of a linear with a bias"
    else:
        found["vllm"] += (
            " (in bfloat16, on GPUs of compute capability 10; on others it leaves activations as "
            "they are)" + (", without tensor parallelism" if moved else "")
        )
    return found


CARD = "README.md"
SNIPPET = """from duquantpp_jax.interop import load_transformers  # of the extra interop

model = load_transformers(DIRECTORY)"""
"""How a user gets an export as compressed-tensors into transformers."""


def card(own: str, notes: Sequence[str], *, loads: bool) -> str:
    """The README.md of an export: that of the model, and how this directory is read.

    Args:
      loads: Whether `load_transformers` reads it.
    """
    lines = "".join(f"- {line}\n" for line in notes)
    code = f"\n```python\n{SNIPPET}\n```\n" if loads else ""
    return f"{own}{2 * chr(10) if own else ''}# Exported by duquantpp_jax\n\n{lines}{code}"
