"""Whatever is wrong with files, checkpoints or flags is said in one line that names it, and nothing
is written before. What may be wrong with datasets is in test_folder_data and test_panoptic_data."""
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import train
from test_train import TINY, content, run

pytestmark = pytest.mark.usefixtures("short_tests", "signals_as_before")

SMALL = ("--crop 64 64 --short-side 64 --max-long-side 96 --test-short-side 64 "
         "--test-max-long-side 96 --steps 1 --batch-size 2 --no-pretrained").split()


# ---------------------------------------------------------------------------------------- good data
def picture(mode="RGB", size=(48, 40)):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode)


def labels(size=(48, 40)):
    return Image.fromarray(np.random.default_rng(1).integers(0, 3, (size[1], size[0]), np.uint8))


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A folder of data with three classes, two images in each split, and a run of drawn shapes."""
    root = tmp_path_factory.mktemp("good")
    for split in ("train", "val"):
        (root / "folder" / "images" / split).mkdir(parents=True)
        (root / "folder" / "annotations" / split).mkdir(parents=True)
        for i in range(2):
            picture().save(root / "folder" / "images" / split / f"{i}.jpg")
            labels().save(root / "folder" / "annotations" / split / f"{i}.png")
    (root / "folder" / "classes.txt").write_text("sky\nroad\ncar thing\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DATASETS, "shapes", partial(data.Shapes, length=2))
        run("--steps", 1, "--output", root / "run")
    return root


@pytest.fixture
def folder(tmp_path, good):
    """A copy of the data."""
    shutil.copytree(good / "folder", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def run_folder(tmp_path, good):
    """A copy of the run, which could be continued."""
    shutil.copytree(good / "run", tmp_path / "run")
    return tmp_path / "run"


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def told(capsys):
    """A function that runs a command, which must end with code 2 and one line of these words."""
    def check(main, argv, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            evaluate.run_command(partial(main, list(map(str, argv))))
        text = capsys.readouterr().err
        lines = [line for line in text.splitlines() if not line.startswith("warning: ")]
        assert ending.value.code == 2, text
        assert len(lines) == 1 and lines[0].startswith("error: "), text
        assert [word for word in words if str(word) not in lines[0]] == [], text
    return check


# -------------------------------------------------------------------------------------------- files
def half_of(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def damaged(path):
    path.write_bytes(path.read_bytes()[:40] + b"x" * 99)


def with_broken_exif(path):
    path.unlink()
    picture().save(path.with_suffix(".png"), exif=b"broken")


BROKEN_FILES = {
    "a truncated image": ("images/train/0.jpg", half_of),
    "a text called image": ("images/train/0.jpg", lambda path: path.write_text("<html>")),
    "a broken EXIF entry": ("images/train/0.jpg", with_broken_exif),
    "an empty image": ("images/val/1.jpg", lambda path: path.write_bytes(b"")),
    "an empty annotation": ("annotations/train/0.png", lambda path: path.write_bytes(b"")),
    "a truncated annotation": ("annotations/train/0.png", half_of),
    "a damaged annotation": ("annotations/val/0.png", damaged),
}


@pytest.mark.parametrize("name, spoil", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_file_that_cannot_be_read_is_named(tmp_path, folder, told, name, spoil):
    spoil(folder / name)
    told(train.main, [*TINY, *SMALL, "--dataset", "folder", "--data-root", folder,
                      "--output", tmp_path / "run"],
         name.partition(".")[0], "replace it")
    assert not (tmp_path / "run" / "best.pt").exists()


def test_a_picture_too_large_to_be_true_is_named(monkeypatch, folder, told):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)          # 48 x 40 is more than twice that
    told(lambda _: data.build_dataset("folder", folder)[0], [], ".png", "exceeds limit",
         "replace it")


def test_a_wrong_folder_is_told_before_anything_is_written(tmp_path, folder, told):
    (folder / "annotations" / "val" / "1.png").unlink()
    told(train.main, [*TINY, *SMALL, "--dataset", "folder", "--data-root", folder,
                      "--output", tmp_path / "run"],
         "annotations/val/1.png", "no such file", "Expected below")
    assert not (tmp_path / "run").exists()


def test_objects_are_not_asked_of_label_images(tmp_path, folder, told):
    told(train.main, [*TINY, *SMALL, "--dataset", "folder", "--data-root", folder,
                      "--task", "panoptic", "--output", tmp_path / "run"],
         "--task panoptic", "classes, not objects")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name in data.DATASETS if name != "shapes"])
def test_every_dataset_tells_where_it_was_expected(tmp_path, told, name):
    nothing = tmp_path / "nothing"
    words = [str(nothing), "Expected below"]
    if name in data.DOWNLOADABLE:
        words.append(f"python tools/download.py {name}")
    told(train.main, ["--dataset", name, "--data-root", nothing, "--output", tmp_path / "run"],
         *words)
    assert not (tmp_path / "run").exists()


PICTURES = {
    "gray": ("L", "0.png"),
    "palette": ("P", "0.png"),
    "black and white": ("1", "0.png"),
    "RGBA": ("RGBA", "0.png"),
    "gray with alpha": ("LA", "0.png"),
    "CMYK": ("CMYK", "0.jpg"),
    "WebP": ("RGB", "0.webp"),
    "TIFF": ("RGB", "0.TIF"),
}


@pytest.mark.parametrize("mode, name", PICTURES.values(), ids=PICTURES)
def test_pictures_of_all_kinds_are_read(folder, mode, name):
    (folder / "images" / "train" / "0.jpg").unlink()
    picture(mode).save(folder / "images" / "train" / name)
    image, segment_map, *_ = data.build_dataset("folder", folder)[0]
    assert image.shape == (3, 40, 48)
    assert segment_map.shape == (40, 48)


def test_a_picture_of_one_pixel_is_trained_and_tested_on(tmp_path, folder):
    for split in ("train", "val"):
        picture(size=(1, 1)).save(folder / "images" / split / "0.jpg")
        labels((1, 1)).save(folder / "annotations" / split / "0.png")
    assert run(*SMALL, "--dataset", "folder", "--data-root", folder,
               "--output", tmp_path / "run") == 0


# -------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("flags, words", [
    (["--dim", 64], ["last.pt", "another run", "size mismatch"]),
    (["--backbone", "resnet10t"], ["last.pt", "another run"]),
    (["--model", "per-pixel"], ["last.pt", "another run"]),
    (["--num-classes", 8], ["last.pt has 6 classes, the dataset 8"]),
], ids=["width", "backbone", "model", "classes"])
def test_a_run_is_not_continued_as_another(run_folder, told, flags, words):
    before = files_in(run_folder)
    told(train.main, [*TINY, "--steps", 2, *flags, "--output", run_folder, "--resume"], *words)
    assert files_in(run_folder) == before


def test_a_run_is_not_continued_to_an_earlier_step(run_folder, told):
    torch.save(content(run_folder / "last.pt") | {"step": 5}, run_folder / "last.pt")
    told(train.main, [*TINY, "--steps", 2, "--output", run_folder, "--resume"],
         "last.pt", "step 5", "--steps 2")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_config_that_was_edited_badly_is_named(run_folder, told, text):
    (run_folder / "config.json").write_text(text)
    told(train.main, ["--output", run_folder, "--resume"], run_folder / "config.json", "remove it")


@pytest.mark.parametrize("spoil", [
    half_of,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("not a checkpoint"),
    lambda path: torch.save({"weights": torch.zeros(3)}, path),
    lambda path: torch.save(torch.zeros(3), path),
], ids=["half", "empty", "a text", "of something else", "a tensor"])
def test_what_is_no_checkpoint_is_named(run_folder, told, spoil):
    last = run_folder / "last.pt"
    new = run_folder.parent / "new"
    spoil(last)
    before = files_in(run_folder)
    words = [str(last), "is not a", "checkpoint of train.py"]
    told(train.main, [*TINY, "--output", run_folder, "--resume"], *words)
    told(train.main, [*TINY, "--output", new, "--init", last], *words)
    told(train.main, [*TINY, "--output", new, "--init-backbone", last], *words)
    told(evaluate.main, ["--checkpoint", last], *words)
    assert files_in(run_folder) == before
    assert not new.exists()


@pytest.mark.parametrize("flag", ["--init", "--init-backbone"])
@pytest.mark.parametrize("name, words", [
    ("nothing.pt", ["nothing.pt", "No such file"]),
    ("maskformer_R500", ["maskformer_R500", "neither a file nor", "maskformer_R50_bs16_160k"]),
    ("{good}/folder/classes.txt", ["classes.txt", "refused"]),
], ids=["no file", "no name", "no weights"])
def test_weights_that_cannot_be_used_are_named(tmp_path, good, told, flag, name, words):
    source = name.replace("{good}", str(good))
    told(train.main, [*TINY, flag, source, "--output", tmp_path / "run"], *words)
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------- evaluate.py
EVALUATED = {
    "--checkpoint nothing.pt": ["nothing.pt", "No such file"],
    "--dataset folder --data-root {good}/folder": ["3 classes in the dataset, 6 in the checkpoint",
                                                   "--data-root"],
    "--split test": ["'test'", "train or val"],
    "--images nothing.jpg": ["nothing.jpg", "no such file"],
    "--images {good}/folder/classes.txt": ["classes.txt", "replace it"],
    "--images {good}": ["no images there"],
    "--save {good}/folder/classes.txt": ["classes.txt"],
    "--object-threshold 1.5": ["--object-threshold", "1.5 is not from 0 to 1"],
    "--test-short-side 0": ["--test-short-side", "0 is not 1 or more"],
    "--workers -1": ["--workers", "-1 is not 0 or more"],
    "--scales big": ["--scales", "'big'"],
    "--scales -1": ["--scales", "-1.0 is not from 0.1 to 10"],
    "--image x.jpg": ["--image"],
}


@pytest.mark.parametrize("flags", EVALUATED)
def test_evaluate_tells_what_it_cannot_do(good, told, flags):
    argv = flags.replace("{good}", str(good)).split()
    if "--checkpoint" not in argv:
        argv += ["--checkpoint", good / "run" / "last.pt"]
    if "--workers" not in argv:
        argv += ["--workers", 0]
    told(evaluate.main, argv, *EVALUATED[flags])


# ----------------------------------------------------------------------------------------- train.py
FLAGS = {
    "--steps 0": ["--steps", "0 is not 1 or more"],
    "--eval-every -1": ["--eval-every", "-1 is not 0 or more"],
    "--save-every -5": ["--save-every", "-5"],
    "--log-every 0": ["--log-every", "1 or more"],
    "--batch-size 0": ["--batch-size", "1 or more"],
    "--queries 0": ["--queries", "1 or more"],
    "--decoder-layers 0": ["--decoder-layers"],
    "--accumulate 0": ["--accumulate"],
    "--overfit 0": ["--overfit"],
    "--crop 0 64": ["--crop", "0 is not 1 or more"],
    "--crop 64": ["--crop", "2 arguments"],
    "--short-side 32 -1": ["--short-side", "-1"],
    "--test-short-side 0": ["--test-short-side"],
    "--lr -1": ["--lr", "-1.0 is not 0 or more"],
    "--lr nan": ["--lr", "nan"],
    "--lr inf": ["--lr", "inf"],
    "--lr fast": ["--lr", "'fast'"],
    "--dropout 1.5": ["--dropout", "1.5 is not from 0 to 1"],
    "--object-threshold 80": ["--object-threshold", "80.0 is not from 0 to 1"],
    "--overlap-threshold -0.1": ["--overlap-threshold", "-0.1"],
    "--seed -1": ["--seed", "-1"],
    "--workers -1": ["--workers", "-1"],
    "--workers 1.5": ["--workers", "'1.5'"],
    "--warmup -1": ["--warmup"],
    "--num-classes 0": ["--num-classes"],
    "--milestones 0": ["--milestones"],
    "--dim 48": ["--dim 48", "32", "--heads 2"],
    "--heads 5": ["--dim 32", "--heads 5"],
    "--batch-size 5 --accumulate 2": ["--batch-size 5", "--accumulate 2", "not divisible"],
    "--schedule step": ["--schedule step needs --milestones"],
    "--resume": ["--resume", "--output"],
    "--matching fixed": ["--task semantic", "--queries 6"],
    "--matching fixed --task semantic --queries 5": ["--queries 6"],
    "--model per-pixel --matching fixed": ["--matching", "--model maskformer"],
    "--data-root data": ["--data-root", "--dataset shapes"],
    "--dataset folder --num-classes 3": ["--num-classes", "--dataset shapes"],
    "--dataset coco-panoptic --augmentation crop": ["--augmentation crop", "--crop H W"],
    "--dataset imagenet": ["'imagenet'", "ade20k"],
    "--amp int8": ["'int8'", "bf16"],
    "--backbone resnet51": ["--backbone resnet51"],
    "--backbone vit_tiny_patch16_224": ["--backbone vit_tiny", "4, 8, 16 and 32"],
    "--learning-rate 1": ["--learning-rate", "--help"],
    "--step 5": ["--step 5"],
    "shapes": ["shapes", "--help"],
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_that_cannot_be_are_told_before_anything_is_written(
        monkeypatch, tmp_path, told, flags):
    monkeypatch.chdir(tmp_path)
    told(train.main, [*TINY, "--no-pretrained", *flags.split()], *FLAGS[flags])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/run", "/proc/run"])
def test_an_output_that_cannot_be_made_is_told(tmp_path, told, place):
    (tmp_path / "file").write_text("mine")
    told(train.main, [*TINY, "--output", tmp_path / place], f"--output {tmp_path / place}",
         "cannot be made")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_used_output_is_told_and_left_alone(run_folder, told):
    before = files_in(run_folder)
    told(train.main, [*TINY, "--output", run_folder], run_folder, "holds a run", "--resume")
    assert files_in(run_folder) == before
