"""lm-eval asks our model and its own `hf`: the same answers to every item of the tasks.

Both read one checkpoint in float32: two layers of the embedded model. Runs where lm-eval,
torch and transformers are installed.
"""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")

from duquantpp_jax import cli  # noqa: E402
from duquantpp_jax.checkpoints import load, load_tokenizer  # noqa: E402
from duquantpp_jax.evaluation import harness  # noqa: E402

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


def samples(model):
    """Arguments, answers and measures of each item of each task."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(harness.TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=["gutenberg"], task_manager=manager, bootstrap_iters=0
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
    model, tokenizer = load(checkpoint), load_tokenizer(checkpoint)
    forward, begin = jax.jit(lambda tokens: model(tokens)[0]), model.config.bos_token_id

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


def test_evaluate_takes_tasks(shallow_directory, tmp_path, capsys):
    out = tmp_path / "scores.json"
    words = ["evaluate", "--model", str(shallow_directory), "--out", str(out)]
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
