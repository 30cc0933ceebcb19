"""A run that is killed, stopped, starved or fed nonsense: what is left, and what is said. Real processes, real signals.

Most processes are forked from this one, which has imported everything already.
"""
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import evaluate
import run as keeper
import train
from data import Shapes, UserError
from test_train import ROOT, TINY, few_images, log_of, signals_as_before, weights                        # noqa: F401

FLAGS = [*TINY, "--dropout", "0.1", "--save-every", "3"]


def start(folder, *flags, rank=None, world_size=2, before=lambda: None, main=train.main, common=FLAGS):
    """`train.py FLAGS --output FOLDER flags` as a process with a session of its own, `before` called in it first. With
    a rank, one of several. What it says goes to the file that `said` reads."""
    def body():
        os.setsid()
        out = os.open(f"{folder}.out", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
        if rank is not None:
            os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
                               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(PORT[0]))
        torch.use_deterministic_algorithms(True)
        before()
        keeper.command(partial(main, [*common, "--output", str(folder), *map(str, flags)]))

    PORT[0] += rank in (None, 0)
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


PORT = [20_000 + os.getpid() % 20_000]


def ended(*processes, within=60):
    """-> exit codes; none of the processes may take longer."""
    limit = time.time() + within
    for process in processes:
        process.join(max(0, limit - time.time()))
    late = [process.kill() for process in processes if process.exitcode is None]
    assert not late
    return [process.exitcode for process in processes]


def said(folder):
    return Path(f"{folder}.out").read_text()


def when(folder, text, within=60):
    """Waits until the process has said it."""
    limit = time.time() + within
    while not Path(f"{folder}.out").exists() or text not in said(folder):
        assert time.time() < limit, said(folder)
        time.sleep(0.02)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pids, within):
    """Those of the processes that are still there so many seconds later."""
    limit = time.time() + within
    while pids and time.time() < limit:
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists() and
                "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]]
        time.sleep(0.1)
    return pids


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 9 steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert ended(start(folder, "--steps", 9, before=lambda: train.DATASETS.update(shapes=partial(Shapes, length=4)))) == [0]
    return folder


def same(a, b):
    """Whether two runs have the same weights, to the bit, and the same history."""
    one, other = weights(a / "last.pt"), weights(b / "last.pt")
    history = [[(row["step"], row.get("loss"), row.get("PQ")) for row in log_of(folder)] for folder in (a, b)]
    return all(torch.equal(one[name], other[name]) for name in one) and history[0] == history[1]


def step_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)["step"]


# ---------------------------------------------------------------------------------------- killed
def kill_itself_halfway_through_the_second_checkpoint():
    saves, save = [], torch.save

    def dying_save(state, file):
        saves.append(state["step"])
        if len(saves) == 2:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)
    torch.save = dying_save


def test_kill_9_while_a_checkpoint_is_written_costs_no_more_than_the_steps_since_the_last(tmp_path, whole):
    folder = tmp_path / "run"
    assert ended(start(folder, "--steps", 9, before=kill_itself_halfway_through_the_second_checkpoint)) == [-9]
    assert (folder / "last.part").exists() and step_of(folder) == 3 and len(log_of(folder)) == 6
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 7, "lo')                                     # a kill may cut this line
    assert ended(start(folder, "--steps", 9, "--resume")) == [0]
    assert same(folder, whole) and not list(folder.glob("*.part"))


@pytest.mark.parametrize("number, workers, whom", [
    (signal.SIGTERM, 0, os.kill), (signal.SIGUSR1, 2, os.kill), (signal.SIGTERM, 2, os.killpg)],
    ids=["SIGTERM", "SIGUSR1", "SIGTERM to loader workers, too"])
def test_a_signal_ends_a_run_after_its_next_step_saved_and_a_resumed_run_is_the_whole_run(tmp_path, whole, number,
                                                                                            workers, whom):
    folder = tmp_path / "run"
    process = start(folder, "--steps", 9, "--workers", workers, before=slow_steps)
    when(folder, "step 4/9")
    loaders = children(process.pid)
    whom(process.pid, number)                                            # the process, or its loader workers, too
    assert ended(process, within=20) == [keeper.STOPPED] and 4 < step_of(folder) < 9
    assert len(loaders) >= workers and alive(loaders, within=5) == []
    assert ended(start(folder, "--steps", 9, "--workers", 2 - workers, "--resume")) == [0]
    assert same(folder, whole)


def slow_steps():
    step = train.training_step
    train.training_step = lambda *args: (time.sleep(0.3), step(*args))[1]


def test_loader_workers_go_when_their_run_is_killed(tmp_path):
    process = start(tmp_path / "run", "--steps", 900, "--workers", 2)
    when(tmp_path / "run", "step 2/")
    loaders = children(process.pid)
    process.kill()
    assert len(loaders) >= 2 and alive(loaders, within=20) == []


def test_signals_stay_blocked_for_workers_that_are_spawned():
    code = ("import run, signal; from multiprocessing import resource_tracker; run.hear_signals(); "
            "resource_tracker.ensure_running(); print(run.STOP_SIGNALS <= signal.pthread_sigmask(signal.SIG_BLOCK, []))")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.stdout == "True\n", result.stderr


def test_two_processes_stop_at_the_same_step_and_one_goes_on_with_their_samples_and_rates(tmp_path):
    folder = tmp_path / "run"
    pair = [start(folder, "--steps", 12, rank=rank, before=slow_steps) for rank in range(2)]
    when(folder, "step 4/12")
    os.kill(pair[1].pid, signal.SIGTERM)                                 # one of them
    assert ended(*pair, within=30) == [keeper.STOPPED] * 2
    first, seen = step_of(folder), tmp_path / "samples"
    assert ended(start(folder, "--steps", 12, "--resume", before=partial(note_samples, seen))) == [0]
    assert [int(n) for n in seen.read_text().split()] == list(range(4 * first, 4 * 12))
    rows, args = [row for row in log_of(folder) if "lr" in row], train.parse([*FLAGS, "--steps", "12"])
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["lr"] for row in rows] == [args.lr * train.lr_factor(step, args) for step in range(12)]


def note_samples(path):
    read = train.TrainingSamples.__getitem__

    def noting_read(self, n):
        with open(path, "a") as file:
            file.write(f"{n}\n")
        return read(self, n)
    train.TrainingSamples.__getitem__ = noting_read


def test_torchrun_restarts_a_job_of_which_one_process_was_killed(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
               "--master-port", str(PORT[0] + 500), str(ROOT / "train.py"), *FLAGS, "--steps", "30",
               "--output", str(tmp_path), "--resume"]
    with open(tmp_path / "out", "w") as out:
        job = subprocess.Popen(command, stdout=out, stderr=out)
    limit = time.time() + 100
    while not (tmp_path / "last.pt").exists():
        assert time.time() < limit and job.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.02)
    os.kill(children(job.pid)[1], signal.SIGKILL)
    assert job.wait(100) == 0, (tmp_path / "out").read_text()
    rows = [row["step"] for row in log_of(tmp_path) if "loss" in row]
    assert rows == list(range(1, 31)) and step_of(tmp_path) == 30


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    assert ended(start(tmp_path / "run", "--steps", 3)) == [0]
    (tmp_path / "run" / "last.part").symlink_to("/dev/full")             # every write: no space left on device
    assert ended(start(tmp_path / "run", "--steps", 6, "--resume")) == [2]
    last_line = said(tmp_path / "run").splitlines()[-1]
    assert last_line.startswith("error: ") and "No space left" in last_line and "last.pt" in last_line
    assert step_of(tmp_path / "run") == 3 and not list((tmp_path / "run").glob("*.part"))


# ---------------------------------------------------------------------------------------- no hang
def broken_image(rank, broken_rank, kind):
    def read(self, index):
        if rank == broken_rank and index % 3 == 0:
            raise kind("photo.jpg is broken: replace it")
        return whole_read(self, index)
    whole_read, Shapes.__getitem__ = Shapes.__getitem__, read


@pytest.mark.parametrize("broken_rank, kind, code, message", [
    (1, UserError, 2, "error: photo.jpg is broken: replace it"), (0, OSError, 2, "error: OSError: photo.jpg is broken"),
    (1, RuntimeError, 1, "RuntimeError: photo.jpg is broken: replace it")])
def test_an_error_in_one_of_two_processes_ends_both_and_is_told_once(tmp_path, broken_rank, kind, code, message):
    folder = tmp_path / "run"
    pair = [start(folder, "--steps", 40, "--workers", 1, rank=rank, before=partial(broken_image, rank, broken_rank, kind))
            for rank in range(2)]
    codes = ended(*pair)
    assert codes[broken_rank] == code and codes[1 - broken_rank] == 1
    assert said(folder).count(message) == 1 and said(folder).count("Traceback") == (0 if code == 2 else 2)


@pytest.mark.parametrize("images", [1, 3])
def test_two_processes_share_images_that_they_cannot_share_evenly(tmp_path, whole, images):
    few = partial(train.DATASETS.update, shapes=partial(Shapes, length=images))
    flags = dict(main=evaluate.main, common=["--checkpoint", str(whole / "last.pt"), "--workers", "1"], before=few)
    flags["main"] = lambda argv: evaluate.main([flag for flag in argv if flag != "--output"][:-1])
    assert ended(start(tmp_path / "one", **flags)) == [0]
    assert ended(*(start(tmp_path / "two", rank=rank, **flags) for rank in range(2))) == [0, 0]
    assert said(tmp_path / "one") == said(tmp_path / "two") != ""


# ---------------------------------------------------------------------------------------- numbers and messages
def test_a_step_that_float16_skips_leaves_a_log_of_plain_numbers(tmp_path, monkeypatch):
    norms, clip = iter([torch.inf, 1., 1.]), nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: clip(*args).fill_(next(norms)))
    train.main([*FLAGS, "--steps", "3", "--amp", "fp16", "--output", str(tmp_path)])
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ["grad_norm" in row for row in rows[:3]] == [False, True, True]


@pytest.mark.parametrize("error, code, told", [
    (UserError("photo.jpg is grey:\n paint it"), 2, "error: photo.jpg is grey: paint it\n"),
    (FileNotFoundError(2, "No such file", "a.png"), 2, "error: [Errno 2] No such file: 'a.png'\n"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: CUDA out of memory.\n"),
    (KeyboardInterrupt(), 130, "interrupted\n")])
def test_what_the_user_can_mend_is_told_in_one_line(capsys, monkeypatch, error, code, told):
    def main():
        raise error
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ending:
        keeper.command(main)
    assert ending.value.code == code and capsys.readouterr().err == told


def test_a_bug_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ending:
        keeper.command(lambda: {}["missing"])
    told = capsys.readouterr().err
    assert ending.value.code == 1 and told.startswith("Traceback") and "KeyError: 'missing'" in told


def test_the_script_tells_a_bad_flag_in_one_line():
    result = subprocess.run([sys.executable, ROOT / "train.py", "--workers", "-1"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: argument --workers: -1 is not 0 or more; --help shows all flags\n"


def test_a_port_that_is_taken_is_told(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        place = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        run = subprocess.run([sys.executable, "train.py", "--output", tmp_path / "run"], cwd=ROOT,
                             env=os.environ | place, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and port in run.stderr.splitlines()[-1] and "in use" in run.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
