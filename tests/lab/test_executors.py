"""Processes and jobs do what this process does, and die without losing anything."""

import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from multiprocessing.context import SpawnProcess
from types import SimpleNamespace

import numpy as np
import pytest

from duquantpp_jax import cli, files
from duquantpp_jax.commands import ablate
from duquantpp_jax.evaluation.rows import TARGETS
from duquantpp_jax.lab import Cell, executors, records, run
from duquantpp_jax.lab.executors import Processes, Slurm, gpus
from duquantpp_jax.lab.running import Outcome
from experiments import gptq_settings
from tests.conftest import COMPILED_VARIABLE


@pytest.fixture(autouse=True)
def _programs(monkeypatch):
    """Processes find the programs that this one has compiled."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ[COMPILED_VARIABLE])
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(scope="module")
def cells(tiny_directory, tiny_text):
    # Shapes of test_running.py, whose programs are found.
    given = {"tokens": 4 * TARGETS, "calibration_tokens": 8 * TARGETS, "batch_rows": 4}
    texts = {"text": tiny_text, "calibration_text": tiny_text}
    return [
        Cell("random_hadamard", model=tiny_directory, seed=seed, **texts, **given)
        for seed in range(4)
    ]


@pytest.fixture(scope="module")
def here(cells, tmp_path_factory):
    """The cells measured in this process."""
    return run(cells, tmp_path_factory.mktemp("here"))


def _assert_alike(outcome, here):
    # Processes with fewer threads may add in another order.
    assert list(outcome.records) == list(here.records)
    for cell, record in outcome.records.items():
        np.testing.assert_allclose(
            record["rows"]["kl"], here.records[cell]["rows"]["kl"], rtol=1e-3
        )


@pytest.mark.slow
def test_processes_measure_what_this_one_does_and_a_killed_one_is_replaced(
    cells, here, tmp_path, caplog, monkeypatch
):
    """Each imports what is given and sees its own GPU, also the one that replaces another."""
    seen, killed, saw = [], [], tmp_path / "saw"
    saw.mkdir()
    monkeypatch.syspath_prepend(saw)
    code = "import os, pathlib; device = os.environ['CUDA_VISIBLE_DEVICES']\n"
    code += f"(pathlib.Path({str(saw)!r}) / f'{{os.getpid()}}.pid').write_text(device)"
    (saw / "sees.py").write_text(code)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")

    def progress(*counts):
        seen.append(counts)

    def kill_one():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for claim in tmp_path.glob(".claims/*.0"):
                pid = json.loads(claim.read_text())["pid"]
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    outcome = run(cells, tmp_path, gpus(imports=("sees",)), progress=progress)
    killer.join()
    assert len(killed) == 1
    (said,) = caplog.messages
    assert f"(process {killed[0]}) was killed by SIGKILL at random_hadamard, mxfp4, seed " in said
    assert said.endswith(": it is replaced, and the cell measured again")
    assert not outcome.errors
    _assert_alike(outcome, here)
    assert seen[0] == (0, 0, 4)
    assert seen[-1] == (4, 0, 4)
    assert list(tmp_path.glob(".claims/*")) == []
    devices = {path.stem: path.read_text() for path in saw.glob("*.pid")}
    replaced = devices[str(killed[0])]
    assert sorted(devices.values()) == sorted(["2", "5", replaced])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,5"


@pytest.mark.slow
def test_a_job_of_submitit_measures_what_this_process_does(cells, here, tmp_path):
    pytest.importorskip("submitit")
    outcome = run(cells, tmp_path, Slurm(1, (("timeout_min", 5),), cluster="local"))
    assert not outcome.errors
    _assert_alike(outcome, here)


def test_jobs_begin_at_different_cells_and_get_what_was_asked_for(cells, tmp_path, monkeypatch):
    asked, ticks = [], []

    class Executor:
        def __init__(self, **given):
            asked.append(given)

        def update_parameters(self, **given):
            asked.append(given)

        def submit(self, function, cells, out, cache_bytes, first, imports):
            asked.append((function, cells, out, cache_bytes, first, imports))
            return SimpleNamespace(done=lambda: True, exception=lambda: None)

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    slurm = Slurm(2, (("timeout_min", 5), ("gpus_per_node", 1)), imports=("a",))
    with pytest.raises(ValueError, match=r"2 jobs ended early .*: 4 cells are left"):
        slurm(cells, tmp_path, 7, lambda: ticks.append(1))
    place, *parameters = asked[:2]
    assert place == {"folder": tmp_path / executors.JOBS, "cluster": "slurm"}
    assert parameters == [{"timeout_min": 5, "gpus_per_node": 1}]
    same = executors._job, cells, tmp_path.resolve(), 7
    assert asked[2:] == [(*same, first, ("a",)) for first in (0, 2)]
    assert ticks


def test_a_job_that_is_killed_is_named_with_its_cell(cells, tmp_path, caplog, monkeypatch):
    class Job:
        job_id, state = "7", "OUT_OF_MEMORY"
        done, exception = lambda _: True, lambda _: RuntimeError("no result")

    name = executors._process_of(tmp_path, "7")
    holder = {"host": "node", "pid": 3, "start": 5}
    files.write_whole(name, files.to_json(holder))
    place = tmp_path / ".claims"
    files.write_whole(place / f"{cells[1].digest}.0", files.to_json(holder))
    files.write_whole(place / f"{cells[2].digest}.0", files.to_json(holder | {"start": 6}))
    assert executors._has_ended(Job(), cells, tmp_path)
    (said,) = caplog.messages
    at = f"at {cells[1].labels()}: its cells are left to other jobs, if any runs"
    assert said == f"job 7 ended early (OUT_OF_MEMORY) {at}"


def test_processes_import_what_is_given_and_are_reported_if_all_die(
    cells, tmp_path, monkeypatch, caplog
):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(executors, "STARTS", 1)
    code = f"import os, pathlib; pathlib.Path({str(tmp_path / 'done')!r}).touch(); os._exit(9)"
    (tmp_path / "deadly.py").write_text(code)
    with pytest.raises(ValueError, match=r"1 worker processes died.*4 cells are left, run again"):
        run(cells, tmp_path, Processes(1, imports=("deadly",)))
    assert (tmp_path / "done").exists()
    assert re.fullmatch(
        r"worker 1 \(process \d+\) ended with code 9: it is not replaced", caplog.messages[0]
    )
    assert not any(records.is_recorded(tmp_path, cell) for cell in cells)


def test_gpus_are_those_that_this_process_may_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert gpus() == Processes(2, ("2", "5"))
    assert gpus(1, ("a",)) == Processes(1, ("2",), ("a",))


def test_without_a_gpu_its_executor_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="choose --executor processes"):
        gpus()


def test_without_submitit_slurm_names_the_extra(cells, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'duquantpp_jax\[slurm\]'"):
        run(cells, tmp_path, Slurm(1))


def test_without_a_cluster_slurm_is_refused(cells, tmp_path, monkeypatch):
    def nowhere(**_):
        raise RuntimeError("no srun")

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=nowhere))
    with pytest.raises(ValueError, match="no srun: choose --executor processes or gpus"):
        run(cells, tmp_path, Slurm(1))


def test_devices_are_left_to_workers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "kernels_here", lambda: "in kernels")
    monkeypatch.setattr(ablate.running, "run", lambda *_, **__: Outcome({}, {}))
    for workers in (1, 2):
        options = ["--workers", str(workers), "--out", str(tmp_path / "out")]
        assert cli.main(["ablate", str(gptq_settings.__file__), *options]) == 0
        assert ("in kernels" in capsys.readouterr().err) == (workers == 1)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be given here")
def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    assert [executors._share_of_cores(i, 2) for i in range(2)] == [[0, 1], [2, 3]]
    assert executors._share_of_cores(0, 6) == []


def test_a_worker_that_dies_while_it_is_looked_at_is_spoken_of(
    cells, tmp_path, monkeypatch, caplog
):
    ended, other = multiprocessing.Pipe()
    other.close()

    class Worker(SpawnProcess):
        codes = iter([None])
        pid, sentinel = property(lambda _: 7), property(lambda _: ended)
        exitcode = property(lambda self: next(self.codes, 9))
        is_alive, kill, join = (lambda _: False,) * 3

    monkeypatch.setattr(executors, "STARTS", 1)
    monkeypatch.setattr(Processes, "_start", lambda *_: Worker())
    with pytest.raises(ValueError, match="1 worker processes died"):
        Processes(1)(cells, tmp_path, 0, lambda: None)
    assert caplog.messages == ["worker 1 (process 7) ended with code 9: it is not replaced"]
