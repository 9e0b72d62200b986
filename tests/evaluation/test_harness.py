"""lm-eval asks our model and its own `hf`: the same answers to every item of the tasks.

Both read one checkpoint in float32. Runs where lm-eval, torch and transformers are installed.
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
ITEMS = 5


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "DISABLE_MULTIPROC"):
            patch.setenv(name, "1")
        yield


def samples(model):
    """Arguments, answers and measures of each item of each task."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(harness.TASKS), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=["gutenberg"], task_manager=manager, limit=ITEMS, bootstrap_iters=0
    )
    return found["samples"]


@pytest.fixture(scope="module")
def ours(shallow_directory):
    return samples(harness.model_class()(str(shallow_directory)))


def test_every_item_is_answered_as_by_hf(ours, shallow_directory):
    """Sums of float32 log-probabilities agree to 1e-5 of their size."""
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    file = str(shallow_directory / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, **ends)
    options = {"dtype": "float32", "device": "cpu", "batch_size": 4}
    theirs = samples(HFLM(pretrained=str(shallow_directory), tokenizer=tokenizer, **options))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 5
    written = set()
    for task in ours:
        assert len(ours[task]) == len(theirs[task]) == ITEMS
        for own, other in zip(ours[task], theirs[task], strict=True):
            assert own["arguments"] == other["arguments"]
            if task == "gutenberg_exact":
                assert own["resps"] == other["resps"]
                written.add(own["resps"][0][0])
                continue
            for mine, wanted in zip(own["filtered_resps"], other["filtered_resps"], strict=True):
                np.testing.assert_allclose(mine[0] if isinstance(mine, tuple) else mine,
                    wanted[0] if isinstance(wanted, tuple) else wanted, rtol=1e-5)  # fmt: skip
            assert own.get("acc") == other.get("acc")
    assert len(written) > 2


def test_a_cloze_is_scored_as_by_hand(ours, shallow_directory):
    model, tokenizer = load(shallow_directory), load_tokenizer(shallow_directory)
    forward = jax.jit(lambda tokens: model(tokens)[0])
    for sample in ours["gutenberg_cloze"][:1]:
        for request, (answer, first) in zip(
            sample["arguments"], sample["filtered_resps"], strict=True
        ):
            context, continuation = (tokenizer.encode(text).ids for text in request)
            logits = np.asarray(forward(np.asarray([context + continuation])))[0].astype(np.float64)
            log_q = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            at = range(len(context) - 1, len(context) + len(continuation) - 1)
            np.testing.assert_allclose(answer, log_q[at, continuation].sum(), rtol=1e-5)
            assert first == (log_q[at].argmax(axis=-1) == continuation).all()


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
