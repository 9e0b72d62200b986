"""Without a terminal progress is a line with the time left, at most every half a minute."""

import pytest

from duquantpp_jax.commands import progress


@pytest.fixture
def shown(monkeypatch, capsys):
    """What is printed for (seconds, description, steps done, all steps), each in turn."""

    def lines(*calls):
        now = [0.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
        with progress.progress_bar() as step:
            for now[0], *call in calls:
                step(*call)
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    return lines


def test_a_short_command_is_silent(shown):
    assert shown((0, "a", 0, 10), (29.9, "a", 10, 10)) == []


def test_a_line_is_printed_at_most_every_half_a_minute_with_the_time_left(shown):
    calls = [(10.0 * k, "measuring", k, 100) for k in range(8)]
    assert shown(*calls) == [
        "measuring: 3 of 100, about 0:16:10 left",
        "measuring: 6 of 100, about 0:15:40 left",
    ]


def test_what_was_done_before_a_resumed_command_does_not_count(shown):
    assert shown((0, "a", 90, 100), (40, "a", 94, 100)) == ["a: 94 of 100, about 0:01:00 left"]


def test_the_rate_is_that_of_the_present_count(shown):
    again = [(100, "b", 0, 10), (140, "b", 4, 10)]
    assert shown((0, "a", 0, 10), (99, "a", 10, 10), *again)[1:] == [
        "b: 4 of 10, about 0:01:00 left"
    ]
    assert shown((0, "a", 0, 10), (40, "a", 0, 10)) == ["a: 0 of 10"]
