"""Where segments come from: datasets and their recipes (MaskFormer, Sec. 4 and appendix A).

Every dataset gives the same five things for an image: the image, ONE integer map that tells the segment of
each pixel (0 is void), the class of each segment id, the ids of crowd segments, a name. Semantic data have a
segment for each class in the image, panoptic data one for each object; nothing else differs.

Letters   K classes · H W image size

    dataset = build_dataset("shapes", split="val")
    image, segment_map, class_of, crowd, name = dataset[0]    # [3, H, W], [H, W], {id: class}, [], "00000"

Another dataset is one more function that returns a `SegmentationDataset`, and a line in RECIPES and DATASETS.
"""
import cmath
import colorsys
import glob
import json
import math
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.transforms import v2


class UserError(ValueError):
    """An error that the user can fix; the message says what is wrong and how to fix it."""


# ---------------------------------------------------------------------------------------- recipes
def paper(crop, side, tenths, test_max_long_side, batch_size, steps, **more):
    """A line of appendix A's table. Training resizes the short side of an image to one of int(0.1 k side), k
    in `tenths`, and cuts out `crop` (H, W); a test resizes it to `side`. All sizes are pixels."""
    return dict(crop=crop, short_side=[int(0.1 * k * side) for k in tenths], max_long_side=4 * side,
                test_short_side=side, test_max_long_side=test_max_long_side, batch_size=batch_size,
                steps=steps) | more


HALF_TO_DOUBLE = range(5, 21)
RECIPES = {
    "ade20k": paper((512, 512), 512, HALF_TO_DOUBLE, 2048, 16, 160_000),
    "ade20k-full": paper((512, 512), 512, HALF_TO_DOUBLE, 2048, 16, 200_000),
    "coco-stuff-10k": paper((640, 640), 640, range(5, 16), 2560, 32, 60_000, size_divisibility=0),
    "cityscapes": paper((512, 1024), 1024, HALF_TO_DOUBLE, 2048, 16, 90_000),
    "mapillary": paper((1280, 1280), 2048, HALF_TO_DOUBLE, 2048, 16, 300_000),
    "ade20k-panoptic": paper((640, 640), 640, HALF_TO_DOUBLE, 2560, 16, 720_000, encoder_layers=6,
                             object_threshold=0.7),
    "coco-panoptic": paper(None, 800, [], 1333, 64, 554_400, short_side=list(range(480, 801, 32)),
                           max_long_side=1333, augmentation="detr", encoder_layers=6, size_divisibility=0,
                           schedule="step", milestones=[369_600]),
    # Not in the paper: modelled on the closest recipe there.
    "cityscapes-panoptic": paper((512, 1024), 1024, HALF_TO_DOUBLE, 2048, 16, 90_000, encoder_layers=6),
    "voc": paper((512, 512), 512, HALF_TO_DOUBLE, 2048, 16, 40_000),
    "folder": paper((512, 512), 512, HALF_TO_DOUBLE, 2048, 16, 40_000),
    "panoptic": paper((640, 640), 640, HALF_TO_DOUBLE, 2560, 16, 40_000, object_threshold=0.7),
    "shapes": paper((64, 96), 64, [], 96, 16, 500, short_side=[56, 64, 72], backbone="resnet10t",
                    pretrained=False, queries=20, decoder_layers=3, dim=64, heads=4, ffn_dim=256, dropout=0.,
                    lr=2e-3, clip=0.1, warmup=20, color_distortion=False),
}
SWIN = dict(lr=6e-5, weight_decay=1e-2, backbone_lr_factor=1., warmup=1500, encoder_layers=0)


def recipe(dataset, backbone="resnet50"):
    """train.py's defaults: the dataset's, then a Swin's own, then Swin-B's and L's image sizes on ADE20K."""
    swin = SWIN if backbone.startswith("swin_") and dataset != "shapes" else {}
    large = dataset == "ade20k" and swin and "384" in backbone
    sizes = paper((640, 640), 640, HALF_TO_DOUBLE, 2560, 16, 160_000) if large else {}
    return RECIPES[dataset] | swin | sizes


# ---------------------------------------------------------------------------------------- files
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def read_lines(path):
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error}): save it as UTF-8") from error
    return [line.strip() for line in lines if line.strip()]


def pair_files(images, annotations, ending="", new_ending=".png", names=None):
    """[(image, annotation)]: an annotation is named like its image, with another ending. names: the JPEGs to
    take, in this order (default: all images whose names end in `ending`, sorted)."""
    images.stat(), annotations.stat()                                    # FileNotFoundError if not there
    found = glob.glob(f"**/*{ending}", root_dir=images, recursive=True)  # follows links, skips .hidden ones
    files = sorted(found) if names is None else [f"{name}.jpg" for name in names]
    pairs = [(images / file, annotations / (file.removesuffix(ending or Path(file).suffix) + new_ending))
             for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    missing = [str(path) for pair in pairs for path in pair if not path.exists()]
    if missing:
        raise FileNotFoundError(2, f"{len(missing)} files are missing for {len(pairs)} images", missing[0])
    return pairs


def open_image(path):
    """A PIL image, read to its end. Raises UserError if that cannot be done."""
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)                        # turned as its EXIF entry says
    except Exception as error:                                           # a broken file can raise anything
        raise UserError(f"{path} cannot be read as an image ({error}): check or replace it") from error


def read_image(path):
    """-> RGB [H, W, 3] uint8, turned as the camera's EXIF entry says."""
    image = open_image(path)
    if image.mode[0] in "IF":
        raise UserError(f"{path} has more than 8 bits per channel: save it with 8")
    return np.array(image.convert("RGB"))


def read_labels(path):
    """-> the values [H, W] of a one-channel PNG, or of a .mat file of COCO-Stuff."""
    if path.suffix == ".mat":
        try:
            import h5py
        except ImportError:
            raise UserError(f"{path}: to read .mat files, pip install h5py") from None
        with h5py.File(path) as file:
            return np.array(file["S"]).T.astype(np.int32)
    values = np.array(open_image(path))
    if values.ndim != 2:
        raise UserError(f"{path} has shape {values.shape}: a label PNG has one channel, of class indices")
    return values.astype(np.int32)


def read_segments(annotation, values_of, class_of_value, void, is_thing=None):
    """-> segment map [H, W] with ids 1, 2, .. in the order of the values, {id: class}, crowd ids. void: the
    value without a class; None: any unlisted value. With `is_thing`, values are coded as in Cityscapes:
    1000 v + n is instance n of class value v; a bare v of a thing class is a crowd."""
    values = values_of(annotation)
    present = np.flatnonzero(np.bincount(values.ravel())).tolist()
    label_of = {value: class_of_value.get(value // 1000 if is_thing and value >= 1000 else value)
                for value in present}
    known = [value for value in present if label_of[value] is not None]
    wrong = sorted({*present} - {*known, void})
    if wrong and void is not None:
        raise UserError(f"{annotation} holds {wrong[:10]}; classes are {min(class_of_value)}.."
                        f"{max(class_of_value)}, void is {void}. If labels start at 1, subtract 1; if the "
                        "list of classes is too short, complete it")
    id_of = np.zeros(int(values.max()) + 1, np.uint8 if len(known) <= 255 else np.int32)
    id_of[known] = range(1, len(known) + 1)
    class_of = {i: label_of[value] for i, value in enumerate(known, 1)}
    crowd = [i for i, value in enumerate(known, 1) if is_thing and value < 1000 and is_thing[class_of[i]]]
    return id_of.take(values), class_of, crowd


# ---------------------------------------------------------------------------------------- datasets
@dataclass(eq=False)
class SegmentationDataset(Dataset):
    """Images with segment maps."""
    pairs: list                   # of (image file, annotation)
    classes: list                 # K names
    is_thing: list                # K bools
    read_segments: Callable       # annotation -> segment map [H, W], {id: class}, crowd ids
    category_ids: list            # the publisher's number of each class
    panoptic: bool = False        # each segment of a thing is an instance
    image_ids: dict = field(default_factory=dict)     # the publisher's, by name
    shrink_to: float = math.inf   # larger images are shrunk to this short side

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        path, annotation = self.pairs[index]
        image = torch.from_numpy(read_image(path)).permute(2, 0, 1)      # [3, H, W]
        segment_map, class_of, crowd = self.read_segments(annotation)
        if segment_map.shape != image.shape[1:]:
            raise UserError(f"{path} is {tuple(image.shape[1:])}, its annotation {segment_map.shape}: "
                            "make their heights and widths equal")
        segment_map = torch.from_numpy(segment_map)
        if min(segment_map.shape) > self.shrink_to:
            image, segment_map = resized(image, segment_map, self.shrink_to)
        return image, segment_map, class_of, crowd, Path(path).stem


def build_dataset(name, root=None, split="train", **options):
    """A dataset of DATASETS. root: where they lie (default $DATA_ROOT, else ./datasets). Raises UserError for
    an unknown name or split, FileNotFoundError if the files are not laid out as its publisher ships them."""
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}; choose from {', '.join(DATASETS)}")
    if split not in ("train", "val"):
        raise UserError(f"unknown split {split!r}; choose train or val")
    root = Path(root or os.environ.get("DATA_ROOT") or "datasets")
    try:
        dataset = DATASETS[name](root, split, **options)
    except FileNotFoundError as error:
        nearest = next(folder for folder in Path(os.path.realpath(error.filename)).parents if folder.is_dir())
        found = ", ".join(sorted(glob.glob("*", root_dir=nearest))[:12]) or "nothing"
        raise FileNotFoundError(f"{error}. Found in {nearest}: {found}. Expected below {root}: "
                                f"{layout_of(name)}") from None
    if len(dataset) == 0:
        raise FileNotFoundError(f"dataset {name!r} has no images in split {split!r} below {root}")
    return dataset


def layout_of(name):
    """The files a dataset expects: the docstring of its function."""
    return " ".join(getattr(DATASETS[name], "func", DATASETS[name]).__doc__.split())


def labelled(pairs, classes, values, is_thing=None, void=None, values_of=read_labels, panoptic=False, **more):
    """Label images in which `values[k]` is class k, or, if panoptic, 1000 values[k] + n an instance of it."""
    is_thing = is_thing or [False] * len(values)
    read = partial(read_segments, values_of=values_of, void=void, is_thing=is_thing if panoptic else None,
                   class_of_value={value: k for k, value in enumerate(values)})
    more = {"category_ids": list(values)} | more
    return SegmentationDataset(pairs, list(classes), is_thing, read, panoptic=panoptic, **more)


def folder(root, split):
    """classes.txt, images/{train,val}/X.jpg, annotations/{train,val}/X.png (class indices, 255 is void)"""
    lines = read_lines(root / "classes.txt")
    classes = [line.removesuffix(" thing").removesuffix(" stuff") for line in lines]
    if not classes:
        raise UserError(f"{root / 'classes.txt'} holds no class: write the name of one in each line")
    pairs = pair_files(root / "images" / split, root / "annotations" / split)
    return labelled(pairs, classes, range(len(classes)), [line.endswith(" thing") for line in lines],
                    void=void_label(len(classes)))


ADE20K_STUFF = {1, 2, 3, 4, 5, 6, 7, 10, 12, 14, 17, 18, 22, 26, 27, 29, 30, 35, 41, 47, 49, 52, 53, 55, 60,
                61, 62, 64, 69, 78, 80, 85, 92, 95, 97, 100, 101, 102, 106, 107, 110, 114, 115, 118, 123,
                129, 132, 141, 142, 146}
PARTS = {"train": "training", "val": "validation"}


def ade20k(root, split, panoptic=False):
    """ADEChallengeData2016/{images,annotations}/{training,validation}/X.{jpg,png}, objectInfo150.txt there;
    for panoptic segmentation also annotations_instance/{training,validation}/X.png (or try --download)"""
    root, part, values = root / "ADEChallengeData2016", PARTS[split], range(1, 151)
    pairs = pair_files(root / "images" / part, root / "annotations" / part)
    classes = [f"class {value}" for value in values]
    if (root / "objectInfo150.txt").exists():                            # Idx, Ratio, Train, Val, Name
        rows = read_lines(root / "objectInfo150.txt")[1:]
        classes = [row.split("\t")[-1].split(",")[0].strip() for row in rows]
    if not panoptic:
        return labelled(pairs, classes, values, void=0)
    instances = pair_files(root / "images" / part, root / "annotations_instance" / part)
    pairs = [(image, (annotation, instance)) for (image, annotation), (_, instance) in zip(pairs, instances)]
    return labelled(pairs, classes, values, [value not in ADE20K_STUFF for value in values], 0,
                    read_ade20k_instances, panoptic=True)


def read_ade20k_instances(paths):
    """Class map, instance PNG (R: index of the thing class, 0 none; G: number) -> Cityscapes' coding [H, W].
    Instances override the class map; thing pixels outside every instance become void."""
    things = np.array([0] + [value for value in range(1, 151) if value not in ADE20K_STUFF])
    values, rgb = read_labels(paths[0]), read_image(paths[1]).astype(np.int32)
    which, number = rgb[..., 0], rgb[..., 1]
    if which.shape != values.shape or which.max() > 100:
        raise UserError(f"{paths[1]}, {which.shape} with categories up to {which.max()} of 100, does not "
                        f"hold the instances of {paths[0]}, {values.shape}")
    return np.where(which > 0, 1000 * things[which] + number, np.where(np.isin(values, things), 0, values))


def ade20k_full(root, split):
    """ADE20K_2021_17_01/{index_ade20k.pkl,images/ADE/{training,validation}/SCENE/{X.jpg,X_seg.png}}
    (https://ade20k.csail.mit.edu)"""
    from pretrained import ArrayUnpickler                                # runs no code of the file's
    root = root / "ADE20K_2021_17_01"
    with open(root / "index_ade20k.pkl", "rb") as file:
        index = ArrayUnpickler(file).load()
    no_part = np.asarray(index["objectPresence"]) > np.asarray(index["objectIsPart"])    # [objects, images]
    training = np.array(["training" in name.split("/") for name in index["folder"]])
    # The 847 that both splits have, in the index's order; released weights were trained in another.
    kept = no_part[:, training].any(1) & no_part[:, ~training].any(1)
    values = (np.flatnonzero(kept) + 1).tolist()
    names = [index["objectnames"][value - 1] for value in values]
    images = root / "images" / "ADE" / PARTS[split]
    return labelled(pair_files(images, images, ".jpg", "_seg.png"), names, values, values_of=read_ade20k_full,
                    shrink_to=512)


def read_ade20k_full(path):
    rgb = read_image(path).astype(np.int32)
    return rgb[..., 0] // 10 * 256 + rgb[..., 1]


def cityscapes(root, split, panoptic=False):
    """cityscapes/leftImg8bit/{train,val}/CITY/X_leftImg8bit.png and
    cityscapes/gtFine/{train,val}/CITY/X_gtFine_{labelIds,instanceIds (panoptic)}.png
    (https://www.cityscapes-dataset.com)"""
    images, annotations = (root / "cityscapes" / part / split for part in ("leftImg8bit", "gtFine"))
    kind = "instanceIds" if panoptic else "labelIds"
    pairs = pair_files(images, annotations, "_leftImg8bit.png", f"_gtFine_{kind}.png")
    names, values, is_thing = zip(*((label.name, label.id, label.has_instances)
                                    for label in Cityscapes.classes if not label.ignore_in_eval))
    return labelled(pairs, names, values, list(is_thing), panoptic=panoptic)


def mapillary(root, split):
    """mapillary_vistas/{config.json,{training,validation}/{images/X.jpg,labels/X.png}}
    (https://www.mapillary.com/dataset/vistas, version 1.2)"""
    root = root / "mapillary_vistas"
    labels = json.loads((root / "config.json").read_text(encoding="utf-8"))["labels"][:65]
    pairs = pair_files(root / PARTS[split] / "images", root / PARTS[split] / "labels")
    return labelled(pairs, [label["readable"] for label in labels], range(len(labels)), void=len(labels))


def voc(root, split):
    """VOCdevkit/VOC2012/{JPEGImages/X.jpg,SegmentationClass/X.png,ImageSets/Segmentation/{train,val}.txt}"""
    root = root / "VOCdevkit" / "VOC2012"
    names = read_lines(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    pairs = pair_files(root / "JPEGImages", root / "SegmentationClass", names=names)
    classes = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()
    return labelled(pairs, classes, range(21), void=255)


def coco_stuff_10k(root, split):
    """coco/coco_stuff_10k/{images/X.jpg,annotations/X.mat,imageLists/{train,test}.txt}; or, instead of the
    last two, annotations_detectron2/{train,test}/X.png (https://github.com/nightrome/cocostuff10k)"""
    root, part = root / "coco" / "coco_stuff_10k", {"train": "train", "val": "test"}[split]
    ids = [i for i in range(1, 183) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)]
    names, prepared = [f"COCO-Stuff {i}" for i in ids], root / "annotations_detectron2" / part
    if prepared.exists():
        stems = sorted(png.stem for png in prepared.glob("*.png"))
        pairs = pair_files(root / "images", prepared, names=stems)
        return labelled(pairs, names, range(171), void=255, category_ids=ids)
    stems = read_lines(root / "imageLists" / f"{part}.txt")
    pairs = pair_files(root / "images", root / "annotations", new_ending=".mat", names=stems)
    return labelled(pairs, names, ids, void=0)


def coco_panoptic(root, split):
    """coco/{train,val}2017/X.jpg, coco/annotations/panoptic_{train,val}2017.json, and the PNGs in
    panoptic_{train,val}2017/ in coco or coco/annotations (or try --download)"""
    root, name = root / "coco", f"panoptic_{split}2017"
    maps = root / name if (root / name).exists() else root / "annotations" / name
    return coco_format(root / f"{split}2017", maps, root / "annotations" / f"{name}.json")


def panoptic(root, split):
    """images/{train,val}/X.jpg; in COCO's format panoptic_{train,val}/X.png and panoptic_{train,val}.json"""
    return coco_format(root / "images" / split, root / f"panoptic_{split}", root / f"panoptic_{split}.json")


def coco_format(images, maps, json_file):
    """COCO's panoptic format: a folder of images, one of PNGs, a json of categories, images, annotations."""
    images.stat(), maps.stat()                                           # FileNotFoundError if not there
    try:
        content = json.loads(json_file.read_text(encoding="utf-8"))
        categories = sorted(content["categories"], key=lambda category: category["id"])
        class_of_id = {category["id"]: k for k, category in enumerate(categories)}   # ids have gaps
        if not 0 < len(class_of_id) == len(categories) or not class_of_id.keys() <= {*range(2 ** 16)}:
            raise ValueError(f"categories need different ids, 0..65535, not {[c['id'] for c in categories]}")
        file_of = {image["id"]: images / image["file_name"] for image in content["images"]}
        annotations = sorted(content["annotations"], key=lambda annotation: annotation["image_id"])
        pairs = [(file_of.get(annotation["image_id"]), listed_segments(annotation, file_of, class_of_id))
                 for annotation in annotations]
        names, is_thing = zip(*((str(c["name"]), bool(int(c["isthing"]))) for c in categories))
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{json_file} is not in COCO's panoptic format: {problem}") from error
    read = partial(read_panoptic_png, folder=maps)
    image_ids = {path.stem: annotation["image_id"] for (path, _), annotation in zip(pairs, annotations)}
    return SegmentationDataset(pairs, list(names), list(is_thing), read, list(class_of_id), True, image_ids)


def listed_segments(annotation, file_of, class_of_id):
    """An entry of COCO's json -> name of its PNG; id, class and crowd flag of each segment [n, 3], by id (an
    array: each loader worker keeps all). ValueError if it does not agree with the others or with itself."""
    name, segments = annotation["file_name"], annotation["segments_info"]
    if annotation["image_id"] not in file_of:
        raise ValueError(f"{name} belongs to image {annotation['image_id']}, which is not in its list")
    if unknown := {segment["category_id"] for segment in segments} - class_of_id.keys():
        raise ValueError(f"{name} has segments of the categories {unknown}, which are not in its list")
    if len({segment["id"] for segment in segments}) < len(segments):
        raise ValueError(f"{name} has two segments of one id")
    rows = [(s["id"], class_of_id[s["category_id"]], bool(s.get("iscrowd"))) for s in segments]
    rows = np.array(rows, np.int64).reshape(-1, 3)
    return name, rows[rows[:, 0].argsort()]


def read_panoptic_png(annotation, folder):
    """What `listed_segments` returns, and its PNG, where id = R + 256 G + 65536 B -> segment map [H, W] with
    ids 1, 2, .. in the order of the json's ids, {id: class}, crowd ids."""
    name, segments = annotation
    ids = read_image(folder / name).astype(np.int32) @ np.array([1, 256, 65536], np.int32)   # [H, W]
    listed = np.append(0, segments[:, 0])
    segment_map = np.searchsorted(listed, ids).clip(max=len(segments))
    wrong = np.unique(ids[listed[segment_map] != ids]).tolist()
    if wrong:
        raise UserError(f"{folder / name}: its json entry lacks the ids (R + 256 G + 65536 B) {wrong[:10]}")
    class_of = dict(enumerate(segments[:, 1].tolist(), 1))
    crowd = (np.flatnonzero(segments[:, 2]) + 1).tolist()
    return segment_map.astype(np.uint8 if len(segments) <= 255 else np.int32), class_of, crowd


def fit(size, short_side, max_long_side=math.inf):
    """(H, W) -> (H, W) with this short side, or smaller, to keep within the long side. Sides are rounded;
    v2.RandomShortestSize truncates them (and turns some 512 into 511)."""
    scale = min(short_side / min(size), max_long_side / max(size))
    return [max(1, int(side * scale + 0.5)) for side in size]


def resized(image, segment_map, short_side, max_long_side=math.inf):
    """-> both, with sides as `fit` tells. NOTE 8: torch's "nearest" shifts a map by up to half a pixel,
    as in the released code on semantic data; its panoptic maps are resized by Pillow, which does not."""
    resize = v2.Resize(fit(image.shape[-2:], short_side, max_long_side))
    return resize(tv_tensors.Image(image), tv_tensors.Mask(segment_map))


def label_map(segment_map, class_of, void):
    """Segments -> classes of pixels [H, W] int64, `void` where no segment is."""
    table = torch.full((int(segment_map.max()) + 1,), void)
    for i, label in class_of.items():
        table[i:i + 1] = label                                           # a slice: i may not be in the map
    return table[segment_map.long()]


def void_label(num_classes):
    """The value of void in label maps and index PNGs: 255, or 65535 where 255 is a class."""
    return 255 if num_classes <= 255 else 65535


# ---------------------------------------------------------------------------------------- drawn shapes
TEXTURES = {"stripes": (0, 0, 0), "checks": (0, 1, 0), "dots": (0, 1, 0.5), "waves": (2, 0, 0),
            "plain": (0, 0, -2)}                      # bent, crossed, level: see `texture`
FORMS = {"disk": 0, "peanut": 2, "trefoil": 3, "cross": 4, "star": 5}    # lobes: see `form`


class Shapes(SegmentationDataset):
    """Drawn pictures: two or three textured regions (stuff), and on them one to three forms (things, each an
    instance). A picture is a function of (seed, split, index). Half of the classes are textures, half forms;
    each has its own hue; with more than five of a kind, some differ in hue alone."""

    def __init__(self, root=None, split="train", num_classes=6, size=(64, 96), length=None, seed=0):
        self.size, self.seed = size, [seed, ("train", "val").index(split)]
        self.num_stuff, num_things = (num_classes + 1) // 2, num_classes // 2
        self.kinds = ((list(TEXTURES) * num_classes)[:self.num_stuff]
                      + (list(FORMS) * num_classes)[:num_things])
        self.hues = [k / n for n in (self.num_stuff, num_things) for k in range(n)]
        hued = [f"{kind} of hue {360 * hue:.0f}" for kind, hue in zip(self.kinds, self.hues)]
        numbers = range(length or {"train": 20_000, "val": 100}[split])
        super().__init__([(f"{number:05d}", None) for number in numbers],
                         self.kinds if num_classes <= 10 else hued,
                         [k >= self.num_stuff for k in range(num_classes)], read_segments=None,
                         category_ids=list(range(num_classes)), panoptic=True)

    def __getitem__(self, index):
        name, _ = self.pairs[index]
        rng, (H, W), K = np.random.default_rng([*self.seed, index]), self.size, len(self.classes)
        y, x = np.mgrid[:H, :W].astype(np.float32)
        image, segment_map = np.zeros((H, W, 3), np.float32), np.zeros((H, W), np.uint8)
        stuff = rng.permutation(self.num_stuff)[:rng.integers(2, 4)].tolist()
        things = rng.integers(self.num_stuff, K, rng.integers(1, 4)).tolist() if K > self.num_stuff else []
        class_of, boundary = dict(enumerate(stuff + things, 1)), np.zeros(W)
        for i, label in class_of.items():                                # painted over one another
            if label in stuff:
                region, shade = y >= boundary, texture(self.kinds[label], rng, x + 1j * y)
                wave = 4 * np.sin(x[0] / rng.uniform(6, 12) + rng.uniform(0, 6))
                boundary = boundary + rng.uniform(0.25, 0.5) * H + wave
            else:
                region, shade = form(self.kinds[label], rng, x + 1j * y), np.ones_like(x)
            hue = self.hues[label] + rng.uniform(-0.35, 0.35) / max(3, K / 2)
            color = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 0.9), rng.uniform(0.5, 1))
            image[region], segment_map[region] = shade[region][:, None] * np.float32(color), i
        image += rng.standard_normal(image.shape, np.float32) * 0.03
        area = np.bincount(segment_map.ravel(), minlength=len(class_of) + 1)
        class_of = {i: label for i, label in class_of.items() if area[i] >= 16}          # slivers become void
        segment_map[~np.isin(segment_map, list(class_of))] = 0
        image = torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)).permute(2, 0, 1)
        return image, torch.from_numpy(segment_map), class_of, [], name


def texture(kind, rng, z):
    """-> shade [H, W] of a turned pattern with a period of 6 to 12 pixels. z: x + iy of each pixel."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 12) / (2 * np.pi)
    z = z * (cmath.exp(1j * angle) / period)
    bent, crossed, level = TEXTURES[kind]
    dark = np.sin(z.real + bent * np.sin(z.imag / 2)) * (np.sin(z.imag) if crossed else 1) < level
    return np.where(dark, np.float32(0.55), np.float32(1))


def form(kind, rng, z):
    """-> region [H, W] of a turned form somewhere in the picture."""
    (H, W), turn = z.shape, rng.uniform(0, 2 * np.pi)
    radius = rng.uniform(0.12, 0.22) * min(H, W)
    z = (z - complex(W * rng.uniform(0.1, 0.9), H * rng.uniform(0.1, 0.9))) / radius
    return abs(z) < 1 + 0.4 * np.cos(FORMS[kind] * (np.angle(z) + turn))


DATASETS = {
    "shapes": Shapes, "folder": folder, "panoptic": panoptic, "ade20k": ade20k, "ade20k-full": ade20k_full,
    "ade20k-panoptic": partial(ade20k, panoptic=True), "coco-panoptic": coco_panoptic, "voc": voc,
    "coco-stuff-10k": coco_stuff_10k, "cityscapes": cityscapes, "mapillary": mapillary,
    "cityscapes-panoptic": partial(cityscapes, panoptic=True)}
