"""What is guaranteed of tools/download.py, on small archives from a server of the test's own."""
import errno
import hashlib
import http.server
import io
import re
import runpy
import shutil
import socket
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import UserError
from tools import download as module
from tools.download import DOWNLOADS, NO_DOWNLOAD, Archive, download

ROOT = Path(__file__).resolve().parent.parent
CONTENT = np.random.default_rng(0).bytes(200_000)


# --------------------------------------------------------------------------------------- the server
class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; closes the next download after `server.cut` bytes."""

    def do_HEAD(self):
        content = self.server.files.get(self.path[1:])
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()

    def do_GET(self):
        self.server.downloads.append(self.path[1:])
        self.do_HEAD()
        self.wfile.write(self.server.files.get(self.path[1:], b"")[:self.server.cut])
        self.server.cut = None

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.files = {}
    server.downloads = []                                    # names, in order
    server.cut = None
    server.tells_length = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def zipped(files):
    """{path: bytes} -> a zip file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return out.getvalue()


def tarred(files):
    """{path: bytes} -> a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def files_below(folder):
    """{path, relative to the folder: bytes}"""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------- each dataset
ADE20K_FILES = ["ADEChallengeData2016/annotations/training/ADE_train_1.png",
                "ADEChallengeData2016/images/training/ADE_train_1.jpg",
                "ADEChallengeData2016/objectInfo150.txt"]
PUBLISHED = {                                                # archive: what its publisher packs
    "ADEChallengeData2016.zip": ADE20K_FILES,
    "annotations_instance.tar": ["annotations_instance/training/ADE_train_1.png"],
    "train2017.zip": ["train2017/1.jpg"],
    "val2017.zip": ["val2017/2.jpg"],
    "panoptic_annotations_trainval2017.zip": ["annotations/panoptic_train2017.json",
                                              "annotations/panoptic_train2017.zip",
                                              "annotations/panoptic_val2017.json",
                                              "annotations/panoptic_val2017.zip"],
    "panoptic_train2017.zip": ["panoptic_train2017/1.png", "__MACOSX/._panoptic_train2017"],
    "panoptic_val2017.zip": ["panoptic_val2017/2.png", "__MACOSX/._panoptic_val2017"],
    "VOCtrainval_11-May-2012.tar": ["VOCdevkit/VOC2012/JPEGImages/2007_1.jpg",
                                    "VOCdevkit/VOC2012/SegmentationClass/2007_1.png"],
}
READ = {                                                     # dataset: what data.py reads
    "ade20k": ADE20K_FILES,
    "ade20k-panoptic": [
        *ADE20K_FILES, "ADEChallengeData2016/annotations_instance/training/ADE_train_1.png"],
    "coco-panoptic": ["coco/annotations/panoptic_train2017.json",
                      "coco/annotations/panoptic_train2017/1.png",
                      "coco/annotations/panoptic_val2017.json",
                      "coco/annotations/panoptic_val2017/2.png",
                      "coco/train2017/1.jpg",
                      "coco/val2017/2.jpg"],
    "voc": ["VOCdevkit/VOC2012/JPEGImages/2007_1.jpg",
            "VOCdevkit/VOC2012/SegmentationClass/2007_1.png"],
}


def published(file_name):
    """The archive of that name; every file in it that is no archive holds its own path."""
    files = {}
    for path in PUBLISHED[file_name]:
        inner = path.rpartition("/")[2]
        files[path] = published(inner) if inner in PUBLISHED else path.encode()
    return zipped(files) if file_name.endswith(".zip") else tarred(files)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_leaves_the_files_that_are_read_and_a_second_one_fetches_nothing(
        name, server, monkeypatch, tmp_path):
    local = []
    for archive in DOWNLOADS[name]:
        file_name = archive.url.rpartition("/")[2]
        content = server.files[file_name] = published(file_name)
        algorithm = hashlib.md5 if name == "voc" else hashlib.sha1
        checksum = archive.checksum and algorithm(content).hexdigest()
        local.append(archive._replace(url=f"{server.url}/{file_name}", checksum=checksum))
    monkeypatch.setitem(DOWNLOADS, name, local)

    root = tmp_path / "not" / "there yet"
    download(name, root)
    found = files_below(root)
    assert sorted(found) == sorted(READ[name])
    assert all(path.endswith(content.decode()) for path, content in found.items())
    assert server.downloads == list(server.files)

    download(name, root)
    assert server.downloads == list(server.files)


def test_only_what_is_missing_of_a_dataset_is_fetched(server, monkeypatch, tmp_path):
    server.files["annotations_instance.tar"] = published("annotations_instance.tar")
    ade20k, instances = DOWNLOADS["ade20k-panoptic"]
    instances = instances._replace(url=f"{server.url}/annotations_instance.tar")
    monkeypatch.setitem(DOWNLOADS, "ade20k-panoptic", [ade20k, instances])
    (tmp_path / "ADEChallengeData2016").mkdir()              # as `ade20k` leaves it
    download("ade20k-panoptic", tmp_path)
    assert server.downloads == ["annotations_instance.tar"]


def test_every_dataset_has_an_archive_or_a_sentence():
    assert set(DOWNLOADS) | set(NO_DOWNLOAD) == set(data.DATASETS)
    assert set(DOWNLOADS) & set(NO_DOWNLOAD) == set()
    assert set(DOWNLOADS) == set(data.DOWNLOADABLE)          # which errors of data.py refer to


def test_addresses_and_checksums_are_well_formed():
    for archives in DOWNLOADS.values():
        for archive in archives:
            assert re.fullmatch(r"https?://[^ ]+\.(zip|tar)", archive.url)
            assert archive.content and not archive.folder.startswith(("/", ".."))
            if archive.checksum is not None:
                assert re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{40}", archive.checksum)


@pytest.mark.parametrize("name, site", [("ade20k-full", "ade20k.csail.mit.edu"),
                                        ("cityscapes", "cityscapes-dataset.com"),
                                        ("cityscapes-panoptic", "cityscapes-dataset.com"),
                                        ("coco-stuff-10k", "nightrome/cocostuff10k"),
                                        ("mapillary", "mapillary.com")])
def test_a_dataset_without_a_public_download_says_where_to_get_it(name, site, tmp_path):
    with pytest.raises(UserError, match=f"^{name} .*{site}.*docs/DATASETS.md"):
        download(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, message", [("folder", "folder .* your own"),
                                           ("panoptic", "panoptic .* your own"),
                                           ("shapes", "shapes .* drawn"),
                                           ("imagenet", "'imagenet'; choose from ade20k, ")])
def test_your_own_drawn_and_unknown_data_are_not_downloaded(name, message, tmp_path):
    with pytest.raises(UserError, match=message):
        download(name, tmp_path)


# ------------------------------------------------------------------------------------------ mishaps
def offer(server, monkeypatch, content, file_name="small.zip", checksum=None):
    """Makes this archive all that `ade20k` consists of."""
    server.files[file_name] = content
    archive = Archive(f"{server.url}/{file_name}", ".", ["ADEChallengeData2016"], checksum)
    monkeypatch.setitem(DOWNLOADS, "ade20k", [archive])


@pytest.fixture
def small(server, monkeypatch):
    """`ade20k` is one zip of 200 kB -> its bytes."""
    content = zipped({"ADEChallengeData2016/a.bin": CONTENT})
    offer(server, monkeypatch, content, checksum=hashlib.sha1(content).hexdigest())
    return content


def is_complete(root):
    return files_below(root) == {"ADEChallengeData2016/a.bin": CONTENT}


@pytest.mark.parametrize("algorithm", [hashlib.sha1, hashlib.md5])
def test_a_wrong_checksum_is_named_and_the_file_thrown_away(
        algorithm, server, monkeypatch, tmp_path):
    content = zipped({"ADEChallengeData2016/a.bin": CONTENT})
    offer(server, monkeypatch, content, checksum=algorithm(content).hexdigest())
    server.files["small.zip"] = content[:-30] + bytes(30)
    with pytest.raises(UserError, match="small.zip.*checksum"):
        download("ade20k", tmp_path)
    assert list(tmp_path.iterdir()) == []

    server.files["small.zip"] = content
    download("ade20k", tmp_path)
    assert is_complete(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 120_001])
def test_a_broken_connection_leaves_nothing_and_the_next_call_starts_anew(
        cut, server, monkeypatch, tmp_path):
    offer(server, monkeypatch, zipped({"ADEChallengeData2016/a.bin": CONTENT}))
    server.cut = cut
    with pytest.raises(UserError, match=f"small.zip.*{cut} of .*again"):
        download("ade20k", tmp_path)
    assert list(tmp_path.iterdir()) == []

    download("ade20k", tmp_path)
    assert is_complete(tmp_path)


def test_a_tar_file_cut_between_two_members_is_not_taken_for_a_whole_one(
        server, monkeypatch, tmp_path):
    files = {"ADEChallengeData2016/a.bin": CONTENT, "ADEChallengeData2016/b.bin": bytes(512)}
    offer(server, monkeypatch, tarred(files), "small.tar")
    server.cut = 512 + 200_192                               # a header and the blocks of a.bin
    with pytest.raises(UserError, match="small.tar.*again"):
        download("ade20k", tmp_path)
    assert list(tmp_path.iterdir()) == []

    download("ade20k", tmp_path)
    assert files_below(tmp_path) == files


def test_what_a_killed_process_left_is_removed(small, tmp_path):
    scratch = tmp_path / "small.zip.part"
    (scratch / "ADEChallengeData2016").mkdir(parents=True)
    (scratch / "ADEChallengeData2016" / "a.bin").write_bytes(b"half")
    (scratch / "small.zip.6b0f.partial").write_bytes(small[:1000])
    download("ade20k", tmp_path)
    assert is_complete(tmp_path)


def test_a_server_that_does_not_tell_the_length_will_do(small, server, tmp_path):
    server.tells_length = False
    download("ade20k", tmp_path)
    assert is_complete(tmp_path)


def test_a_missing_file_and_a_missing_server_are_named(small, server, monkeypatch, tmp_path):
    server.files.clear()
    with pytest.raises(UserError, match="small.zip.*404"):
        download("ade20k", tmp_path)

    nobody = Archive("http://127.0.0.1:9/small.zip", ".", ["ADEChallengeData2016"])
    monkeypatch.setitem(DOWNLOADS, "ade20k", [nobody])
    with pytest.raises(UserError, match="127.0.0.1:9/small.zip.*refused"):
        download("ade20k", tmp_path)


def test_too_small_a_disk_is_named_before_anything_is_fetched(
        small, server, monkeypatch, tmp_path):
    enough_for_the_archive_only = len(small) + 1000
    usage = shutil.disk_usage(tmp_path)._replace(free=enough_for_the_archive_only)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=rf"small.zip.*GB.*{re.escape(str(tmp_path))}"):
        download("ade20k", tmp_path)
    assert server.downloads == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_unpacking_starts_again_without_a_second_download(
        error, small, server, monkeypatch, tmp_path):
    def unpack_half(file, folder):
        (folder / "ADEChallengeData2016").mkdir()
        (folder / "ADEChallengeData2016" / "a.bin").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, "extract", unpack_half)
        with pytest.raises((KeyboardInterrupt, UserError)) as caught:
            download("ade20k", tmp_path)
    assert isinstance(caught.value, KeyboardInterrupt) or "No space left" in str(caught.value)
    assert files_below(tmp_path) == {"small.zip": small}

    download("ade20k", tmp_path)
    assert is_complete(tmp_path) and server.downloads == ["small.zip"]


def test_an_interrupted_download_leaves_nothing(small, monkeypatch, tmp_path):
    def fetch_half(url, path):
        Path(path).write_bytes(small[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file", fetch_half)
        with pytest.raises(KeyboardInterrupt):
            download("ade20k", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("packed, file_name", [(zipped, "small.zip"), (tarred, "small.tar")])
@pytest.mark.parametrize("length", [0, 300, 100_000])
def test_a_truncated_archive_is_named_and_fetched_again(
        packed, file_name, length, server, monkeypatch, tmp_path):
    content = packed({"ADEChallengeData2016/a.bin": CONTENT})
    offer(server, monkeypatch, content[:length], file_name)
    with pytest.raises(UserError, match=f"{file_name} was broken.*again"):
        download("ade20k", tmp_path)
    assert list(tmp_path.iterdir()) == []

    server.files[file_name] = content
    download("ade20k", tmp_path)
    assert is_complete(tmp_path)


def test_an_archive_that_is_already_there_is_only_unpacked(small, server, tmp_path):
    (tmp_path / "small.zip").write_bytes(small)
    download("ade20k", tmp_path)
    assert is_complete(tmp_path) and server.downloads == []


# ------------------------------------------------------------------------------------------- safety
@pytest.mark.parametrize("packed, file_name", [(zipped, "small.zip"), (tarred, "small.tar")])
@pytest.mark.parametrize("path", ["../evil.txt", "ADEChallengeData2016/../../../evil.txt",
                                  "{top}/evil.txt"])
def test_no_archive_writes_outside_the_root(
        packed, file_name, path, server, monkeypatch, tmp_path):
    files = {"ADEChallengeData2016/a.bin": CONTENT, path.format(top=tmp_path): b"evil"}
    offer(server, monkeypatch, packed(files), file_name)
    root = tmp_path / "root"
    if packed is zipped:
        download("ade20k", root)
        assert is_complete(root)
    elif path.startswith("{top}"):                           # the filter makes it relative
        download("ade20k", root)
    else:
        with pytest.raises(UserError, match="small.tar.*outside"):
            download("ade20k", root)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert "evil.txt" not in [path.name for path in root.iterdir()]


def test_no_link_in_an_archive_leads_outside_the_root(server, monkeypatch, tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        link = tarfile.TarInfo("ADEChallengeData2016")
        link.type = tarfile.SYMTYPE
        link.linkname = "../.."
        archive.addfile(link)
        member = tarfile.TarInfo("ADEChallengeData2016/evil.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    offer(server, monkeypatch, out.getvalue(), "small.tar")
    with pytest.raises(UserError, match="small.tar.*outside"):
        download("ade20k", tmp_path / "root")
    assert files_below(tmp_path) == {}


# -------------------------------------------------------------------------------------- the command
def test_the_command_answers_a_mistake_with_one_line_and_exit_code_2(monkeypatch, capsys):
    script = str(ROOT / "tools" / "download.py")
    monkeypatch.setattr(sys, "argv", [script, "cityscapes"])
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: None)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(script, run_name="__main__")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: cityscapes .*cityscapes-dataset\.com.*\n", err)


@pytest.mark.parametrize("flags, variable, expected", [
    ([], None, "datasets"), ([], "/data", "/data"), (["--data-root", "/mine"], "/data", "/mine")])
def test_the_root_is_the_flag_else_the_variable_else_datasets(
        flags, variable, expected, monkeypatch):
    monkeypatch.delenv("DATA_ROOT", raising=False)
    if variable is not None:
        monkeypatch.setenv("DATA_ROOT", variable)
    calls = []
    monkeypatch.setattr(module, "download", lambda name, root: calls.append((name, root)))
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: None)
    module.main(["voc", *flags])
    assert calls == [("voc", expected)]
