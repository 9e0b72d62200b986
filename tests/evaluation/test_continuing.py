"""What is read off tokens as they come: ends, stop strings, letters that no further token changes.

The tokens are given; that models draw them so is tested in test_scoring.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from duquantpp_jax.evaluation import continuing
from duquantpp_jax.evaluation.continuing import Continuing, Wish
from duquantpp_jax.evaluation.predict import Predictor
from duquantpp_jax.models.sampling import Unfinished
from duquantpp_jax.ptq import stores
from tests.conftest import byte_tokenizer, tiny_decoder

END = 7
TOKENIZER = byte_tokenizer()


def ids(text):
    return TOKENIZER.encode(text).ids


@pytest.fixture
def drawing(monkeypatch):
    """`Continuing` of wishes whose new tokens are given, and what `proceed` is told has ended."""
    over = []

    def made(wishes, *new):
        shown = 0

        def text(steps):
            nonlocal shown
            shown += steps
            tokens = np.zeros((len(new), 64), np.int32)
            lengths = np.zeros(len(new), np.int32)
            for number, (wish, row) in enumerate(zip(wishes, new, strict=True)):
                some = row[:shown]
                lengths[number] = len(wish.prompt) + len(some)
                tokens[number, len(wish.prompt) : lengths[number]] = some
            ended = np.asarray([shown >= len(row) for row in new])
            parts = map(jnp.asarray, (tokens, lengths, lengths, ended, np.int32(shown)))
            return Unfinished(*parts, cache=None, log_q=None, likeliest=None)

        def proceed(model, text_before, keys, draws, steps, **_):
            over.append(np.asarray(text_before.ended).tolist())
            return text(int(steps))

        monkeypatch.setattr(continuing, "begin", lambda *_, **__: text(1))
        monkeypatch.setattr(continuing, "proceed", proceed)
        predictor = Predictor(tiny_decoder(eos_token_id=(END, 300)))
        return Continuing(predictor, TOKENIZER, stores.store("float32", 16), wishes)

    return made, over


def test_a_row_ends_at_its_end_token_its_stop_string_or_its_length(drawing):
    made, _ = drawing
    wishes = [Wish([1], 9), Wish([1, 2], 9, stop=("zz", "cd")), Wish([1], 3)]
    batch = made(wishes, [*ids("ab"), END], ids("abcdzz"), ids("abc"))
    assert not batch.done
    batch.proceed(8)
    assert [(row.text, row.finish) for row in batch.rows] == [
        *(("ab", "stop"), ("ab", "stop"), ("abc", "length"))
    ]
    assert [len(row.ids) for row in batch.rows] == [3, 6, 3]
    assert batch.done


@pytest.mark.parametrize(
    ("text", "stop", "settled"),
    [
        ("ab<e", ("<end>",), [1, 2, 2, 4]),
        ("ab<x", ("<end>", "x!"), [1, 2, 2, 4]),
        ("aaa", ("aaaa",), [0, 0, 3]),
        ("aü", (), [1, 1, 2]),  # one byte of two is no letter yet
    ],
)
def test_letters_that_a_further_token_may_change_are_not_settled(drawing, text, stop, settled):
    made, _ = drawing
    batch = made([Wish([1], 9, stop=stop)], ids(text))
    found = [batch.rows[0].settled]
    while not batch.done:
        batch.proceed(1)
        found.append(batch.rows[0].settled)
    assert found == settled
    assert batch.rows[0].text == text


def test_a_row_that_nobody_waits_for_ends_and_stays_as_it_is(drawing):
    made, over = drawing
    batch = made([Wish([1], 9), Wish([1], 9)], ids("abcd"), ids("efgh"))
    batch.proceed(1, abandoned=[1])
    batch.proceed(8)
    assert over == [[False, True], [False, True]]
    assert [(row.text, row.finish) for row in batch.rows] == [("abcd", "length"), ("e", "stop")]


def test_a_text_that_follows_its_prompt_is_what_the_whole_has_more(drawing):
    made, _ = drawing
    whole = ids("ü")
    wishes = [Wish(ids("once"), 9, joined=True), Wish(whole[:1], 9, joined=True)]
    batch = made(wishes, ids(" u"), [*whole[1:], *ids("b")])
    batch.proceed(8)
    # Half a letter of the prompt is no beginning of the whole: the new tokens stand alone.
    assert [row.text for row in batch.rows] == [" u", "\ufffdb"]


def test_a_nan_names_the_token(drawing):
    made, _ = drawing
    batch = made([Wish([1], 9)], [*ids("a"), -1])
    with pytest.raises(ValueError, match="NaN for token 2 after the prompt"):
        batch.proceed(8)
