"""Every command that reads a text asks for the key of its lines."""

import gzip

import pytest

from duquantpp_jax import cli


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "--text"),
        ("compare", "--calibration-text", "OTHER", "--text"),
        ("compare", "--text", "OTHER", "--calibration-text"),
        ("quantize", "--calibration-text"),
        ("learn", "--text"),
        ("inspect", "--text"),
    ],
    ids=lambda words: " ".join((words[0], words[-1])),
)
def test_the_key_of_a_text_is_asked_for_by_every_command(
    words, tiny_directory, tiny_text, tmp_path, capsys
):
    text = tmp_path / "t.jsonl.gz"
    text.write_bytes(gzip.compress(b'{"body": "a"}\n'))
    given = (str(tiny_text) if word == "OTHER" else word for word in words)
    out = ("--out", str(tmp_path / "out"))
    model = ("--model", str(tiny_directory), "--text-key", "story")
    assert cli.main([*given, str(text), *model, *(out if words[0] != "evaluate" else ())]) == 2
    assert "no string under 'story', but under body" in capsys.readouterr().err
