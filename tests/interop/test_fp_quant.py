"""transformers knows an export for QuTLASS, and does not load it where it would compute otherwise
(needs the extra `interop`)."""

import json

import pytest

from tests.checkpoints.test_fp_quant import served  # noqa: F401

transformers = pytest.importorskip("transformers", reason="needs the extra interop")


def test_transformers_accepts_the_configuration_and_refuses_a_cpu(served):  # noqa: F811
    fields = json.loads((served[1] / "config.json").read_text())["quantization_config"]
    known = transformers.FPQuantConfig(**fields).to_dict()
    assert {name: known[name] for name in fields} == fields
    with pytest.raises(NotImplementedError, match="FPQuant quantization is only supported on GPU"):
        transformers.AutoModelForCausalLM.from_pretrained(served[1])
