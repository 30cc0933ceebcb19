"""A run that is killed, stopped, starved or fed nonsense: what is left of it, and what it says.

Real processes, real signals. Most processes are forked from this one, which has imported everything
already; they hold what the tests have patched.
"""
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import evaluate
import train
from data import Shapes, UserError, to_label_map
from test_train import ROOT, TINY, content, equal, free_port, log_of, weights

pytestmark = pytest.mark.usefixtures("short_tests", "signals_as_before")

FLAGS = [*TINY, "--dropout", "0.1", "--save-every", "3"]


# ---------------------------------------------------------------------------------------- processes
def start(folder, *flags, port=None, rank=0, before=lambda: None, main=train.main):
    """`train.py FLAGS --output FOLDER flags` as a process in a session of its own.

    What it says goes to the file that `said` reads. `before` is called in it first. With a port it
    is process `rank` of two.
    """
    def body():
        os.setsid()
        output = os.open(f"{folder}.out", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        if port:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        before()
        evaluate.run_command(partial(main, [*map(str, flags)]))

    if main is train.main:
        flags = [*FLAGS, "--output", folder, *flags]
    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def start_two(folder, *flags, **options):
    port = free_port()
    return [start(folder, *flags, port=port, rank=rank, **options) for rank in range(2)]


def ended(*processes, within=100):
    """-> exit codes. None of the processes may take longer."""
    limit = time.time() + within
    for process in processes:
        process.join(max(0, limit - time.time()))
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        process.kill()
    assert not late
    return [process.exitcode for process in processes]


def said(folder):
    return Path(f"{folder}.out").read_text()


def wait_until_said(folder, text, within=100):
    limit = time.time() + within
    while not Path(f"{folder}.out").exists() or text not in said(folder):
        assert time.time() < limit, said(folder)
        time.sleep(0.02)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def still_alive(pids, within):
    """Those of the processes that are still there so many seconds later."""
    limit = time.time() + within
    while pids and time.time() < limit:
        pids = [pid for pid in pids if is_alive(pid)]
        time.sleep(0.1)
    return pids


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"                                          # ended, not yet waited for


def slow_steps(seconds=0.2):
    step = train.training_step

    def slow_step(*args):
        time.sleep(seconds)
        return step(*args)

    train.training_step = slow_step


def slow_tests():
    predict = evaluate.predict

    def slow_predict(*args, **options):
        time.sleep(0.3)
        return predict(*args, **options)

    evaluate.predict = slow_predict


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 9 steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.DATASETS, "shapes", few_shapes(3))
        assert ended(start(folder, "--steps", 9)) == [0]
    return folder


def few_shapes(number):
    def shapes(root, split, **options):
        return Shapes(root, split, length=number if split == "val" else None, **options)
    return shapes


def assert_same(run, other):
    """Two runs have the same weights, to the bit, and the same history."""
    assert equal(weights(run / "last.pt"), weights(other / "last.pt"))
    histories = [[(row["step"], row.get("loss"), row.get("PQ")) for row in log_of(folder)]
                 for folder in (run, other)]
    assert histories[0] == histories[1]


def step_of(folder):
    return content(folder / "last.pt")["step"]


# ------------------------------------------------------------------------------------------- killed
def kill_itself_halfway_through_the_second_checkpoint():
    save = torch.save
    saves = []

    def dying_save(state, file):
        saves.append(state["step"])
        if len(saves) == 2:
            file.write(b"half a checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)

    torch.save = dying_save


def test_kill_9_while_a_checkpoint_is_written_costs_no_more_than_the_steps_since_the_last(
        tmp_path, whole):
    folder = tmp_path / "run"
    before = kill_itself_halfway_through_the_second_checkpoint
    assert ended(start(folder, "--steps", 9, before=before)) == [-9]
    assert (folder / "last.part").exists()
    assert step_of(folder) == 3
    assert len(log_of(folder)) == 6

    assert ended(start(folder, "--steps", 9, "--resume")) == [0]
    assert_same(folder, whole)
    assert not list(folder.glob("*.part"))


def test_loader_workers_go_when_their_run_is_killed(tmp_path, monkeypatch):
    # How often a worker looks for its parent; 5 seconds, if nothing is said.
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 0.5)
    process = start(tmp_path / "run", "--steps", 900, "--workers", 2)
    wait_until_said(tmp_path / "run", "step 2/")
    loaders = children(process.pid)
    process.kill()
    assert len(loaders) >= 2
    assert still_alive(loaders, within=20) == []


# ------------------------------------------------------------------------------------------ stopped
SIGNALS = {"SIGTERM": (signal.SIGTERM, 0, os.kill),
           "SIGUSR1": (signal.SIGUSR1, 2, os.kill),
           "SIGTERM to loader workers, too": (signal.SIGTERM, 2, os.killpg)}


def test_a_signal_ends_a_run_after_its_step_saved_and_resumed_it_is_the_whole_run(tmp_path, whole):
    # All at once, for they mostly wait.
    runs = {name: start(tmp_path / name, "--steps", 9, "--workers", workers,
                        before=partial(slow_steps, 0.4))
            for name, (_, workers, _) in SIGNALS.items()}
    loaders = {}
    for name, (number, workers, send) in SIGNALS.items():
        wait_until_said(tmp_path / name, "step 4/9")
        loaders[name] = children(runs[name].pid)
        assert len(loaders[name]) >= workers
        send(runs[name].pid, number)

    assert ended(*runs.values(), within=30) == [train.STOPPED] * 3
    for name in SIGNALS:
        assert 4 < step_of(tmp_path / name) < 9
        assert f"continue with --output {tmp_path / name} --resume" in said(tmp_path / name)
        assert still_alive(loaders[name], within=5) == []

    resumed = [start(tmp_path / name, "--steps", 9, "--workers", 2 - workers, "--resume")
               for name, (_, workers, _) in SIGNALS.items()]
    assert ended(*resumed) == [0] * 3
    for name in SIGNALS:
        assert_same(tmp_path / name, whole)


def test_a_signal_during_a_test_spares_its_loader_workers(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "--steps", 9, "--eval-every", 4, "--workers", 1, before=slow_tests)
    wait_until_said(folder, "step 4/9")
    time.sleep(0.3)                                              # now three images are tested
    os.killpg(process.pid, signal.SIGTERM)
    assert ended(process, within=30) == [train.STOPPED]
    assert step_of(folder) == 5
    assert "held-out" in said(folder)


def note_samples(path):
    read = train.TrainingSamples.__getitem__

    def noting_read(self, n):
        with open(path, "a") as file:
            file.write(f"{n}\n")
        return read(self, n)

    train.TrainingSamples.__getitem__ = noting_read


def test_two_processes_stop_at_one_step_and_one_goes_on_with_their_samples_and_rates(tmp_path):
    folder = tmp_path / "run"
    pair = start_two(folder, "--steps", 12, "--workers", 1, before=slow_steps)
    wait_until_said(folder, "step 4/12")
    os.kill(pair[1].pid, signal.SIGTERM)                         # one of them
    assert ended(*pair, within=30) == [train.STOPPED] * 2

    first = step_of(folder)
    samples = tmp_path / "samples"
    process = start(folder, "--steps", 12, "--resume", "--workers", 0,
                    before=partial(note_samples, samples))
    assert ended(process) == [0]
    assert [int(n) for n in samples.read_text().split()] == list(range(4 * first, 4 * 12))
    rows = [row for row in log_of(folder) if "lr" in row]
    args = train.parse_args([*FLAGS, "--steps", "12"])
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["lr"] for row in rows] == [args.lr * train.lr_factor(step, args)
                                           for step in range(12)]


def files_of_shapes(root):
    """A data set of files: eight drawings to train on, three that are held out."""
    for split, count in (("train", 8), ("val", 3)):
        shapes = Shapes(split=split)
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image, segment_map, class_of, _, name = shapes[i]
            to_pil_image(image).save(root / "images" / split / f"{name}.png")
            label_map = to_label_map(segment_map, class_of, void=255).byte()
            to_pil_image(label_map).save(root / "annotations" / split / f"{name}.png")
    (root / "classes.txt").write_text("\n".join(shapes.classes))


@pytest.fixture(scope="module", autouse=True)
def torchrun_job(tmp_path_factory):
    """A job of two processes, one of which is killed when there is a checkpoint.

    -> its folder, its flags, a function that waits for its exit code. Its processes import all from
    scratch, which takes half a minute on two cores, so it goes on while other tests run.
    """
    root = tmp_path_factory.mktemp("torchrun")
    files_of_shapes(root / "data")
    folder = root / "job"
    flags = ["--dataset", "folder", "--data-root", str(root / "data"), "--no-pretrained",
             "--crop", "64", "96", "--short-side", "64", "--test-short-side", "64",
             "--steps", "20", "--resume"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--max-restarts", "1", "--master-port", str(free_port()), str(ROOT / "train.py"),
               *FLAGS, "--output", str(folder), *flags]
    with open(f"{folder}.out", "w") as output:
        job = subprocess.Popen(command, stdout=output, stderr=output)

    def kill_a_process_and_wait():
        while not (folder / "last.pt").exists() and job.poll() is None:
            time.sleep(0.02)
        os.kill(children(job.pid)[1], signal.SIGKILL)
        return job.wait()

    with ThreadPoolExecutor(1) as pool:
        code = pool.submit(kill_a_process_and_wait)
        yield folder, flags, code.result
        job.terminate()                                          # ends its processes, too


# ------------------------------------------------------------------------------------------- errors
def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    folder = tmp_path / "run"
    assert ended(start(folder, "--steps", 3)) == [0]
    (folder / "last.part").symlink_to("/dev/full")               # every write: no space left
    assert ended(start(folder, "--steps", 6, "--resume")) == [2]
    last_line = said(folder).splitlines()[-1]
    assert last_line.startswith(f"error: {folder / 'last.pt'} cannot be written")
    assert "No space left" in last_line
    assert step_of(folder) == 3
    assert not list(folder.glob("*.part"))


def broken_image(error, broken_rank=0):
    """From now on some images of process `broken_rank` cannot be read."""
    read = Shapes.__getitem__

    def broken_read(self, index):
        if int(os.environ.get("RANK", 0)) == broken_rank and index % 7 == 0:
            raise error("photo.jpg is broken: replace it")
        return read(self, index)

    Shapes.__getitem__ = broken_read


def broken_step(error):
    """The third step fails."""
    step = train.training_step

    def third_time_broken(number, *args):
        if number == 2:
            raise error("the step is broken")
        return step(number, *args)

    train.training_step = third_time_broken


@pytest.mark.parametrize("breaking, error, code, told", [
    (broken_image, UserError, 2, "\nerror: photo.jpg is broken: replace it\n"),
    (broken_image, RuntimeError, 1, "\nRuntimeError: photo.jpg is broken: replace it\n"),
    (broken_step, UserError, 2, "\nerror: the step is broken\n"),
    (broken_step, ZeroDivisionError, 1, "\nZeroDivisionError: the step is broken\n"),
    (broken_step, KeyboardInterrupt, 130, "\ninterrupted\n"),
], ids=["file", "bug in a worker", "mistake", "bug", "Ctrl-C"])
def test_an_error_ends_a_run_and_its_loader_workers_within_seconds(
        tmp_path, breaking, error, code, told):
    folder = tmp_path / "run"
    process = start(folder, "--steps", 40, "--workers", 2, before=partial(breaking, error))
    wait_until_said(folder, told)
    assert ended(process, within=15) == [code]
    assert ("Traceback" in said(folder)) == (code == 1)
    with pytest.raises(ProcessLookupError):                      # nothing is left of its session
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("error, code, message", [
    (UserError, 2, "error: photo.jpg is broken: replace it\n"),
    (RuntimeError, 1, "RuntimeError: photo.jpg is broken: replace it\n"),
])
def test_an_error_in_one_of_two_processes_ends_both(tmp_path, error, code, message):
    folder = tmp_path / "run"
    pair = start_two(folder, "--steps", 40, "--workers", 1,
                     before=partial(broken_image, error, broken_rank=1))
    assert ended(*pair) == [1, code]
    assert said(folder).count(message) == 1


@pytest.mark.parametrize("images", [1, 3])
def test_two_processes_share_images_that_they_cannot_share_evenly(
        tmp_path, monkeypatch, whole, images):
    monkeypatch.setitem(train.DATASETS, "shapes", few_shapes(images))
    flags = ["--checkpoint", whole / "last.pt", "--workers", 1]
    assert ended(start(tmp_path / "one", *flags, main=evaluate.main)) == [0]
    assert ended(*start_two(tmp_path / "two", *flags, main=evaluate.main)) == [0, 0]
    assert said(tmp_path / "one") == said(tmp_path / "two")
    assert "mIoU" in said(tmp_path / "one")


def test_a_port_that_is_taken_is_told_and_nothing_is_written(tmp_path):
    folder = tmp_path / "run"
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, = ended(start(folder, port=port))
    assert code != 0
    assert "in use" in said(folder) and str(port) in said(folder)
    assert not folder.exists()


# ---------------------------------------------------------------------------------------- restarted
def test_torchrun_restarts_a_job_of_which_one_process_was_killed(tmp_path, torchrun_job):
    folder, flags, exit_code = torchrun_job
    assert exit_code(100) == 0, said(folder)
    rows = [row["step"] for row in log_of(folder) if "loss" in row]
    assert rows == list(range(1, 21))
    assert "mIoU" in log_of(folder)[-1]
    assert ended(*start_two(tmp_path / "calm", *flags)) == [0, 0]
    assert equal(weights(folder / "last.pt"), weights(tmp_path / "calm" / "last.pt"))
