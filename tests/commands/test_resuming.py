"""Quantizing that is killed goes on, and writes what it writes undisturbed."""

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest

from duquantpp_jax import files
from duquantpp_jax.checkpoints import load_quantized, writer
from duquantpp_jax.checkpoints.directory import layer_file
from duquantpp_jax.commands.export import ExportOptions, export
from duquantpp_jax.commands.quantize import quantize
from tests import quantize_worker
from tests.commands.conftest import contents, options_of
from tests.decompress import assert_equal, by_library, by_numpy, dequantized


@pytest.mark.parametrize(
    ("layers", "hidden", "first"),
    [
        ((), (), 0),
        ((0, 1), (), 0),  # layer 2 has nothing to read
        ((0, 1), (1,), 1),
        ((0, 1), (1, 2), 2),
        ((0,), (2,), 0),
        ((1,), (2,), 0),  # layer 0 is missing
        ((0, 1, 2), (2,), 2),  # killed before the hidden states were dropped
        ((0, 1, 2), (), 3),
    ],
)
def test_it_goes_on_from_the_last_layer_with_all_before_it_and_its_hidden_states(
    layers, hidden, first, tmp_path
):
    for number in layers:
        (tmp_path / layer_file(number)).touch()
    for number in hidden:
        hidden = {"hidden": np.full((1, 1, 2), number, np.float32)}
        files.write_tensors(writer._hidden_file(tmp_path, number), hidden, {})
    found, states = writer._resume(tmp_path, 3)
    assert found == first
    assert (states is None) == (first in (0, 3))
    assert states is None or np.all(states == first)


def test_one_process_writes_a_directory_and_removes_what_none_is_writing(tmp_path):
    (tmp_path / "quantization.json").touch()
    left = tmp_path / ".layer-00000.safetensors.of-another-machine"
    (left / "inside").mkdir(parents=True)
    with writer.only_writer(tmp_path):
        assert not left.exists()
        left.touch()
        with pytest.raises(ValueError, match="by another process"):
            writer.only_writer(tmp_path).__enter__()
        assert left.exists()


def test_a_refusal_before_a_layer_is_finished_leaves_nothing_and_a_later_one_the_layers(tmp_path):
    def fails(out, *names):
        with writer.only_writer(out):
            for name in names:
                (out / name).touch()
            raise ValueError("NaN")

    for out, names in ((tmp_path / "a", ()), (tmp_path / "b", (layer_file(0),))):
        with pytest.raises(ValueError, match="NaN"):
            fails(out, "quantization.json", *names)
    assert not (tmp_path / "a").exists()
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"quantization.json", *names}


class Killed(BaseException):
    """In place of a signal: nothing after it runs, not even what tidies up."""


def killed_at(moment, patch):
    """Makes the `moment`-th step of writing files the last: some write half a file first."""
    count = [0]

    def dies(real, half):
        def step(*arguments, **options):
            count[0] += 1
            if count[0] > moment:
                raise Killed
            if count[0] == moment:
                if half:
                    real(*arguments, **options)
                raise Killed
            return real(*arguments, **options)

        return step

    patch.setattr(os, "replace", dies(os.replace, half=moment % 2 == 0))
    patch.setattr("duquantpp_jax.files.os.fsync", dies(os.fsync, half=False))
    # A process that is gone unlinks no temporary file.
    unlink = type(files.Path()).unlink
    patch.setattr(
        "pathlib.Path.unlink",
        lambda path, **more: None if count[0] >= moment else unlink(path, **more),
    )


def test_killed_before_anything_has_its_name_it_begins_anew(three_layers, quantized, tmp_path):
    options = options_of(three_layers, tmp_path / "q", recipe="smooth_hadamard", rounding="gptq")
    with pytest.MonkeyPatch.context() as patch:
        killed_at(1, patch)
        with pytest.raises(Killed):
            quantize(options)
    left, lock = sorted(options.out.iterdir(), reverse=True)
    assert left.name.startswith(".quantization.json.")
    assert lock.name == ".lock"
    quantize(options)
    assert contents(options.out) == contents(quantized)


def test_killed_before_it_drops_old_hidden_states_it_drops_them_later(
    three_layers, quantized, tmp_path
):
    options = options_of(three_layers, tmp_path / "q", recipe="smooth_hadamard", rounding="gptq")
    unlink = type(files.Path()).unlink

    def dies(path, **more):
        if path.name == "hidden-00001.safetensors":
            raise Killed
        unlink(path, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", dies)
        with pytest.raises(Killed):
            quantize(options)
    assert len(list(options.out.glob("hidden-*"))) == 2
    finished = {path: path.stat().st_ino for path in options.out.glob("layer-*")}
    assert len(finished) == 2
    path, whole = options.out / layer_file(0), (options.out / layer_file(0)).read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"layer-00000\.safetensors holds contents .*: remove it"):
        quantize(options)
    shutil.copy(options.out / layer_file(1), path)
    with pytest.raises(ValueError, match=r"layer-00000\.safetensors holds layer 1, and not 0"):
        quantize(options)
    path.write_bytes(whole)
    finished[path] = path.stat().st_ino
    quantize(options)
    assert {path: path.stat().st_ino for path in finished} == finished  # none is done again
    assert contents(options.out) == contents(quantized)


@pytest.mark.slow
def test_killed_sequential_goes_on_from_what_the_quantized_layers_gave(three_layers, tmp_path):
    """Three times, at random steps of writing; once without the hidden states it had stored."""
    few = {"include": ("*.o_proj", "*.down_proj"), "rounding": "asymmetric", "sequential": True}
    whole = options_of(three_layers, tmp_path / "whole", **few)
    quantize(whole)
    options = dataclasses.replace(whole, out=tmp_path / "q")
    kills, moments, dropped = 0, random.Random(0), []
    while kills < 3:
        with pytest.MonkeyPatch.context() as patch:
            killed_at(moments.randint(4, 12), patch)
            try:
                quantize(options)
            except Killed:
                kills += 1
            else:
                assert contents(options.out) == contents(whole.out)
                shutil.rmtree(options.out)
        if not dropped:  # finished layers without hidden states are done again
            dropped = list(options.out.glob("hidden-*"))
            for path in dropped:
                path.unlink()
    assert dropped
    quantize(options)
    assert contents(options.out) == contents(whole.out)


@pytest.fixture
def in_process(tmp_path):
    """Quantizes in a process that is killed a while after so many of its steps.

    Gives the steps that were seen and the process's exit code: 0 if it was done before.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["duquantpp_jax.commands.quantize"])

    def run(options, steps=10**9, pause=0.0):
        reader, writer = context.Pipe(duplex=False)
        arguments = (options, tmp_path / "programs", writer)
        process = context.Process(target=quantize_worker.run, args=arguments)
        process.start()
        writer.close()
        seen = 0
        with reader, contextlib.suppress(EOFError):  # it has ended
            while seen < steps:
                reader.recv_bytes()
                seen += 1
            time.sleep(pause)
        process.kill()
        process.join()
        return seen, process.exitcode

    return run


@pytest.mark.slow
def test_eight_processes_killed_at_random_leave_what_one_writes_and_exports(
    three_layers, tmp_path, in_process
):
    """SIGKILL, after a step drawn from those of a whole run, and up to 50 ms later."""
    few = {"include": ("*.o_proj", "*.down_proj")}  # a process has less to trace
    whole, options = (
        options_of(three_layers, tmp_path / name, **few) for name in ("whole", "killed")
    )
    steps, code = in_process(whole)
    assert code == 0
    kills, moments, left = 0, random.Random(1), set()
    while kills < 8:
        _, code = in_process(options, moments.randint(1, steps - 1), moments.uniform(0, 0.05))
        if code == 0:
            assert contents(options.out) == contents(whole.out)
            shutil.rmtree(options.out)
            continue
        assert code == -signal.SIGKILL
        kills += 1
        left.add(len(list(options.out.glob("layer-*"))))
        if not (options.out / "config.json").exists():
            with pytest.raises(ValueError, match=r"is no quantized model|is not finished"):
                load_quantized(options.out)
    assert len(left) > 1
    assert in_process(options)[1] == 0
    assert contents(options.out) == contents(whole.out)
    for format in ("compressed-tensors", "dequantized"):
        exported = [tmp_path / f"{format} of {job.out.name}" for job in (whole, options)]
        for job, place in zip((whole, options), exported, strict=True):
            export(ExportOptions(job.out, format, out=place))
        assert contents(exported[0]) == contents(exported[1])
        if format == "compressed-tensors":
            assert_equal(by_numpy(exported[1]), dequantized(whole.out))
            if importlib.util.find_spec("compressed_tensors"):  # the extra `interop`
                assert_equal(by_library(exported[1]), dequantized(whole.out))
