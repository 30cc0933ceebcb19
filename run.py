"""What keeps a run alive: processes, signals, errors, the run's folder. Nothing of the paper is here.

A run may end at any moment, by kill -9, too: its last checkpoint is whole, and --output DIR --resume goes on
from there. SIGTERM or SIGUSR1 (a cluster wants its machine back) end it after its next step, saved.

Exit codes   0 done · 1 a bug, with its traceback · 2 something to mend, in one line · 75 ended by a signal
"""
import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from data import UserError

STOPPED = 75
STOP_SIGNALS = {getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)}


# ---------------------------------------------------------------------------------------- errors
def command(main):
    """Runs `main`, tells what went wrong and ends the process with its code (see the top)."""
    text = None
    try:
        code = main() or 0
        if dist.is_initialized():
            dist.destroy_process_group()
    except (UserError, OSError, dist.DistNetworkError, torch.OutOfMemoryError) as error:
        text, code = "error: " + one_line(error), 2
    except KeyboardInterrupt:
        text, code = "interrupted", 130
    except Exception:
        text, code = traceback.format_exc(), 1
    if text and is_first_to_fail():
        print(text, file=sys.stderr, flush=True)
    gc.collect()                       # of what the error held: a loader's workers end with it
    raise SystemExit(code)


def one_line(error):
    """The message of an error; if a loader's worker sent it, that is the last line of a traceback."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.split("\n")[-1].removeprefix("data.UserError: ")
    return " ".join(text.split())


def is_first_to_fail():
    """The other processes then fail because they miss its answers; torchrun's store counts."""
    if "RANK" not in os.environ:
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=datetime.timedelta(seconds=10))
        return store.add(f"failed in attempt {attempt}", 1) == 1
    except RuntimeError:                                                 # no store, nobody to count with
        return os.environ["RANK"] == "0"


class Flags(argparse.ArgumentParser):
    """The flags of a command. What they cannot be is a UserError: integers begin at 1 (some at 0), all other
    numbers at 0, and shares end at 1."""

    zero_too = ("encoder_layers", "seed", "size_divisibility", "warmup", "workers")
    shares = ("dropout", "object_threshold", "overlap_threshold")

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; --help shows all flags")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            for number in value if isinstance(value, (list, tuple)) else [value]:
                least = 1 if type(number) is int and name not in self.zero_too else 0
                most = 1 if name in self.shares else sys.float_info.max
                if type(number) in (int, float) and not least <= number <= most:
                    allowed = f"from {least} to 1" if name in self.shares else f"{least} or more"
                    self.error(f"argument --{name.replace('_', '-')}: {number} is not {allowed}")
        return args


# ---------------------------------------------------------------------------------------- processes
def start_process():
    """Joins torchrun's process group if there is one -> the device of this process."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node: there are only {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(device)
    if "RANK" in os.environ:                                             # what lies on the CPU stays there
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def process():
    """-> rank of this process, number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average_over_processes(value):
    if process()[1] > 1:
        dist.all_reduce(value)
    return value / process()[1]


def hear_signals():
    """-> function for all processes to call: was one of them asked to stop? From now on to the end of this
    process the signals do nothing else; loader workers, which inherit what is blocked, go on reading."""
    heard = []
    for number in STOP_SIGNALS:                                          # a library's thread may get it
        signal.signal(number, lambda *_: heard.append(True))
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def asked_to_stop():
        waiting = os.name == "posix" and signal.sigpending() & STOP_SIGNALS
        return average_over_processes(torch.tensor(float(bool(heard or waiting)))).item() > 0
    return asked_to_stop


# ---------------------------------------------------------------------------------------- the folder
def start_folder(args, first):
    """Makes the folder of a run and config.json: every flag, the versions, the git revision. -> its path.

    The log is cut behind step `first`: what a killed run did after its last checkpoint is done again.
    """
    numbers = (f"runs/{args.dataset}-{number:03d}" for number in range(1, 1000))
    folder = Path(args.output or next(path for path in numbers if not Path(path).exists()))
    if process()[0] > 0:
        return folder                                                    # in which process 0 alone writes
    folder.mkdir(parents=True, exist_ok=True)
    git, describe = None, ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):                                   # no git here
        git = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "scipy")}
    content = vars(args) | {"versions": versions, "git": git and git.strip(), "processes": process()[1]}
    write_whole(folder / "config.json", json.dumps(content, indent=1) + "\n")
    if (log := folder / "log.jsonl").exists():
        rows = [row for row in log.read_text().splitlines() if row.endswith("}")]        # the last may be cut
        write_whole(log, "".join(f"{row}\n" for row in rows if json.loads(row)["step"] <= first))
    return folder


def log_row(folder, row):
    """A line of log.jsonl."""
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def write_whole(path, content):
    """Writes text, or with torch what is no text, under another name and renames it: `path` is never half."""
    unfinished = path.with_suffix(".part")
    try:
        with open(unfinished, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:                             # RuntimeError: torch, of a full disk
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}), what was there is untouched: make room, then "
                        "continue with --output DIR --resume") from error


def read_checkpoint(path):
    """-> the content of a checkpoint of train.py. No code in the file is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("model", "config", "classes", "is_thing", "step")} | state
    except OSError:
        raise
    except Exception as error:                                           # a broken file can raise anything
        raise UserError(f"{path} is no whole checkpoint of train.py ({type(error).__name__}): take another")
