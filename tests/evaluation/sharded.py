"""Run by test_predict.py in a process of its own, as devices are counted before their first use.

A batch is whole on its device, so that under log256, whose scale spans a batch, a device sees what
one device alone would: only the order of sums inside a matrix product may differ. The same holds
where the devices of a group share the weights, and there of the softmax over the vocabulary.
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from duquantpp_jax.checkpoints import save
from duquantpp_jax.commands.evaluate import evaluate
from duquantpp_jax.commands.generate import continued
from duquantpp_jax.commands.options.evaluate import EvaluateOptions
from duquantpp_jax.commands.options.generate import GenerateOptions
from duquantpp_jax.evaluation.predict import Predictor, Reference
from duquantpp_jax.evaluation.scoring import Scorer
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.ptq.sharding import cut, mesh_of
from duquantpp_jax.ptq.walk import quantize_decoder
from duquantpp_jax.recipes import recipe
from tests.conftest import byte_tokenizer, mixture, tiny_decoder

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def main() -> None:
    devices = jax.devices()
    model = tiny_decoder(vocab_size=260)
    tokens = np.random.default_rng(0).integers(0, 257, (19, 24)).astype(np.int32)
    plan = Plan.of(model.config, recipe("rtn", "log256"))
    predictor = Predictor(*quantize_decoder(plan, model, tokens))
    # 19 rows are ten batches: eight, and two beside six devices that have none.
    where = ({}, {"mesh": mesh_of("data=2,model=4")}, {"devices": devices[:1]})
    *several, alone = (
        Reference(Predictor(model), tokens, batch_rows=2, **some).row_sums(predictor)
        for some in where
    )
    for sums in several:
        for values, others in zip(sums, alone, strict=True):
            np.testing.assert_allclose(values, others, rtol=1e-6, atol=7e-6)
    rows = [row.tolist() for row in tokens[:9, :10]]
    everywhere, alone = (
        Scorer(Predictor(model), batch_rows=2, devices=some)(rows) for some in (None, devices[:1])
    )
    for scored, other in zip(everywhere, alone, strict=True):
        np.testing.assert_allclose(scored.log_q, other.log_q, rtol=1e-6, atol=7e-6)
    a_quarter_of_every_matrix_is_on_a_device(predictor)
    commands_give_the_same()
    print(len(devices), "devices agree")


def a_quarter_of_every_matrix_is_on_a_device(predictor: Predictor) -> None:
    model, _, state = cut(mesh_of("model=4"), predictor.model, predictor.linear, predictor.state)
    large = [leaf for leaf in jax.tree.leaves((model, state["mlp_in"].weights)) if leaf.size > 1024]
    assert len(large) >= 1 + 7 + 2
    assert all(leaf.nbytes == 4 * leaf.addressable_data(0).nbytes for leaf in large)
    with pytest.raises(ValueError, match=r"q_proj has 64 outputs, and 3 .* a divisor of 32"):
        cut(mesh_of("model=3"), model, predictor.linear, state)


def commands_give_the_same() -> None:
    """Of a mixture of experts, whose vocabulary 4 devices cannot share."""
    with tempfile.TemporaryDirectory() as place:
        directory, text = Path(place, "model"), Path(place, "text")
        save(mixture("GptOssForCausalLM"), byte_tokenizer().to_str(), directory)
        text.write_text("abcd efgh " * 30)
        options = EvaluateOptions(directory, text, window=24)
        cut_up = dataclasses.replace(options, mesh="data=2,model=4")
        found, wanted = (evaluate(each)["nll"]["value"] for each in (cut_up, options))
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
        prompt = GenerateOptions(directory, "abc", max_new_tokens=4, cache="float32")
        assert continued(dataclasses.replace(prompt, mesh="model=4")) == continued(prompt)
        with pytest.raises(ValueError, match="give model=N alone"):
            continued(dataclasses.replace(prompt, mesh="data=2,model=4"))


if __name__ == "__main__":
    main()
