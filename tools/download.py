"""Downloads a dataset and unpacks it where train.py looks for it.

    python tools/download.py ade20k
    python tools/download.py coco-panoptic --data-root /data

Also ade20k-panoptic and voc; for every other dataset it says where to get it. What is already there
is not fetched again, so after an interruption the same command goes on. Archives that you have
fetched yourself, say coco/train2017.zip with `wget -c`, are unpacked, then deleted, also if they
turn out to be broken: let the download finish first.
"""
import argparse
import hashlib
import http.client
import os
import shutil
import socket
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import UserError


class Archive(NamedTuple):
    url: str
    folder: str                          # below the root, where the archive is unpacked
    content: list[str]                   # what is then in that folder
    checksum: str | None = None          # sha1 or md5, where one is published


COCO = "http://images.cocodataset.org"
ADE20K = Archive("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                 ".", ["ADEChallengeData2016"], "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7")

DOWNLOADS = {
    "ade20k": [ADE20K],
    "ade20k-panoptic": [
        ADE20K,
        Archive("http://sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar",
                "ADEChallengeData2016", ["annotations_instance"]),
    ],
    "coco-panoptic": [
        Archive(f"{COCO}/zips/train2017.zip", "coco", ["train2017"]),
        Archive(f"{COCO}/zips/val2017.zip", "coco", ["val2017"]),
        Archive(f"{COCO}/annotations/panoptic_annotations_trainval2017.zip", "coco",
                ["annotations/panoptic_train2017", "annotations/panoptic_train2017.json",
                 "annotations/panoptic_val2017", "annotations/panoptic_val2017.json"]),
    ],
    "voc": [
        Archive("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
                ".", ["VOCdevkit/VOC2012"], "6cd6e144f989b92b3379bac3b3de84fd"),
    ],
}

NO_DOWNLOAD = {
    "ade20k-full": "fill in the form at https://ade20k.csail.mit.edu",
    "cityscapes": "register at https://www.cityscapes-dataset.com",
    "cityscapes-panoptic": "register at https://www.cityscapes-dataset.com",
    "coco-stuff-10k": "get it from https://github.com/nightrome/cocostuff10k",
    "folder": "this is your own dataset",
    "mapillary": "register at https://www.mapillary.com/dataset/vistas",
    "panoptic": "this is your own dataset",
    "shapes": "its images are drawn while training",
}


def download(name, root):
    """Fetches and unpacks the missing archives of a dataset below the folder `root`.

    UserError for a dataset without a public download, a broken connection or archive, a full disk.
    Even then, or if the process is killed, nothing half-finished lies where a dataset is expected.
    """
    if name in NO_DOWNLOAD:
        raise UserError(f"{name} cannot be downloaded: {NO_DOWNLOAD[name]} (docs/DATASETS.md shows "
                        "where the files of each dataset belong)")
    if name not in DOWNLOADS:
        raise UserError(f"unknown dataset {name!r}; choose from {', '.join(DOWNLOADS)}")

    for archive in DOWNLOADS[name]:
        try:
            fetch_and_unpack(archive, Path(root))
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{archive.url}: {error}. Run the command again to go on") from error


def fetch_and_unpack(archive, root):
    """Downloads an archive and unpacks it, unless its content is there."""
    folder = root / archive.folder
    if all((folder / entry).exists() for entry in archive.content):
        print(f"{folder / archive.content[0]} is already there")
        return

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / archive.url.rpartition("/")[2]
    scratch = folder / f"{file.name}.part"                   # everything unfinished is in here
    shutil.rmtree(scratch, ignore_errors=True)               # of a process that was killed
    scratch.mkdir()
    try:
        if not file.exists():                                # of yours, or downloaded before
            fetch(archive, scratch / file.name)
            (scratch / file.name).rename(file)
        unpack(archive, file, scratch, folder)
    finally:
        shutil.rmtree(scratch)
    file.unlink()


def fetch(archive, file):
    """Downloads an archive, then compares its size and its checksum."""
    request = urllib.request.Request(archive.url, method="HEAD")
    with urllib.request.urlopen(request) as answer:
        size = int(answer.headers.get("Content-Length", 0))  # 0: the server does not tell
    free = shutil.disk_usage(file.parent).free
    if free < 2 * size:
        raise UserError(f"{file.name} takes {2 * size / 1e9:.1f} GB with its unpacked content, and "
                        f"{file.parent.parent} has {free / 1e9:.1f} GB left: make room, or choose "
                        "another --data-root")

    print(f"downloading {archive.url}", flush=True)
    torch.hub.download_url_to_file(archive.url, str(file))   # shows a progress bar
    received = file.stat().st_size
    if size > 0 and received != size:                        # torch.hub does not check it
        raise ConnectionError(f"the connection broke off after {received} of {size} bytes")

    if archive.checksum is not None:
        algorithm = "sha1" if len(archive.checksum) == 40 else "md5"
        with open(file, "rb") as stream:
            found = hashlib.file_digest(stream, algorithm).hexdigest()
        if found != archive.checksum:
            raise ConnectionError(f"its {algorithm} checksum is {found}, not {archive.checksum}")


def unpack(archive, file, scratch, folder):
    """Unpacks into `scratch`, then moves the content of the archive to `folder`."""
    print(f"unpacking {file}", flush=True)
    try:
        extract(file, scratch)
        for inner in scratch.glob("annotations/panoptic_*2017.zip"):     # COCO's holds two more
            extract(inner, inner.parent)
    except (shutil.ReadError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        file.unlink()
        raise UserError(f"{file} was broken ({error}); it has been deleted. Run the command again "
                        "to download it") from error

    for entry in archive.content:
        target = folder / entry
        target.parent.mkdir(exist_ok=True)
        if not target.exists():                              # it may be of an earlier call
            (scratch / entry).rename(target)


def extract(file, folder):
    """No member is written outside of `folder`: tar files with such members are refused, and
    shutil skips them in zip files."""
    if file.suffix == ".tar":
        shutil.unpack_archive(file, folder, filter="data")
    else:
        shutil.unpack_archive(file, folder)


def main(argv=None):
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of {', '.join(DOWNLOADS)}")
    parser.add_argument("--data-root", metavar="DIR",
                        default=os.environ.get("DATA_ROOT") or "datasets",
                        help="the folder to put it in (default: $DATA_ROOT, else ./datasets)")
    args = parser.parse_args(argv)
    socket.setdefaulttimeout(60)                             # a silent server is an error
    download(args.name, args.data_root)


if __name__ == "__main__":
    from evaluate import run_command
    run_command(main)
