"""Files appear whole, and what killed processes left is removed by the next."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from duquantpp_jax import files
from duquantpp_jax.files import processes


def _left(directory, name, **changes):
    """What a process that was killed while it wrote `name` leaves."""
    other = processes.process() | {"pid": 2**22 + 1, "start": 7} | changes
    host = hashlib.sha256(other["host"].encode()).hexdigest()[:12]
    place = directory / f".{name}.{host}-{other['pid']}-{other['start']}-0123abcd"
    (place / "inside").mkdir(parents=True)
    return place


def test_what_dead_processes_left_is_removed_and_all_else_is_not(tmp_path):
    dead = [_left(tmp_path, name) for name in ("model", "another")]
    long = processes.host().ljust(40, "x")
    others = [
        _left(tmp_path, "model", host="elsewhere"),
        _left(tmp_path, "model", host=long),  # as of two pods: the first 32 letters are the same
        _left(tmp_path, "model2", **processes.process()),
        tmp_path / ".model.mine",
    ]
    others[-1].touch()
    with files.new_directory(tmp_path / "model") as partial:
        (partial / "file").touch()
        assert not any(path.exists() for path in dead)
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / "model"])
    assert (tmp_path / "model" / "file").exists()


def test_a_directory_that_two_processes_write_is_refused_at_the_start_or_at_the_end(tmp_path):
    with files.new_directory(tmp_path / "a"):
        with pytest.raises(ValueError, match="a is being written by another process: wait"):
            files.new_directory(tmp_path / "a").__enter__()
        with files.new_directory(tmp_path / "ab") as partial:  # not that one
            (partial / "file").touch()

    def overtaken():
        with files.new_directory(tmp_path / "b") as partial:
            (partial / "mine").touch()
            (tmp_path / "b").mkdir()
            (tmp_path / "b" / "theirs").touch()

    with pytest.raises(ValueError, match="b is being written by another process"):
        overtaken()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["theirs"]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "ab", "b"}


def test_one_process_at_a_time_is_in_a_directory_and_a_dead_ones_lock_is_none(tmp_path):
    out = tmp_path / "out"
    with processes.only_process(out):
        with pytest.raises(ValueError, match="out is being written by another process"):
            processes.only_process(out).__enter__()
        assert [path.name for path in out.iterdir()] == [processes.LOCK]
    assert not out.exists()  # it has made it for nothing
    out.mkdir()
    (out / processes.LOCK).touch()  # as a killed process leaves it
    with processes.only_process(out) as alone:
        assert alone
    assert list(out.iterdir()) == []


def test_one_file_is_written_by_one_process_and_its_neighbours_by_others(tmp_path):
    out = tmp_path / "deep" / "a.json"
    with processes.only_process(out, single=True):
        with processes.only_process(out.with_name("b.json"), single=True):
            pass
        with pytest.raises(ValueError, match=r"a\.json is being written by another process"):
            processes.only_process(out, single=True).__enter__()
        out.touch()
    assert [*out.parent.iterdir()] == [out]


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    import fcntl

    real, removed = fcntl.flock, []

    def flock(file, how):
        real(file, how)
        if not removed:  # its holder ends between opening and locking
            removed.append((tmp_path / processes.LOCK).unlink())

    monkeypatch.setattr(fcntl, "flock", flock)
    with processes.only_process(tmp_path):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="by another process"):
            processes.only_process(tmp_path).__enter__()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="of POSIX")
def test_a_copy_that_a_killed_process_was_writing_is_gone_after_the_next(tmp_path):
    code = (
        "import os, pathlib, signal; from duquantpp_jax import files\n"
        f"with files.new_directory(pathlib.Path({str(tmp_path / 'model')!r})):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert [path.name[:7] for path in tmp_path.iterdir()] == [".model."]
    with files.new_directory(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_whole(path, b"old")

    def fail():
        with files.whole(path) as name:
            name.write_bytes(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("kind", ["bytes", "tensors"])
def test_a_disk_without_room_is_an_error_and_leaves_what_was_there(kind, tmp_path):
    resource = pytest.importorskip("resource", reason="of POSIX")
    path, limits = tmp_path / "a", resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(count):
        if kind == "bytes":
            return files.write_whole(path, bytes(count))
        files.write_tensors(path, {"a": np.zeros(count, np.uint8)}, {})

    write(10)
    old = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write(200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_rename_is_on_the_disk_with_its_directory(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    files.write_whole(tmp_path / "a", b"b")
    assert synced == [path.stat().st_ino for path in (tmp_path / "a", tmp_path)]
    files.write_tensors(tmp_path / "t", {"a": np.zeros(2)}, {})
    assert synced[2:] == [path.stat().st_ino for path in (tmp_path / "t", tmp_path)]
    with files.new_directory(tmp_path / "d"):
        pass
    assert synced[4:] == [tmp_path.stat().st_ino]


def test_tensors_are_read_as_they_were_written_or_refused(tmp_path):
    path, tensors = tmp_path / "t.safetensors", {"a": np.arange(3.0), "b": np.int32([[1]])}
    files.write_tensors(path, tensors, {"of": [1, None]})
    again, about = files.read_tensors(path, "make it again")
    assert about == {"of": [1, None]}
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array)
    first = path.read_bytes()
    files.write_tensors(path, dict(reversed(tensors.items())), {"of": [1, None]})
    assert path.read_bytes() == first
    for spoilt in (first[:-1], first[:-1] + b"?", first.replace(b"null", b"true"), b"", b"{}"):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"^[^\n]*t\.safetensors [^\n]*make it again$"):
            files.read_tensors(path, "make it again")


def test_a_hash_is_computed_again_only_for_a_file_that_was_written_again(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write_whole(path, b"1")
    first = files.sha256(path)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        assert files.sha256(path) == first
    files.write_whole(path, b"2")
    assert files.sha256(path) != first


def test_errors_show_control_characters_and_obey_none(tmp_path):
    path = tmp_path / "a\x1b[2J.json"
    path.write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(ValueError, match="is not JSON") as caught:
        files.read_json(path)
    assert files.one_line(caught.value).count(r"a\x1b[2J.json") == 1
    assert files.printable("é\n\u202e\x9b") == "é\n\\u202e\\x9b"


def test_a_file_to_write_is_refused_by_the_option_that_names_it(tmp_path):
    files.check_file(None, "--report")
    files.check_file(tmp_path / "new" / "page.html", "--report")
    with pytest.raises(ValueError, match="is a directory: give a file as --report"):
        files.check_file(tmp_path, "--report")
    with pytest.raises(ValueError, match="give another --summary"):
        files.check_file(Path("/proc/page.html"), "--summary")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_not_finite_is_found_in_every_place(monkeypatch, dtype):
    monkeypatch.setattr(files.contents, "PIECE", 3)
    plain = np.linspace(-2, 2, 8).astype(dtype)
    assert files.all_finite(plain)
    assert files.all_finite(plain[:0])
    for place in range(8):
        for wrong in (np.nan, -np.nan, np.inf, -np.inf):
            spoiled = plain.copy()
            spoiled[place] = wrong
            assert not files.all_finite(spoiled)
            assert not files.all_finite(np.stack([plain, spoiled], axis=1)[:, 1])
