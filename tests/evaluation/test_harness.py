"""lm-eval asks our model and its own `hf`: the same answers to every item of the tasks.

Both read one checkpoint in float32: two layers of the embedded model. Runs where lm-eval,
torch and transformers are installed.
"""

import json
import runpy

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")

from duquantpp_jax import cli  # noqa: E402
from duquantpp_jax.checkpoints import load_any, load_tokenizer  # noqa: E402
from duquantpp_jax.commands.export import export  # noqa: E402
from duquantpp_jax.commands.options.export import ExportOptions  # noqa: E402
from duquantpp_jax.commands.options.quantize import QuantizeOptions  # noqa: E402
from duquantpp_jax.commands.quantize import quantize  # noqa: E402
from duquantpp_jax.evaluation import harness  # noqa: E402
from tests.conftest import TEXT  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
ITEMS = {"cloze": 64, "last_word": 46, "rolling": 16, "exact": 64, "two_shot": 45}
"""All of each task."""
LENGTH = 512
"""That inputs are filled up to when they are scored by hand: more than the longest has."""


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DISABLE_MULTIPROC"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def checkpoint(shallow_directory):
    return shallow_directory


@pytest.fixture(scope="module")
def simulated(checkpoint, tmp_path_factory):
    """That model quantized, and packed; and how each is loaded."""
    place = tmp_path_factory.mktemp("simulated")
    quantize(
        QuantizeOptions(
            model=checkpoint,
            out=place / "q",
            rows=4,
            calibration_text=TEXT,
            serve="transformers",
            recipe="block_hadamard",
        )
    )
    export(ExportOptions(place / "q", serve="transformers", out=place / "e"))
    return {
        "quantized": (place / "q", {}),
        "packed": (place / "e", {"activation_format": "mxfp4:even"}),
    }


def samples(model, limit=None):
    """Arguments, answers and measures of each item of each task, or of the first of them."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(harness.TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=["gutenberg"], task_manager=manager, bootstrap_iters=0, limit=limit
    )
    return found["samples"]


@pytest.fixture(scope="module")
def ours(checkpoint):
    return samples(harness.model_class()(str(checkpoint)))


def test_every_item_is_answered_as_by_hf(ours, checkpoint):
    """Sums of float32 log-probabilities agree to 1e-5 of their size."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"), **ends)
    options = {"dtype": "float32", "device": "cpu", "batch_size": 4}
    theirs = samples(HFLM(pretrained=str(checkpoint), tokenizer=tokenizer, **options))
    assert ours.keys() == theirs.keys()
    written = set()
    for task in ours:
        assert len(ours[task]) == len(theirs[task]) == ITEMS[task.removeprefix("gutenberg_")]
        for own, other in zip(ours[task], theirs[task], strict=True):
            assert own["arguments"] == other["arguments"]
            if task == "gutenberg_exact":
                assert own["resps"] == other["resps"]
                written.add(own["resps"][0][0])
                continue
            for mine, wanted in zip(own["filtered_resps"], other["filtered_resps"], strict=True):
                np.testing.assert_allclose(mine[0] if isinstance(mine, tuple) else mine,
                    wanted[0] if isinstance(wanted, tuple) else wanted, rtol=1e-5)  # fmt: skip
                assert not isinstance(mine, tuple) or mine[1] == wanted[1]
            assert own.get("acc") == other.get("acc")
    assert len(written) > 2


def test_every_item_is_scored_as_by_hand(ours, checkpoint):
    """Log-softmax in float64 of logits of whole inputs, which were encoded here."""
    assert_by_hand(ours, checkpoint)


def test_quantized_and_packed_models_are_scored_as_by_hand_and_write_the_same(simulated):
    written = []
    for place, more in simulated.values():
        found = samples(harness.model_class()(str(place), **more), limit=2)
        assert_by_hand(found, place, more.get("activation_format"))
        written.append([item["resps"] for item in found["gutenberg_exact"]])
    assert written[0] == written[1]


def test_lm_evals_own_command_takes_a_quantized_model(simulated, tmp_path, monkeypatch, capsys):
    words = ["harness", "run", "--model", "duquantpp", "--tasks", "gutenberg_last_word"]
    words += ["--model_args", f"pretrained={simulated['quantized'][0]}", "--limit", "2"]
    words += ["--include_path", str(harness.TASKS)]
    monkeypatch.setattr("sys.argv", words)
    runpy.run_module("duquantpp_jax.evaluation.harness", run_name="__main__")
    assert "gutenberg_last_word" in capsys.readouterr().out


def assert_by_hand(ours, checkpoint, activation_format=None):
    """The scores of a model are those of logits of whole inputs."""
    model, linear, state = load_any(checkpoint, activation_format)
    tokenizer, begin = load_tokenizer(checkpoint, model.config), model.config.bos_token_id
    forward = jax.jit(lambda tokens: model(tokens, linear, state)[0])

    def log_q(tokens):
        filled = np.zeros((1, LENGTH), np.int32)
        filled[0, : len(tokens)] = tokens
        logits = np.asarray(forward(filled))[0, : len(tokens)].astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def encoded(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    for task, items in ours.items():
        for item in items if task != "gutenberg_exact" else ():
            for request, answer in zip(item["arguments"], item["filtered_resps"], strict=True):
                context, text = request if len(request) == 2 else ("", *request)
                tokens = [begin] * (not context) + encoded(context + text)
                at = np.arange(len(encoded(context)) or 1, len(tokens))
                rows = log_q(tokens[:-1])[at - 1]
                own = np.asarray(tokens)[at]
                wanted = rows[np.arange(len(at)), own].sum()
                score, first = answer if isinstance(answer, tuple) else (answer, None)
                np.testing.assert_allclose(score, wanted, rtol=1e-5)
                assert first in (None, (rows.argmax(axis=-1) == own).all())


def test_evaluate_takes_tasks(simulated, tmp_path, capsys):
    out = tmp_path / "scores.json"
    place, more = simulated["packed"]
    words = ["evaluate", "--model", str(place), "--out", str(out)]
    words += ["--activation-format", more["activation_format"]]
    assert cli.main([*words, "--tasks", "gutenberg_cloze", "--limit", "2"]) == 0
    results = json.loads(out.read_text())
    assert results["items"] == {"gutenberg_cloze": 2}
    assert set(results["tasks"]["gutenberg_cloze"]) == {"acc", "acc_norm"}
    assert "gutenberg_cloze: acc" in capsys.readouterr().out
    for more, says in (
        (("--tasks", "gutenberg_close"), "unknown task 'gutenberg_close'"),
        (("--tasks", "gutenberg", "--text", "a"), "--text is about --text"),
        (("--tasks", "gutenberg", "--limit", "0"), "give at least one item"),
    ):
        assert cli.main([*words, *more]) == 2
        assert says in capsys.readouterr().err
