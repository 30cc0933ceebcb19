"""Whatever is wrong with data, checkpoints or flags is said in one line that names it, and nothing is written before."""
import json
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import run as keeper
import train
from data import Shapes
from test_train import few_images, signals_as_before                                                      # noqa: F401

TINY = ("--dim 32 --ffn-dim 64 --heads 2 --decoder-layers 2 --queries 7 --batch-size 2 --workers 0 --steps 1 --log-every 1 "
        "--backbone test_resnet --no-pretrained").split()
SMALL = "--crop 64 64 --short-side 64 --max-long-side 96 --test-short-side 64 --test-max-long-side 96".split()


# ---------------------------------------------------------------------------------------- good data
def picture(mode="RGB", size=(48, 40)):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode)


def labels(size=(48, 40), high=3):
    return Image.fromarray(np.random.default_rng(1).integers(0, high, (size[1], size[0]), np.uint8))


def semantic_data(root):
    """Three classes; images 0 and 1 of each split."""
    for kind in ("images", "annotations"):
        for split in ("train", "val"):
            (root / kind / split).mkdir(parents=True)
            for i in range(2):
                name = root / kind / split / str(i)
                picture().save(f"{name}.jpg") if kind == "images" else labels().save(f"{name}.png")
    (root / "classes.txt").write_text("sky\nroad\ncar thing\n")


def panoptic_data(root):
    """Classes 7 (stuff) and 9 (thing); segments 5 and 300 in each image."""
    for split in ("train", "val"):
        content = {"categories": [{"id": 7, "name": "sky", "isthing": 0}, {"id": 9, "name": "car", "isthing": 1}],
                   "images": [], "annotations": []}
        for folder in (root / "images" / split, root / f"panoptic_{split}"):
            folder.mkdir(parents=True)
        for i in range(2):
            picture().save(root / "images" / split / f"{i}.jpg")
            ids = np.full((40, 48), 5)
            ids[:, 20:] = 300
            Image.fromarray(np.stack([ids % 256, ids // 256, ids * 0], -1).astype(np.uint8)).save(
                root / f"panoptic_{split}" / f"{i}.png")
            content["images"].append({"id": i, "file_name": f"{i}.jpg"})
            segments = [{"id": 5, "category_id": 7, "iscrowd": 0}, {"id": 300, "category_id": 9, "iscrowd": 0}]
            content["annotations"].append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
        (root / f"panoptic_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """Data of both kinds, and a checkpoint of six drawn classes."""
    folder = tmp_path_factory.mktemp("good")
    semantic_data(folder / "folder")
    panoptic_data(folder / "panoptic")
    train.DATASETS["shapes"], whole = partial(Shapes, length=2), train.DATASETS["shapes"]
    train.main([*TINY, "--output", str(folder / "run")])
    train.DATASETS["shapes"] = whole
    return folder


def outcome(capsys, monkeypatch, main, argv):
    """-> exit code, what went to stderr."""
    monkeypatch.setattr(keeper.os, "_exit", sys.exit)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        keeper.command(partial(main, list(map(str, argv))))
    return ending.value.code, capsys.readouterr().err


def told(capsys, monkeypatch, main, argv, *words):
    """The command ends with code 2 and one line that holds the words."""
    code, text = outcome(capsys, monkeypatch, main, argv)
    lines = [line for line in text.splitlines() if "Warning" not in line and not line.startswith("  ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), text
    assert [word for word in words if word not in lines[0]] == [], text


# ---------------------------------------------------------------------------------------- semantic data
def remove(name):
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def write(name, content=b""):
    return lambda root: (root / name).write_bytes(content)


def put(name, image, **options):
    return lambda root: image.save(root / name, **options)


def cut(name):
    """Half of the file."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:(root / name).stat().st_size // 2])


FOLDER = {
    "no folder": (remove(""), ["/data/classes.txt", "Expected below", "images/{train,val}/X.jpg"]),
    "no classes.txt": (remove("classes.txt"), ["/data/classes.txt", "Found in", "annotations, images", "Expected below"]),
    "no class": (write("classes.txt"), ["/data/classes.txt", "no class", "in each line"]),
    "classes.txt in UTF-16": (write("classes.txt", "sky\nroad\ncar".encode("utf-16")), ["/data/classes.txt", "save it as UTF-8"]),
    "no images of a split": (remove("images/val"), ["/images/val", "Found in", ": train."]),
    "no annotations": (remove("annotations"), ["/annotations/train", "Found in", "Expected below"]),
    "a split without an image": (lambda root: [remove(f"images/val/{i}.jpg")(root) for i in range(2)],
                                 ["'folder' has no images in split 'val'", "/data"]),
    "an image without annotation": (remove("annotations/train/1.png"), ["1 files are missing", "annotations/train/1.png"]),
    "annotations that are JPEGs": (lambda root: (root / "annotations/val/0.png").rename(root / "annotations/val/0.jpg"),
                                   ["annotations/val/0.png"])}
IN_THE_FILES = {
    "a truncated image": (cut("images/train/0.jpg"), ["train/0.jpg", "runcated", "replace it"]),
    "a text called image": (write("images/train/0.jpg", b"<html>"), ["train/0.jpg", "cannot identify", "replace it"]),
    "a broken EXIF entry": (put("images/train/0.png", picture(), exif=b"broken"), ["train/0.png", "replace it"]),
    "an empty image": (write("images/val/1.jpg"), ["val/1.jpg", "replace it"]),
    "an empty annotation": (write("annotations/train/0.png"), ["annotations/train/0.png", "replace it"]),
    "a truncated annotation": (cut("annotations/train/0.png"), ["annotations/train/0.png", "replace it"]),
    "a broken PNG": (lambda root: write("annotations/val/0.png", (root / "annotations/val/0.png").read_bytes()[:40] + b"x" * 99)
                     (root), ["annotations/val/0.png", "replace it"]),
    "16 bits": (put("images/train/0.png", Image.fromarray(np.full((40, 48), 40_000, np.uint16))),
                ["train/0.png", "more than 8 bits", "save it with 8"]),
    "labels from 1": (put("annotations/train/0.png", labels(high=4)), ["train/0.png", "[3]", "classes are 0..2", "subtract 1"]),
    "labels out of range": (put("annotations/val/0.png", labels(high=200)), ["val/0.png", "[3, 4,", "complete it"]),
    "labels in color": (put("annotations/train/0.png", picture()), ["train/0.png", "(40, 48, 3)", "one channel"]),
    "labels with alpha": (put("annotations/train/0.png", picture("LA")), ["train/0.png", "(40, 48, 2)", "one channel"]),
    "labels of another size": (put("annotations/train/0.png", labels((40, 40))), ["train/0.jpg", "(40, 48)", "(40, 40)", "equal"]),
    "a label map on its side": (put("annotations/train/0.png", labels((40, 48))), ["(40, 48)", "(48, 40)", "equal"])}


@pytest.fixture
def data(tmp_path, good):
    shutil.copytree(good / "folder", tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("spoil, words", FOLDER.values(), ids=FOLDER)
def test_a_wrong_folder_is_told_before_anything_is_written(capsys, monkeypatch, tmp_path, data, spoil, words):
    spoil(data)
    told(capsys, monkeypatch, train.main, [*TINY, *SMALL, "--dataset", "folder", "--data-root", data, "--output",
                                           tmp_path / "run"], *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spoil, words", IN_THE_FILES.values(), ids=IN_THE_FILES)
def test_a_file_that_cannot_be_used_is_named(capsys, monkeypatch, tmp_path, data, spoil, words):
    if words[0] == "train/0.png" and words[1] in ("more than 8 bits", "replace it"):
        remove("images/train/0.jpg")(data)
    spoil(data)
    told(capsys, monkeypatch, train.main, [*TINY, *SMALL, "--dataset", "folder", "--data-root", data, "--output",
                                           tmp_path / "run"], *words)
    assert not (tmp_path / "run" / "best.pt").exists()


def test_a_picture_too_large_to_be_true_is_named(capsys, monkeypatch, tmp_path, data):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)                  # 48 x 40 is more than twice that
    told(capsys, monkeypatch, train.main, [*TINY, *SMALL, "--dataset", "folder", "--data-root", data, "--output",
                                           tmp_path / "run"], ".jpg", "exceeds limit", "replace it")


PICTURES = {"grey": (picture("L"), "0.png"), "palette": (picture("P"), "0.png"), "black and white": (picture("1"), "0.png"),
            "RGBA": (picture("RGBA"), "0.png"), "grey with alpha": (picture("LA"), "0.png"), "CMYK": (picture("CMYK"), "0.jpg"),
            "WebP": (picture(), "0.webp"), "TIFF": (picture(), "0.TIF"), "1x1": (picture(size=(1, 1)), "0.png")}


@pytest.mark.parametrize("image, name", PICTURES.values(), ids=PICTURES)
def test_pictures_of_all_kinds_are_trained_on(tmp_path, data, image, name):
    for split in ("train", "val"):
        remove(f"images/{split}/0.jpg")(data)
        image.save(data / "images" / split / name)
        labels(image.size).save(data / "annotations" / split / "0.png")
    assert train.main([*TINY, *SMALL, "--dataset", "folder", "--data-root", str(data), "--output", str(tmp_path / "run")]) == 0


def test_a_photo_turned_by_its_exif_entry_fits_the_labels_of_what_is_seen(tmp_path, data):
    exif = Image.Exif()
    exif[0x0112] = 6                                                     # to be shown turned by 90 degrees
    picture().save(data / "images" / "train" / "0.jpg", exif=exif)
    labels((40, 48)).save(data / "annotations" / "train" / "0.png")
    assert train.main([*TINY, *SMALL, "--dataset", "folder", "--data-root", str(data), "--output", str(tmp_path / "run")]) == 0


def test_the_full_ade20k_is_not_taken_for_the_challenge(capsys, monkeypatch, tmp_path):
    (tmp_path / "ADE20K_2021_17_01" / "images").mkdir(parents=True)
    told(capsys, monkeypatch, train.main, [*TINY, "--dataset", "ade20k", "--data-root", tmp_path], "ADEChallengeData2016",
         "Found in", "ADE20K_2021_17_01", "Expected below")


@pytest.mark.parametrize("name", [name for name in train.DATASETS if name != "shapes"])
def test_every_dataset_tells_where_it_was_expected(capsys, monkeypatch, tmp_path, name):
    told(capsys, monkeypatch, train.main, [*TINY, "--dataset", name, "--data-root", tmp_path / "nothing"],
         str(tmp_path / "nothing"), "Expected below", "X")


# ---------------------------------------------------------------------------------------- panoptic data
def edit(change, split="train"):
    def spoil(root):
        content = json.loads((root / f"panoptic_{split}.json").read_text())
        change(content)
        (root / f"panoptic_{split}.json").write_text(json.dumps(content))
    return spoil


def segment(content, **more):
    content["annotations"][0]["segments_info"][1].update(more)


PANOPTIC = {
    "no json": (remove("panoptic_val.json"), ["panoptic_val.json", "Found in", "Expected below"]),
    "half a json": (cut("panoptic_train.json"), ["panoptic_train.json"]),
    "a json of something else": (write("panoptic_train.json", b'{"annotations": []}'), ["panoptic_train.json", "categories"]),
    "a list": (write("panoptic_train.json", b"[]"), ["panoptic_train.json"]),
    "no PNGs": (remove("panoptic_train"), ["panoptic_train", "Found in"]),
    "an annotation of no image": (edit(lambda c: c["annotations"][0].update(image_id=77)), ["panoptic_train.json", "0.png", "image 77"]),
    "two categories of one id": (edit(lambda c: c["categories"][1].update(id=7)), ["panoptic_train.json", "[7, 7]"]),
    "an id of a category that no label map can hold": (edit(lambda c: c["categories"][1].update(id=70_000)),
                                                       ["panoptic_train.json", "[7, 70000]", "0..65535"]),
    "no category": (edit(lambda c: c["categories"].clear()), ["panoptic_train.json", "categories"]),
    "an unknown category": (edit(lambda c: segment(c, category_id=8)), ["panoptic_train.json", "0.png", "categories {8}"]),
    "two segments of one id": (edit(lambda c: segment(c, id=5)), ["panoptic_train.json", "0.png", "two segments"]),
    "a segment that only the PNG has": (edit(lambda c: c["annotations"][0]["segments_info"].pop()), ["0.png", "[300]", "json"]),
    "no PNG of an entry": (remove("panoptic_train/0.png"), ["panoptic_train/0.png"]),
    "no image of an entry": (remove("images/train/0.jpg"), ["images/train/0.jpg"]),
    "an entry without its segments": (edit(lambda c: c["annotations"][0].pop("segments_info")), ["panoptic_train.json", "'segments_info'"]),
    "a PNG of another size": (put("panoptic_train/0.png", picture(size=(10, 10))), ["0.png"])}


@pytest.fixture
def panoptic(tmp_path, good):
    shutil.copytree(good / "panoptic", tmp_path / "data")
    return ["--dataset", "panoptic", "--data-root", tmp_path / "data", "--output", tmp_path / "run"]


@pytest.mark.parametrize("spoil, words", PANOPTIC.values(), ids=PANOPTIC)
def test_panoptic_data_that_do_not_agree_are_named(capsys, monkeypatch, tmp_path, panoptic, spoil, words):
    spoil(tmp_path / "data")
    told(capsys, monkeypatch, train.main, [*TINY, *SMALL, *panoptic], *words)


def test_a_segment_that_only_the_json_has_is_no_segment(tmp_path, panoptic):
    edit(lambda c: c["annotations"][0]["segments_info"].append({"id": 9, "category_id": 9, "iscrowd": 0}))(tmp_path / "data")
    assert train.main([*map(str, [*TINY, *SMALL, *panoptic])]) == 0


# ---------------------------------------------------------------------------------------- checkpoints
@pytest.fixture
def run_folder(tmp_path, good):
    """A run that could be continued."""
    shutil.copytree(good / "run", tmp_path / "run")
    return tmp_path / "run"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


RESUMED = {
    "another width": (["--dim", 64], ["last.pt", "another run", "size mismatch"]),
    "another backbone": (["--backbone", "resnet10t"], ["last.pt", "another run"]),
    "another model": (["--model", "per-pixel"], ["last.pt", "another run"]),
    "other classes": (["--num-classes", 8], ["last.pt", "6 classes"]),
    "fewer steps": (["--steps", 1, "--log-every", 1], [])}


@pytest.mark.parametrize("flags, words", list(RESUMED.values())[:-1], ids=list(RESUMED)[:-1])
def test_a_run_is_not_continued_as_another(capsys, monkeypatch, run_folder, flags, words):
    before = contents(run_folder)
    told(capsys, monkeypatch, train.main, [*TINY, "--steps", 2, *flags, "--output", run_folder, "--resume"], *words)
    assert contents(run_folder) == before


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_config_that_was_edited_badly_is_named(capsys, monkeypatch, run_folder, text):
    (run_folder / "config.json").write_text(text)
    told(capsys, monkeypatch, train.main, ["--output", run_folder, "--resume"], str(run_folder / "config.json"), "remove it")


def test_a_run_is_not_continued_to_an_earlier_step(capsys, monkeypatch, run_folder):
    state = torch.load(run_folder / "last.pt", weights_only=True)
    torch.save(state | {"step": 5}, run_folder / "last.pt")
    told(capsys, monkeypatch, train.main, [*TINY, "--steps", 2, "--output", run_folder, "--resume"], "last.pt", "step 5")


NO_CHECKPOINT = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:10_000]), "empty": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("not a checkpoint"),
    "of something else": lambda path: torch.save({"weights": torch.zeros(3)}, path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path)}


@pytest.mark.parametrize("spoil", NO_CHECKPOINT.values(), ids=NO_CHECKPOINT)
def test_what_is_no_checkpoint_is_named(capsys, monkeypatch, run_folder, spoil):
    spoil(run_folder / "last.pt")
    before = contents(run_folder)
    for main, flags in ((train.main, [*TINY, "--output", run_folder, "--resume"]),
                        (train.main, [*TINY, "--output", run_folder.parent / "new", "--init", run_folder / "last.pt"]),
                        (evaluate.main, ["--checkpoint", run_folder / "last.pt"])):
        told(capsys, monkeypatch, main, flags, str(run_folder / "last.pt"), "no whole checkpoint", "take another")
    assert contents(run_folder) == before and not (run_folder.parent / "new").exists()


WEIGHTS = {
    "of another width": (["--dim", 64], "run/last.pt", ["run/last.pt", "another model"]),
    "of no file": ([], "nothing.pt", ["nothing.pt", "No such file"]),
    "of no name": ([], "maskformer_R500", ["maskformer_R500", "neither a file nor", "maskformer_R50_bs16_160k"]),
    "of a broken pickle": ([], "folder/classes.txt", ["classes.txt", "refused"])}


@pytest.mark.parametrize("flags, name, words", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_cannot_be_used_are_named(capsys, monkeypatch, tmp_path, good, flags, name, words):
    source = good / name if "/" in name else name
    told(capsys, monkeypatch, train.main, [*TINY, *flags, "--init", source, "--output", tmp_path / "run"], *words)
    assert not (tmp_path / "run").exists()


EVALUATED = {
    "no such checkpoint": (["--checkpoint", "nothing.pt"], ["nothing.pt", "No such file"]),
    "other classes": (["--dataset", "folder", "--data-root", "{good}/folder"], ["6 classes", "the dataset 3", "--data-root"]),
    "no such split": (["--split", "test"], ["'test'", "train or val"]),
    "no such photo": (["--images", "nothing.jpg"], ["nothing.jpg", "No such file"]),
    "a text for a photo": (["--images", "{good}/folder/classes.txt"], ["classes.txt", "replace it"]),
    "an output that is a file": (["--save", "{good}/folder/classes.txt"], ["classes.txt"]),
    "a threshold above one": (["--object-threshold", 1.5], ["--object-threshold", "1.5", "from 0 to 1"]),
    "no side": (["--test-short-side", 0], ["--test-short-side", "0", "1 or more"]),
    "no number": (["--scales", "big"], ["--scales", "'big'"]),
    "a scale below zero": (["--scales", -1], ["--scales"]),
    "no such flag": (["--image", "x.jpg"], ["--image"])}


@pytest.mark.parametrize("flags, words", EVALUATED.values(), ids=EVALUATED)
def test_evaluate_tells_what_it_cannot_do(capsys, monkeypatch, good, flags, words):
    flags = [str(flag).replace("{good}", str(good)) for flag in flags]
    common = [] if "--checkpoint" in flags else ["--checkpoint", good / "run" / "last.pt", "--workers", 0]
    told(capsys, monkeypatch, evaluate.main, [*common, *flags], *words)


def test_a_per_pixel_baseline_has_no_panoptic_inference(capsys, monkeypatch, tmp_path):
    train.main([*TINY, "--model", "per-pixel", "--output", str(tmp_path)])
    told(capsys, monkeypatch, evaluate.main, ["--checkpoint", tmp_path / "last.pt", "--workers", 0, "--inference", "panoptic"],
         "--inference panoptic", "no segments")


# ---------------------------------------------------------------------------------------- flags
FLAGS = {
    "--steps 0": ["--steps", "0", "1 or more"], "--eval-every 0": ["--eval-every", "0", "1 or more"],
    "--save-every -5": ["--save-every", "-5"], "--log-every 0": ["--log-every", "1 or more"],
    "--batch-size 0": ["--batch-size", "1 or more"], "--queries 0": ["--queries", "1 or more"],
    "--decoder-layers 0": ["--decoder-layers"], "--accumulate 0": ["--accumulate"], "--overfit 0": ["--overfit"],
    "--crop 0 64": ["--crop", "0 is not 1 or more"], "--crop 64": ["--crop", "2 arguments"],
    "--short-side 32 -1": ["--short-side", "-1"], "--test-short-side 0": ["--test-short-side"],
    "--lr -1": ["--lr", "-1.0", "0 or more"], "--lr nan": ["--lr", "nan"], "--lr inf": ["--lr", "inf"],
    "--lr fast": ["--lr", "'fast'"], "--dropout 1.5": ["--dropout", "1.5", "from 0 to 1"],
    "--object-threshold 80": ["--object-threshold", "80", "from 0 to 1"], "--overlap-threshold -0.1": ["-0.1"],
    "--seed -1": ["--seed", "-1"], "--workers -1": ["--workers", "-1"], "--warmup -1": ["--warmup"],
    "--num-classes 0": ["--num-classes"], "--milestones 0": ["--milestones"],
    "--dim 48": ["--dim 48", "32", "--heads 2"], "--heads 5": ["--dim 32", "--heads 5"],
    "--batch-size 5 --accumulate 2": ["--batch-size 5", "--accumulate 2", "not divisible"],
    "--resume": ["--resume", "--output"], "--matching fixed": ["--task semantic", "--queries 6"],
    "--matching fixed --task semantic --queries 5": ["--queries 6"],
    "--model per-pixel --matching fixed": ["--matching", "--model maskformer"],
    "--data-root data": ["--data-root", "--dataset", "shapes"],
    "--dataset folder --num-classes 3": ["--num-classes", "--dataset shapes"],
    "--dataset coco-panoptic --augmentation crop": ["--augmentation crop", "--crop H W"],
    "--download": ["shapes", "cannot be fetched"], "--dataset imagenet": ["'imagenet'", "ade20k"],
    "--dataset cityscapes --download": ["cityscapes", "login"], "--amp int8": ["'int8'", "bf16"],
    "--backbone resnet51": ["--backbone resnet51"], "--backbone vit_tiny_patch16_224": ["--backbone vit_tiny", "4, 8, 16 and 32"],
    "--learning-rate 1": ["--learning-rate", "--help"], "--step 5": ["--step 5"], "shapes": ["shapes", "--help"]}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_that_cannot_be_are_told_before_anything_is_written(capsys, monkeypatch, tmp_path, flags):
    monkeypatch.chdir(tmp_path)
    told(capsys, monkeypatch, train.main, [*TINY, *flags.split()], *FLAGS[flags])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_an_output_that_cannot_be_made_is_told(capsys, monkeypatch, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    told(capsys, monkeypatch, train.main, [*TINY, "--output", tmp_path / place], f"--output {tmp_path / place}", "choose another")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_used_output_is_told_and_left_alone(capsys, monkeypatch, run_folder):
    before = contents(run_folder)
    told(capsys, monkeypatch, train.main, [*TINY, "--output", run_folder], str(run_folder), "holds a run", "--resume")
    assert contents(run_folder) == before
