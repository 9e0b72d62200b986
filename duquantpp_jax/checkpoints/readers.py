"""The programs that read exports, and what each does with the input of a linear.

    transformers   compressed-tensors 0.20 rounds activations under EVEN. It leaves transform_config
                   out, so an export whose inputs are moved is refused by it (`STATUS`) and loaded
                   by `duquantpp_jax.interop.load_transformers`. NVFP4 it rounds as
                   nvfp4_calibrated, bit for bit. Experts are decompressed and put together, and
                   their inputs neither moved nor rounded.
    vllm           FlashInfer rounds them under RCEIL, on a GPU of compute capability 10; elsewhere
                   vLLM leaves them in bfloat16, whatever config.json says of activations. It
                   applies transform_config, with matrices in bfloat16, on one GPU, to linears
                   without a bias, and not to experts; q, k, v are one linear there, and so are gate
                   and up.
    qutlass        Reads another layout (fp_quant.py), through transformers with fp_quant or through
                   vLLM, on a GPU of compute capability 10 or 12: moves and rounds all inputs in one
                   kernel, by a matrix in bfloat16 and under its own rule.

Source: transformers 5.24, quantizer_compressed_tensors.py and integrations/compressed_tensors.py;
compressed-tensors 0.20.1, quantization/utils/mxfp_utils.py; vLLM, model_executor/layers/
quantization/compressed_tensors and fp_quant.py, and QuTLASS, fused_quantize_mx (read, not run).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from duquantpp_jax.commands.options.common import Serve
from duquantpp_jax.commands.options.export import Layout
from duquantpp_jax.models.parameters import EXPERT_SITES

NVFP4 = "nvfp4_calibrated"
"""The format of ours that is exported as NVFP4."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """A program that serves exports.

    Attributes:
      rule: The scale rule under which it rounds activations to MXFP4, or the name of its format.
      of_experts: The same of the inputs of experts; bf16 where it does not round them.
      fuses: Whether linears that share an input are one linear to it: their weights in NVFP4 then
        have one tensor scale, and are not exported for it.
      biases: Whether it adds a bias behind an input that is moved.
      layout: What it reads.
      weights: The formats of weights that it takes: mxfp4 under any rule, and others, in which it
        takes activations, too.
      plain: Whether it also runs a linear whose input is not rounded, other than of an expert.
    """

    rule: str
    of_experts: str
    fuses: bool
    biases: bool
    layout: Layout = "compressed-tensors"
    weights: tuple[str, ...] = ("mxfp4",)
    plain: bool = True

    def rule_of(self, site: str, mixture: bool) -> str:
        """`rule` or `of_experts`."""
        return self.of_experts if mixture and site in EXPERT_SITES else self.rule

    def activations(self, site: str, mixture: bool) -> str:
        """The format to which it rounds the inputs of a site, by its full name."""
        rule = self.rule_of(site, mixture)
        return rule if rule in ("bf16", "fpquant") else f"mxfp4:{rule}"

    def rounds_as(self, given: str, site: str, mixture: bool) -> bool:
        """Whether it rounds the inputs of a site as this format does."""
        fine = given == self.activations(site, mixture)
        if mixture and site in EXPERT_SITES:
            return fine
        return fine or (given == "bf16" and self.plain) or given in self.weights[1:]


READERS: dict[str, Reader] = {
    "transformers": Reader("even", "bf16", fuses=False, biases=True, weights=("mxfp4", NVFP4)),
    "vllm": Reader("rceil", "rceil", fuses=True, biases=False),
    "qutlass": Reader(
        "fpquant",
        "fpquant",
        fuses=True,
        biases=True,
        layout="fp-quant",
        weights=("mxfp4", "fpquant", "quest"),
        plain=False,
    ),
}
ANY = Reader("", "", fuses=True, biases=True)
"""Of an export that is not for one of them: what the layout itself holds."""

FOR = "duquantpp_jax"
"""Where config.json says for which formats an export was quantized, `{FOR: {SITE: NAME}}`: the
library has no names for scale rules, and passes this entry over."""
STATUS = "inputs are moved: load by duquantpp_jax.interop"
"""Stands for quantization_status where inputs are moved. The library refuses it, and prints it;
vLLM does not read it."""


def check_formats(
    serve: Serve, weights: Mapping[str, str], activations: Mapping[str, str], *, mixture: bool
) -> None:
    """Raises ValueError if a reader would round otherwise than formats say.

    Args:
      weights, activations: Of each site, by their full names.
      mixture: Whether the model is a mixture of experts.
    """
    reader = READERS[serve]
    for name in weights.values():
        if name.partition(":")[0] not in reader.weights:
            raise ValueError(
                f"--serve {serve} takes weights in {' or '.join(reader.weights)}, not in {name}"
            )
    for site, name in activations.items():
        wanted = reader.activations(site, mixture)
        if not reader.rounds_as(name, site, mixture):
            own = mixture and site in EXPERT_SITES
            inputs = f"the inputs of experts ({site})" if own else "activations"
            rounds = f"leaves {inputs}" if wanted == "bf16" else f"rounds {inputs} to {wanted}"
            raise ValueError(
                f"{serve} {rounds}, and the model is quantized for {name}: quantize with "
                f"--serve {serve}, or with --activation-formats {site}={wanted}"
            )


def quantized_for(packing: Mapping[str, Any]) -> dict[str, str]:
    """The activation formats, by site, for which an export says it was quantized; empty where it
    says nothing.

    Args:
      packing: quantization_config of config.json.

    Raises:
      ValueError: The entry is no object of names.
    """
    formats = packing.get(FOR, {})
    if not isinstance(formats, dict) or not all(isinstance(n, str) for n in formats.values()):
        raise ValueError(f"config.json: quantization_config has {FOR} {formats!r:.100}: not ours")
    return formats


def other_formats(serve: Serve, activations: Mapping[str, str], *, mixture: bool) -> str | None:
    """How a reader rounds activations that this model has in another format, in words; else None.

    Args:
      activations: Of each site, by their full names; NVFP4 is rounded as here.
      mixture: Whether the model is a mixture of experts.
    """
    reader = READERS[serve]
    wrong = {
        f"{reader.activations(site, mixture)}, not {given}"
        for site, given in activations.items()
        if given != NVFP4 and not reader.rounds_as(given, site, mixture)
    }
    return "; ".join(sorted(wrong)) or None


def says(
    activations: Mapping[str, str],
    *,
    moved: bool,
    biases: bool = False,
    mixture: bool = False,
    experts_moved: bool = False,
) -> dict[str, str]:
    """What each reader makes of an export as compressed-tensors, in a line.

    Args:
      activations: Of each site, by their full names.
      moved: Whether inputs are moved online.
      biases: Whether such an input's linear has a bias.
      mixture: Whether the model is a mixture of experts.
      experts_moved: Whether inputs of experts are among them.
    """
    found = {}
    programs: tuple[Serve, ...] = ("transformers", "vllm")
    for name in programs:
        found[name] = "gives this model's logits"
        if NVFP4 in activations.values() and READERS[name].fuses:
            found[name] = (
                "gives other logits: it takes one tensor scale for q, k and v, up and gate"
            )
        if wrong := other_formats(name, activations, mixture=mixture):
            found[name] = f"gives other logits: it has activations in {wrong}"
    if experts_moved:
        found["transformers"] = "refuses it: it moves no input of an expert"
        found["vllm"] = "gives other logits: it moves no input of an expert"
        return found
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
SNIPPETS: dict[Layout, str] = {
    "compressed-tensors": """\
from duquantpp_jax.interop import load_transformers  # of the extra interop

model = load_transformers(DIRECTORY)""",
    "fp-quant": """\
# needs fp_quant, QuTLASS and a GPU of compute capability 10 or 12; or: vllm serve DIRECTORY
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype="bfloat16", device_map="cuda")""",
}
"""How a user gets an export into a program, by its layout."""
SNIPPETS["dequantized"] = SNIPPETS["compressed-tensors"]


def card(own: str, notes: Sequence[str], layout: Layout) -> str:
    """The README.md of an export: that of the model, and how this directory is read."""
    lines = "".join(f"- {line}\n" for line in notes)
    code = f"\n```python\n{SNIPPETS[layout]}\n```\n" if layout in SNIPPETS else ""
    return f"{own}{2 * chr(10) if own else ''}# Exported by duquantpp_jax\n\n{lines}{code}"
