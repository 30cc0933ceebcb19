"""What is guaranteed of every published dataset, on small replicas of what its publisher ships."""
import functools
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import evaluate
import train
from data import UserError, build_dataset
from test_folder_data import write_image, write_png
from test_recipes import table

ROOT = Path(__file__).parent.parent
CLASSES = json.loads((ROOT / "tools" / "classes.json").read_text())
H, W = 26, 42           # W is the least common multiple of 14, 7, 6, 3 and 2, as columns go


def columns(*values, size=(H, W), dtype=np.uint8):
    """A map of equally wide columns with these values."""
    height, width = size
    row = np.array(values, dtype)[np.arange(width) * len(values) // width]
    return np.repeat(row[None], height, 0)


def answer(item, n):
    """The n columns of an item -> their ids, and classes: None for void, (class,) for crowd."""
    _, segment_map, class_of, crowd, _ = item
    width = segment_map.shape[1]
    ids = [segment_map[0, -(-k * width // n)].item() for k in range(n)]
    expected = columns(*ids, size=segment_map.shape, dtype=np.int32)
    assert torch.equal(segment_map, torch.from_numpy(expected))
    labels = []
    for i in ids:
        if i == 0:
            labels.append(None)
        else:
            labels.append((class_of[i],) if i in crowd else class_of[i])
    return ids, labels


def rgb_of(ids):
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)


def write_palette_png(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    png = Image.fromarray(np.asarray(values, np.uint8)).convert("P")
    png.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    png.save(path)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# ----------------------------------------------------------------------------------------- replicas

ADE_THINGS = [int(k) for k in """
    8 9 11 13 15 16 19 20 21 23 24 25 28 31 32 33 34 36 37 38 39 40 42 43 44 45 46 48 50 51 54 56
    57 58 59 63 65 66 67 68 70 71 72 73 74 75 76 77 79 81 82 83 84 86 87 88 89 90 91 93 94 96 98 99
    103 104 105 108 109 111 112 113 116 117 119 120 121 122 124 125 126 127 128 130 131 133 134 135
    136 137 138 139 140 143 144 145 147 148 149 150""".split()]      # the k-th: category k of a PNG
ADE_VALUES = [1, 4, 13, 13, 13, 0, 20, 1, 0, 150, 150, 3, 1, 8]
# (category, number): persons, chairs, one over wall, one over void, flags, a bed over wall
ADE_INSTANCES = [(0, 0), (0, 0), (4, 1), (4, 2), (0, 0), (0, 0), (8, 1), (8, 2), (4, 3), (100, 1),
                 (100, 255), (0, 0), (1, 1), (1, 1)]


def make_ade20k(root):
    base = root / "ADEChallengeData2016"
    write_text(base / "objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tName\n")
    for part, short, numbers in (("training", "train", (1, 2)), ("validation", "val", (1,))):
        for n in numbers:
            name = f"ADE_{short}_{n:08d}"
            write_image(base / f"images/{part}/{name}.jpg", (H, W), n)
            write_png(base / f"annotations/{part}/{name}.png", columns(*ADE_VALUES))


def make_ade20k_panoptic(root):
    make_ade20k(root)
    base = root / "ADEChallengeData2016"
    category = columns(*[category for category, _ in ADE_INSTANCES])
    number = columns(*[number for _, number in ADE_INSTANCES])
    rgb = np.stack([category, number, np.zeros_like(number)], -1)
    for path in list(base.glob("annotations/*/*.png")):
        write_png(base / "annotations_instance" / path.relative_to(base / "annotations"), rgb)


FULL_VALUES = [0, 2978, 255, 1831, 256, 312, 3156]      # 255 and 256 are none of the 847
FULL_SCENES = [
    ("training", "urban", "street", "ADE_train_00000001", (H, W)),
    ("training", "sports_and_leisure", "basketball_court/indoor", "ADE_train_00000002", (600, 714)),
    ("validation", "urban", "street", "ADE_val_00000001", (H, W)),
    ("validation", "home_or_hotel", "attic", "ADE_val_00000002", (714, 600)),
]


def make_ade20k_full(root):
    for part, group, scene, name, size in FULL_SCENES:
        base = root / "ADE20K_2021_17_01/images/ADE" / part / group / scene
        write_image(base / f"{name}.jpg", size)
        values = columns(*FULL_VALUES, size=size, dtype=np.int32)
        instances = columns(*range(40, 47), size=size)
        rgb = np.stack([values // 256 * 10, values % 256, instances], -1)
        write_png(base / f"{name}_seg.png", rgb.astype(np.uint8))
        write_png(base / f"{name}_parts_1.png", np.stack([columns(2, size=size)] * 3, -1))
        write_png(base / name / f"instance_000_{name}.png", columns(0, 255, size=size))
        write_text(base / f"{name}.json", "{}")


ABSENT = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)   # ids of COCO that no image has
COCO_THINGS = [i for i in range(1, 91) if i not in ABSENT]
COCO_STUFF = [92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145,
              147, 148, 149, 151, 154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180,
              181, *range(184, 201)]
# id, category, crowd
COCO_SEGMENTS = [(3937500, 1, 0), (4260062, 1, 0), (7, 90, 0), (256, 1, 1), (16_000_001, 200, 0)]
COCO_COLUMNS = [3937500, 4260062, 0, 7, 256, 16_000_001]


def make_coco_panoptic(root, maps="annotations/"):
    categories = [{"id": i, "name": "person" if i == 1 else f"name {i}", "isthing": int(i <= 90),
                   "supercategory": "any", "color": [i, 0, 0]} for i in COCO_THINGS + COCO_STUFF]
    for split, numbers in (("train", (9, 25)), ("val", (139,))):
        images, annotations = [], []
        for n in numbers:
            write_image(root / f"coco/{split}2017/{n:012d}.jpg", (H, W), n)
            write_png(root / f"coco/{maps}panoptic_{split}2017/{n:012d}.png",
                      rgb_of(columns(*COCO_COLUMNS, dtype=np.int64)))
            images.append({"id": n, "file_name": f"{n:012d}.jpg", "height": H, "width": W})
            segments = [{"id": i, "category_id": c, "iscrowd": crowd, "area": H * W // 6,
                         "bbox": [0, 0, W // 6, H]} for i, c, crowd in COCO_SEGMENTS]
            annotations.append({"image_id": n, "file_name": f"{n:012d}.png",
                                "segments_info": segments})
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations,
                   "categories": categories}
        write_text(root / f"coco/annotations/panoptic_{split}2017.json", json.dumps(content))


STUFF_VALUES = [0, 1, 11, 13, 182, 92]                  # of the .mat files
STUFF_NAMES = {"test": ["COCO_train2014_000000000077"],
               "train": ["COCO_train2014_000000000109", "COCO_train2014_000000000400"]}


def make_coco_stuff(root):
    """What is prepared and what is shipped have these in common."""
    base = root / "coco/coco_stuff_10k"
    for part, names in STUFF_NAMES.items():
        write_text(base / f"imageLists/{part}.txt", "\n".join(names) + "\n")
        for n, name in enumerate(names):
            write_image(base / f"images/{name}.jpg", (H, W), n)
    return base


def make_coco_stuff_prepared(root):
    base = make_coco_stuff(root)
    for part, names in STUFF_NAMES.items():
        for name in names:
            write_png(base / f"annotations_detectron2/{part}/{name}.png",
                      columns(255, 0, 10, 11, 170, 80))


def make_coco_stuff_mat(root, dtype=np.uint16):
    h5py = pytest.importorskip("h5py")
    base = make_coco_stuff(root)
    (base / "annotations").mkdir(parents=True)
    for name in STUFF_NAMES["test"] + STUFF_NAMES["train"]:
        with h5py.File(base / f"annotations/{name}.mat", "w", userblock_size=512) as file:
            file["S"] = columns(*STUFF_VALUES).T.astype(dtype)
            file["regionLabelsStuff"] = np.zeros((1, 3))


CITYSCAPES = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
              19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
              24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
              32: "motorcycle", 33: "bicycle"}
CITY_LABELS = [0, 1, 4, 7, 8, 10, 11, 23, 24, 29, 31, 33, 30, 255]   # 255: a license plate, -1
CITY_INSTANCES = [4, 7, 24000, 24001, 24, 26000, 26, 29000, 29, 30001, 33005, 8, 25, 7]


def make_cityscapes(root):
    base = root / "cityscapes"
    for part, city, n in (("train", "aachen", 19), ("train", "bochum", 20),
                          ("val", "frankfurt", 294), ("test", "berlin", 19)):
        name = f"{city}_000000_{n:06d}"
        write_image(base / f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png", (H, W), n)
        truth = f"gtFine/{part}/{city}/{name}_gtFine"
        write_png(base / f"{truth}_labelIds.png", columns(*CITY_LABELS))
        write_png(base / f"{truth}_instanceIds.png", columns(*CITY_INSTANCES, dtype=np.uint16))
        write_image(base / f"{truth}_color.png", (H, W))
        write_text(base / f"{truth}_polygons.json", "{}")


def make_mapillary(root):
    base, name = root / "mapillary_vistas", "_1Gn_xkw7sa_i9GU4mkxxQ"
    for part in ("training", "validation", "testing"):
        write_image(base / f"{part}/images/{name}.jpg", (H, W), 3)
    for part in ("training", "validation"):
        write_palette_png(base / f"{part}/labels/{name}.png", columns(0, 64, 65, 13, 27, 30))
        write_png(base / f"{part}/instances/{name}.png", columns(256, dtype=np.uint16))


def make_voc(root):
    base = root / "VOCdevkit/VOC2012"
    lists = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}
    for part, names in lists.items():
        write_text(base / f"ImageSets/Segmentation/{part}.txt", "\n".join(names) + "\n")
        for n, name in enumerate(names):
            write_image(base / f"JPEGImages/{name}.jpg", (H, W), n)
            write_palette_png(base / f"SegmentationClass/{name}.png",
                              columns(0, 1, 255, 15, 20, 255))
            write_palette_png(base / f"SegmentationObject/{name}.png",
                              columns(0, 1, 255, 2, 3, 255))
    write_image(base / "JPEGImages/2007_000027.jpg", (H, W))         # most have no segmentation


REPLICAS = {
    "ade20k": make_ade20k,
    "ade20k-panoptic": make_ade20k_panoptic,
    "ade20k-full": make_ade20k_full,
    "coco-panoptic": make_coco_panoptic,
    "coco-stuff-10k": make_coco_stuff_prepared,
    "cityscapes": make_cityscapes,
    "cityscapes-panoptic": make_cityscapes,
    "mapillary": make_mapillary,
    "voc": make_voc,
}
PANOPTIC = [name for name in REPLICAS if name.endswith("panoptic")]


@pytest.fixture(scope="session")
def replica(tmp_path_factory):
    """name -> root of its replica, which tests only read."""
    @functools.cache
    def make(name):
        root = tmp_path_factory.mktemp(name)
        REPLICAS[name](root)
        return root
    return make


# ------------------------------------------------------------------------------------ facts of each

@pytest.mark.parametrize("name, classes, things", [
    ("ade20k", 150, 0), ("ade20k-panoptic", 150, 100), ("ade20k-full", 847, 0),
    ("coco-panoptic", 133, 80), ("coco-stuff-10k", 171, 0), ("cityscapes", 19, 8),
    ("cityscapes-panoptic", 19, 8), ("mapillary", 65, 0), ("voc", 21, 0)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_dataset_has_its_classes_names_and_ids(name, classes, things, split, replica):
    dataset = build_dataset(name, replica(name), split)
    assert len(dataset.classes) == len(dataset.is_thing) == classes
    assert sum(dataset.is_thing) == things
    assert dataset.panoptic == (name in PANOPTIC)
    assert dataset.has_truth
    if name != "ade20k-full":                                        # it has several "bag"s
        assert len(set(dataset.classes)) == classes
    for numbers in (dataset.category_ids, dataset.label_values):
        assert len(numbers) == len(set(numbers)) == classes
        assert all(type(number) is int for number in numbers)


@pytest.mark.parametrize("name, lengths", [
    ("ade20k", (2, 1)), ("ade20k-panoptic", (2, 1)), ("ade20k-full", (2, 2)),
    ("coco-panoptic", (2, 1)), ("coco-stuff-10k", (2, 1)), ("cityscapes", (2, 1)),
    ("cityscapes-panoptic", (2, 1)), ("mapillary", (1, 1)), ("voc", (2, 1))])
def test_an_item_is_an_image_a_map_the_class_of_each_id_crowd_and_a_name(name, lengths, replica):
    for split, length in zip(("train", "val"), lengths):
        dataset = build_dataset(name, replica(name), split)
        assert len(dataset) == length
        names = set()
        for index in range(length):
            image, segment_map, class_of, crowd, stem = dataset[index]
            assert image.dtype == torch.uint8
            assert image.shape == (3, *segment_map.shape)
            assert segment_map.dtype in (torch.uint8, torch.int32)
            assert set(segment_map.unique().tolist()) - {0} <= set(class_of)
            assert set(crowd) <= set(class_of)
            assert min(class_of) >= 1
            assert all(0 <= k < len(dataset.classes) for k in class_of.values())
            assert all(type(value) is int for value in [*class_of, *class_of.values(), *crowd])
            assert re.fullmatch(r"[^/\\]+", stem)
            names.add(stem)
        assert len(names) == length


def test_value_v_of_ade20k_is_class_v_minus_1(replica):
    dataset = build_dataset("ade20k", replica("ade20k"), "val")
    assert dataset.classes[:13] == ["wall", "building", "sky", "floor", "tree", "ceiling", "road",
                                    "bed", "window", "grass", "cabinet", "sidewalk", "person"]
    assert dataset.classes[149] == "flag"
    assert dataset.category_ids == dataset.label_values == list(range(1, 151))
    ids, labels = answer(dataset[0], 14)
    assert labels == [None if value == 0 else value - 1 for value in ADE_VALUES]
    assert dataset[0][-1] == "ADE_val_00000001"


def test_panoptic_ade20k_numbers_categories_from_0_and_label_maps_from_1(replica):
    dataset = build_dataset("ade20k-panoptic", replica("ade20k-panoptic"), "val")
    assert dataset.category_ids == list(range(150))                  # the authors' preparation
    assert dataset.label_values == list(range(1, 151))               # the publisher's PNGs


def test_the_things_of_ade20k_are_the_hundred_of_the_instance_challenge(replica):
    dataset = build_dataset("ade20k-panoptic", replica("ade20k-panoptic"), "val")
    assert [k + 1 for k, thing in enumerate(dataset.is_thing) if thing] == ADE_THINGS


def test_ade20k_things_lie_over_stuff_and_thing_pixels_without_an_instance_are_void(replica):
    dataset = build_dataset("ade20k-panoptic", replica("ade20k-panoptic"), "val")
    ids, labels = answer(dataset[0], 14)
    assert labels == [0, 3, 12, 12, None, None, 19, 19, 12, 149, 149, 2, 7, 7]
    assert ids[12] == ids[13]
    assert ids[0] not in (ids[7], ids[12])
    things = [i for i, k in zip(ids, labels) if k in (12, 19, 149)]
    assert len(set(things)) == len(things) == 7          # (category, number) tells instances apart
    assert dataset[0][3] == []


def test_every_category_of_the_instance_pngs_is_its_thing(tmp_path):
    make_ade20k_panoptic(tmp_path)
    base, size = tmp_path / "ADEChallengeData2016", (H, 50)
    name = "validation/ADE_val_00000001"
    write_image(base / f"images/{name}.jpg", size)
    write_png(base / f"annotations/{name}.png", columns(1, size=size))
    for start in range(1, 101, 10):
        categories = range(start, start + 10)
        category = columns(*categories, size=size)
        number = np.ones_like(category)
        write_png(base / f"annotations_instance/{name}.png",
                  np.stack([category, number, 0 * number], -1))
        _, labels = answer(build_dataset("ade20k-panoptic", tmp_path, "val")[0], 10)
        assert [k + 1 for k in labels] == [ADE_THINGS[c - 1] for c in categories]


def test_ade20k_full_has_the_classes_of_the_released_weights_in_their_order(replica):
    dataset = build_dataset("ade20k-full", replica("ade20k-full"), "val")
    assert dataset.classes[:4] == ["wall", "building", "sky", "tree"]
    assert dataset.category_ids[:4] == [2978, 312, 2420, 2855]
    item = next(item for item in dataset if item[0].shape[1:] == (H, W))
    ids, labels = answer(item, 7)
    values = [None if k is None else dataset.category_ids[k] for k in labels]
    assert values == [None, 2978, None, 1831, None, 312, 3156]       # all others are void
    assert (labels[1], labels[3], labels[5]) == (0, 11, 1)           # wall, person, building


def test_large_images_of_ade20k_full_are_shrunk_to_a_short_side_of_512_and_small_ones_kept(replica):
    for split, size in (("train", (512, 609)), ("val", (609, 512))):
        dataset = build_dataset("ade20k-full", replica("ade20k-full"), split)
        items = {tuple(item[0].shape[1:]): item for item in dataset}
        assert set(items) == {(H, W), size}
        _, segment_map, class_of, _, _ = items[size]
        row = segment_map[200].tolist()
        values = [0 if i == 0 else dataset.category_ids[class_of[i]] for i in row]
        starts = [x for x in range(1, size[1]) if values[x] != values[x - 1]]
        assert [values[x] for x in starts] == [2978, 0, 1831, 0, 312, 3156]
        assert starts == pytest.approx([size[1] * k / 7 for k in range(1, 7)], abs=2)


@pytest.mark.parametrize("maps", ["annotations/", ""])
def test_coco_panoptic_is_read_from_either_place_of_its_pngs(maps, tmp_path):
    make_coco_panoptic(tmp_path, maps)
    dataset = build_dataset("coco-panoptic", tmp_path, "val")
    assert dataset.category_ids == COCO_THINGS + COCO_STUFF
    assert dataset.is_thing == [True] * 80 + [False] * 53
    assert dataset.classes[0] == "person"
    ids, labels = answer(dataset[0], 6)
    assert labels == [0, 0, None, 79, (0,), 132]
    assert len(set(ids)) == 6
    assert dataset[0][-1] == "000000000139"
    assert dataset.image_ids == {"000000000139": 139}
    train_set = build_dataset("coco-panoptic", tmp_path, "train")
    assert [item[-1] for item in train_set] == ["000000000009", "000000000025"]


def test_the_listed_classes_of_coco_are_those_of_its_json(replica):
    dataset = build_dataset("coco-panoptic", replica("coco-panoptic"), "val")
    listed = CLASSES["coco-panoptic"]
    assert [c["id"] for c in listed] == dataset.category_ids
    assert [bool(c["isthing"]) for c in listed] == dataset.is_thing


def check_coco_stuff(dataset):
    ids = [i for i in range(1, 183) if i not in ABSENT]
    assert dataset.category_ids == ids
    assert dataset.classes[:2] == ["person", "bicycle"]
    assert answer(dataset[0], 6)[1] == [None, 0, 10, 11, 170, 80]
    assert ids[80] == 92
    assert dataset[0][-1] == "COCO_train2014_000000000077"


def test_prepared_annotations_of_coco_stuff_10k_are_read(replica):
    check_coco_stuff(build_dataset("coco-stuff-10k", replica("coco-stuff-10k"), "val"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_mat_files_of_coco_stuff_10k_are_read_transposed(dtype, tmp_path):
    make_coco_stuff_mat(tmp_path, dtype)
    check_coco_stuff(build_dataset("coco-stuff-10k", tmp_path, "val"))
    train_set = build_dataset("coco-stuff-10k", tmp_path, "train")
    assert [item[-1] for item in train_set] == STUFF_NAMES["train"]


def test_mat_files_without_h5py_say_what_to_install(tmp_path, monkeypatch):
    make_coco_stuff_mat(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py"):
        build_dataset("coco-stuff-10k", tmp_path, "val")[0]


def test_a_mat_value_that_no_class_has_is_named(tmp_path):
    make_coco_stuff_mat(tmp_path)
    import h5py
    path = next(tmp_path.glob("coco/coco_stuff_10k/annotations/*077.mat"))
    with h5py.File(path, "r+") as file:
        file["S"][:3] = 26
    with pytest.raises(UserError, match=r"077.mat.*26"):
        build_dataset("coco-stuff-10k", tmp_path, "val")[0]


def test_cityscapes_has_19_classes_and_all_other_labels_are_void(replica):
    dataset = build_dataset("cityscapes", replica("cityscapes"), "val")
    assert dataset.classes == list(CITYSCAPES.values())
    assert dataset.category_ids == list(CITYSCAPES)
    order = list(CITYSCAPES)
    expected = [order.index(value) if value in order else None for value in CITY_LABELS]
    assert answer(dataset[0], 14)[1] == expected


def test_every_label_id_of_cityscapes_is_its_class(tmp_path):
    make_cityscapes(tmp_path)
    base, name = tmp_path / "cityscapes", "val/frankfurt/frankfurt_000000_000294"
    write_image(base / f"leftImg8bit/{name}_leftImg8bit.png", (H, 34))
    order = list(CITYSCAPES)
    for values in (range(0, 17), range(17, 34)):
        write_png(base / f"gtFine/{name}_gtFine_labelIds.png", columns(*values, size=(H, 34)))
        labels = answer(build_dataset("cityscapes", tmp_path, "val")[0], 17)[1]
        assert labels == [order.index(v) if v in order else None for v in values]


def test_cityscapes_things_without_an_instance_are_crowd(replica):
    dataset = build_dataset("cityscapes-panoptic", replica("cityscapes-panoptic"), "val")
    assert dataset.is_thing == [False] * 11 + [True] * 8
    ids, labels = answer(dataset[0], 14)
    assert labels[:7] == [None, 0, 11, 11, (11,), 13, (13,)]
    assert labels[7:] == [None, None, None, 18, 1, (12,), 0]         # caravans are void
    assert ids[1] == ids[13]
    assert len(set(ids) - {0}) == 9


@pytest.mark.parametrize("name", ["cityscapes", "cityscapes-panoptic"])
def test_images_of_cityscapes_have_the_ids_that_its_evaluator_looks_for(name, replica):
    dataset = build_dataset(name, replica(name), "val")
    assert dataset.image_ids[dataset[0][-1]] == "frankfurt_000000_000294"


def test_mapillary_has_65_classes_and_65_is_void(replica):
    dataset = build_dataset("mapillary", replica("mapillary"), "val")
    assert (dataset.classes[0], dataset.classes[64]) == ("Bird", "Ego Vehicle")
    assert dataset.category_ids == list(range(65))
    assert answer(dataset[0], 6)[1] == [0, 64, None, 13, 27, 30]


def test_voc_has_background_and_255_is_void_and_lists_say_which_photos(replica):
    dataset = build_dataset("voc", replica("voc"), "val")
    names = [dataset.classes[k] for k in (0, 1, 15, 20)]
    assert names == ["background", "aeroplane", "person", "tvmonitor"]
    assert answer(dataset[0], 6)[1] == [0, 1, None, 15, 20, None]
    train_set = build_dataset("voc", replica("voc"), "train")
    assert [item[-1] for item in train_set] == ["2007_000032", "2007_000039"]


def test_voc_is_laid_out_as_torchvision_does(replica):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.datasets.VOCSegmentation(replica("voc"), image_set="train")
    ours = build_dataset("voc", replica("voc"), "train")
    for (image, truth), item in zip(theirs, ours, strict=True):
        assert np.array_equal(np.array(image), item[0].permute(1, 2, 0))
        values = np.array(truth).astype(int)
        assert np.array_equal(values, data.to_label_map(*item[1:3], void=255))


@pytest.mark.parametrize("name", REPLICAS)
def test_a_dataset_travels_to_workers_that_are_spawned(name, replica):
    dataset = build_dataset(name, replica(name), "val")
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.classes == dataset.classes
    assert len(copy) == len(dataset)
    for ours, theirs in zip(dataset[0], copy[0], strict=True):
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs


# ----------------------------------------------------------------------------- splits without truth

@pytest.mark.parametrize("name, image, image_id", [
    ("cityscapes", "cityscapes/leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png",
     "berlin_000000_000019"),
    ("cityscapes-panoptic",
     "cityscapes/leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png",
     "berlin_000000_000019"),
    ("mapillary", "mapillary_vistas/testing/images/_1Gn_xkw7sa_i9GU4mkxxQ.jpg", None),
    ("coco-panoptic", "coco/test2017/000000000581.jpg", 581)])
def test_a_test_split_has_images_and_classes_and_no_truth(name, image, image_id, tmp_path):
    REPLICAS[name](tmp_path)
    write_image(tmp_path / image, (H, W), 5)
    dataset = build_dataset(name, tmp_path, "test")
    with_truth = build_dataset(name, tmp_path, "val")
    assert not dataset.has_truth
    assert len(dataset) == 1
    assert len(dataset.classes) == len(with_truth.classes)
    assert dataset.category_ids == with_truth.category_ids
    assert dataset.is_thing == with_truth.is_thing
    assert dataset.panoptic == with_truth.panoptic
    photo, segment_map, class_of, crowd, stem = dataset[0]
    assert photo.shape == (3, H, W)
    assert segment_map.shape == (H, W)
    assert not segment_map.any()
    assert (class_of, crowd, stem) == ({}, [], Path(image).stem)
    assert dataset.image_ids.get(stem) == image_id


@pytest.mark.parametrize("name", ["ade20k", "voc", "coco-stuff-10k", "folder", "panoptic"])
def test_other_datasets_have_no_test_split(name, tmp_path):
    with pytest.raises(UserError, match=f"{name}.*'test'.*train or val"):
        build_dataset(name, tmp_path, "test")


def test_a_test_split_without_images_is_named(replica):
    with pytest.raises(UserError, match="test2017.*Found in"):
        build_dataset("coco-panoptic", replica("coco-panoptic"), "test")


# ---------------------------------------------------------------------------- the truth, given back

class Oracle(nn.Module):
    """Answers the n-th image with the truth of the n-th item: a query for each segment, and two
    for nothing."""

    def __init__(self, dataset):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.mean = torch.tensor([124., 116., 104.]).view(3, 1, 1)
        self.size_divisibility = 0
        self.num_classes = len(dataset.classes)
        self.truth = (dataset[index] for index in range(len(dataset)))

    def forward(self, images):
        _, segment_map, class_of, _, _ = next(self.truth)
        assert images.shape[-2:] == segment_map.shape
        N = len(class_of)
        class_logits = torch.full((N + 2, self.num_classes + 1), -20.)
        class_logits[N:, -1] = 20.
        class_logits[range(N), list(class_of.values())] = 20.
        masks = segment_map == torch.tensor([*class_of, -1, -1])[:, None, None]
        return class_logits[None, None], torch.where(masks, 20., -20.)[None, None]


class One(torch.utils.data.Dataset):
    """One image of a dataset."""

    def __init__(self, dataset, index):
        for name in ("classes", "is_thing", "panoptic", "category_ids", "label_values", "image_ids",
                     "has_truth"):
            setattr(self, name, getattr(dataset, name))
        self.pairs = [dataset.pairs[index]]
        self.item = dataset[index]

    def __len__(self):
        return 1

    def __getitem__(self, index):
        if index:
            raise IndexError
        return self.item


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
@pytest.mark.parametrize("name", REPLICAS)
def test_truth_as_prediction_scores_100(name, task, replica, monkeypatch):
    monkeypatch.setattr(evaluate, "MaskFormer", Oracle)
    dataset = build_dataset(name, replica(name), "val")
    for index in range(len(dataset)):
        one = One(dataset, index)
        short = min(one.item[1].shape)
        if short > 100:                                  # 847 classes at 512 pixels take seconds
            continue
        metrics = evaluate.evaluate(Oracle(one), one, task=task, test_short_side=short,
                                    test_max_long_side=10 ** 4)
        expected = ["mIoU", "mACC", "pACC", "fwIoU", "PQ_st"]
        if name in PANOPTIC and task == "panoptic":
            expected += ["PQ", "SQ", "RQ", "PQ_th"]
        else:
            assert "PQ" not in metrics
        for key in expected:
            assert metrics[key] == pytest.approx(100), key
        occurring = {k for i, k in one.item[2].items() if (one.item[1] == i).any()}
        assert {k for k, iou in enumerate(metrics["IoU"]) if iou == iou} == occurring


@pytest.mark.parametrize("name", ["ade20k", "cityscapes"])
def test_the_semantic_classes_of_panoptic_truth_are_those_of_semantic_truth(name, replica):
    panoptic = build_dataset(f"{name}-panoptic", replica(f"{name}-panoptic"), "val")
    semantic = build_dataset(name, replica(name), "val")
    assert panoptic.classes == semantic.classes
    assert panoptic.label_values == semantic.label_values
    assert panoptic[0][-1] == semantic[0][-1]
    assert torch.equal(panoptic[0][0], semantic[0][0])


# ------------------------------------------------------------------------------------ wrong layouts

TOP_FOLDER = {"ade20k": "ADEChallengeData2016", "ade20k-panoptic": "ADEChallengeData2016",
              "ade20k-full": "ADE20K_2021_17_01", "coco-panoptic": "coco/",
              "coco-stuff-10k": "coco_stuff_10k", "cityscapes": "gtFine",
              "cityscapes-panoptic": "gtFine", "mapillary": "mapillary_vistas",
              "voc": "VOCdevkit"}


@pytest.mark.parametrize("name", REPLICAS)
def test_another_layout_is_answered_with_what_was_expected_and_what_was_found(name, tmp_path):
    (tmp_path / "holiday photos").mkdir()
    with pytest.raises(UserError) as error:
        build_dataset(name, tmp_path, "val")
    message = str(error.value)
    assert f"Found in {tmp_path}: holiday photos" in message
    assert TOP_FOLDER[name] in message.split("Expected below")[1]
    assert ("python tools/download.py" in message) == (name in data.DOWNLOADABLE)


def test_the_full_release_of_ade20k_is_not_the_scene_parsing_one_and_vice_versa(replica):
    with pytest.raises(UserError, match=r"Found in.*ADE20K_2021_17_01.*ADEChallengeData2016"):
        build_dataset("ade20k", replica("ade20k-full"), "val")
    with pytest.raises(UserError, match=r"Found in.*ADEChallengeData2016.*ADE20K_2021_17_01"):
        build_dataset("ade20k-full", replica("ade20k"), "val")


@pytest.mark.parametrize("name, gone", [
    ("ade20k-panoptic", "ADEChallengeData2016/annotations_instance"),
    ("ade20k", "ADEChallengeData2016/annotations/validation"),
    ("ade20k-full", "ADE20K_2021_17_01/images/ADE/validation"),
    ("coco-panoptic", "coco/annotations/panoptic_val2017"),
    ("coco-panoptic", "coco/val2017"),
    ("coco-panoptic", "coco/annotations/panoptic_val2017.json"),
    ("cityscapes", "cityscapes/gtFine/val"),
    ("cityscapes", "cityscapes/leftImg8bit"),
    ("mapillary", "mapillary_vistas/validation/labels"),
    ("voc", "VOCdevkit/VOC2012/SegmentationClass"),
    ("voc", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt")])
def test_what_is_missing_is_named(name, gone, tmp_path):
    REPLICAS[name](tmp_path)
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=rf"{path.name}.*No such file.*Found in"):
        build_dataset(name, tmp_path, "val")


@pytest.mark.parametrize("name, pattern", [
    ("ade20k", "ADEChallengeData2016/annotations/validation/*.png"),
    ("ade20k-panoptic", "ADEChallengeData2016/annotations_instance/validation/*.png"),
    ("ade20k-full", "ADE20K_2021_17_01/images/ADE/validation/*/*/*_seg.png"),
    ("coco-panoptic", "coco/val2017/*.jpg"),
    ("coco-panoptic", "coco/annotations/panoptic_val2017/*.png"),
    ("cityscapes", "cityscapes/gtFine/val/*/*_labelIds.png"),
    ("cityscapes-panoptic", "cityscapes/gtFine/val/*/*_instanceIds.png"),
    ("mapillary", "mapillary_vistas/validation/labels/*.png"),
    ("voc", "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png")])
def test_a_missing_file_is_named_when_the_dataset_is_built(name, pattern, tmp_path):
    REPLICAS[name](tmp_path)
    path = next(tmp_path.glob(pattern))
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name}: no such file \(1 missing"):
        build_dataset(name, tmp_path, "val")


@pytest.mark.parametrize("name, pattern, value", [
    ("ade20k", "ADEChallengeData2016/annotations/validation/*.png", 151),
    ("ade20k-panoptic", "ADEChallengeData2016/annotations/validation/*.png", 151),
    ("mapillary", "mapillary_vistas/validation/labels/*.png", 66),
    ("voc", "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png", 21)])
def test_a_value_that_no_class_has_is_named_with_its_file(name, pattern, value, tmp_path):
    REPLICAS[name](tmp_path)
    path = next(tmp_path.glob(pattern))
    write_palette_png(path, columns(1, value))
    with pytest.raises(UserError, match=rf"{path.name}.*\[{value}\]"):
        build_dataset(name, tmp_path, "val")[0]


def test_a_category_outside_the_hundred_is_named_with_its_file(tmp_path):
    make_ade20k_panoptic(tmp_path)
    path = next(tmp_path.glob("ADEChallengeData2016/annotations_instance/validation/*.png"))
    category = columns(0, 101)
    write_png(path, np.stack([category] * 3, -1))
    with pytest.raises(UserError, match=rf"{path.name}.*101 of 100"):
        build_dataset("ade20k-panoptic", tmp_path, "val")[0]


# ----------------------------------------------------------------------------------------- the page

@pytest.mark.parametrize("name", [*REPLICAS, "shapes"])
def test_the_page_says_the_number_of_classes_and_things(name, replica):
    dataset = build_dataset(name, None if name == "shapes" else replica(name), "val")
    _, classes, things, *_ = table(1)[name]
    assert int(classes) == len(dataset.classes)
    assert things == (str(sum(dataset.is_thing)) if dataset.panoptic else "")


# ----------------------------------------------------------------------------------------- training

TINY = ("--backbone resnet10t --no-pretrained --queries 8 --decoder-layers 1 --encoder-layers 0 "
        "--dim 32 --heads 4 --ffn-dim 32 --steps 2 --batch-size 4 --short-side 64 "
        "--test-short-side 64 --workers 0").split()


@pytest.mark.parametrize("name, flags", [("cityscapes", "--crop 64 64"),
                                         ("ade20k-panoptic", "--crop 64 64"),
                                         ("coco-panoptic", "--augmentation detr")])
def test_a_replica_is_trained_on_and_scored(name, flags, replica, tmp_path):
    train.main(["--dataset", name, "--data-root", str(replica(name)),
                "--output", str(tmp_path / "run"), *TINY, *flags.split()])
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    names = ["mIoU", "PQ_st"]
    if name in PANOPTIC:
        names += ["PQ", "SQ", "RQ"]
    assert all(0 <= metrics[key] <= 100 for key in names)
    assert ("PQ" in metrics) == (name in PANOPTIC)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses and np.isfinite(losses).all()
