"""One process holds a claim, and a dead one holds none."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from duquantpp_jax import files
from duquantpp_jax.lab import claims


def test_a_claim_is_held_once_and_leaves_nothing(tmp_path):
    with claims.claim(tmp_path, "a") as first, claims.claim(tmp_path, "a") as second:
        assert (first, second) == (True, False)
        with claims.claim(tmp_path, "b") as other:
            assert other
    with claims.claim(tmp_path, "a") as again:
        assert again
    assert list(tmp_path.iterdir()) == []


def test_a_claim_is_on_the_disk_with_its_directory_before_work_begins(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    with claims.claim(tmp_path, "a"):
        assert synced == [path.stat().st_ino for path in (tmp_path / "a.0", tmp_path)]


def test_a_dead_process_is_named_with_what_it_had_claimed_and_no_other(tmp_path):
    pid = _dead_pid()
    _left_by(tmp_path, 0, pid=pid)
    (tmp_path / "b.0").write_text(json.dumps(files.process() | {"pid": pid, "host": "elsewhere"}))
    (tmp_path / "c.0").write_text("")
    with claims.claim(tmp_path, "d"):
        assert claims.left_by(tmp_path, {"host": files.host(), "pid": pid}) == {"a"}


def test_of_many_at_once_one_at_a_time_holds_it(tmp_path):
    inside, most, turns_held = [0], [0], [0]
    lock = threading.Lock()

    def contend():
        turns = 0
        while turns < 3:
            with claims.claim(tmp_path, "a") as ours:
                if not ours:
                    continue
                with lock:
                    inside[0] += 1
                    turns_held[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                with lock:
                    inside[0] -= 1
            turns += 1

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert turns_held[0] == 24


def _left_by(tmp_path, generation, **changes):
    holder = files.process() | changes
    path = tmp_path / f"a.{generation}"
    path.write_text(json.dumps(holder))
    return path


def _dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("dead", [1, 3])
def test_the_claim_of_a_dead_process_passes_on_and_is_cleaned_up(dead, tmp_path):
    pid = _dead_pid()
    for generation in range(dead):
        _left_by(tmp_path, generation, pid=pid)
    with claims.claim(tmp_path, "a") as ours, claims.claim(tmp_path, "a") as second:
        assert (ours, second) == (True, False)
        assert (tmp_path / f"a.{dead}").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{}", "[]", "3", '{"host": 1', "[" * 10**5])
def test_a_claim_that_a_crash_has_cut_short_passes_on(content, tmp_path):
    (tmp_path / "a.0").write_text(content)
    with claims.claim(tmp_path, "a") as ours:
        assert ours
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_a_dead_ones_number_does_not_hold_its_claim(tmp_path):
    _left_by(tmp_path, 0, start=1)
    with claims.claim(tmp_path, "a") as ours:
        assert ours


def test_a_dead_process_that_nobody_has_waited_for_is_dead(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 30
    while files.process(process.pid)["start"] != -1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.wait()


def test_of_many_that_find_a_holder_dead_one_succeeds(tmp_path):
    _left_by(tmp_path, 0, pid=_dead_pid())
    barrier, wins = threading.Barrier(8), []

    def contend():
        barrier.wait()
        with claims.claim(tmp_path, "a") as ours:
            wins.append(ours)
            barrier.wait()

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == [False] * 7 + [True]


def test_a_claim_of_another_machine_holds_while_it_is_renewed(tmp_path):
    path = _left_by(tmp_path, 0, host="elsewhere")
    with claims.claim(tmp_path, "a") as ours:
        assert not ours
    old = time.time() - claims.STALE_SECONDS - 1
    os.utime(path, (old, old))
    with claims.claim(tmp_path, "a") as ours:
        assert ours


def test_a_claim_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RENEWAL_SECONDS", 0.01)
    with claims.claim(tmp_path, "a"):
        path = tmp_path / "a.0"
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
