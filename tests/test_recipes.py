"""What is guaranteed of the recipes in train.py, and that docs/DATASETS.md says what they are."""
from pathlib import Path

import pytest

import data
import train
from tools.download import DOWNLOADS

PAGE = Path(__file__).parent.parent / "docs" / "DATASETS.md"


@pytest.mark.parametrize("name, crop, side, multiples, longest, test, batch, steps", [
    ("ade20k", (512, 512), 512, range(5, 21), 2048, (512, 2048), 16, 160_000),
    ("ade20k-full", (512, 512), 512, range(5, 21), 2048, (512, 2048), 16, 200_000),
    ("coco-stuff-10k", (640, 640), 640, range(5, 16), 2560, (640, 2560), 32, 60_000),
    ("cityscapes", (512, 1024), 1024, range(5, 21), 4096, (1024, 2048), 16, 90_000),
    ("mapillary", (1280, 1280), 2048, range(5, 21), None, (2048, 2048), 16, 300_000),
    ("ade20k-panoptic", (640, 640), 640, range(5, 21), 2560, (640, 2560), 16, 720_000)])
def test_recipes_are_the_lines_of_appendix_a(name, crop, side, multiples, longest, test, batch,
                                             steps):
    recipe = train.recipe(name, "resnet50")
    assert tuple(recipe["crop"]) == crop
    assert recipe["short_side"] == [int(0.1 * k * side) for k in multiples]
    assert longest in (None, recipe["max_long_side"])
    assert (recipe["test_short_side"], recipe["test_max_long_side"]) == test
    assert (recipe["batch_size"], recipe["steps"]) == (batch, steps)
    assert recipe.get("schedule", "poly") == "poly"
    assert recipe.get("augmentation") != "detr"
    assert recipe.get("encoder_layers", 0) == (6 if name == "ade20k-panoptic" else 0)


def test_the_recipe_of_coco_panoptic_is_that_of_detr():
    recipe = train.recipe("coco-panoptic", "resnet50")
    assert recipe["augmentation"] == "detr"
    assert recipe["short_side"] == list(range(480, 801, 32))
    assert recipe["max_long_side"] == 1333
    assert (recipe["test_short_side"], recipe["test_max_long_side"]) == (800, 1333)
    assert (recipe["batch_size"], recipe["steps"]) == (64, 554_400)
    assert (recipe["schedule"], recipe["milestones"]) == ("step", [369_600])
    assert recipe["encoder_layers"] == 6
    assert recipe["size_divisibility"] == 0


def test_thresholds_are_those_of_the_paper():
    assert train.recipe("ade20k-panoptic", "resnet50")["object_threshold"] == 0.7
    assert train.recipe("coco-panoptic", "resnet50").get("object_threshold", 0.8) == 0.8


def test_swin_backbones_have_rates_of_their_own_and_no_encoder():
    for name in set(data.DATASETS) - {"shapes"}:
        recipe = train.recipe(name, "swin_tiny_patch4_window7_224")
        assert (recipe["lr"], recipe["weight_decay"], recipe["warmup"]) == (6e-5, 1e-2, 1500)
        assert recipe["backbone_lr_factor"] == 1
        assert recipe.get("encoder_layers", 0) == 0
        assert recipe["crop"] == train.recipe(name, "resnet50")["crop"]


@pytest.mark.parametrize("backbone", ["swin_base_patch4_window12_384",
                                      "swin_large_patch4_window12_384.ms_in22k"])
def test_large_swin_backbones_see_larger_images_on_ade20k(backbone):
    recipe = train.recipe("ade20k", backbone)
    assert tuple(recipe["crop"]) == (640, 640)
    assert (recipe["short_side"][0], recipe["short_side"][-1]) == (320, 1280)
    assert recipe["max_long_side"] == 2560
    assert (recipe["test_short_side"], recipe["test_max_long_side"]) == (640, 2560)
    assert (recipe["batch_size"], recipe["steps"], recipe["lr"]) == (16, 160_000, 6e-5)


def test_a_recipe_may_be_changed_without_changing_the_next():
    train.recipe("ade20k", "resnet50")["steps"] = 3
    assert train.recipe("ade20k", "resnet50")["steps"] == 160_000


def table(number):
    """A table of docs/DATASETS.md, the first or the second -> {dataset: its other cells}."""
    part = PAGE.read_text(encoding="utf-8").split("## Recipes")[number - 1]
    rows = {}
    for line in part.split("\n"):
        if line.startswith("| `"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[name.strip("`")] = cells
    return rows


def test_the_page_of_datasets_has_them_all():
    assert set(table(1)) == set(table(2)) == set(data.DATASETS) == set(train.RECIPES)
    assert set(data.DOWNLOADABLE) == set(DOWNLOADS)
    for name, (*_, source) in table(1).items():
        assert (source == "yes") == (name in DOWNLOADS)


@pytest.mark.parametrize("name", data.DATASETS)
def test_the_page_says_what_the_recipes_are(name):
    recipe = train.recipe(name, "resnet50")
    crop, sides, test, batch, steps = table(2)[name]
    if recipe.get("augmentation") == "detr":
        assert crop == "as DETR"
    else:
        assert crop == "{} x {}".format(*recipe["crop"])
    assert sides == f"{min(recipe['short_side'])} to {max(recipe['short_side'])}"
    assert test == f"{recipe['test_short_side']} ({recipe['test_max_long_side']})"
    assert (int(batch), steps) == (recipe["batch_size"], f"{recipe['steps']:,}")
