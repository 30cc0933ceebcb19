"""What is guaranteed of data.py: datasets, augmentation, batching."""
import colorsys
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import batches
from batches import Augmentation, DetrAugmentation, TrainingSamples, collate, merge_classes, step_batches
from data import build_dataset, resized
from evaluate import ConfusionMatrix, PanopticQuality

REAL = os.environ.get("DATA_ROOT")
H, W = 10, 14


def same(ours, theirs):
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
               for a, b in zip(ours, theirs, strict=True))


def write_image(path, size=(H, W), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def write_png(path, values, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    image.save(path, **options)


def blocks(*values, dtype=np.uint8):
    """A map [H, W] of equally wide columns with these values."""
    return np.repeat(np.array(values, dtype)[np.arange(W) * len(values) // W][None], H, 0)


# ------------------------------------------------------------------ drawn shapes

def test_a_drawn_picture_is_a_function_of_seed_split_and_index():
    first, again = (build_dataset("shapes", split="train") for _ in range(2))
    assert same(first[3], again[3])
    torch.manual_seed(1), np.random.seed(1), first[0]
    assert same(first[3], again[3])
    others = [first[4], build_dataset("shapes", split="val")[3],
              build_dataset("shapes", split="train", seed=1)[3]]
    assert not any(torch.equal(first[3][0], other[0]) for other in others)


def test_a_drawn_picture_is_an_image_a_segment_map_the_class_of_each_id_crowd_and_a_name():
    dataset = build_dataset("shapes", split="val", size=(50, 70))
    for index in range(20):
        image, segment_map, class_of, crowd, name = dataset[index]
        assert image.shape == (3, 50, 70) and image.dtype == torch.uint8 and image.float().std() > 5
        assert segment_map.shape == (50, 70) and crowd == [] and name == f"{index:05d}"
        assert set(segment_map.unique().tolist()) - {0} == set(class_of)
        stuff = [label for label in class_of.values() if not dataset.is_thing[label]]
        assert len(set(stuff)) == len(stuff) >= 1                        # a segment for each stuff class
        assert (segment_map == 0).float().mean() < 0.1


@pytest.mark.parametrize("num_classes", [2, 6, 40, 150])
def test_shapes_have_as_many_classes_as_asked_for_and_all_appear(num_classes):
    dataset = build_dataset("shapes", split="train", num_classes=num_classes, size=(32, 48))
    assert len(dataset.classes) == len(set(dataset.classes)) == len(dataset.is_thing) == num_classes
    assert sum(dataset.is_thing) == num_classes // 2
    seen = set()
    for index in range(2 * num_classes + 60):
        seen |= set(dataset[index][2].values())
    assert seen >= set(range(num_classes)) if num_classes < 100 else len(seen) > 0.85 * num_classes


def test_two_shapes_of_a_class_are_two_segments():
    dataset = build_dataset("shapes", split="train", num_classes=2)
    counts = [list(dataset[index][2].values()).count(1) for index in range(20)]
    assert max(counts) >= 2


def test_shapes_end():
    dataset = build_dataset("shapes", split="val", length=3)
    assert len(dataset) == 3 and len([item for item in dataset]) == 3


def test_the_example_in_the_docstring_of_data_runs():
    names = vars(data).copy()
    exec("\n".join(line.strip() for line in data.__doc__.split("\n") if re.match(r" {4}\S", line)), names)
    assert names["image"].shape[1:] == names["segment_map"].shape and names["name"] == "00000"


# ------------------------------------------------------------------ own folders

def make_folder(root, classes=("road", "car thing", "sky stuff"), values=(0, 2, 1, 255), suffix=".jpg"):
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    for i, split in enumerate(("train", "val")):
        write_image(root / f"images/{split}/b{suffix}", seed=i)
        write_png(root / f"annotations/{split}/b.png", blocks(*values))
    return root


def test_a_folder_of_images_and_index_pngs_is_a_dataset(tmp_path):
    dataset = build_dataset("folder", make_folder(tmp_path), "val")
    assert dataset.classes == ["road", "car", "sky"] and dataset.is_thing == [False, True, False]
    assert len(dataset) == 1
    image, segment_map, class_of, crowd, name = dataset[0]
    assert image.shape == (3, H, W) and image.dtype == torch.uint8 and name == "b" and crowd == []
    assert class_of == {1: 0, 2: 1, 3: 2}
    assert segment_map.tolist() == blocks(1, 3, 2, 0).tolist()           # 255 is void


def test_images_behind_links_count_and_hidden_ones_do_not(tmp_path):
    for name in ("data", "elsewhere"):
        (tmp_path / name).mkdir()
        make_folder(tmp_path / name)
    for kind in ("images", "annotations"):
        (tmp_path / "data" / kind / "val" / "town").symlink_to(tmp_path / "elsewhere" / kind / "val")
        (tmp_path / "data" / kind / "val" / ".cache").symlink_to(tmp_path / "elsewhere" / kind / "val")
    names = [path.relative_to(tmp_path / "data").as_posix() for path, _ in build_dataset("folder", tmp_path / "data", "val").pairs]
    own = [name for name in names if "town" not in name]
    assert own and sorted(names) == sorted(own + [name.replace("val/", "val/town/") for name in own])


def test_a_folder_image_is_read_as_it_is(tmp_path):
    make_folder(tmp_path, suffix=".png")
    pixels = write_image(tmp_path / "images/val/b.png", seed=5)
    assert torch.equal(build_dataset("folder", tmp_path, "val")[0][0],
                       torch.from_numpy(pixels).permute(2, 0, 1))


def test_grey_palette_and_transparent_photos_become_rgb(tmp_path):
    make_folder(tmp_path, suffix=".png")
    photo = Image.fromarray(np.full((H, W, 3), 77, np.uint8))
    for picture in (photo.convert("L"), photo.quantize(), photo.convert("RGBA"), photo.convert("LA")):
        picture.save(tmp_path / "images/val/b.png")
        image = build_dataset("folder", tmp_path, "val")[0][0]
        assert image.shape == (3, H, W) and (image == 77).all()


def test_a_label_out_of_range_names_file_value_and_remedy(tmp_path):
    make_folder(tmp_path)
    write_png(tmp_path / "annotations/train/b.png", blocks(1, 2, 3))
    with pytest.raises(ValueError) as error:
        build_dataset("folder", tmp_path, "train")[0]
    message = str(error.value)
    assert "annotations/train/b.png" in message.replace("\\", "/") and "[3]" in message
    assert "0..2" in message and "255" in message
    assert "subtract 1" in message and "complete" in message


def test_annotations_may_be_palette_16_bit_or_1_bit_pngs(tmp_path):
    make_folder(tmp_path)
    expected = blocks(1, 2, 1).tolist()
    png = Image.fromarray(blocks(0, 1, 0)).convert("P")
    png.putpalette([0, 0, 0, 200, 10, 90])
    png.save(tmp_path / "annotations/val/b.png")
    assert build_dataset("folder", tmp_path, "val")[0][1].tolist() == expected
    write_png(tmp_path / "annotations/val/b.png", blocks(0, 1, 0, dtype=np.uint16))
    assert build_dataset("folder", tmp_path, "val")[0][1].tolist() == expected
    Image.fromarray(blocks(0, 1, 0) > 0).save(tmp_path / "annotations/val/b.png")
    assert build_dataset("folder", tmp_path, "val")[0][1].tolist() == expected


def test_more_than_255_classes_use_16_bit_pngs_with_void_65535(tmp_path):
    make_folder(tmp_path, classes=[f"class {k}" for k in range(300)])
    write_png(tmp_path / "annotations/val/b.png", blocks(299, 255, 0, 65535, dtype=np.uint16))
    _, segment_map, class_of, _, _ = build_dataset("folder", tmp_path, "val")[0]
    assert segment_map.tolist() == blocks(3, 2, 1, 0).tolist()
    assert class_of == {1: 0, 2: 255, 3: 299}


def test_with_more_than_255_classes_an_8_bit_png_is_read_too(tmp_path):
    make_folder(tmp_path, classes=[f"class {k}" for k in range(300)], values=(7, 254, 0))
    _, segment_map, class_of, _, _ = build_dataset("folder", tmp_path, "val")[0]
    assert class_of == {1: 0, 2: 7, 3: 254} and segment_map.tolist() == blocks(2, 3, 1).tolist()


def test_255_classes_still_fit_with_255_as_void(tmp_path):
    make_folder(tmp_path, classes=[f"class {k}" for k in range(255)], values=(254, 0, 255))
    _, segment_map, class_of, _, _ = build_dataset("folder", tmp_path, "val")[0]
    assert class_of == {1: 0, 2: 254} and segment_map.tolist() == blocks(2, 1, 0).tolist()


def test_a_colour_png_is_no_label_map(tmp_path):
    make_folder(tmp_path)
    write_image(tmp_path / "annotations/val/b.png")
    with pytest.raises(ValueError, match="b.png.*one channel"):
        build_dataset("folder", tmp_path, "val")[0]


def test_an_image_without_annotation_is_named(tmp_path):
    make_folder(tmp_path)
    write_image(tmp_path / "images/val/lonely.jpg")
    with pytest.raises(FileNotFoundError, match="1 files.*2 images.*lonely.png"):
        build_dataset("folder", tmp_path, "val")


def test_image_and_annotation_of_different_sizes_are_named(tmp_path):
    make_folder(tmp_path)
    write_image(tmp_path / "images/val/b.jpg", size=(H, W + 1))
    with pytest.raises(ValueError, match=r"b.jpg.*\(10, 15\).*\(10, 14\)"):
        build_dataset("folder", tmp_path, "val")[0]


@pytest.mark.parametrize("name, expected", [("folder", "classes.txt"), ("panoptic", "panoptic_val.json"),
                                            ("ade20k", "ADEChallengeData2016")])
def test_a_wrong_folder_says_what_was_expected_and_what_was_found(name, expected, tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        build_dataset(name, tmp_path, "val")
    assert "images/" in str(error.value) or "{images" in str(error.value)
    assert expected in str(error.value).replace("{train,val}", "val") and "holiday" in str(error.value)
    with pytest.raises(FileNotFoundError, match="Found in"):
        build_dataset(name, tmp_path / "not" / "there", "val")


def test_unknown_names_splits_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shapez.*shapes"):
        build_dataset("shapez")
    with pytest.raises(ValueError, match="test.*train or val"):
        build_dataset("shapes", split="test")
    make_folder(tmp_path)
    (tmp_path / "images/val/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="no images"):
        build_dataset("folder", tmp_path, "val")


def test_a_photo_is_turned_as_its_exif_entry_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                     # to be turned clockwise
    pixels = write_image(tmp_path / "turned.png", size=(4, 6), exif=exif)
    assert np.array_equal(data.read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))


# ------------------------------------------------------------------ ADE20K

def test_in_ade20k_value_0_is_void_and_value_v_is_class_v_minus_1(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for part in ("training", "validation"):
        write_image(root / f"images/{part}/ADE_00000001.jpg")
        write_png(root / f"annotations/{part}/ADE_00000001.png", blocks(0, 1, 150))
    dataset = build_dataset("ade20k", tmp_path, "train")
    assert len(dataset.classes) == len(dataset.is_thing) == 150 and not dataset.panoptic
    _, segment_map, class_of, _, name = dataset[0]
    assert class_of == {1: 0, 2: 149} and segment_map.tolist() == blocks(0, 1, 2).tolist()
    assert name == "ADE_00000001"
    rows = "".join(f"{k}\t0.1\t10\t2\tname {k}, synonym\n" for k in range(1, 151))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)
    assert build_dataset("ade20k", tmp_path, "val").classes[::149] == ["name 1", "name 150"]
    write_png(root / "annotations/training/ADE_00000001.png", blocks(0, 151))
    with pytest.raises(ValueError, match=r"\[151\]"):
        dataset[0]


# ------------------------------------------------------------------ COCO's panoptic format

IDS = [70_000, 3, 16_000_001, 256]  # of segments; more than two bytes, not sorted
CATEGORIES = [{"id": 200, "name": "grass", "isthing": 0}, {"id": 1, "name": "person", "isthing": 1},
              {"id": 90, "name": "brush", "isthing": 1}]


def make_panoptic(root, ids=IDS):
    write_image(root / "images/val/photo.jpg")
    values = blocks(ids[0], ids[1], 0, ids[2], ids[3], dtype=np.int64)
    write_png(root / "panoptic_val/photo.png",
              np.stack([values % 256, values // 256 % 256, values // 65536], -1).astype(np.uint8))
    segments = [{"id": IDS[0], "category_id": 200, "iscrowd": 0},
                {"id": IDS[1], "category_id": 1, "iscrowd": 0},
                {"id": IDS[2], "category_id": 1, "iscrowd": 0},
                {"id": IDS[3], "category_id": 90, "iscrowd": 1}]
    content = {"images": [{"id": 5, "file_name": "photo.jpg"}], "categories": CATEGORIES,
               "annotations": [{"image_id": 5, "file_name": "photo.png", "segments_info": segments}]}
    (root / "panoptic_val.json").write_text(json.dumps(content))
    return root


def test_coco_panoptic_ids_and_categories_need_not_be_contiguous(tmp_path):
    dataset = build_dataset("panoptic", make_panoptic(tmp_path), "val")
    assert dataset.classes == ["person", "brush", "grass"] and dataset.is_thing == [True, True, False]
    assert dataset.panoptic
    image, segment_map, class_of, crowd, name = dataset[0]
    labels = [[class_of.get(i) for i in row] for row in segment_map.tolist()]
    assert labels == [[{70_000: 2, 3: 0, 0: None, 16_000_001: 0, 256: 1}[i] for i in row]
                      for row in blocks(IDS[0], IDS[1], 0, IDS[2], IDS[3], dtype=np.int64).tolist()]
    assert len(class_of) == 4 and [class_of[i] for i in crowd] == [1]
    assert segment_map[0, 0] != segment_map[0, -1] and name == "photo"


def test_ids_that_the_json_does_not_list_are_named(tmp_path):
    dataset = build_dataset("panoptic", make_panoptic(tmp_path, [70_000, 4, 16_000_001, 999]), "val")
    with pytest.raises(ValueError, match=r"photo.png.*\[4, 999\]"):
        dataset[0]


def test_listed_segments_without_pixels_are_never_trained_on(tmp_path):
    dataset = build_dataset("panoptic", make_panoptic(tmp_path, [70_000, 0, 16_000_001, 0]), "val")
    _, segment_map, ids, labels, _ = TrainingSamples(dataset, unchanged)[0]
    assert sorted(labels.tolist()) == [0, 2] and set(ids.tolist()) == set(segment_map.unique().tolist()) - {0}


# ------------------------------------------------------------------ real data

def score_of_truth(dataset, indices):
    """The truth of some images given back as the prediction -> metrics."""
    K = len(dataset.classes)
    matrix, quality = ConfusionMatrix(K), PanopticQuality(K, dataset.is_thing)
    for index in indices:
        image, segment_map, class_of, crowd, _ = dataset[index]
        assert image.shape[1:] == segment_map.shape
        assert set(segment_map.unique().tolist()) <= set(class_of) | {0}
        regions, _ = merge_classes(segment_map, class_of)
        label = torch.where(regions > 0, regions.long() - 1, 255)
        matrix.update(label, label)
        segments = [{"id": i, "category_id": c, "iscrowd": i in crowd} for i, c in class_of.items()]
        answer = [s for s in segments if not s["iscrowd"]]
        quality.update(segment_map, answer, segment_map, segments)
    return matrix.compute() | quality.compute()


def assert_perfect(metrics):
    assert [metrics[name]
            for name in ("mIoU", "mACC", "pACC", "fwIoU", "PQ", "SQ", "RQ")] == pytest.approx([100] * 7)


def real(*parts):
    path = Path(REAL or "absent").joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not below $DATA_ROOT")
    return path


def test_truth_as_prediction_scores_100_on_camvid():
    dataset = build_dataset("folder", real("camvid"), "val")
    assert len(dataset) == 101 and len(dataset.classes) == 11
    assert_perfect(score_of_truth(dataset, range(0, 101, 25)))


def test_truth_as_prediction_scores_100_on_penn_fudan():
    dataset = build_dataset("panoptic", real("pennfudan"), "val")
    assert len(dataset) == 34
    assert dict(zip(dataset.classes, dataset.is_thing)) == {"pedestrian": True, "background": False}
    assert_perfect(score_of_truth(dataset, range(0, 34, 5)))


def test_truth_as_prediction_scores_100_on_ade20k(monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(real("ADEChallengeData2016").parent))
    assert_perfect(score_of_truth(build_dataset("ade20k", split="val"), range(3)))


def test_truth_as_prediction_scores_100_on_coco():
    root = real("coco")
    dataset = data.coco_format(root / "val2017", root / "panoptic_val2017",
                               root / "annotations/panoptic_val2017.json")
    assert len(dataset.classes) == 133 and sum(dataset.is_thing) == 80
    assert all(dataset[index][3] for index in range(2))                  # both images hold crowds
    assert_perfect(score_of_truth(dataset, range(2)))


# ------------------------------------------------------------------ augmentation

def marked(height, width):
    """An image whose red channel tells the segment: 40 * id; ids 1..5 and void 0 are columns."""
    segment_map = torch.zeros(height, width, dtype=torch.uint8)
    for i in range(6):
        segment_map[:, i * width // 6:(i + 1) * width // 6] = i
    image = torch.stack([40 * segment_map, torch.full_like(segment_map, 9),
                         torch.full_like(segment_map, 200)])
    return image, segment_map


@pytest.mark.parametrize("size, expected", [((120, 180), {(50, 75), (64, 96)}), ((61, 300), {(41, 96)})])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_augmented_image_and_map_stay_aligned_and_padding_is_128_and_void(size, expected, dtype):
    image, segment_map = marked(*size)
    augment = Augmentation([50, 80, 110], 200, (64, 96), color_distortion=False)
    flipped, sizes = set(), set()
    for seed in range(25):
        torch.manual_seed(seed)
        ours, mine = augment(image, segment_map.to(dtype))
        assert ours.shape == (3, 64, 96) and ours.dtype == torch.uint8
        assert mine.shape == (64, 96) and mine.dtype == dtype
        inside = ours[1] != 128                                          # the green channel is 9 everywhere
        height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
        # padded at the right and the bottom
        assert inside[:height, :width].all() and inside.sum() == height * width
        assert (ours[:, ~inside] == 128).all() and (mine[~inside] == 0).all()
        wrong = (ours[0, :height, :width].int() - 40 * mine[:height, :width].int()).abs() > 20
        assert wrong.float().mean() < 0.08                               # but for blurred borders
        flipped.add(bool(mine[0, :width].int().diff().sum() < 0))
        sizes.add((height, width))
    assert flipped == {True, False} and sizes == expected


def test_short_and_long_side_obey_their_limits():
    augment = Augmentation([50, 80], 100, (400, 400), color_distortion=False)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        ours, _ = augment(*marked(60, 90))
        inside = ours[1] != 128
        seen.add((int(inside.any(1).sum()), int(inside.any(0).sum())))
    assert seen == {(50, 75), (67, 100)}                                 # 80 would make the long side 120


def test_colour_distortion_changes_colours_and_nothing_else():
    image, segment_map = marked(64, 96)
    image = torch.randint(256, image.shape, dtype=torch.uint8)
    changed = 0
    for seed in range(10):
        torch.manual_seed(seed)
        plain, plain_map = Augmentation([64], 96, (64, 96), color_distortion=False)(image, segment_map)
        torch.manual_seed(seed)
        ours, ours_map = Augmentation([64], 96, (64, 96))(image, segment_map)
        changed += not torch.equal(ours, plain)
        assert sorted(ours_map.flatten().tolist()) == sorted(plain_map.flatten().tolist())
        assert ours.dtype == torch.uint8
    assert changed >= 6


def test_each_colour_distortion_has_a_coin_of_its_own_and_its_limit():
    augment, grey, red = Augmentation([8], 8, (8, 8)), [], []
    for seed in range(200):
        torch.manual_seed(seed)
        for color, seen in (((100, 100, 100), grey), ((210, 90, 90), red)):
            image = torch.tensor(color, dtype=torch.uint8)[:, None, None].repeat(1, 8, 8)
            seen.append(augment(image, torch.zeros(8, 8, dtype=torch.uint8))[0][:, 0, 0].tolist())
    levels = [r for r, g, b in grey]                                     # of a plain grey image brightness is all
    assert 70 < levels.count(100) < 130 and 86 <= min(levels) < 92 and 108 < max(levels) <= 113
    hues = [(colorsys.rgb_to_hsv(*color)[0] + 0.5) % 1 - 0.5 for color in red]
    assert 70 < sum(abs(hue) < 0.005 for hue in hues) < 130 and 0.08 < max(map(abs, hues)) <= 0.12


def test_detrs_augmentation_crops_half_of_the_time_within_its_limits_and_keeps_image_and_map_together(monkeypatch):
    resizes, flipped, sides, crops = [], set(), set(), []
    def noting(image, segment_map, short_side, *limit):
        resizes.append((list(image.shape[1:]), short_side))
        return resized(image, segment_map, short_side, *limit)
    monkeypatch.setattr(batches, "resized", noting)
    augment = DetrAugmentation([50, 80], 100)
    for seed in range(60):
        torch.manual_seed(seed)
        resizes.clear()
        ours, mine = augment(*marked(120, 180))
        assert resizes[0][0] == [120, 180] and list(ours.shape[1:]) == data.fit(*resizes[-1], 100)
        assert ((ours[0].int() - 40 * mine.int()).abs() > 20).float().mean() < 0.1
        flipped.add(bool(mine[0].int().diff().sum() < 0))
        if len(resizes) == 2:                                            # else it was not cropped
            (_, side), (crop, _) = resizes
            sides.add(side)
            crops.append(crop)
            assert 384 <= crop[0] <= side and 384 <= crop[1] <= 600
    assert flipped == {True, False} and sides == {400, 500, 600} and 20 < len(crops) < 40
    assert min(map(min, crops)) < 400 and max(map(max, crops)) > 575


def test_test_size_is_the_short_side_unless_the_long_side_gets_too_long():
    assert list(data.fit((100, 200), 50, 1000)) == [50, 100]
    assert list(data.fit((200, 100), 50, 80)) == [80, 40]
    assert min(data.fit((1, 5000), 512, 2048)) >= 1
    for H in range(200, 900):                                            # a crop of 512 needs no padding
        assert data.fit((H, H + 100), 512)[0] == data.fit((H + 100, H), 512)[1] == 512
    assert resized(*marked(322, 422), 512)[0].shape == (3, 512, 671)
    image, segment_map = resized(*marked(60, 90), 30, 60)
    assert image.shape == (3, 30, 45) and segment_map.shape == (30, 45)
    assert set(segment_map.unique().tolist()) == set(range(6))


# ------------------------------------------------------------------ samples and batches

class FakeDataset:
    classes, is_thing, panoptic = ["a", "b", "c", "d"], [True] * 4, True

    def __init__(self, segment_map, class_of, crowd=(), length=5):
        self.item = torch.zeros(3, *segment_map.shape, dtype=torch.uint8), segment_map, class_of, list(crowd)
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return *self.item, f"image {index}"


def unchanged(image, segment_map):
    return image, segment_map


def test_segments_that_the_crop_emptied_are_dropped():
    segment_map = torch.tensor([[1, 2], [3, 0]], dtype=torch.uint8)      # quarters of 5 x 7 pixels
    dataset = FakeDataset(segment_map.repeat_interleave(5, 0).repeat_interleave(7, 1), {1: 3, 2: 0, 3: 3})
    _, _, ids, labels, _ = TrainingSamples(dataset, lambda image, ids: (image[:, :, :7], ids[:, :7]))[0]
    assert ids.tolist() == [1, 3] and labels.tolist() == [3, 3] and ids.dtype == labels.dtype == torch.int64
    empty = TrainingSamples(dataset, lambda image, ids: (image[:, 5:, 7:], ids[5:, 7:]))[0]
    assert empty[2].tolist() == empty[3].tolist() == []
    batch = collate([empty, empty])
    assert batch.masks().shape == (0, 5, 7) and batch.owner.shape == batch.labels.shape == (0,)


def test_crowd_segments_are_not_trained_on_as_instances():
    segment_map = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    class_of = {1: 0, 2: 2, 3: 1, 4: 0}
    _, _, ids, labels, _ = TrainingSamples(FakeDataset(segment_map, class_of, crowd=[2, 4]), unchanged)[0]
    assert ids.tolist() == [1, 3] and labels.tolist() == [0, 1]


def test_in_the_semantic_task_crowd_belongs_to_its_class_and_costs_no_other_class_its_segment():
    segment_map = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    class_of = {1: 0, 2: 2, 3: 1, 4: 0}  # class 1 gets id 2 when merged, class 0 id 1
    dataset = FakeDataset(segment_map, class_of, crowd=[2, 4])
    _, merged, ids, labels, _ = TrainingSamples(dataset, unchanged, task="semantic")[0]
    assert merged.tolist() == [[1, 3, 2, 1]]
    assert dict(zip(ids.tolist(), labels.tolist())) == {1: 0, 2: 1, 3: 2}


def test_merging_classes_leaves_one_segment_for_each_class():
    segment_map = torch.tensor([[1, 2, 0], [3, 300, 4]], dtype=torch.int32)
    merged, class_of = merge_classes(segment_map, {1: 5, 2: 5, 3: 0, 300: 9, 4: 0, 77: 8})
    assert merged.tolist() == [[6, 6, 0], [1, 10, 1]]
    assert {i: class_of[i] for i in (6, 1, 10)} == {6: 5, 1: 0, 10: 9}
    assert all(i == c + 1 for i, c in class_of.items())
    merged, class_of = merge_classes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), {1: 299, 2: 254, 3: 254})
    assert merged.tolist() == [[300, 255, 255]]
    merged, class_of = merge_classes(torch.tensor([[1, 2]], dtype=torch.uint8), {1: 299, 2: 254})
    assert merged.tolist() == [[1, 2]] and class_of == {1: 299, 2: 254}  # one for each class: nothing to do
    merged, class_of = merge_classes(torch.zeros(2, 3, dtype=torch.uint8), {})
    assert class_of == {} and not merged.any()


def shape_samples(seed=0, length=7):
    dataset = build_dataset("shapes", split="train", size=(48, 64), length=length)
    return TrainingSamples(dataset, Augmentation([40, 48, 56], 100, (32, 40)), seed=seed)


def test_the_nth_sample_is_a_function_of_seed_and_n():
    samples = shape_samples()
    first = samples[12]
    torch.manual_seed(99), np.random.seed(99), samples[3]
    state = torch.random.get_rng_state()
    assert same(first, samples[12]) and same(first, shape_samples()[12])
    assert torch.equal(state, torch.random.get_rng_state())              # and leaves the generator alone
    assert not torch.equal(first[0], shape_samples(seed=1)[12][0])


def test_every_epoch_holds_every_image_once_in_another_order_and_another_crop():
    samples = shape_samples()
    epochs = [[samples[n] for n in range(start, start + 7)] for start in (0, 7, 14)]
    names = [[sample[-1] for sample in epoch] for epoch in epochs]
    assert all(sorted(epoch) == [f"{i:05d}" for i in range(7)] for epoch in names)
    assert names[0] != names[1] or names[1] != names[2]
    by_name = [{sample[-1]: sample[0] for sample in epoch} for epoch in epochs]
    assert not all(torch.equal(by_name[0][name], by_name[1][name]) for name in by_name[0])


def test_processes_and_accumulation_split_the_same_global_batches():
    whole = list(step_batches(2, 5, 12))
    assert [len(batch) for batch in whole] == [12] * 3 and whole[0] == range(24, 36)
    for world_size, accumulate in ((2, 1), (1, 3), (2, 3), (3, 2)):
        parts = [list(step_batches(2, 5, 12, rank, world_size, accumulate)) for rank in range(world_size)]
        assert all(len(part) == 3 * accumulate for part in parts)
        assert {len(batch) for part in parts for batch in part} == {12 // world_size // accumulate}
        for step in range(3):
            mine = [n for part in parts for batch in part[step * accumulate:(step + 1) * accumulate]
                    for n in batch]
            assert mine == list(whole[step])


def test_a_resumed_stream_goes_on_where_it_stopped():
    assert list(step_batches(0, 6, 4))[4:] == list(step_batches(4, 6, 4))


def test_workers_send_what_one_process_computes():
    cpu, numbers = torch.device("cpu"), list(step_batches(0, 3, 4))
    alone, shared = (list(batches.training_batches(shape_samples(), numbers, n, cpu)) for n in (0, 1))
    assert len(alone) == len(shared) == 3
    assert all(same(ours, theirs) for ours, theirs in zip(alone, shared))


def random_sample(height, width, ids, labels, dtype=torch.uint8, name="x"):
    ids = torch.tensor(ids, dtype=torch.long)
    values = torch.cat([ids, torch.zeros(1, dtype=torch.long)])
    segment_map = values[torch.randint(len(values), (height, width))].to(dtype)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return image, segment_map, ids, torch.tensor(labels, dtype=torch.long), name


def test_a_batch_holds_images_maps_and_flat_segments():
    samples = [random_sample(6, 9, [4, 7], [1, 1], name="a"), random_sample(6, 9, [], [], name="b"),
               random_sample(6, 9, [2, 4, 200], [0, 3, 2], name="c")]
    batch = collate(samples)
    assert batch.images.shape == (3, 3, 6, 9)
    assert batch.images.dtype == batch.segment_maps.dtype == torch.uint8
    assert batch.owner.tolist() == [0, 0, 2, 2, 2] and batch.labels.tolist() == [1, 1, 0, 3, 2]
    assert batch.names == ["a", "b", "c"]
    masks = batch.to("cpu").masks()
    assert masks.shape == (5, 6, 9) and masks.dtype == torch.bool
    for n, (b, i) in enumerate(((0, 4), (0, 7), (2, 2), (2, 4), (2, 200))):
        assert torch.equal(masks[n], samples[b][1] == i)
    label_map = batch.label_map(255)
    assert label_map.shape == (3, 6, 9) and label_map.dtype == torch.int64
    for b, table in enumerate(({4: 1, 7: 1, 0: 255}, {0: 255}, {2: 0, 4: 3, 200: 2, 0: 255})):
        assert label_map[b].tolist() == [[table[i] for i in row] for row in samples[b][1].tolist()]


def test_segments_that_are_not_listed_are_void_in_the_label_map():
    image, segment_map, ids, labels, name = random_sample(6, 9, [1, 2], [5, 6])
    label_map = collate([(image, segment_map, ids[:1], labels[:1], name)]).label_map(65535)
    assert torch.equal(label_map[0], torch.where(segment_map == 1, 5, 65535))


def test_images_of_different_sizes_are_padded_at_the_right_and_the_bottom_with_the_mean_and_void():
    samples = [random_sample(6, 9, [1], [2]), random_sample(8, 5, [3], [0])]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 8, 9) and batch.images.dtype == torch.uint8
    assert batch.segment_maps.shape == (2, 8, 9)
    for b, (image, segment_map, *_) in enumerate(samples):
        height, width = segment_map.shape
        assert torch.equal(batch.images[b, :, :height, :width], image)
        assert torch.equal(batch.segment_maps[b, :height, :width], segment_map)
        padding = torch.ones(8, 9, dtype=torch.bool)
        padding[:height, :width] = False
        assert (batch.segment_maps[b][padding] == 0).all()
        assert (batch.images[b][:, padding] == torch.tensor([[124], [116], [104]])).all()
    assert batch.masks().shape == (2, 8, 9)


def test_maps_of_different_integer_types_make_one_batch():
    samples = [random_sample(6, 9, [1], [2]), random_sample(6, 9, [700], [0], dtype=torch.int32)]
    masks = collate(samples).masks()
    assert torch.equal(masks[0], samples[0][1] == 1) and torch.equal(masks[1], samples[1][1] == 700)
