"""The model that lm-eval calls, called by a stand-in for lm-eval: scores, texts, refusals.

test_harness.py asks lm-eval itself where it is installed.
"""

import importlib.machinery
import sys
import types

import jax
import numpy as np
import pytest

from duquantpp_jax.evaluation import harness
from duquantpp_jax.models import dense
from tests.conftest import byte_tokenizer, tiny_decoder


class TemplateLM:
    """What of lm-eval's base class is used: it keeps the answers."""

    def __init__(self):
        self.kept, self.cache_hook = [], self

    def add_partial(self, kind, request, answer):
        self.kept.append((kind, request, answer))


def windows(ids, prefix, most, _):
    for first in range(0, len(ids), most):
        yield [prefix, *ids][first : first + most], ids[first : first + most]


@pytest.fixture
def model_of(tiny_directory, monkeypatch):
    """Makes the model of lm-eval's registry, of a random decoder over bytes."""
    registry = {}
    parts = {
        "lm_eval": {"__spec__": importlib.machinery.ModuleSpec("lm_eval", None)},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {
            "model_registry": registry,
            "register_model": lambda name: lambda kind: registry.setdefault(name, kind),
        },
        "lm_eval.utils": {
            "get_rolling_token_windows": windows,
            "make_disjoint_window": lambda pair: (pair[0][:1], pair[1]),
        },
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    def make(changes=(), **options):
        model = tiny_decoder(**dict(changes))
        monkeypatch.setattr(harness, "load_any", lambda *_: (model, dense, None))
        kind = harness.model_class()
        assert kind is harness.model_class() is registry["duquantpp"]
        return kind(str(tiny_directory), rows=2, **options)

    return make


def log_q_of(row):
    logits = np.asarray(jax.jit(lambda m, t: m(t)[0])(tiny_decoder(), np.asarray([row[:-1]])))[0]
    return logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))


def asked(*arguments):
    return types.SimpleNamespace(args=arguments)


def test_a_continuation_has_the_sum_of_its_targets_and_says_whether_each_is_the_likeliest(model_of):
    model, row = model_of(max_length=11), np.random.default_rng(0).integers(0, 257, 12).tolist()
    log_q = log_q_of(row)
    likeliest = [*row[:-1], int(log_q[-1].argmax())]
    requests = [
        (("a", "b"), row[:8], row[8:]),
        (None, likeliest[:-1], likeliest[-1:]),
        (("c", "d"), [5] * 30 + row[:8], row[8:]),  # which loses its beginning
    ]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    wanted = log_q[range(7, 11), row[8:]].sum()
    assert found[0] == (pytest.approx(wanted, abs=1e-4), False)
    assert found[1] == (pytest.approx(log_q[-1].max(), abs=1e-4), True)
    assert found[2] == found[0]
    assert model.kept == [("loglikelihood", each[0], found[0]) for each in requests[::2]]
    assert model._loglikelihood_tokens([]) == []
    for context, continuation in (([], [1]), ([1], []), ([1], [1] * 12)):
        with pytest.raises(ValueError, match="give at least a token each, at most 11"):
            model._loglikelihood_tokens([(None, context, continuation)])


def test_a_whole_text_is_scored_after_the_prefix_and_in_windows_of_the_models_length(model_of):
    text = "once upon a"
    ids = byte_tokenizer().encode(text).ids
    whole = model_of()
    (found,) = whole.loglikelihood_rolling([asked(text)], disable_tqdm=True)
    wanted = log_q_of([256, *ids])[range(11), ids].sum()
    assert found == pytest.approx(wanted, abs=1e-4)
    cut = model_of(max_length=6)
    parts = [(None, [256], ids[:6]), (None, ids[5:6], ids[6:])]
    each = [score for score, _ in cut._loglikelihood_tokens(parts, disable_tqdm=True)]
    several = cut.loglikelihood_rolling([asked(text), asked(text)], disable_tqdm=True)
    assert several == [pytest.approx(sum(each))] * 2
    assert cut.kept == [("loglikelihood_rolling", (text,), found) for found in several]


def test_texts_are_those_of_each_request_alone_in_the_order_of_the_requests(model_of):
    model = model_of()
    requests = [
        asked("a", {"max_gen_toks": 3, "until": "zz", "temperature": 0.7, "do_sample": True}),
        asked("hello", {"max_new_tokens": 5, "until": ["", "zz"], "temperature": 0.7, "seed": 3}),
        asked("", {"max_tokens": 2, "do_sample": False, "temperature": 0.7}),
    ]
    texts = model.generate_until(requests[:2], disable_tqdm=True)
    assert texts == [model.generate_until([each], disable_tqdm=True)[0] for each in requests[:2]]
    pairs = zip(requests[:2], texts, strict=True)
    assert model.kept[:2] == [("generate_until", each.args, text) for each, text in pairs]
    assert texts[0] != texts[1]
    assert [wish.new for wish in (model._wish(*each.args) for each in requests)] == [3, 5, 2]
    assert model._wish("", {}).prompt == [256]
    assert len(model._wish("a" * 3000, {"max_gen_toks": 8}).prompt) == 2048 - 8
    assert model._wish(*requests[2].args).sampling.temperature == 0
    for settings, says in (({"num_beams": 2}, "num_beams"), ({"max_tokens": 2048}, "give 1 to")):
        with pytest.raises(ValueError, match=says):
            model._wish("a", settings)


def test_what_cannot_be_asked_is_refused(model_of, monkeypatch):
    ends = model_of({"bos_token_id": None, "eos_token_id": (7, 8)})
    assert ends.prefix_token_id == ends.eot_token_id == 7
    assert ends.tok_encode("ab", add_special_tokens=False) == byte_tokenizer().encode("ab").ids
    assert ends.chat_template() is None
    assert "/" not in ends.tokenizer_name
    with pytest.raises(ValueError, match="neither bos_token_id nor eos_token_id"):
        _ = model_of({"bos_token_id": None}).prefix_token_id
    with pytest.raises(ValueError, match="give 2 and 1 at least"):
        model_of(max_length=1)
    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="tasks need lm-eval"):
        harness.model_class()
