"""What is guaranteed of every dataset by name, on small replicas of what its publisher ships."""
import errno
import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import evaluate
import run
import train
from data import build_dataset
from test_data import write_image, write_png

ROOT = Path(__file__).parent.parent
H, W = 26, 42  # W is the least common multiple of 14, 7, 6, 3 and 2, as columns go


def columns(*values, size=(H, W), dtype=np.uint8):
    """A map of equally wide columns with these values."""
    return np.repeat(np.array(values, dtype)[np.arange(size[1]) * len(values) // size[1]][None], size[0], 0)


def answer(item, n):
    """The n columns of an item -> the ids; for each the class, None for void, (class,) for crowd."""
    _, segment_map, class_of, crowd, _ = item
    ids = [segment_map[0, -(-k * segment_map.shape[1] // n)].item() for k in range(n)]
    assert torch.equal(segment_map, torch.from_numpy(columns(*ids, size=segment_map.shape, dtype=np.int32)))
    labels = [None if i == 0 else (class_of[i],) if i in crowd else class_of[i] for i in ids]
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


# ------------------------------------------------------------------ replicas

ADE_NAMES = ["wall", "building, edifice", "sky", "floor, flooring", "tree", "ceiling", "road, route", "bed",
             "windowpane, window", "grass", "cabinet", "sidewalk, pavement",
             "person, individual, someone, somebody, mortal, soul", "earth, ground", "door, double door", "table",
             "mountain, mount", "plant, flora, plant life", "curtain, drape, drapery, mantle, pall", "chair"]
ADE_THINGS = [int(k) for k in """
    8 9 11 13 15 16 19 20 21 23 24 25 28 31 32 33 34 36 37 38 39 40 42 43 44 45 46 48 50 51 54 56 57 58 59 63 65 66
    67 68 70 71 72 73 74 75 76 77 79 81 82 83 84 86 87 88 89 90 91 93 94 96 98 99 103 104 105 108 109 111 112 113
    116 117 119 120 121 122 124 125 126 127 128 130 131 133 134 135 136 137 138 139 140 143 144 145 147 148 149
    150""".split()]  # the k-th is category k of the instance PNGs
ADE_VALUES = [1, 4, 13, 13, 13, 0, 20, 1, 0, 150, 150, 3, 1, 8]
ADE_INSTANCES = [(0, 0), (0, 0), (4, 1), (4, 2), (0, 0), (0, 0), (8, 1), (8, 2), (4, 3), (100, 1), (100, 255), (0, 0),
                 (1, 1), (1, 1)]  # (category, id): persons, chairs, one over wall, one over void, flags, bed over wall


def make_ade20k(root):
    base = root / "ADEChallengeData2016"
    rows = [f"{k}\t0.{1577 - k:04d}\t{11664 - k}\t{1172 - k}\t{name}"
            for k, name in enumerate(ADE_NAMES + [f"name {k}, synonym" for k in range(21, 150)] + ["flag"], 1)]
    write_text(base / "objectInfo150.txt", "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    write_text(base / "sceneCategories.txt", "ADE_train_00000001 airport_terminal\n")
    for part, short, numbers in (("training", "train", (1, 2)), ("validation", "val", (1,))):
        for n in numbers:
            name = f"ADE_{short}_{n:08d}"
            write_image(base / f"images/{part}/{name}.jpg", (H, W), n)
            write_png(base / f"annotations/{part}/{name}.png", columns(*ADE_VALUES))


def make_ade20k_panoptic(root):
    make_ade20k(root)
    base = root / "ADEChallengeData2016"
    for path in list(base.glob("annotations/*/*.png")):
        category, number = (columns(*values) for values in zip(*ADE_INSTANCES))
        write_png(base / "annotations_instance" / path.relative_to(base / "annotations"),
                  np.stack([category, number, np.zeros_like(number)], -1))


FULL_NAMES = [f"name {k}, synonym" for k in range(1, 301)]  # value v of a _seg.png is FULL_NAMES[v - 1]
FULL_NAMES[0], FULL_NAMES[255] = "screen, silver screen", "screen, CRT screen"
FULL_VALUES = [0, 1, 2, 300, 3, 4, 256]


def make_ade20k_full(root):
    """Kept are the classes that are objects in training and in validation: 1, 256 and 300. 2 is a part wherever it
    is, 3 is in training alone, 4 in validation alone."""
    scenes = [("training", "urban", "street", "ADE_train_00000001", (H, W)),
              ("training", "sports_and_leisure", "basketball_court/indoor", "ADE_train_00000002", (600, 714)),
              ("validation", "urban", "street", "ADE_val_00000001", (H, W)),
              ("validation", "home_or_hotel", "attic", "ADE_val_00000002", (714, 600))]
    present, parts = np.zeros((300, 4)), np.zeros((300, 4))
    present[[0, 299]] = 3
    parts[299, 0] = parts[299, 2] = 1                                    # now and then a part
    present[255, 1] = present[255, 2] = 1
    present[1], parts[1] = 2, 2
    present[2, :2], present[3, 2:] = 1, 5
    for part, group, scene, name, size in scenes:
        base = root / "ADE20K_2021_17_01/images/ADE" / part / group / scene
        write_image(base / f"{name}.jpg", size)
        values = columns(*FULL_VALUES, size=size, dtype=np.int32)
        instances = columns(*range(40, 47), size=size)
        rgb = np.stack([values // 256 * 10, values % 256, instances], -1)
        write_png(base / f"{name}_seg.png", rgb.astype(np.uint8))
        write_png(base / f"{name}_parts_1.png", np.stack([columns(2, size=size)] * 3, -1))
        write_png(base / name / f"instance_000_{name}.png", columns(0, 255, size=size))
        write_text(base / f"{name}.json", "{}")
    index = {"filename": [f"{name}.jpg" for *_, name, _ in scenes],
             "folder": [f"ADE20K_2021_17_01/images/ADE/{part}/{group}/{scene}" for part, group, scene, *_ in scenes],
             "scene": [f"/{scene}" for _, _, scene, *_ in scenes], "objectPresence": present, "objectIsPart": parts,
             "objectnames": FULL_NAMES, "objectcounts": present.sum(1), "proportionClassIsPart": np.zeros(300)}
    (root / "ADE20K_2021_17_01/index_ade20k.pkl").write_bytes(pickle.dumps(index))


ABSENT = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)  # ids of COCO that no image has
COCO_THINGS = [i for i in range(1, 91) if i not in ABSENT]
COCO_STUFF = [92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151,
              154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201)]
COCO_SEGMENTS = [(3937500, 1, 0), (4260062, 1, 0), (7, 90, 0), (256, 1, 1), (16_000_001, 200, 0)]  # id, category, crowd
COCO_IDS = [3937500, 4260062, 0, 7, 256, 16_000_001]


def make_coco_panoptic(root, maps="annotations/"):
    categories = [{"id": i, "name": "person" if i == 1 else f"name {i}", "isthing": int(i <= 90),
                   "supercategory": "any", "color": [i, 0, 0]} for i in COCO_THINGS + COCO_STUFF]
    for split, numbers in (("train", (9, 25)), ("val", (139,))):
        content = {"info": {}, "licenses": [], "images": [], "annotations": [], "categories": categories}
        for n in numbers:
            write_image(root / f"coco/{split}2017/{n:012d}.jpg", (H, W), n)
            write_png(root / f"coco/{maps}panoptic_{split}2017/{n:012d}.png",
                      rgb_of(columns(*COCO_IDS, dtype=np.int64)))
            content["images"].append({"id": n, "file_name": f"{n:012d}.jpg", "height": H, "width": W})
            segments = [{"id": i, "category_id": c, "iscrowd": crowd, "area": H * W // 6, "bbox": [0, 0, W // 6, H]}
                        for i, c, crowd in COCO_SEGMENTS]
            content["annotations"].append({"image_id": n, "file_name": f"{n:012d}.png", "segments_info": segments})
        write_text(root / f"coco/annotations/panoptic_{split}2017.json", json.dumps(content))


STUFF_VALUES = [0, 1, 11, 13, 182, 92]  # of the .mat files
STUFF_NAMES = {"test": ["COCO_train2014_000000000077"],
               "train": ["COCO_train2014_000000000109", "COCO_train2014_000000000400"]}


def make_coco_stuff(root):
    """What is prepared and what is shipped have these in common."""
    base = root / "coco/coco_stuff_10k"
    for part, names in STUFF_NAMES.items():
        write_text(base / f"imageLists/{part}.txt", "\n".join(names) + "\n")
        for n, name in enumerate(names):
            write_image(base / f"images/{name}.jpg", (H, W), n)
    write_text(base / "imageLists/all.txt", "\n".join(sum(STUFF_NAMES.values(), [])) + "\n")
    return base


def make_coco_stuff_prepared(root):
    base = make_coco_stuff(root)
    for part, names in STUFF_NAMES.items():
        for name in names:
            shutil.copytree(base / "images", base / "images_detectron2" / part, dirs_exist_ok=True,
                            ignore=lambda folder, files: [file for file in files if Path(file).stem not in names])
            write_png(base / f"annotations_detectron2/{part}/{name}.png", columns(255, 0, 10, 11, 170, 80))


def make_coco_stuff_mat(root, dtype=np.uint16):
    h5py = pytest.importorskip("h5py")
    base = make_coco_stuff(root)
    (base / "annotations").mkdir(parents=True)
    for name in sum(STUFF_NAMES.values(), []):
        with h5py.File(base / f"annotations/{name}.mat", "w", userblock_size=512) as file:
            file["S"] = columns(*STUFF_VALUES).T.astype(dtype)
            file["regionLabelsStuff"] = np.zeros((1, 3))


CITYSCAPES = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
              20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
              27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
CITY_LABELS = [0, 1, 4, 7, 8, 10, 11, 23, 24, 29, 31, 33, 30, 255]  # 255: a licence plate, -1
CITY_INSTANCES = [4, 7, 24000, 24001, 24, 26000, 26, 29000, 29, 30001, 33005, 8, 25, 7]


def make_cityscapes(root):
    base = root / "cityscapes"
    for part, city, numbers in (("train", "aachen", (19,)), ("train", "bochum", (20,)), ("val", "frankfurt", (294,)),
                                ("test", "berlin", (19,))):
        for n in numbers:
            name = f"{city}_000000_{n:06d}"
            write_image(base / f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png", (H, W), n)
            truth = base / f"gtFine/{part}/{city}/{name}_gtFine"
            write_png(Path(f"{truth}_labelIds.png"), columns(*CITY_LABELS))
            write_png(Path(f"{truth}_instanceIds.png"), columns(*CITY_INSTANCES, dtype=np.uint16))
            write_image(Path(f"{truth}_color.png"), (H, W))
            write_text(Path(f"{truth}_polygons.json"), "{}")


def make_mapillary(root):
    base = root / "mapillary_vistas"
    labels = [{"name": f"object--thing-{k}", "readable": f"Name {k}", "instances": k % 2 == 0, "evaluate": True,
               "color": [k, 0, 0]} for k in range(65)]
    labels[0] |= {"name": "animal--bird", "readable": "Bird"}
    labels.append({"name": "void--unlabeled", "readable": "Unlabeled", "instances": False, "evaluate": False,
                   "color": [0, 0, 0]})
    write_text(base / "config.json", json.dumps({"labels": labels, "version": "1.2", "folder_structure": "{split}"}))
    for part in ("training", "validation"):
        write_image(base / f"{part}/images/_1Gn_xkw7sa_i9GU4mkxxQ.jpg", (H, W), 3)
        write_palette_png(base / f"{part}/labels/_1Gn_xkw7sa_i9GU4mkxxQ.png", columns(0, 64, 65, 13, 27, 30))
        write_png(base / f"{part}/instances/_1Gn_xkw7sa_i9GU4mkxxQ.png", columns(256, dtype=np.uint16))


def make_voc(root):
    base = root / "VOCdevkit/VOC2012"
    lists = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}
    for part, names in {**lists, "trainval": sum(lists.values(), [])}.items():
        write_text(base / f"ImageSets/Segmentation/{part}.txt", "\n".join(names) + "\n")
        for n, name in enumerate(names):
            write_image(base / f"JPEGImages/{name}.jpg", (H, W), n)
            write_palette_png(base / f"SegmentationClass/{name}.png", columns(0, 1, 255, 15, 20, 255))
            write_palette_png(base / f"SegmentationObject/{name}.png", columns(0, 1, 255, 2, 3, 255))
    write_image(base / "JPEGImages/2007_000027.jpg", (H, W))             # most photos have no segmentation


REPLICAS = {"ade20k": make_ade20k, "ade20k-panoptic": make_ade20k_panoptic, "ade20k-full": make_ade20k_full,
            "coco-panoptic": make_coco_panoptic, "coco-stuff-10k": make_coco_stuff_prepared,
            "cityscapes": make_cityscapes, "cityscapes-panoptic": make_cityscapes, "mapillary": make_mapillary,
            "voc": make_voc}
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


# ------------------------------------------------------------------ facts of each

@pytest.mark.parametrize("name, classes, things", [
    ("ade20k", 150, None), ("ade20k-panoptic", 150, 100), ("ade20k-full", 3, 0), ("coco-panoptic", 133, 80),
    ("coco-stuff-10k", 171, None), ("cityscapes", 19, None), ("cityscapes-panoptic", 19, 8), ("mapillary", 65, None),
    ("voc", 21, None)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_dataset_has_its_classes_names_and_ids(name, classes, things, split, replica):
    dataset = build_dataset(name, replica(name), split)
    K = len(dataset.classes)
    assert K == len(set(dataset.classes)) == len(dataset.is_thing) == len(dataset.category_ids) == classes
    assert len(set(dataset.category_ids)) == K and all(type(i) is int for i in dataset.category_ids)
    assert dataset.panoptic == (name in PANOPTIC)
    if name in PANOPTIC:
        assert sum(dataset.is_thing) == things
    names = [dataset[i][-1] for i in range(len(dataset))]
    assert len(set(names)) == len(dataset) and not any(re.search(r"[/\\]", one) for one in names)
    assert len(dataset) == (1 if split == "val" and name != "ade20k-full" else 1 if name == "mapillary" else 2)


@pytest.mark.parametrize("name", REPLICAS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_an_item_is_an_image_a_map_the_class_of_each_id_crowd_and_a_name(name, split, replica):
    dataset = build_dataset(name, replica(name), split)
    for index in range(len(dataset)):
        image, segment_map, class_of, crowd, stem = dataset[index]
        assert image.dtype == torch.uint8 and image.shape == (3, *segment_map.shape)
        assert segment_map.dtype in (torch.uint8, torch.int32)
        assert set(segment_map.unique().tolist()) - {0} <= set(class_of) and set(crowd) <= set(class_of)
        assert all(0 <= k < len(dataset.classes) for k in class_of.values()) and min(class_of) >= 1
        assert type(stem) is str and stem
        assert all(type(value) is int for value in [*class_of, *class_of.values(), *crowd])


def test_ade20k_value_v_is_class_v_minus_1_and_names_come_from_its_list(replica):
    dataset = build_dataset("ade20k", replica("ade20k"), "val")
    assert dataset.classes[:13] == ["wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane",
                                    "grass", "cabinet", "sidewalk", "person"] and dataset.classes[149] == "flag"
    assert dataset.category_ids == list(range(1, 151))
    ids, labels = answer(dataset[0], 14)
    assert labels == [None if v == 0 else v - 1 for v in ADE_VALUES] and dataset[0][-1] == "ADE_val_00000001"


@pytest.mark.parametrize("end", ["  \r\n", "\t\n", "\n\n"])
def test_the_list_of_ade20k_classes_may_have_trailing_white_space(end, tmp_path):
    make_ade20k(tmp_path)
    path = tmp_path / "ADEChallengeData2016/objectInfo150.txt"
    path.write_bytes(path.read_text().replace("\n", end).encode())
    classes = build_dataset("ade20k", tmp_path, "val").classes
    assert len(classes) == 150 and (classes[0], classes[1], classes[149]) == ("wall", "building", "flag")


def test_the_things_of_ade20k_are_the_hundred_of_the_instance_challenge(replica):
    dataset = build_dataset("ade20k-panoptic", replica("ade20k-panoptic"), "val")
    assert [k + 1 for k, thing in enumerate(dataset.is_thing) if thing] == ADE_THINGS
    assert dataset.classes[12] == "person" and dataset.is_thing[12] and not dataset.is_thing[0]


def test_ade20k_things_lie_over_stuff_and_thing_pixels_without_an_instance_are_void(replica):
    dataset = build_dataset("ade20k-panoptic", replica("ade20k-panoptic"), "val")
    ids, labels = answer(dataset[0], 14)
    assert labels == [0, 3, 12, 12, None, None, 19, 19, 12, 149, 149, 2, 7, 7]
    assert ids[12] == ids[13] and ids[0] not in (ids[7], ids[12])
    things = [i for i, k in zip(ids, labels) if k in (12, 19, 149)]
    assert len(set(things)) == len(things) == 7                          # (category, number) tells instances apart
    assert dataset[0][3] == []


def test_every_category_of_the_instance_pngs_is_its_thing(tmp_path):
    make_ade20k_panoptic(tmp_path)
    path = next(tmp_path.glob("ADEChallengeData2016/annotations_instance/validation/*.png"))
    for start in range(1, 101, 10):
        categories = range(start, start + 10)
        R = columns(*categories, size=(H, 50))
        write_png(path, np.stack([R, np.ones_like(R), np.zeros_like(R)], -1))
        write_png(Path(str(path).replace("annotations_instance", "annotations")), columns(1, size=(H, 50)))
        write_image(tmp_path / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg", (H, 50))
        _, labels = answer(build_dataset("ade20k-panoptic", tmp_path, "val")[0], 10)
        assert [k + 1 for k in labels] == [ADE_THINGS[c - 1] for c in categories]


def test_ade20k_full_keeps_the_objects_of_both_splits(replica):
    for split in ("train", "val"):
        dataset = build_dataset("ade20k-full", replica("ade20k-full"), split)
        assert sorted(dataset.category_ids) == [1, 256, 300] and len(dataset) == 2
        item = next(dataset[i] for i in range(2) if dataset[i][0].shape[1:] == (H, W))
        ids, labels = answer(item, 7)
        values = [None if k is None else dataset.category_ids[k] for k in labels]
        assert values == [None, 1, None, 300, None, None, 256]           # parts and the rest are void
        assert [dataset.classes[labels[c]].split(",")[0] for c in (1, 3, 6)] == ["screen", "name 300", "screen"]
        assert not dataset.panoptic and ids[1] == labels[1] + 1


def test_the_index_of_ade20k_full_may_come_from_an_older_numpy_and_runs_no_code(tmp_path):
    make_ade20k_full(tmp_path)
    path = tmp_path / "ADE20K_2021_17_01/index_ade20k.pkl"
    index = pickle.loads(path.read_bytes())
    index["objectnames"] = np.array(index["objectnames"], dtype=object)
    path.write_bytes(pickle.dumps(index, 2).replace(b"numpy._core.", b"numpy.core."))
    dataset = build_dataset("ade20k-full", tmp_path, "val")
    assert sorted(dataset.category_ids) == [1, 256, 300]
    assert all(type(name) is str for name in dataset.classes)
    path.write_bytes(pickle.dumps(Evil(tmp_path)))
    with pytest.raises(Exception, match="index_ade20k|neither|mkdir"):
        build_dataset("ade20k-full", tmp_path, "val")
    assert not (tmp_path / "evil").exists()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, root):
        self.root = root

    def __reduce__(self):
        return os.mkdir, (str(self.root / "evil"),)


def test_large_images_of_ade20k_full_are_shrunk_to_a_short_side_of_512_and_small_ones_are_kept(replica):
    for split, size in (("train", (512, 609)), ("val", (609, 512))):
        dataset = build_dataset("ade20k-full", replica("ade20k-full"), split)
        sizes = {tuple(dataset[i][0].shape[1:]): i for i in range(2)}
        assert set(sizes) == {(H, W), size}
        _, segment_map, class_of, _, _ = dataset[sizes[size]]
        values = [0 if i == 0 else dataset.category_ids[class_of[i]] for i in segment_map[200].tolist()]
        starts = [x for x in range(1, size[1]) if values[x] != values[x - 1]]
        assert [values[x] for x in starts] == [1, 0, 300, 0, 256]        # no values between: nearest
        assert starts == pytest.approx([size[1] * k / 7 for k in (1, 2, 3, 4, 6)], abs=2)


@pytest.mark.parametrize("maps", ["annotations/", ""])
def test_coco_panoptic_is_read_from_either_place_of_its_pngs(maps, tmp_path):
    make_coco_panoptic(tmp_path, maps)
    dataset = build_dataset("coco-panoptic", tmp_path, "val")
    assert dataset.category_ids == COCO_THINGS + COCO_STUFF and dataset.is_thing == [True] * 80 + [False] * 53
    assert dataset.classes[0] == "person"
    ids, labels = answer(dataset[0], 6)
    assert labels == [0, 0, None, 79, (0,), 132] and len(set(ids)) == 6
    assert dataset[0][-1] == "000000000139" and dataset.image_ids["000000000139"] == 139
    assert [item[-1] for item in build_dataset("coco-panoptic", tmp_path, "train")] == ["000000000009", "000000000025"]


def check_coco_stuff(dataset):
    ids = [i for i in range(1, 183) if i not in ABSENT]
    assert dataset.category_ids == ids and not dataset.panoptic
    assert len(set(dataset.classes)) == 171
    assert answer(dataset[0], 6)[1] == [None, 0, 10, 11, 170, 80]
    assert ids[80] == 92 and dataset[0][-1] == "COCO_train2014_000000000077"


def test_prepared_annotations_of_coco_stuff_10k_are_read(replica):
    check_coco_stuff(build_dataset("coco-stuff-10k", replica("coco-stuff-10k"), "val"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_mat_files_of_coco_stuff_10k_are_read_transposed(dtype, tmp_path):
    make_coco_stuff_mat(tmp_path, dtype)
    check_coco_stuff(build_dataset("coco-stuff-10k", tmp_path, "val"))
    assert [item[-1] for item in build_dataset("coco-stuff-10k", tmp_path, "train")] == STUFF_NAMES["train"]


def test_mat_files_without_h5py_say_what_to_install(tmp_path, monkeypatch):
    make_coco_stuff_mat(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises((ImportError, data.UserError), match="pip install h5py"):
        build_dataset("coco-stuff-10k", tmp_path, "val")[0]


def test_a_mat_value_that_no_class_has_is_named(tmp_path):
    make_coco_stuff_mat(tmp_path)
    import h5py
    for path in tmp_path.glob("coco/coco_stuff_10k/annotations/*077.mat"):
        with h5py.File(path, "r+") as file:
            file["S"][:3] = 26
    with pytest.raises(ValueError, match=r"077.mat.*26"):
        build_dataset("coco-stuff-10k", tmp_path, "val")[0]


def test_cityscapes_has_19_classes_and_all_other_labels_are_void(replica):
    dataset = build_dataset("cityscapes", replica("cityscapes"), "val")
    assert dataset.classes == list(CITYSCAPES.values()) and dataset.category_ids == list(CITYSCAPES)
    order = list(CITYSCAPES)
    assert answer(dataset[0], 14)[1] == [order.index(v) if v in order else None for v in CITY_LABELS]
    assert dataset[0][-1].startswith("frankfurt_000000_000294")


def test_every_label_id_of_cityscapes_is_its_class(tmp_path):
    make_cityscapes(tmp_path)
    path = tmp_path / "cityscapes/gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png"
    order = list(CITYSCAPES)
    for ids in (range(0, 17), range(17, 34)):
        write_png(path, columns(*ids, size=(H, 34)))
        write_image(tmp_path / "cityscapes/leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png", (H, 34))
        labels = answer(build_dataset("cityscapes", tmp_path, "val")[0], 17)[1]
        assert labels == [order.index(v) if v in order else None for v in ids]


def test_cityscapes_things_without_an_instance_are_crowd(replica):
    dataset = build_dataset("cityscapes-panoptic", replica("cityscapes-panoptic"), "val")
    assert dataset.classes == list(CITYSCAPES.values()) and dataset.category_ids == list(CITYSCAPES)
    assert dataset.is_thing == [False] * 11 + [True] * 8
    ids, labels = answer(dataset[0], 14)
    assert labels == [None, 0, 11, 11, (11,), 13, (13,), None, None, None, 18, 1, (12,), 0]   # caravans are void
    assert ids[1] == ids[13] and len(set(ids) - {0}) == 9


def test_mapillary_has_65_classes_and_65_is_void(replica):
    dataset = build_dataset("mapillary", replica("mapillary"), "val")
    assert dataset.classes[0] in ("Bird", "animal--bird") and "nlabeled" not in " ".join(dataset.classes)
    assert dataset.category_ids == list(range(65))
    assert answer(dataset[0], 6)[1] == [0, 64, None, 13, 27, 30]


def test_voc_has_background_and_255_is_void_and_lists_say_which_photos(replica):
    dataset = build_dataset("voc", replica("voc"), "val")
    assert [dataset.classes[k] for k in (0, 1, 15, 20)] == ["background", "aeroplane", "person", "tvmonitor"]
    assert answer(dataset[0], 6)[1] == [0, 1, None, 15, 20, None]
    assert [item[-1] for item in build_dataset("voc", replica("voc"), "train")] == ["2007_000032", "2007_000039"]


def test_voc_is_laid_out_as_torchvision_does(replica):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.datasets.VOCSegmentation(replica("voc"), image_set="train")
    ours = build_dataset("voc", replica("voc"), "train")
    for (image, truth), item in zip(theirs, ours, strict=True):
        assert np.array_equal(np.array(image), item[0].permute(1, 2, 0))
        values = np.array(truth).astype(int)
        assert np.array_equal(values, data.label_map(*item[1:3], void=255))


@pytest.mark.parametrize("name", REPLICAS)
def test_a_dataset_travels_to_workers_that_are_spawned(name, replica):
    dataset = build_dataset(name, replica(name), "val")
    copy = pickle.loads(pickle.dumps(dataset))
    for ours, theirs in zip(dataset[0], copy[0], strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert copy.classes == dataset.classes and len(copy) == len(dataset)


def test_spawned_workers_read_what_one_process_reads(replica):
    dataset = build_dataset("ade20k-full", replica("ade20k-full"), "train")
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for index, item in enumerate(loader):
        assert all(torch.equal(item[i], dataset[index][i]) for i in (0, 1)) and item[2] == dataset[index][2]


# ------------------------------------------------------------------ the truth, given back

class Oracle(nn.Module):
    """Answers the n-th image with the truth of the n-th item: a query for each segment, two for nothing."""

    def __init__(self, dataset):
        super().__init__()
        self.backbone, self.size_divisibility, self.num_classes = nn.Module(), 0, len(dataset.classes)
        self.backbone.mean = torch.tensor([124., 116., 104.]).view(3, 1, 1)
        self.truth = (dataset[index] for index in range(len(dataset)))

    def forward(self, images):
        _, segment_map, class_of, _, _ = next(self.truth)
        assert images.shape[-2:] == segment_map.shape
        class_logits = torch.full((len(class_of) + 2, self.num_classes + 1), -20.)
        class_logits[len(class_of):, -1] = 20.
        class_logits[range(len(class_of)), list(class_of.values())] = 20.
        masks = segment_map == torch.tensor([*class_of, -1, -1])[:, None, None]
        return class_logits[None, None], torch.where(masks, 20., -20.)[None, None]


class One(torch.utils.data.Dataset):
    """One image of a dataset."""

    def __init__(self, dataset, index):
        self.__dict__ |= {name: getattr(dataset, name) for name in
                          ("classes", "is_thing", "panoptic", "category_ids", "image_ids")}
        self.item = dataset[index]

    def __len__(self):
        return 1

    def __getitem__(self, index):
        if index:
            raise IndexError
        return self.item


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
@pytest.mark.parametrize("name", REPLICAS)
def test_truth_as_prediction_scores_100(name, task, replica, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "MaskFormer", Oracle)
    dataset = build_dataset(name, replica(name), "val")
    for index in range(len(dataset)):
        one = One(dataset, index)
        short = min(one.item[1].shape)
        metrics = evaluate.evaluate(Oracle(one), one, task=task, test_short_side=short, test_max_long_side=10 ** 4)
        expected = ["mIoU", "mACC", "pACC", "fwIoU", "PQ_st"]
        if name in PANOPTIC and task == "panoptic":
            expected += ["PQ", "SQ", "RQ", "PQ_th"]
        else:
            assert "PQ" not in metrics
        assert [metrics[key] for key in expected] == pytest.approx([100] * len(expected))
        occurring = {k for i, k in one.item[2].items() if (one.item[1] == i).any()}
        assert {k for k, iou in enumerate(metrics["IoU"]) if iou == iou} == occurring


@pytest.mark.parametrize("name", PANOPTIC)
def test_the_semantic_classes_of_panoptic_truth_are_those_of_semantic_truth(name, replica):
    if name not in ("ade20k-panoptic", "cityscapes-panoptic"):
        pytest.skip("has no semantic form of its own")
    panoptic = build_dataset(name, replica(name), "val")
    semantic = build_dataset(name.removesuffix("-panoptic"), replica(name), "val")
    assert panoptic.classes == semantic.classes and panoptic.category_ids == semantic.category_ids
    assert panoptic[0][-1] == semantic[0][-1] and torch.equal(panoptic[0][0], semantic[0][0])


# ------------------------------------------------------------------ wrong layouts

@pytest.mark.parametrize("name", REPLICAS)
def test_another_layout_is_answered_with_what_was_expected_and_what_was_found(name, tmp_path):
    (tmp_path / "holiday photos").mkdir()
    with pytest.raises((FileNotFoundError, data.UserError)) as error:
        build_dataset(name, tmp_path, "val")
    message, top = str(error.value), {"ade20k": "ADEChallengeData2016", "ade20k-panoptic": "ADEChallengeData2016",
                                      "ade20k-full": "ADE20K_2021_17_01", "coco-panoptic": "coco",
                                      "coco-stuff-10k": "coco_stuff_10k", "cityscapes": "gtFine",
                                      "cityscapes-panoptic": "gtFine", "mapillary": "mapillary_vistas",
                                      "voc": "VOCdevkit"}[name]
    assert "holiday photos" in message and top in message and str(tmp_path) in message


def test_the_full_release_of_ade20k_is_not_the_scene_parsing_one_and_vice_versa(replica):
    with pytest.raises((FileNotFoundError, data.UserError), match="ADEChallengeData2016") as error:
        build_dataset("ade20k", replica("ade20k-full"), "val")
    assert "ADE20K_2021_17_01" in str(error.value).split("Found in")[1]
    with pytest.raises((FileNotFoundError, data.UserError), match="index_ade20k.pkl") as error:
        build_dataset("ade20k-full", replica("ade20k"), "val")
    assert "ADEChallengeData2016" in str(error.value).split("Found in")[1]


@pytest.mark.parametrize("name, gone, named", [
    ("ade20k-panoptic", "ADEChallengeData2016/annotations_instance", "annotations_instance"),
    ("ade20k", "ADEChallengeData2016/annotations/validation", "annotations"),
    ("ade20k-full", "ADE20K_2021_17_01/index_ade20k.pkl", "index_ade20k.pkl"),
    ("coco-panoptic", "coco/annotations/panoptic_val2017", "panoptic_{train,val}2017"),
    ("coco-panoptic", "coco/val2017", "{train2017,val2017}"),
    ("coco-panoptic", "coco/annotations/panoptic_val2017.json", "panoptic_{train,val}2017.json"),
    ("cityscapes", "cityscapes/gtFine/val", "gtFine"),
    ("cityscapes", "cityscapes/leftImg8bit", "leftImg8bit"),
    ("mapillary", "mapillary_vistas/config.json", "config.json"),
    ("voc", "VOCdevkit/VOC2012/SegmentationClass", "SegmentationClass"),
    ("voc", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", "ImageSets")])
def test_what_is_missing_is_named(name, gone, named, tmp_path):
    REPLICAS[name](tmp_path)
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises((FileNotFoundError, data.UserError)) as error:
        build_dataset(name, tmp_path, "val")
    message = str(error.value)
    assert path.name in message or named in message
    assert "Found in" in message or "no annotation" in message


@pytest.mark.parametrize("name, pattern", [
    ("ade20k", "ADEChallengeData2016/annotations/validation/*.png"),
    ("ade20k-panoptic", "ADEChallengeData2016/annotations_instance/validation/*.png"),
    ("cityscapes", "cityscapes/gtFine/val/*/*_labelIds.png"),
    ("cityscapes-panoptic", "cityscapes/gtFine/val/*/*_instanceIds.png"),
    ("mapillary", "mapillary_vistas/validation/labels/*.png"),
    ("voc", "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png")])
def test_an_image_without_its_annotation_is_named(name, pattern, tmp_path):
    REPLICAS[name](tmp_path)
    path = next(tmp_path.glob(pattern))
    path.unlink()
    with pytest.raises((FileNotFoundError, data.UserError), match=re.escape(path.name)):
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
    with pytest.raises(ValueError, match=rf"{path.name}.*\[{value}\]"):
        build_dataset(name, tmp_path, "val")[0]


def test_a_category_outside_the_hundred_is_named_with_its_file(tmp_path):
    make_ade20k_panoptic(tmp_path)
    path = next(tmp_path.glob("ADEChallengeData2016/annotations_instance/validation/*.png"))
    R = columns(0, 101)
    write_png(path, np.stack([R, R, R], -1))
    with pytest.raises(ValueError, match=rf"{path.name}.*101"):
        build_dataset("ade20k-panoptic", tmp_path, "val")[0]


# ------------------------------------------------------------------ download

class Files(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; `server.cut` closes the next connection after so many bytes."""

    def do_GET(self):
        server, content = self.server, self.server.files.get(self.path.lstrip("/"))
        server.asked.append(self.path.lstrip("/"))
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        if not server.without_length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        cut, server.cut = server.cut, None
        self.wfile.write(content[:cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.files, server.asked, server.cut, server.without_length = {}, [], None, False
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def zipped(files):
    """{name: bytes} -> a zip file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tarred(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def below(root, folder):
    """{name, from `root` on: bytes} of a folder in `root`."""
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted((root / folder).rglob("*")) if path.is_file()}


def serve(server, monkeypatch, name, *entries):
    """entries: (name of the archive, content, what it leaves, checksum)."""
    server.files |= {archive: content for archive, content, _, _ in entries}
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setitem(run.DOWNLOADS, name, [(f"{place}/{archive}", result, checksum)
                                               for archive, _, result, checksum in entries])


def ade20k_archives(root):
    base = root / "ADEChallengeData2016"
    instances = below(base, "annotations_instance")
    parsing = {name: content for name, content in below(root, "ADEChallengeData2016").items()
               if "annotations_instance" not in name}
    archive = zipped(parsing)
    return [("ADEChallengeData2016.zip", archive, "ADEChallengeData2016", hashlib.sha1(archive).hexdigest()),
            ("annotations_instance.tar", tarred(instances), "ADEChallengeData2016/annotations_instance", None)]


def coco_archives(root):
    base = root / "coco"
    maps = {f"annotations/panoptic_{split}2017.zip": zipped(
        below(base / "annotations", f"panoptic_{split}2017") | {"__MACOSX/._x": b""}) for split in ("train", "val")}
    jsons = {name: content for name, content in below(base, "annotations").items() if name.endswith(".json")}
    return [*((f"{split}2017.zip", zipped(below(base, f"{split}2017")), f"coco/{split}2017", None)
              for split in ("train", "val")),
            ("panoptic_annotations_trainval2017.zip", zipped(jsons | maps), "coco/annotations/panoptic_val2017.json",
             None)]


def voc_archives(root):
    archive = tarred(below(root, "VOCdevkit"))
    return [("VOCtrainval_11-May-2012.tar", archive, "VOCdevkit", hashlib.md5(archive).hexdigest())]


ARCHIVES = {"ade20k-panoptic": ade20k_archives, "coco-panoptic": coco_archives, "voc": voc_archives}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_download_leaves_the_dataset_and_nothing_else_and_a_second_one_does_nothing(
        name, replica, server, monkeypatch, tmp_path):
    archives = ARCHIVES[name](replica(name))
    assert [entry[2] for entry in archives] == [result for _, result, _ in run.DOWNLOADS[name]]
    assert [entry[0] for entry in archives] == [url.rsplit("/", 1)[1] for url, _, _ in run.DOWNLOADS[name]]
    serve(server, monkeypatch, name, *archives)
    root = tmp_path / "not" / "there yet"
    run.download(name, root)
    for split in ("train", "val"):
        ours, original = (build_dataset(name, place, split) for place in (root, replica(name)))
        assert ours.classes == original.classes and len(ours) == len(original)
        assert all(torch.equal(ours[i][part], original[i][part]) for i in range(len(ours)) for part in (0, 1))
    assert {name for name in below(root, ".") if "__MACOSX" not in name} == set(below(replica(name), "."))
    assert server.asked == [entry[0] for entry in archives]
    run.download(name, root)
    assert len(server.asked) == len(archives)


def test_where_downloads_come_from_is_well_formed():
    for name, entries in run.DOWNLOADS.items():
        assert name in data.DATASETS and entries
        for url, result, checksum in entries:
            assert re.fullmatch(r"https?://[^ ]+\.(zip|tar)", url) and not result.startswith(("/", ".."))
            assert checksum is None or re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{40}", checksum)


@pytest.fixture
def small(server, monkeypatch):
    """A download of one zip, 200 kB; -> its content."""
    content = zipped({"ADEChallengeData2016/a.bin": np.random.default_rng(0).bytes(200_000)})
    serve(server, monkeypatch, "ade20k", ("small.zip", content, "ADEChallengeData2016",
                                          hashlib.sha1(content).hexdigest()))
    return content


def complete(root):
    return (root / "ADEChallengeData2016/a.bin").read_bytes() == np.random.default_rng(0).bytes(200_000) and \
        list(below(root, ".")) == ["ADEChallengeData2016/a.bin"]


def test_a_wrong_checksum_is_named_and_the_file_is_thrown_away(small, server, tmp_path):
    server.files["small.zip"] = small[:-30] + bytes(30)
    with pytest.raises(data.UserError, match="small.zip.*checksum"):
        run.download("ade20k", tmp_path)
    assert list(tmp_path.iterdir()) == []
    server.files["small.zip"] = small
    run.download("ade20k", tmp_path)
    assert complete(tmp_path) and server.asked == ["small.zip"] * 2


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 120_001])
def test_a_download_that_was_cut_is_no_archive_and_the_next_call_starts_anew(
        small, server, checked, cut, monkeypatch, tmp_path):
    if not checked:
        serve(server, monkeypatch, "ade20k", ("small.zip", small, "ADEChallengeData2016", None))
    server.cut = cut
    with pytest.raises(data.UserError, match="small.zip.*again"):
        run.download("ade20k", tmp_path)
    assert not (tmp_path / "ADEChallengeData2016").exists() and not (tmp_path / "small.zip").exists()
    run.download("ade20k", tmp_path)
    assert complete(tmp_path)


def test_a_tar_that_was_cut_between_two_members_is_not_taken_for_whole(server, monkeypatch, tmp_path):
    content = tarred({"ADEChallengeData2016/a.bin": np.random.default_rng(0).bytes(200_000), "b.bin": bytes(512)})
    serve(server, monkeypatch, "ade20k", ("small.tar", content, "ADEChallengeData2016", None))
    server.cut = 512 + 200_192                                           # a header, and whole blocks of content
    with pytest.raises(data.UserError, match="small.tar.*again"):
        run.download("ade20k", tmp_path)
    assert not (tmp_path / "ADEChallengeData2016").exists()
    run.download("ade20k", tmp_path)
    assert (tmp_path / "b.bin").exists()


@pytest.mark.parametrize("rest", [b"", b"PK\x03\x04 of a call that was killed"])
def test_what_a_killed_call_left_is_overwritten(small, server, rest, tmp_path):
    (tmp_path / "small.zip.part").write_bytes(rest + small + bytes(1000))
    run.download("ade20k", tmp_path)
    assert complete(tmp_path) and server.asked == ["small.zip"]


def test_a_server_that_does_not_tell_the_length_will_do(small, server, tmp_path):
    server.without_length = True
    run.download("ade20k", tmp_path)
    assert complete(tmp_path)


def test_a_server_that_is_not_there_or_has_no_such_file_is_named(small, server, monkeypatch, tmp_path):
    server.files.clear()
    with pytest.raises(data.UserError, match="small.zip.*404"):
        run.download("ade20k", tmp_path)
    monkeypatch.setitem(run.DOWNLOADS, "ade20k", [("http://127.0.0.1:9/small.zip", "ADEChallengeData2016", None)])
    with pytest.raises(data.UserError, match="127.0.0.1:9/small.zip"):
        run.download("ade20k", tmp_path)


def test_too_small_a_disk_is_named_before_anything_is_fetched(small, server, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=len(small) + 1000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)          # the archive alone would fit
        with pytest.raises(data.UserError, match=r"GB.*" + re.escape(str(tmp_path))):
            run.download("ade20k", tmp_path)
    assert sum(len(content) for content in below(tmp_path, ".").values()) == 0
    run.download("ade20k", tmp_path)
    assert complete(tmp_path)


def test_an_interrupted_unpacking_starts_again_without_a_second_download(small, server, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        def interrupted(*_, **__):
            (tmp_path / "ADEChallengeData2016").mkdir()
            (tmp_path / "ADEChallengeData2016/a.bin").write_bytes(b"half")
            raise KeyboardInterrupt
        patch.setattr(shutil, "unpack_archive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.download("ade20k", tmp_path)
    run.download("ade20k", tmp_path)
    assert complete(tmp_path) and len(server.asked) == 1


def test_a_disk_that_is_full_while_unpacking_costs_no_second_download(small, server, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "unpack_archive", full)
        with pytest.raises(data.UserError, match="small.zip.*No space left"):
            run.download("ade20k", tmp_path)
    run.download("ade20k", tmp_path)
    assert complete(tmp_path) and len(server.asked) == 1


def test_a_broken_archive_is_named_and_fetched_again(server, monkeypatch, tmp_path):
    content = zipped({"ADEChallengeData2016/a.bin": np.random.default_rng(0).bytes(200_000)})
    serve(server, monkeypatch, "ade20k", ("small.zip", content[:-50], "ADEChallengeData2016", None))
    with pytest.raises(data.UserError, match="small.zip"):
        run.download("ade20k", tmp_path)
    server.files["small.zip"] = content
    run.download("ade20k", tmp_path)
    assert complete(tmp_path)


@pytest.mark.parametrize("pack, archive", [(zipped, "small.zip"), (tarred, "small.tar")])
@pytest.mark.parametrize("evil", ["../evil.txt", "ADEChallengeData2016/../../evil.txt", "{top}/evil.txt"])
def test_no_archive_writes_outside_the_root(pack, archive, evil, server, monkeypatch, tmp_path):
    content = pack({"ADEChallengeData2016/a.bin": b"good", evil.format(top=tmp_path): b"evil"})
    serve(server, monkeypatch, "ade20k", (archive, content, "ADEChallengeData2016", None))
    try:
        run.download("ade20k", tmp_path / "root")
    except data.UserError as error:
        assert archive in str(error)
    assert not (tmp_path / "evil.txt").exists() and [path.name for path in tmp_path.iterdir()] == ["root"]


def test_no_link_in_an_archive_leads_outside_the_root(server, monkeypatch, tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        link = tarfile.TarInfo("ADEChallengeData2016")
        link.type, link.linkname = tarfile.SYMTYPE, ".."
        archive.addfile(link)
        member = tarfile.TarInfo("ADEChallengeData2016/evil.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    serve(server, monkeypatch, "ade20k", ("small.tar", out.getvalue(), "ADEChallengeData2016", None))
    with pytest.raises(data.UserError, match="small.tar"):
        run.download("ade20k", tmp_path / "root")
    assert not (tmp_path / "evil.txt").exists()


@pytest.mark.parametrize("name, site", [("cityscapes", "cityscapes-dataset.com"), ("mapillary", "mapillary.com"),
                                        ("cityscapes-panoptic", "cityscapes-dataset.com"),
                                        ("ade20k-full", "csail.mit.edu"), ("coco-stuff-10k", "cocostuff10k")])
def test_a_dataset_behind_a_login_says_where_to_get_it(name, site, tmp_path):
    with pytest.raises(data.UserError) as error:
        run.download(name, tmp_path)
    assert site in str(error.value) and "docs/DATASETS.md" in str(error.value) and name in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["shapes", "folder", "panoptic"])
def test_own_and_drawn_data_are_not_to_be_downloaded(name, tmp_path):
    with pytest.raises(data.UserError, match="own or drawn"):
        run.download(name, tmp_path)


# ------------------------------------------------------------------ recipes and their page

@pytest.mark.parametrize("name, crop, sides, longest, test, batch, steps", [
    ("ade20k", (512, 512), (512, 5, 20), 2048, (512, 2048), 16, 160_000),
    ("ade20k-full", (512, 512), (512, 5, 20), 2048, (512, 2048), 16, 200_000),
    ("coco-stuff-10k", (640, 640), (640, 5, 15), 2560, (640, 2560), 32, 60_000),
    ("cityscapes", (512, 1024), (1024, 5, 20), 4096, (1024, 2048), 16, 90_000),
    ("mapillary", (1280, 1280), (2048, 5, 20), None, (2048, 2048), 16, 300_000),
    ("ade20k-panoptic", (640, 640), (640, 5, 20), 2560, (640, 2560), 16, 720_000)])
def test_recipes_are_the_lines_of_appendix_a(name, crop, sides, longest, test, batch, steps):
    recipe = data.recipe(name, "resnet50")
    side, first, last = sides
    assert tuple(recipe["crop"]) == crop and longest in (None, recipe["max_long_side"])
    assert recipe["short_side"] == [int(0.1 * k * side) for k in range(first, last + 1)]
    assert (recipe["test_short_side"], recipe["test_max_long_side"]) == test
    assert (recipe["batch_size"], recipe["steps"]) == (batch, steps)
    assert recipe.get("schedule", "poly") == "poly" and recipe.get("augmentation") != "detr"
    assert recipe.get("encoder_layers", 0) == (6 if name == "ade20k-panoptic" else 0)


def test_the_recipe_of_coco_panoptic_is_that_of_detr():
    recipe = data.recipe("coco-panoptic", "resnet50")
    assert recipe["augmentation"] == "detr" and recipe["short_side"] == list(range(480, 801, 32))
    assert (recipe["max_long_side"], recipe["test_short_side"], recipe["test_max_long_side"]) == (1333, 800, 1333)
    assert (recipe["batch_size"], recipe["steps"]) == (64, 554_400)
    assert (recipe["schedule"], recipe["milestones"], recipe["encoder_layers"]) == ("step", [369_600], 6)
    assert recipe["size_divisibility"] == 0


def test_thresholds_are_those_of_the_paper():
    assert data.recipe("ade20k-panoptic", "resnet50")["object_threshold"] == 0.7
    assert data.recipe("coco-panoptic", "resnet50").get("object_threshold", 0.8) == 0.8


def test_swin_backbones_have_rates_of_their_own_no_encoder_and_the_large_ones_larger_images_on_ade20k():
    for name in set(data.DATASETS) - {"shapes"}:
        recipe = data.recipe(name, "swin_tiny_patch4_window7_224")
        assert (recipe["lr"], recipe["weight_decay"], recipe["warmup"], recipe["backbone_lr_factor"]) == (
            6e-5, 1e-2, 1500, 1) and recipe.get("encoder_layers", 0) == 0
        assert recipe["crop"] == data.recipe(name, "resnet50")["crop"]
    for backbone in ("swin_base_patch4_window12_384", "swin_large_patch4_window12_384.ms_in22k"):
        recipe = data.recipe("ade20k", backbone)
        assert tuple(recipe["crop"]) == (640, 640) and recipe["short_side"][::15] == [320, 1280]
        assert (recipe["max_long_side"], recipe["test_short_side"], recipe["test_max_long_side"]) == (2560, 640, 2560)
        assert (recipe["batch_size"], recipe["steps"], recipe["lr"]) == (16, 160_000, 6e-5)


def test_a_recipe_may_be_changed_without_changing_the_next(monkeypatch):
    data.recipe("ade20k", "resnet50")["steps"] = 3
    assert data.recipe("ade20k", "resnet50")["steps"] == 160_000


def table(number):
    """A table of docs/DATASETS.md, the first or the second -> {dataset: its other cells}."""
    part = (ROOT / "docs/DATASETS.md").read_text().split("## Recipes")[number - 1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.split("\n") if line[:3] == "| `"]
    return {name.strip("`"): cells for name, *cells in rows}


def test_the_page_of_datasets_has_them_all_and_is_short():
    assert set(table(1)) == set(table(2)) == set(data.DATASETS) == set(data.RECIPES)
    assert len((ROOT / "docs/DATASETS.md").read_text().split("\n")) <= 70
    for name, (*_, source) in table(1).items():
        assert (source == "yes") == (name in run.DOWNLOADS)
        if "](" in source:
            with pytest.raises(data.UserError, match=re.escape(re.search(r"\((.*)\)", source)[1])):
                run.download(name, "nowhere")


def test_the_commands_of_the_page_are_understood():
    for flags in re.findall(r"train\.py ([^`]*)`", (ROOT / "docs/DATASETS.md").read_text()):
        assert train.parse(flags.replace("NAME", "voc").split()).dataset == "voc"


@pytest.mark.parametrize("name", [*REPLICAS, "shapes"])
def test_the_page_says_the_number_of_classes_and_things(name, replica):
    dataset = build_dataset(name, None if name == "shapes" else replica(name), "val")
    _, classes, things, *_ = table(1)[name]
    if name != "ade20k-full":                                            # the replica has three of its classes
        assert int(classes) == len(dataset.classes)
    assert things == (str(sum(dataset.is_thing)) if dataset.panoptic else "")


@pytest.mark.parametrize("name", data.RECIPES)
def test_the_page_says_what_the_recipes_are(name):
    recipe, (crop, sides, test, batch, steps) = data.recipe(name, "resnet50"), table(2)[name]
    assert crop == ("as DETR" if recipe.get("augmentation") == "detr" else "{} x {}".format(*recipe["crop"]))
    assert sides == f"{min(recipe['short_side'])} to {max(recipe['short_side'])}"
    assert test == f"{recipe['test_short_side']} ({recipe['test_max_long_side']})"
    assert (int(batch), steps) == (recipe["batch_size"], f"{recipe['steps']:,}")


# ------------------------------------------------------------------ training

@pytest.mark.parametrize("name, flags", [("cityscapes", "--crop 64 64"), ("ade20k-panoptic", "--crop 64 64"),
                                         ("coco-panoptic", "--augmentation detr")])
def test_two_processes_train_on_a_replica_and_score(name, flags, replica, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               ROOT / "train.py", "--dataset", name, "--data-root", replica(name), "--output", tmp_path / "run"]
    tiny = ("--backbone resnet10t --no-pretrained --queries 8 --decoder-layers 1 --encoder-layers 0 --dim 32 --heads 4 "
            "--ffn-dim 32 --steps 2 --batch-size 4 --short-side 64 --test-short-side 64 --workers 0 " + flags)
    result = subprocess.run([*map(str, command), *tiny.split()], capture_output=True, text=True, timeout=300,
                            cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    names = ["mIoU", "PQ_st"] + ["PQ", "SQ", "RQ"] * (name in PANOPTIC)
    assert all(0 <= metrics[key] <= 100 for key in names) and ("PQ" in metrics) == (name in PANOPTIC)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row) and "mIoU" in result.stdout


# ------------------------------------------------------------------ predictions as the benchmarks take them


@pytest.mark.parametrize("numbers, void", [([7, 8, 33], 0), ([1, 2, 150], 0), ([0, 1, 2], 255)])
def test_saved_label_maps_hold_the_publishers_numbers(numbers, void, tmp_path):
    dataset = data.SegmentationDataset([], ["a", "b", "c"], [False] * 3, None, numbers)
    label = torch.tensor([[0, 1, 2, 255]])
    evaluate.save_prediction(tmp_path, "x", torch.zeros(3, 1, 4, dtype=torch.uint8), dataset, label, None, None)
    with Image.open(tmp_path / "semantic/x.png") as png:
        assert png.mode == "L" and np.array(png).tolist() == [[*numbers, void]]
