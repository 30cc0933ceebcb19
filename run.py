"""What keeps a run alive: processes, signals, errors, the run's folder. Nothing of the paper is here.

A run may be killed at any moment, even by kill -9: its last checkpoint is intact, and --output DIR --resume
continues from it. On SIGTERM or SIGUSR1 (a cluster wants its machine back) it finishes its step, saves, ends.

Exit codes   0 done · 1 a bug (traceback) · 2 user can fix it (one line) · 75 ended by a signal · 130 Ctrl-C
"""
import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import multiprocessing.resource_tracker
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import UserError, layout_of

STOPPED, ATTEMPT = 75, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
STOP_SIGNALS = {getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)}


# ---------------------------------------------------------------------------------------- errors
def command(main):
    """Runs `main`, tells what went wrong and ends the process with its code (see the top)."""
    try:
        code = main() or 0
        if dist.is_initialized():
            dist.destroy_process_group()
        raise SystemExit(code)
    except dist.DistNetworkError as error:                               # no store to say who failed first
        print("error: " + one_line(error), file=sys.stderr, flush=True)
        leave(2)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        text, code = "error: " + one_line(error), 2
    except KeyboardInterrupt:
        text, code = "interrupted", 130
    except Exception:
        text, code = traceback.format_exc(), 1
    if is_first_to_fail():
        print(text, file=sys.stderr, flush=True)
    leave(code)


def leave(code):
    """Ends this process at once, and its loader workers, who are deaf to signals (`hear_signals`)."""
    if os.name == "posix":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                    # torch would raise an error
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    os._exit(code)


def one_line(error):
    """The message of an error; if a loader's worker sent it, that is the last line of a traceback."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.split("\n")[-1].removeprefix("data.UserError: ")
    return " ".join(text.split())


def is_first_to_fail():
    """Whether this process failed first, counted in torchrun's store; the others fail as a consequence."""
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=datetime.timedelta(seconds=10))
        return store.add(f"failed in attempt {ATTEMPT}", 1) == 1
    except (KeyError, RuntimeError):                                     # no torchrun, or its store is gone
        return os.environ.get("RANK", "0") == "0"


class Flags(argparse.ArgumentParser):
    """The flags of a command. Values out of range are a UserError: integers start at 1 (`zero_too` at 0),
    floats at 0, and `shares` end at 1."""

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
    """Joins torchrun's process group if there is one -> this process's device. CPU tensors go by gloo."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node: there are only {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        store, number, count = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {ATTEMPT}", store)            # hides the last attempt's addresses
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count)
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0               # the number of this process


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1         # how many processes there are


def sum_over_processes(value):                                           # in place
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def counter(items, text):
    """Yields `items`; process 0 prints its progress every hundred."""
    for i, item in enumerate(items):
        if rank() == 0 and i % 100 == 0 and i > 0:
            print(f"{text} {i}/{len(items)}", flush=True)
        yield item


def hear_signals():
    """-> a function that all processes call together: was any of them asked to stop? From now on the signals
    do nothing else in this process; its loader workers inherit the blocked signals and keep reading."""
    heard = []
    for number in STOP_SIGNALS:                                          # a library's thread may get it
        signal.signal(number, lambda *_: heard.append(True))
    if os.name == "posix":
        multiprocessing.resource_tracker.ensure_running()                # started later, it unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def asked_to_stop():
        waiting = os.name == "posix" and signal.sigpending() & STOP_SIGNALS
        return sum_over_processes(torch.tensor(int(bool(heard or waiting)))).item() > 0
    return asked_to_stop


# ---------------------------------------------------------------------------------------- the folder
def start_folder(args, first):
    """Makes the folder of a run and config.json: every flag, the versions, the git revision. -> its path.
    Log rows after step `first` are dropped: what a killed run did after its last checkpoint is redone."""
    numbers = (f"runs/{args.dataset}-{number:03d}" for number in range(1, 10 ** 9))
    folder = Path(args.output or next(path for path in numbers if not Path(path).exists()))
    if rank() > 0:
        return folder                                                    # in which process 0 alone writes
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be made ({error.strerror}): choose another") from error
    git, describe = None, ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):                                   # no git here
        git = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "scipy")}
    content = vars(args) | {"versions": versions, "git": git and git.strip(), "processes": world_size()}
    write_whole(folder / "config.json", json.dumps(content, indent=1) + "\n")
    if (log := folder / "log.jsonl").exists():
        rows = [row for row in log.read_text().splitlines(True) if row.endswith("}\n")]  # the last may be cut
        last = first, first < args.steps and first % args.eval_every > 0     # else `first` is tested again
        write_whole(log, "".join(row for row in rows if (json.loads(row)["step"], '"mIoU"' in row) <= last))
    return folder


def earlier_flags(args):
    """-> {flag: value} of the run that --resume continues, by its config.json; {} if there is none."""
    path = Path(args.output or "", "config.json")
    try:
        content = json.loads(path.read_text()) if args.resume and args.output and path.exists() else {}
        return {name: content[name] for name in content.keys() - {"versions", "git", "processes"}}
    except (AttributeError, ValueError) as error:
        raise UserError(f"{path} is not as it was written ({error}): remove it and give all flags") from error


def log_row(folder, row):
    """A line of log.jsonl."""
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def write_whole(path, content):
    """Writes text (anything else: torch.save) to another name, then renames: `path` is never half-written."""
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
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            return {name: state[name] for name in ("model", "config", "classes", "is_thing", "step")} | state
        except Exception as error:                                       # a broken file can raise anything
            raise UserError(f"{path} is no whole checkpoint of train.py ({error!r:.60}): take another")


# ---------------------------------------------------------------------------------------- download
COCO = "http://images.cocodataset.org"
DOWNLOADS = {                                         # url, what it leaves below the root, md5 or sha1
    "ade20k": [("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                "ADEChallengeData2016", "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"),
               ("http://sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar",
                "ADEChallengeData2016/annotations_instance", None)],
    "coco-panoptic": [(f"{COCO}/zips/train2017.zip", "coco/train2017", None),
                      (f"{COCO}/zips/val2017.zip", "coco/val2017", None),
                      (f"{COCO}/annotations/panoptic_annotations_trainval2017.zip",
                       "coco/annotations/panoptic_val2017.json", None)],
    "voc": [("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar", "VOCdevkit",
             "6cd6e144f989b92b3379bac3b3de84fd")]}
DOWNLOADS["ade20k-panoptic"] = DOWNLOADS["ade20k"]


def download(name, root=None):
    """Fetches and unpacks what is missing of a dataset; after an interruption call it again. Raises UserError
    for data that cannot be downloaded, for a full disk and for broken files."""
    if name not in DOWNLOADS:
        reason = "needs a login" if "https:" in layout_of(name) else "is your own or drawn"
        raise UserError(f"--download: {name} {reason}, it cannot be fetched. What belongs below --data-root: "
                        f"{layout_of(name)} (see docs/DATASETS.md)")
    root = Path(root or os.environ.get("DATA_ROOT") or "datasets")
    for url, result, checksum in DOWNLOADS[name]:
        archive = root / url.rpartition("/")[2]                          # stays until it is unpacked
        folder = root / Path(result).parts[0] if "/" in result else root
        if (root / result).exists() and not archive.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        # No path may leave `folder`: in zip files such members are skipped, tar files with any are refused.
        safely = {"filter": "data"} if archive.suffix == ".tar" else {}
        try:
            if not archive.exists():
                fetch(url, archive, checksum)
            print(f"unpacking {archive}", flush=True)
            shutil.unpack_archive(archive, folder, **safely)
            for inner in folder.glob("annotations/panoptic_*2017.zip"):  # COCO's holds two more
                shutil.unpack_archive(inner, inner.parent)
                inner.unlink()
        except Exception as error:                                       # a broken file can raise anything
            if isinstance(error, shutil.ReadError) or not isinstance(error, OSError):
                archive.unlink(missing_ok=True)                          # but a full disk spares it
            raise UserError(f"{url}: {error}; run again to go on") from error
        archive.unlink()


def fetch(url, archive, checksum):
    """Downloads to ARCHIVE.part, checks and renames it: an existing ARCHIVE is complete."""
    part = archive.with_name(f"{archive.name}.part")

    def report(blocks, block_size, total):
        free = shutil.disk_usage(archive.parent).free if blocks == 0 else 2 * total
        if 2 * total > free:
            raise UserError(f"needs {2 * total / 1e9:.1f} GB, also to unpack it; {archive.parent} has "
                            f"{free / 1e9:.1f}")
        if blocks % 1000 == 0:
            done = f"{blocks * block_size / 1e6:.0f} of {total / 1e6:.0f} MB"
            print(f"\r{archive.name}: {done}", end="", flush=True)

    socket.setdefaulttimeout(60)                                         # of silence
    urllib.request.urlretrieve(url, part, report)                        # an error if it breaks off
    print()
    digest = hashlib.md5 if checksum and len(checksum) == 32 else hashlib.sha1
    found = checksum and digest(np.memmap(part, mode="r")).hexdigest()
    if found != checksum:
        part.unlink()
        raise UserError(f"has the checksum {found} instead of {checksum}")
    part.replace(archive)
