"""Scores of rows of any length, and texts that are continued together."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from duquantpp_jax.evaluation.continuing import Continuing, Wish
from duquantpp_jax.evaluation.harness import TASKS
from duquantpp_jax.evaluation.predict import Predictor
from duquantpp_jax.evaluation.scoring import TOP, Scorer
from duquantpp_jax.models.sampling import Sampling
from duquantpp_jax.ptq import stores
from tests.conftest import byte_tokenizer, tiny_decoder


@pytest.fixture(scope="module")
def model():
    return tiny_decoder()


def test_a_row_has_the_scores_of_its_own_full_pass_whatever_fills_it_up(model):
    random = np.random.default_rng(0)
    rows = [random.integers(0, 257, length).tolist() for length in (12, 2, 17, 5)]
    done = []
    scored = Scorer(Predictor(model), batch_rows=2)(rows, lambda *counts: done.append(counts))
    assert done == [(2, 4), (4, 4)]
    assert [len(each.log_q) for each in scored] == [11, 1, 16, 4]
    logits = np.asarray(jax.jit(lambda m, t: m(t)[0])(model, np.asarray([rows[0][:-1]])))[0]
    log_q = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(scored[0].log_q, log_q[range(11), rows[0][1:]], atol=2e-5)
    order = np.argsort(-log_q, axis=-1)[:, :TOP]
    np.testing.assert_array_equal(scored[0].likeliest, order)
    np.testing.assert_allclose(
        scored[0].largest, np.take_along_axis(log_q, order, axis=-1), atol=2e-5
    )
    with pytest.raises(ValueError, match="row 1 has no target"):
        Scorer(Predictor(model))([rows[0], [1]])


def test_a_nan_is_no_score(model):
    broken = dataclasses.replace(Predictor(model))
    scorer = Scorer(broken, batch_rows=2)
    with pytest.raises(ValueError, match="the model gave NaN"):
        scorer([[1, 2, 300, 4], [1, 2]])  # 300 is no token


def test_texts_end_at_their_stop_strings_limits_and_ends_and_do_not_see_one_another(model):
    store, tokenizer = stores.store("float32", 16), byte_tokenizer()
    prompts = [[104, 101, 108], [97] * 9, [98, 99]]

    def written(wishes, steps):
        batch = Continuing(Predictor(model), tokenizer, store, wishes, count=4, top=3)
        while not batch.done:
            before = [row.text[: row.settled] for row in batch.rows]
            batch.proceed(steps)
            for row, part in zip(batch.rows, before, strict=True):
                assert row.text.startswith(part)
        return batch.rows

    free = written([Wish(prompts[0], 20), Wish(prompts[1], 1, Sampling(0.7))], 20)[0]
    text, stop = free.text, free.text[6:9]
    warm = Wish(prompts[2], 7, Sampling(1.0), seed=5)
    rows = written([Wish(prompts[0], 20, stop=("zzz", stop)), Wish(prompts[1], 5), warm], 4)
    assert (rows[0].text, rows[0].finish) == (text[: text.index(stop)], "stop")
    assert rows[0].ids == free.ids[: len(rows[0].ids)]
    assert [(len(row.ids), row.finish) for row in rows[1:]] == [(5, "length"), (7, "length")]
    assert [row.likeliest[0][0] for row in rows[:2]] == [
        (row.ids[0], pytest.approx(row.log_q[0])) for row in rows[:2]
    ]
    again = written([warm, Wish(prompts[1], 20)], 1)
    assert again[0].ids == rows[2].ids
    assert again[1].ids[:5] == rows[1].ids


@pytest.mark.parametrize("name", ["cloze", "last_word", "rolling", "exact", "two_shot"])
def test_a_task_in_the_package_asks_what_its_documents_answer(name):
    splits = json.loads((TASKS / f"{name}.json").read_text("utf-8"))
    assert (TASKS / f"{name}.yaml").is_file()
    assert 10 < len(splits["test"]) <= 64
    for each in [document for documents in splits.values() for document in documents]:
        if "choices" in each:
            assert len(set(each["choices"])) == 4
            words = each["context"].split()
            assert not {*each["choices"]} - {each["choices"][each["answer"]]} & {*words}
        if "word" in each:
            assert each["word"] in each["context"]
        if "rest" in each:
            first, second, third = each["context"].split("\n")
            assert first == second == f"{third} {each['rest']}"
