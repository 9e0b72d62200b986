"""Programs of a command are found by the next, whole, within a bound; never an error."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from duquantpp_jax.commands import programs
from duquantpp_jax.commands.programs import PROGRAMS, kept_programs


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Of a processor, empty; JAX has no directory of programs, as where a command starts."""
    before = jax.config.jax_compilation_cache_dir
    programs._use(None, 0.0)
    monkeypatch.setenv("DUQUANTPP_CACHE", str(tmp_path))
    yield programs._place()
    programs._use(before, 0.0)


def compile_anew(number):
    """Compiles a program that differs from those of other numbers."""
    jax.jit(lambda x: x * number + 1)(jnp.float32(2)).block_until_ready()


def kept(place):
    return sorted(path.name for path in place.iterdir())


def test_the_next_command_finds_the_programs_of_the_last(place):
    with kept_programs():
        compile_anew(3)
        assert not [*place.glob(PROGRAMS)]
    first = kept(place)
    assert len(first) > 0
    assert all(name.endswith("-cache") for name in first)
    times = [(place / name).stat().st_mtime_ns for name in first]
    with kept_programs():
        assert kept(Path(jax.config.jax_compilation_cache_dir)) == first
        compile_anew(3)
        compile_anew(5)
    assert jax.config.jax_compilation_cache_dir is None
    assert set(first) < set(kept(place))
    assert times == [(place / name).stat().st_mtime_ns for name in first]


def test_a_command_that_ends_before_its_time_keeps_nothing(place):
    def interrupted():
        with kept_programs():
            compile_anew(7)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert kept(place) == []


def test_what_a_killed_command_left_is_deleted_and_what_a_running_one_has_is_not(place):
    with kept_programs():
        compile_anew(9)
    host = f".{programs.socket.gethostname()}"
    left, running = (place / f"{host}.{pid}.x" for pid in (2**22 + 1, os.getpid()))
    left.mkdir()
    running.mkdir()
    with kept_programs():
        pass
    assert not left.exists()
    assert running.exists()


def test_the_oldest_go_where_there_is_no_room(place, monkeypatch):
    with kept_programs():
        compile_anew(11)
    (old, *others) = place.glob(PROGRAMS)
    os.utime(old, (1, 1))
    sizes = [path.stat().st_size for path in others]
    monkeypatch.setattr(programs, "BOUND", sum(sizes))
    with kept_programs():
        pass
    assert sorted(place.glob(PROGRAMS)) == sorted(others)


def test_nothing_is_kept_where_it_cannot_be_or_must_not(place, monkeypatch):
    place.mkdir(parents=True)
    place.chmod(0o777)  # others could put their code there
    with kept_programs():
        assert jax.config.jax_compilation_cache_dir is None
    place.chmod(0o700)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with kept_programs():
            assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("DUQUANTPP_CACHE", "/dev/null/nowhere")
    with kept_programs():
        assert jax.config.jax_compilation_cache_dir is None
        compile_anew(13)
