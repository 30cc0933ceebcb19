"""Where segments come from, and how pictures reach the model (MaskFormer, Sec. 4, appendix A).

Every dataset gives the same five things for an image: the image, ONE integer map that tells the
segment of each pixel (0 is void), the class of each segment id, the ids of crowd segments, and a
name. Semantic data have one segment for each class in the image, panoptic data one for each object;
nothing else differs. The map goes through augmentation and to the device as it is; only there is it
split into binary masks.

Letters   B images · N segments in the batch · n segments of an image · K classes · H W image size
Numbers   label: a class, 0 to K-1 · value: a class in the publisher's label files
          category id: a class in the publisher's lists · segment id: a segment in a map, from 1

    dataset = build_dataset("shapes", split="val")
    image, segment_map, class_of, crowd, name = dataset[0]    # [3, H, W], [H, W], {id: class}, []
    samples = TrainingSamples(dataset, Augmentation([64], 96, crop=(64, 96)))
    batch = collate([samples[0], samples[1]])

Another dataset is one more function that returns a `SegmentationDataset`, a line in DATASETS and
LAYOUT, and a recipe in train.py.
"""
import colorsys
import copy
import errno
import glob
import json
import math
import os
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.transforms import v2


# ------------------------------------------------------------------------------ errors and warnings
class UserError(ValueError):
    """An error that the user can fix; the message says what is wrong, and how to fix it."""


@cache
def warn(message):
    """Prints one line on stderr, once, by one process of a job; a run goes on after it."""
    if os.environ.get("RANK", "0") == "0":
        # Python's stderr escapes what the console cannot show, so this never fails.
        print(f"warning: {message}", file=sys.stderr, flush=True)


def listing(values, most=10):
    """The values as text: "a, b, c", or "a, b and 17 more" if there are more than `most`."""
    values = list(values)
    text = ", ".join(map(str, values[:most]))
    return text if len(values) <= most else f"{text} and {len(values) - most} more"


def repeated(values):
    """The values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


# ----------------------------------------------------------------------------------------- datasets
@dataclass(eq=False)
class SegmentationDataset(Dataset):
    """Images with segment maps.

    An item: image [3, H, W] uint8, segment map [H, W] uint8 or int32 (0 is void), {segment id:
    class}, the ids of crowd segments, the image's name. UserError for a file that cannot be used.
    """
    pairs: list                 # (image file, annotation: a file, or a tuple that starts with one)
    classes: list               # K names
    is_thing: list              # K bools
    read_segments: Callable     # annotation -> segment map [H, W], {id: class}, crowd ids
    category_ids: list          # the publisher's number of each class
    panoptic: bool = False      # each segment of a thing is an instance
    image_ids: dict = field(default_factory=dict)     # the publisher's id of an image, by its name
    label_values: list = None   # the value of each class in index PNGs (default: category_ids)
    shrink_to: float = math.inf     # larger images are shrunk to this short side, in pixels
    has_truth: bool = True      # False: photos, or a test split whose truth is kept back

    def __post_init__(self):
        if self.label_values is None:
            self.label_values = self.category_ids

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        path, annotation = self.pairs[index]
        image = torch.from_numpy(read_image(path)).permute(2, 0, 1)                  # [3, H, W]
        if self.has_truth:
            segment_map, class_of, crowd = self.read_segments(annotation)
        else:
            segment_map, class_of, crowd = np.zeros(image.shape[1:], np.uint8), {}, []

        if segment_map.shape != image.shape[1:]:
            raise UserError(f"{path} has (height, width) {tuple(image.shape[1:])}, its annotation "
                            f"{file_of(annotation)} {segment_map.shape}: make them equal")
        segment_map = torch.from_numpy(segment_map)
        if min(segment_map.shape) > self.shrink_to:
            image, segment_map = resized(image, segment_map, self.shrink_to)
        return image, segment_map, class_of, crowd, Path(path).stem


def file_of(annotation):
    """The file of an annotation, which may be a tuple that starts with it."""
    return annotation[0] if isinstance(annotation, tuple) else annotation


TEST_SPLITS = ("cityscapes", "cityscapes-panoptic", "mapillary", "coco-panoptic")
DOWNLOADABLE = ("ade20k", "ade20k-panoptic", "coco-panoptic", "voc")     # by tools/download.py


def build_dataset(name, root=None, split="train", **options):
    """A dataset of DATASETS.

    root: where datasets lie (default: $DATA_ROOT, else ./datasets)
    split: train, val or, for TEST_SPLITS, test: the images whose truth the publisher keeps back
    options: of the dataset's own function
    UserError for an unknown name or split, and for files that are not as they should be.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}; choose from {', '.join(DATASETS)}")
    splits = ["train", "val", "test"] if name in TEST_SPLITS else ["train", "val"]
    if split not in splits:
        raise UserError(f"dataset {name!r} has no split {split!r}; choose {' or '.join(splits)}")
    root = Path(root or os.environ.get("DATA_ROOT") or "datasets")
    try:
        return DATASETS[name](root, split, **options)
    except (FileNotFoundError, NotADirectoryError) as error:
        nearest = Path(os.path.realpath(error.filename)).parent
        while not nearest.is_dir():
            nearest = nearest.parent
        found = listing(sorted(glob.glob("*", root_dir=nearest)), 12) or "nothing"
        remedy = f". To fetch it: python tools/download.py {name}" if name in DOWNLOADABLE else ""
        raise UserError(f"{error.filename}: {error.strerror}. Found in {nearest}: {found}. "
                        f"Expected below {root}: {LAYOUT[name]}{remedy}") from None


# ------------------------------------------------------------------------------------- augmentation
def fit(size, short_side, max_long_side=math.inf):
    """(H, W) -> [H, W] with this short side, or smaller, to keep within the long side.

    Sides are rounded; v2.RandomShortestSize truncates them, which turns some 512 into 511.
    """
    scale = min(short_side / min(size), max_long_side / max(size))
    return [max(1, int(side * scale + 0.5)) for side in size]


def resized(image, segment_map, short_side, max_long_side=math.inf):
    """-> both, with sides as in `fit`.

    NOTE 8: torch's "nearest" shifts a map by up to half a pixel, as in the released code on
    semantic data; its panoptic maps are resized by Pillow, which does not.
    """
    resize = v2.Resize(fit(image.shape[-2:], short_side, max_long_side))
    return resize(tv_tensors.Image(image), tv_tensors.Mask(segment_map))


class Augmentation:
    """Appendix A: random short side, crop, flip, color distortion, and padding at the right and the
    bottom.

    short_side: list of sides to choose from; max_long_side: their limit; crop: (H, W); in pixels
    """

    def __init__(self, short_side, max_long_side, crop, color_distortion=True):
        self.short_side = short_side
        self.max_long_side = max_long_side
        self.crop = crop
        self.flip = v2.RandomHorizontalFlip()
        # NOTE 7: the released code distorts colors as SSD does; here the formulas are torchvision's
        # (brightness is a factor, not a sum; contrast and saturation blend with gray), and the
        # order is always this one. (v2.RandomPhotometricDistort would also shuffle channels.)
        # On Pillow images: their 8-bit hue takes a third of the time of torchvision's on tensors.
        if color_distortion:
            self.distort = v2.Compose([
                v2.ToPILImage(),
                v2.RandomApply([v2.ColorJitter(brightness=0.125)]),
                v2.RandomApply([v2.ColorJitter(contrast=0.5)]),
                v2.RandomApply([v2.ColorJitter(saturation=0.5)]),
                v2.RandomApply([v2.ColorJitter(hue=0.1)]),
                v2.PILToTensor(),
            ])
        else:
            self.distort = v2.Identity()

    def __call__(self, image, segment_map):
        side = random_choice(self.short_side)
        image, segment_map = resized(image, segment_map, side, self.max_long_side)
        crop_height = min(image.shape[-2], self.crop[0])
        crop_width = min(image.shape[-1], self.crop[1])
        image, segment_map = v2.RandomCrop([crop_height, crop_width])(image, segment_map)
        image, segment_map = self.flip(image, segment_map)
        image = self.distort(image)
        return pad_to(image, self.crop, 128), pad_to(segment_map, self.crop, 0)


class DetrAugmentation:
    """DETR's, for COCO: a flip; half of the time a resize and a crop; then a resize.

    Images keep their own sizes; `collate` pads them. Sides in pixels, as in Augmentation.
    """

    def __init__(self, short_side, max_long_side):
        self.short_side = short_side
        self.max_long_side = max_long_side
        self.flip = v2.RandomHorizontalFlip()

    def __call__(self, image, segment_map):
        image, segment_map = self.flip(tv_tensors.Image(image), tv_tensors.Mask(segment_map))
        if torch.rand(()) < 0.5:
            image, segment_map = resized(image, segment_map, random_choice([400, 500, 600]))
            size = [int(torch.randint(min(384, side), min(600, side) + 1, ()))
                    for side in image.shape[-2:]]
            image, segment_map = v2.RandomCrop(size)(image, segment_map)
        return resized(image, segment_map, random_choice(self.short_side), self.max_long_side)


def random_choice(values):
    return values[int(torch.randint(len(values), ()))]


def pad_to(x, size, value):
    """Pads [..., H, W] at the right and the bottom to `size`. value: one, or one per channel."""
    height, width = x.shape[-2:]
    if [height, width] == list(size):
        return x
    padded = torch.empty(*x.shape[:-2], *size, dtype=x.dtype)
    padded[:] = torch.tensor(value)[..., None, None]
    padded[..., :height, :width] = x
    return padded


# ------------------------------------------------------------------------------ samples and batches
def to_label_map(segment_map, class_of, void):
    """Segments -> classes of pixels [H, W] int64, `void` where no segment is."""
    table = torch.full((int(segment_map.max()) + 1,), void)
    for i, label in class_of.items():
        if i < len(table):                                           # a listed id may have no pixel
            table[i] = label
    return table[segment_map.long()]


def void_label(num_classes):
    """The value of void in label maps and index PNGs: 255, or 65535 where 255 is a class."""
    return 255 if num_classes <= 255 else 65535


def merge_classes(segment_map, class_of):
    """Panoptic -> semantic: merges the segments of each class, crowds too.

    -> segment map, {segment id: class}; if any merge, ids are class + 1
    """
    classes = set(class_of.values())
    if len(classes) == len(class_of):
        return segment_map, class_of
    merged = to_label_map(segment_map, class_of, void=-1) + 1
    dtype = torch.uint8 if max(classes) < 255 else torch.int32
    return merged.to(dtype), {label + 1: label for label in classes}


def seed_of(*numbers):
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainingSamples(Dataset):
    """An endless stream of augmented samples: the n-th is a function of (seed, n) and nothing else.

    A sample: image [3, H, W] uint8, segment map [H, W], segment ids [n], their labels [n], name.
    Task "semantic" merges the segments of a class, crowds too; "panoptic" drops crowds. Segments
    that the crop emptied are dropped.
    """

    def __init__(self, dataset, augment, seed=0, task="panoptic"):
        self.dataset = dataset
        self.augment = augment
        self.seed = seed
        self.task = task
        self.epoch, self.order = None, None

    def __getitem__(self, n):
        epoch, place = divmod(n, len(self.dataset))
        if epoch != self.epoch:
            self.epoch = epoch
            rng = np.random.default_rng([self.seed, epoch])
            self.order = rng.permutation(len(self.dataset)).tolist()
        image, segment_map, class_of, crowd, name = self.dataset[self.order[place]]
        if self.task == "semantic":
            segment_map, class_of = merge_classes(segment_map, class_of)
            crowd = []

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, n))
            image, segment_map = self.augment(image, segment_map)

        present = torch.bincount(segment_map.flatten()).nonzero().flatten().tolist()
        ids = [i for i in present if i in class_of and i not in crowd]
        labels = [class_of[i] for i in ids]
        return (image, segment_map, torch.tensor(ids, dtype=torch.long),
                torch.tensor(labels, dtype=torch.long), name)


class Batch(NamedTuple):
    """What loader workers send. Segment n is where segment_maps[owner[n]] == ids[n]."""
    images: torch.Tensor          # [B, 3, H, W] uint8
    segment_maps: torch.Tensor    # [B, H, W] uint8 or int32, 0 is void
    ids: torch.Tensor             # [N]
    labels: torch.Tensor          # [N]
    owner: torch.Tensor           # [N], the image of each segment
    names: list                   # [B]

    def to(self, device):
        """Everything on `device` except `owner`: the matcher needs segment counts on the CPU."""
        return Batch(self.images.to(device, non_blocking=True),
                     self.segment_maps.to(device, non_blocking=True),
                     self.ids.to(device, non_blocking=True),
                     self.labels.to(device, non_blocking=True), self.owner, self.names)

    def masks(self):
        """-> the binary mask of every segment [N, H, W] bool."""
        owner = self.owner.to(self.ids.device, non_blocking=True)
        return self.segment_maps[owner] == self.ids[:, None, None].to(self.segment_maps.dtype)

    def label_map(self, void):
        """-> [B, H, W] int64: the class of each pixel, or `void`."""
        max_id = 2 ** 8 - 1 if self.segment_maps.dtype == torch.uint8 else 2 ** 16 - 1
        owner = self.owner.to(self.ids.device, non_blocking=True)
        class_of = torch.full((len(self.images), max_id + 1), void, device=self.ids.device)
        class_of[owner, self.ids] = self.labels
        labels = class_of.gather(1, self.segment_maps.flatten(1).long())             # [B, HW]
        return labels.view(self.segment_maps.shape)


def collate(samples):
    """Samples -> Batch. Smaller images are padded at the right and the bottom: maps with void,
    images with ImageNet's mean, rounded (about zero after normalization)."""
    images, segment_maps, ids, labels, names = zip(*samples)
    size = [max(image.shape[1] for image in images), max(image.shape[2] for image in images)]
    images = torch.stack([pad_to(image, size, (124, 116, 104)) for image in images])
    segment_maps = torch.stack([pad_to(segment_map, size, 0) for segment_map in segment_maps])
    owner = torch.repeat_interleave(torch.tensor([len(i) for i in ids]))
    return Batch(images, segment_maps, torch.cat(ids), torch.cat(labels), owner, list(names))


def step_batches(first, steps, batch_size, rank=0, world_size=1, accumulate=1):
    """Yields the sample numbers of every forward pass of one process, from step `first` on.

    Step s takes batch_size samples from number s * batch_size on, and each process an equal share.
    """
    share = batch_size // world_size // accumulate                   # images of a forward pass
    for step in range(first, steps):
        for part in range(accumulate):
            start = ((step * world_size + rank) * accumulate + part) * share
            yield range(start, start + share)


def training_batches(samples, sampler, workers, device):
    """-> iterator over the `Batch`es of a sampler, read ahead by `workers` processes."""
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=collate, num_workers=workers,
                        pin_memory=device.type == "cuda", worker_init_fn=ignore_stop_signals,
                        prefetch_factor=4 if workers else None)      # evens out slow images
    return iter(loader)


def ignore_stop_signals(worker):
    """Keeps a loader worker alive when the whole job is told to stop: the training process still
    needs it to finish its step, and ends it then."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):                                   # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


# ------------------------------------------------------------------------------------- drawn shapes
TEXTURES = ["stripes", "checks", "dots", "waves", "plain"]
LOBES = {"disk": 0, "peanut": 2, "trefoil": 3, "cross": 4, "star": 5}


class Shapes(SegmentationDataset):
    """Drawn pictures: two or three textured regions (stuff) under one to three forms (things), as
    far as there are classes. Each form is an instance.

    A picture is a function of (seed, split, index). Half of the classes are textures, half forms;
    each has its own hue; with more than five of a kind, some differ in hue alone.
    """

    def __init__(self, root=None, split="train", num_classes=6, size=(64, 96), length=None, seed=0):
        self.size = size
        self.seed = [seed, ("train", "val").index(split)]
        self.num_stuff = (num_classes + 1) // 2
        self.num_things = num_classes // 2
        textures = [TEXTURES[k % len(TEXTURES)] for k in range(self.num_stuff)]
        forms = [list(LOBES)[k % len(LOBES)] for k in range(self.num_things)]
        self.kinds = textures + forms
        self.hues = [k / self.num_stuff for k in range(self.num_stuff)]
        self.hues += [k / self.num_things for k in range(self.num_things)]
        if num_classes <= 10:
            classes = self.kinds
        else:
            classes = [f"{kind} of hue {360 * hue:.0f}" for kind, hue in zip(self.kinds, self.hues)]
        if length is None:
            length = 20_000 if split == "train" else 100
        super().__init__(pairs=[(f"{number:05d}", None) for number in range(length)],
                         classes=classes,
                         is_thing=[k >= self.num_stuff for k in range(num_classes)],
                         read_segments=None, category_ids=list(range(num_classes)), panoptic=True)

    def __getitem__(self, index):
        name, _ = self.pairs[index]
        H, W = self.size
        num_classes = self.num_stuff + self.num_things
        rng = np.random.default_rng([*self.seed, index])
        y, x = np.mgrid[:H, :W].astype(np.float32)
        image = np.zeros((H, W, 3), np.float32)
        segment_map = np.zeros((H, W), np.uint8)

        stuff = rng.permutation(self.num_stuff)[:rng.integers(2, 4)].tolist()
        things = []
        if self.num_things:
            things = rng.integers(self.num_stuff, num_classes, size=rng.integers(1, 4)).tolist()
        class_of = dict(enumerate(stuff + things, 1))

        boundary = np.zeros(W)                         # the upper edge of the next region of stuff
        for i, label in class_of.items():              # painted over one another
            if label < self.num_stuff:
                region = y >= boundary
                shade = texture(self.kinds[label], rng, y, x)
                wave = 4 * np.sin(x[0] / rng.uniform(6, 12) + rng.uniform(0, 6))
                boundary = boundary + rng.uniform(0.25, 0.5) * H + wave
            else:
                region = form(self.kinds[label], rng, y, x)
                shade = np.ones_like(x)
            hue = self.hues[label] + rng.uniform(-0.35, 0.35) / max(3, num_classes / 2)
            color = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 0.9), rng.uniform(0.5, 1))
            image[region] = shade[region][:, None] * np.float32(color)
            segment_map[region] = i
        image += 0.03 * rng.standard_normal(image.shape, np.float32)

        area = np.bincount(segment_map.ravel(), minlength=len(class_of) + 1)
        class_of = {i: label for i, label in class_of.items() if area[i] >= 16}
        segment_map[~np.isin(segment_map, list(class_of))] = 0       # slivers become void
        image = torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)).permute(2, 0, 1)
        return image, torch.from_numpy(segment_map), class_of, [], name


def texture(kind, rng, y, x):
    """-> shade [H, W] of a rotated pattern with a period of 6 to 12 pixels. y, x: pixels [H, W]."""
    angle = rng.uniform(0, np.pi)
    frequency = 2 * np.pi / rng.uniform(6, 12)
    cos = frequency * math.cos(angle)
    sin = frequency * math.sin(angle)
    across = x * cos - y * sin
    along = x * sin + y * cos
    if kind == "stripes":
        dark = np.sin(across) < 0
    elif kind == "checks":
        dark = np.sin(across) * np.sin(along) < 0
    elif kind == "dots":
        dark = np.sin(across) * np.sin(along) < 0.5
    elif kind == "waves":
        dark = np.sin(across + 2 * np.sin(along / 2)) < 0
    else:                                                            # plain
        dark = np.zeros(x.shape, bool)
    return np.where(dark, np.float32(0.55), np.float32(1))


def form(kind, rng, y, x):
    """-> region [H, W] of a rotated form somewhere in the picture. y, x: pixels [H, W]."""
    H, W = x.shape
    turn = rng.uniform(0, 2 * np.pi)
    size = rng.uniform(0.12, 0.22) * min(H, W)
    x = (x - W * rng.uniform(0.1, 0.9)) / size
    y = (y - H * rng.uniform(0.1, 0.9)) / size
    return np.hypot(x, y) < 1 + 0.4 * np.cos(LOBES[kind] * (np.arctan2(y, x) + turn))


# ------------------------------------------------------------------------------------ reading files
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def require(*paths):
    """FileNotFoundError for the first file or folder that is not there."""
    for path in paths:
        path.stat()


def read_text(path):
    """The text of a UTF-8 file, with or without the byte order mark that Windows writes."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


def read_lines(path):
    """The lines of a text file without surrounding white space; empty lines are left out."""
    lines = [line.strip() for line in read_text(path).split("\n")]
    return [line for line in lines if line]


def find_files(folder, suffixes, ending=""):
    """The names of files in a folder and its subfolders, sorted; skips hidden ones, follows links.

    suffixes: one in lower case, or a tuple of them; ending: what the names must end in besides
    """
    found = glob.glob(f"**/*{ending}", root_dir=folder, recursive=True)
    return sorted(file for file in found if file.lower().endswith(suffixes))


def find_images(folder, ending=""):
    """The names of the images in a folder and its subfolders, sorted. UserError without any."""
    require(folder)
    images = find_files(folder, IMAGE_SUFFIXES, ending)
    if not images:
        raise UserError(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)})")
    return images


def pair_files(images, annotations, ending="", new_endings=(".png",), names=None):
    """Finds the annotation of every image -> [(image, annotation)].

    An annotation has the name of its image, but for the ending, and lies in the same subfolder.

    images, annotations: folders
    ending: what the names of the images end in (default: the suffix of an image)
    new_endings: what annotations end in instead; the first that exists counts
    names: JPEGs to take, in this order (default: all images, sorted)
    """
    require(images, annotations)
    if names is None:
        files = find_images(images, ending)
    else:
        files = [f"{name}.jpg" for name in names]
    pairs = []
    for file in files:
        stem = file.removesuffix(ending or Path(file).suffix)
        candidates = [annotations / (stem + new_ending) for new_ending in new_endings]
        annotation = next((path for path in candidates if path.exists()), candidates[0])
        pairs.append((images / file, annotation))

    missing = [path for pair in pairs for path in pair if not path.exists()]
    if missing:
        problem = f"no such file ({len(missing)} missing for {len(pairs)} images)"
        raise FileNotFoundError(errno.ENOENT, problem, str(missing[0]))
    shared = repeated(annotation for _, annotation in pairs)
    if shared:
        owners = [image.name for image, annotation in pairs if annotation == shared[0]]
        raise UserError(f"{shared[0]} belongs to {' and '.join(owners)}: give each image a name "
                        "and an annotation of its own")
    return pairs


def open_image(path):
    """A PIL image, read to its end and turned as the camera's EXIF entry says."""
    try:
        with Image.open(path) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:          # decoders raise all kinds of errors for broken files
        raise UserError(f"{path} cannot be read as an image ({error}): replace it") from error
    if image.format == "TIFF" and has_unused_bands(image):
        raise UserError(f"{path} has more bands than red, green and blue, and the rest would be "
                        "ignored: save the three that count as an RGB image")
    return turned


def has_unused_bands(tiff):
    """Whether a TIFF has bands beside the colors that are not declared as transparency."""
    samples_per_pixel = tiff.tag_v2.get(277, 1)
    extra_samples = tiff.tag_v2.get(338, ())           # of each extra band; 1 and 2: transparency
    colors = 4 if tiff.mode == "CMYK" else 3
    unused = samples_per_pixel - colors
    if unused == 1 and extra_samples in ((1,), (2,)):
        return False
    return unused > 0


def read_image(path):
    """-> RGB [H, W, 3] uint8, turned as the camera's EXIF entry says."""
    image = open_image(path)
    if image.mode[0] in "IF":
        raise UserError(f"{path} has more than 8 bits per channel: save it with 8")
    return np.array(image.convert("RGB"))


def read_labels(path):
    """-> the class values [H, W] int32 of an index PNG, or of a .mat file of COCO-Stuff.

    Three equal channels are read as one, and transparency is ignored.
    """
    if path.suffix == ".mat":
        return read_mat(path)
    image = open_image(path)
    if image.mode == "LA":                                           # gray with transparency
        image = image.getchannel("L")
    values = np.array(image)
    if values.ndim == 3:
        values, rgb = values[..., 0], values[..., :3]
        if (rgb != values[..., None]).any():
            raise UserError(f"{path} holds the colors {colors_in(rgb)}, not class indices: save "
                            "indices in one channel or, in a folder of your own, add the color "
                            "of each class to its line in classes.txt (road 128 64 128)")
    return values.astype(np.int32)


def read_mat(path):
    """-> the class values [H, W] int32 of a .mat file of COCO-Stuff."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: to read .mat files, pip install h5py") from None
    try:
        with h5py.File(path) as file:
            return np.array(file["S"]).T.astype(np.int32)            # stored column by column
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is no label file of COCO-Stuff ({error}): replace it") from error


def read_colors(path, colors):
    """-> the index [H, W] int32 of each pixel's color in the list `colors` of (R, G, B)."""
    rgb = read_image(path)
    codes = rgb @ np.array([1, 256, 65536], np.int32)
    code_of_color = np.array(colors) @ [1, 256, 65536]
    order = code_of_color.argsort()
    place = np.searchsorted(code_of_color[order], codes).clip(max=len(colors) - 1)
    index = order[place]
    unlisted = code_of_color[index] != codes
    if unlisted.any():
        raise UserError(f"{path} holds the colors {colors_in(rgb[unlisted])}, which classes.txt "
                        "does not list: add them, or save the mask without smooth edges")
    return index.astype(np.int32)


def colors_in(rgb):
    """The colors in an array [..., 3] as text, the most frequent first."""
    colors, counts = np.unique(rgb.reshape(-1, 3), axis=0, return_counts=True)
    return listing(tuple(color) for color in colors[(-counts).argsort()].tolist())


def segments_of_values(annotation, read_values, class_of_value, void_values, is_thing=None):
    """A map of class values -> segment map [H, W], {segment id: class}, crowd ids.

    Segment ids are 1, 2, ... in the order of the values.

    read_values: a function, annotation -> values [H, W]
    void_values: values without a class; None: all that class_of_value does not list
    is_thing: if given, values are coded as in Cityscapes: 1000 v + n is instance n of class
        value v, and a bare v of a thing class is a crowd
    """
    values = read_values(annotation)
    present = np.flatnonzero(np.bincount(values.ravel())).tolist()
    classes = {}
    for value in present:
        class_value = value // 1000 if is_thing and value >= 1000 else value
        if class_value in class_of_value:
            classes[value] = class_of_value[class_value]

    if void_values is not None:
        wrong = [value for value in present if value not in classes and value not in void_values]
        if wrong:
            raise UserError(f"{file_of(annotation)} holds [{listing(wrong)}]; classes are "
                            f"{min(class_of_value)}..{max(class_of_value)}, void is "
                            f"{listing(sorted(void_values))}. If labels start at 1, subtract 1; "
                            "if the list of classes is too short, complete it")

    id_of_value = np.zeros(int(values.max()) + 1, np.uint8 if len(classes) <= 255 else np.int32)
    id_of_value[list(classes)] = range(1, len(classes) + 1)
    class_of, crowd = {}, []
    for i, (value, label) in enumerate(classes.items(), 1):
        class_of[i] = label
        if is_thing and is_thing[label] and value < 1000:
            crowd.append(i)
    return id_of_value[values], class_of, crowd


# --------------------------------------------------------------------------- published label images
def value_dataset(pairs, classes, values, is_thing=None, void_values=None, panoptic=False,
                  read_values=read_labels, category_ids=None, **more):
    """A dataset of label maps in which `values[k]` is class k.

    panoptic: values are coded as in Cityscapes, see `segments_of_values`
    category_ids: by default the values
    more: further fields of SegmentationDataset
    """
    if is_thing is None:
        is_thing = [False] * len(values)
    read_segments = partial(segments_of_values, read_values=read_values, void_values=void_values,
                            class_of_value={value: k for k, value in enumerate(values)},
                            is_thing=is_thing if panoptic else None)
    return SegmentationDataset(pairs, list(classes), list(is_thing), read_segments,
                               category_ids or list(values), panoptic, **more)


def without_truth(paths, info):
    """A dataset of images alone. info: a checkpoint's "config", "classes", "is_thing" and, if it
    has them, the publisher's "category_ids" and "label_values"."""
    numbers = info.get("category_ids") or list(range(len(info["classes"])))
    return SegmentationDataset([(path, None) for path in paths], info["classes"], info["is_thing"],
                               read_segments=None, category_ids=numbers, has_truth=False,
                               label_values=info.get("label_values"),
                               image_ids=published_image_ids(info["config"]["dataset"], paths))


def published_image_ids(dataset, paths):
    """-> {name of an image: the publisher's id}, by which its evaluators know the image."""
    names = [path.stem for path in paths]
    if dataset.startswith("cityscapes"):
        return {name: name.removesuffix("_leftImg8bit") for name in names}
    if dataset == "coco-panoptic":
        return {name: int(name) for name in names if name.isdecimal()}
    return {}


def published_classes(name):
    """The classes of a dataset in order: dicts of "id", "name" and, for some, "isthing"."""
    path = Path(__file__).parent / "tools" / "classes.json"
    return json.loads(path.read_text(encoding="utf-8"))[name]


PARTS = {"train": "training", "val": "validation", "test": "testing"}


def ade20k(root, split, panoptic=False):
    """The 150 classes of the scene parsing challenge (SceneParse150)."""
    root, part = root / "ADEChallengeData2016", PARTS[split]
    classes = published_classes("ade20k")
    names = [c["name"] for c in classes]
    values = [c["id"] for c in classes]                              # 1..150
    pairs = pair_files(root / "images" / part, root / "annotations" / part)
    if not panoptic:
        return value_dataset(pairs, names, values, void_values={0})

    is_thing = [bool(c["isthing"]) for c in classes]
    instances = pair_files(root / "images" / part, root / "annotations_instance" / part)
    both = [(image, (annotation, instance))
            for (image, annotation), (_, instance) in zip(pairs, instances)]
    things = [value for value, thing in zip(values, is_thing) if thing]
    # The authors' preparation numbers the panoptic categories 0..149, not 1..150.
    return value_dataset(both, names, values, is_thing, {0}, panoptic=True,
                         read_values=partial(read_ade20k_instances, things=things),
                         category_ids=list(range(150)), label_values=values)


def read_ade20k_instances(paths, things):
    """A class map and a PNG of instances -> values [H, W] in Cityscapes' coding.

    In the PNG, R is the place of the class among the 100 things, from 1 (0: no instance), and G the
    number of the instance. Instances lie over the class map; pixels of things outside every
    instance become void.
    """
    class_map_path, instance_path = paths
    values = read_labels(class_map_path)
    rgb = read_image(instance_path).astype(np.int32)
    place, number = rgb[..., 0], rgb[..., 1]
    if place.shape != values.shape or place.max() > len(things):
        raise UserError(f"{instance_path}, {place.shape} with categories up to {place.max()} of "
                        f"{len(things)}, does not hold the instances of {class_map_path}, "
                        f"{values.shape}")
    values = np.where(np.isin(values, things), 0, values)
    return np.where(place > 0, 1000 * np.array([0, *things])[place] + number, values)


def ade20k_full(root, split):
    """The 847 classes of the full ADE20K, in the order of the released weights."""
    images = root / "ADE20K_2021_17_01" / "images" / "ADE" / PARTS[split]
    classes = published_classes("ade20k-full")
    pairs = pair_files(images, images, ".jpg", ["_seg.png"])
    return value_dataset(pairs, [c["name"] for c in classes], [c["id"] for c in classes],
                         read_values=read_ade20k_full, shrink_to=512)


def read_ade20k_full(path):
    """-> the class values [H, W] of an X_seg.png; its blue channel numbers the instances."""
    rgb = read_image(path).astype(np.int32)
    return rgb[..., 0] // 10 * 256 + rgb[..., 1]


def cityscapes(root, split, panoptic=False):
    """The 19 classes of Cityscapes; in panoptic data, groups of things are crowd."""
    root = root / "cityscapes"
    labels = [label for label in Cityscapes.classes if not label.ignore_in_eval]
    names = [label.name for label in labels]
    values = [label.id for label in labels]
    is_thing = [label.has_instances for label in labels]
    images = root / "leftImg8bit" / split
    if split == "test":
        pairs = unlabeled(images)
    else:
        kind = "instanceIds" if panoptic else "labelIds"
        pairs = pair_files(images, root / "gtFine" / split, "_leftImg8bit.png",
                           [f"_gtFine_{kind}.png"])
    image_ids = published_image_ids("cityscapes", [path for path, _ in pairs])
    return value_dataset(pairs, names, values, is_thing, panoptic=panoptic, image_ids=image_ids,
                         has_truth=split != "test")


def unlabeled(folder):
    """The images in a folder, as pairs without an annotation."""
    return [(folder / file, None) for file in find_images(folder)]


def mapillary(root, split):
    """The 65 classes of Mapillary Vistas 1.2."""
    root = root / "mapillary_vistas" / PARTS[split]
    names = [c["name"] for c in published_classes("mapillary")]
    if split == "test":
        pairs = unlabeled(root / "images")
    else:
        pairs = pair_files(root / "images", root / "labels")
    return value_dataset(pairs, names, range(65), void_values={65}, has_truth=split != "test")


def voc(root, split):
    """The 21 classes of Pascal VOC 2012, background among them."""
    root = root / "VOCdevkit" / "VOC2012"
    names = read_lines(root / "ImageSets" / "Segmentation" / f"{split}.txt")
    pairs = pair_files(root / "JPEGImages", root / "SegmentationClass", names=names)
    classes = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable "
               "dog horse motorbike person pottedplant sheep sofa train tvmonitor").split()
    return value_dataset(pairs, classes, range(21), void_values={255})


def coco_stuff_10k(root, split):
    """The 171 classes of COCO-Stuff 10k, from its .mat files or from prepared PNGs."""
    root = root / "coco" / "coco_stuff_10k"
    part = "train" if split == "train" else "test"
    classes = published_classes("coco-stuff-10k")
    names = [c["name"] for c in classes]
    ids = [c["id"] for c in classes]                                 # 1..182, with gaps
    prepared = root / "annotations_detectron2" / part
    if prepared.exists():                                            # PNGs of 0..170, 255 is void
        stems = sorted(png.stem for png in prepared.glob("*.png"))
        pairs = pair_files(root / "images", prepared, names=stems)
        return value_dataset(pairs, names, range(171), void_values={255}, category_ids=ids)
    stems = read_lines(root / "imageLists" / f"{part}.txt")
    pairs = pair_files(root / "images", root / "annotations", new_endings=[".mat"], names=stems)
    return value_dataset(pairs, names, ids, void_values={0})


# ---------------------------------------------------------------------------- your own label images
class ClassLine(NamedTuple):
    """A line of classes.txt."""
    index: int                  # of the line; the class's value in the label maps
    name: str
    color: tuple                # (R, G, B), or None
    kind: str                   # thing, stuff or void


COLOR = r"\d+[\s,]+\d+[\s,]+\d+"
LINE_OF_CLASS = re.compile(rf"((?P<color_first>{COLOR})[\s,]+)?"
                           r"(?P<name>.+?)"
                           rf"([\s,]+(?P<color>{COLOR}))?"
                           r"([\s,]+(?P<kind>thing|stuff|void))?", re.IGNORECASE)


def read_class_list(path):
    """classes.txt -> [ClassLine]. A line is NAME [RED GREEN BLUE] [thing | stuff | void].

    The color may also come first, as in CamVid's label_colors.txt, and a class called "void" is
    void.
    """
    text = read_text(path).rstrip()
    lines = []
    for index, line in enumerate(text.split("\n") if text else []):
        line = line.strip()
        if not line:
            raise UserError(f"{path}: line {index + 1} is empty, but each line is a class: write "
                            "its name, or `unused void`")
        match = LINE_OF_CLASS.fullmatch(line)
        color = match["color_first"] or match["color"]
        if color:
            color = tuple(int(number) for number in re.findall(r"\d+", color))
            if max(color) > 255:
                raise UserError(f"{path}: {line!r} lists a color beyond 255: colors are three "
                                "numbers from 0 to 255")
        kind = (match["kind"] or "stuff").lower()
        if match["name"].lower() == "void":
            kind = "void"
        lines.append(ClassLine(index, match["name"], color, kind))

    names = [line.name for line in lines if line.kind != "void"]
    colors = [line.color for line in lines if line.color]
    if not names:
        raise UserError(f"{path} lists no class: write the name of one in each line")
    if repeated(names):
        raise UserError(f"{path} lists {listing(map(repr, repeated(names)))} more than once: give "
                        "each class a name of its own")
    if colors and len(colors) < len(lines):
        without = [line.name for line in lines if not line.color]
        raise UserError(f"{path} lists no color for {listing(map(repr, without))}: give every "
                        "class a color, or none")
    if repeated(colors):
        raise UserError(f"{path} lists the color {listing(repeated(colors))} more than once: give "
                        "each class a color of its own")
    return lines


def label_folder(root, split):
    """Your own label images: index PNGs, or colored ones whose colors classes.txt lists."""
    lines = read_class_list(root / "classes.txt")
    listed = [line for line in lines if line.kind != "void"]
    annotations = root / "annotations" / split
    pairs = pair_files(root / "images" / split, annotations,
                       new_endings=[".png", ".PNG", "_L.png"])       # CamVid's end in _L.png
    used = {annotation for _, annotation in pairs}
    unused = [file for file in find_files(annotations, ".png") if annotations / file not in used]
    if unused:
        warn(f"{annotations}: PNGs that belong to no image ({len(unused)}): {listing(unused, 3)}")

    void_values = {line.index for line in lines if line.kind == "void"}
    if lines[0].color:
        read_values = partial(read_colors, colors=[line.color for line in lines])
    else:
        read_values = read_labels
        void_values.add(void_label(len(lines)))

    dataset = value_dataset(pairs, [line.name for line in listed], [line.index for line in listed],
                            [line.kind == "thing" for line in listed], void_values,
                            read_values=read_values)
    check_labels(dataset, annotations, only_255_is_void=void_values == {255})
    return dataset


def check_labels(dataset, where, only_255_is_void):
    """Tells what would silently go wrong in training with label maps."""
    classes = dataset.classes
    occurring, has_void, looked_at = look_at_maps(dataset, where)
    if only_255_is_void and has_void and len(classes) == 2 and occurring == {0}:
        raise UserError(f"{where} holds nothing but 0 and 255, and 255 is void. If these are your "
                        "two classes: write 0 and 1, or list their colors in classes.txt "
                        f"({classes[0]} 0 0 0, {classes[1]} 255 255 255)")
    warn_of_one_class(classes, where)
    hint = ""
    if only_255_is_void and has_void:
        hint = "; 255 is void: if it stands for a class, write that class's index instead"
    missing = [repr(name) for k, name in enumerate(classes) if k not in occurring]
    if missing:
        maps = f"any of the {looked_at} label maps looked at"
        if looked_at == len(dataset):
            maps = "any label map"
        warn(f"{where}: no {listing(missing)} in {maps}{hint}")
    elif len(classes) == 1 and hint:
        warn(f"{where}: 0 is {classes[0]!r}{hint}")


def look_at_maps(dataset, where, most=50):
    """Reads up to 50 segment maps, or all if those have fewer than two classes.

    -> the set of classes that have a pixel, whether void has one, the number of maps. UserError if
       there is nothing but void.
    """
    every = math.ceil(len(dataset) / most)
    occurring, has_void = classes_in(dataset, dataset.pairs[::every])
    if len(occurring) < min(2, len(dataset.classes)):                # too odd to be judged by 50
        if len(dataset) > 1000:
            warn(f"{where}: {most} of the maps show fewer than two classes, so all are read")
        every = 1
        occurring, has_void = classes_in(dataset, dataset.pairs)
    if not occurring:
        raise UserError(f"{where} holds nothing but void: there is nothing to learn")
    return occurring, has_void, len(dataset.pairs[::every])


def classes_in(dataset, pairs):
    """-> the set of classes that have a pixel in these pairs' maps, and whether void has one."""
    occurring, has_void = set(), False
    for _, annotation in pairs:
        segment_map, class_of, _ = dataset.read_segments(annotation)
        present = set(np.flatnonzero(np.bincount(segment_map.ravel())).tolist())
        occurring.update(class_of[i] for i in present & class_of.keys())
        has_void = has_void or 0 in present
    return occurring, has_void


def warn_of_one_class(classes, where):
    if len(classes) == 1:
        warn(f"{where}: {classes[0]!r} is the only class, so mIoU and the per-pixel loss say "
             "nothing: if there is a background, make it a class")


# --------------------------------------------------------------------------- COCO's panoptic format
def coco_panoptic(root, split):
    """The 133 classes of COCO 2017."""
    root, name = root / "coco", f"panoptic_{split}2017"
    if split == "test":
        classes = published_classes("coco-panoptic")
        pairs = unlabeled(root / "test2017")
        image_ids = published_image_ids("coco-panoptic", [path for path, _ in pairs])
        return SegmentationDataset(pairs, [c["name"] for c in classes],
                                   [bool(c["isthing"]) for c in classes], read_segments=None,
                                   category_ids=[c["id"] for c in classes], panoptic=True,
                                   image_ids=image_ids, has_truth=False)
    maps = root / name if (root / name).exists() else root / "annotations" / name
    json_file = root / "annotations" / f"{name}.json"
    return coco_format(root / f"{split}2017", maps, json_file)


def coco_folder(root, split):
    """Your own data in COCO's panoptic format."""
    other_split = "val" if split == "train" else "train"
    maps = root / f"panoptic_{split}"
    dataset = coco_format(root / "images" / split, maps, root / f"panoptic_{split}.json",
                          root / f"panoptic_{other_split}.json")
    look_at_maps(dataset, maps)              # for its errors: unlisted ids, nothing but void
    return dataset


def coco_format(images, maps, json_file, other_json_file=None):
    """A dataset in COCO's panoptic format.

    images, maps: the folders of images and of PNGs
    json_file: the json that lists both
    other_json_file: that of another split, if there is one; classes are those of both together, so
        that each has one number even if one of the splits lacks it
    """
    require(images, maps, json_file)
    content = read_coco_json(json_file)
    categories = read_categories(json_file, content)
    if other_json_file and other_json_file.exists():
        others = read_categories(other_json_file, read_coco_json(other_json_file))
        differing = differences(categories, others)
        if differing:
            raise UserError(f"{json_file} and {other_json_file} differ in the categories "
                            f"{listing(differing)}: make them equal")
        categories = dict(sorted((others | categories).items()))

    annotations = match_images(json_file, content)
    image_files = match_files(images, [image["file_name"] for _, image in annotations])
    map_files = match_files(maps, [annotation["file_name"] for annotation, _ in annotations])

    class_of_category = {category_id: k for k, category_id in enumerate(categories)}
    pairs, image_ids = [], {}
    for (annotation, _), image_file, map_file in zip(annotations, image_files, map_files):
        segments = listed_segments(json_file, annotation, class_of_category)
        pairs.append((image_file, (map_file, segments)))
        image_ids[image_file.stem] = annotation["image_id"]

    names = [name for name, _ in categories.values()]
    is_thing = [thing for _, thing in categories.values()]
    check_segments(json_file, names, [segments for _, (_, segments) in pairs])
    return SegmentationDataset(pairs, names, is_thing, read_panoptic_png, list(categories),
                               panoptic=True, image_ids=image_ids)


COCO_KEYS = {"categories": ("id", "name"), "images": ("id", "file_name"),
             "annotations": ("image_id", "file_name", "segments_info")}


def read_coco_json(path):
    """A json in COCO's panoptic format, with the lists and the keys that it must have."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not a whole json file ({error}): export it again") from error
    problem = f"{path} is not in COCO's panoptic format"
    for part, keys in COCO_KEYS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{problem}: it lacks the list {part!r}")
        for entry in entries:
            for key in keys:
                if key not in entry:
                    raise UserError(f"{problem}: an entry of {part!r} lacks {key!r}: {entry!s:.80}")
    return content


def read_categories(json_file, content):
    """-> {category id: (name, is it a thing?)}, sorted by id; ids may have gaps."""
    categories = content["categories"]
    ids = [category["id"] for category in categories]
    # Index PNGs, in which evaluate.py saves results, hold no larger number.
    if not ids or repeated(map(str, ids)) or not all(is_number(i, 0, 65535) for i in ids):
        raise UserError(f"{json_file}: categories need different ids from 0 to 65535, not {ids}")
    names = [str(category["name"]) for category in categories]
    if repeated(names):
        raise UserError(f"{json_file} lists {listing(map(repr, repeated(names)))} more than once: "
                        "give each category a name of its own")
    without = [name for name, category in zip(names, categories) if "isthing" not in category]
    if without:
        warn(f"{json_file}: no \"isthing\" in the categories {listing(map(repr, without))}, which "
             "are taken for things (objects that are counted)")
    things = [as_flag(category.get("isthing", 1), "isthing", json_file) for category in categories]
    return dict(sorted(class_table(ids, names, things).items()))


def is_number(value, low, high):
    """Whether a value from a json is an integer from low to high."""
    return type(value) is int and low <= value <= high


def as_flag(value, key, where):
    """0, 1, false or true, also as text -> bool. key, where: of the json, for the message."""
    flags = {"0": False, "false": False, "1": True, "true": True}
    text = str(value).lower()
    if text not in flags:
        raise UserError(f"{where}: {key!r} is {value!r}: write 0 or 1")
    return flags[text]


def match_images(json_file, content):
    """-> [(annotation, its image)] in the order of the image ids.

    Ids may be numbers on one side and text on the other, as some tools write them.
    """
    ids = [image["id"] for image in content["images"]]
    wrong = [i for i in ids if type(i) not in (int, str)]
    if wrong:
        raise UserError(f"{json_file}: ids of images are integers or text, not {wrong[0]!r}")
    by_text = {}
    for image in content["images"]:
        by_text.setdefault(str(image["id"]), []).append(image)
    for same_id in by_text.values():
        if len(same_id) > 1:
            files = [image["file_name"] for image in same_id]
            raise UserError(f"{json_file}: {listing(files)} have the same id "
                            f"{same_id[0]['id']!r}: give each image an id of its own")

    annotations = content["annotations"]
    unmatched = [a["image_id"] for a in annotations if str(a["image_id"]) not in by_text]
    if unmatched:
        raise UserError(f"{json_file} has annotations of the images "
                        f"{listing(map(repr, unmatched), 20)}, which are not in its list of images")
    twice = repeated(str(a["image_id"]) for a in annotations)
    if twice:
        raise UserError(f"{json_file} has several annotations of the images {listing(twice)}: "
                        "merge them")

    annotated = {str(a["image_id"]) for a in annotations}
    ignored = [images[0]["file_name"] for text, images in by_text.items() if text not in annotated]
    if ignored:
        warn(f"{json_file}: images without an annotation are ignored ({len(ignored)}): "
             f"{listing(ignored, 3)}")
    # Numbers before text, which Python does not compare.
    annotations = sorted(annotations, key=lambda a: (isinstance(a["image_id"], str), a["image_id"]))
    return [(annotation, by_text[str(annotation["image_id"])][0]) for annotation in annotations]


def match_files(folder, names):
    """The files that a json names -> their paths.

    As some tools write them, names may hold subfolders that are not there and, for PNGs, the ending
    of the image.
    """
    found = glob.glob("**/*", root_dir=folder, recursive=True)
    found = {Path(file).as_posix() for file in found}                # no backslashes on Windows
    files, missing = [], []
    for name in names:
        name = str(name).replace("\\", "/")                          # written on Windows
        png = os.path.splitext(name)[0] + ".png"
        candidates = (name, png, os.path.basename(name), os.path.basename(png))
        existing = [candidate for candidate in candidates if candidate in found]
        if existing:
            files.append(existing[0])
        else:
            missing.append(name)
    if missing:
        problem = f"no such file ({len(missing)} missing: {listing(missing, 3)})"
        raise FileNotFoundError(errno.ENOENT, problem, str(folder / missing[0]))
    if repeated(files):
        raise UserError(f"{folder / repeated(files)[0]} belongs to two entries of the json: give "
                        "each a file of its own")
    return [folder / file for file in files]


def listed_segments(json_file, annotation, class_of_category):
    """An annotation of COCO's json -> id, class and crowd flag of its segments [n, 3], by id.

    An array, because every loader worker keeps those of all images.
    """
    where = f"{json_file}, annotation {annotation['file_name']}"
    rows = []
    for segment in annotation["segments_info"]:
        for key in ("id", "category_id"):
            if key not in segment:
                raise UserError(f"{where}: a segment lacks {key!r}: {segment!s:.80}")
        # 0 is void in the PNG; three channels hold no more than 2 ** 24 - 1.
        if not is_number(segment["id"], 1, 2 ** 24 - 1):
            raise UserError(f"{where}: a segment has the id {segment['id']!r}: ids are integers "
                            f"from 1 to {2 ** 24 - 1}")
        if segment["category_id"] not in class_of_category:
            raise UserError(f"{where}: a segment has the category {segment['category_id']!r}, "
                            "which is not in the list of categories")
        crowd = as_flag(segment.get("iscrowd") or 0, "iscrowd", where)
        rows.append((segment["id"], class_of_category[segment["category_id"]], crowd))
    if len({i for i, _, _ in rows}) < len(rows):
        raise UserError(f"{where}: two segments have the same id")
    return np.array(sorted(rows), np.int64).reshape(-1, 3)


def check_segments(json_file, names, segments):
    """Tells what would silently go wrong in training. segments: [n, 3] of each image, as above."""
    if not segments or not sum(len(rows) for rows in segments):
        raise UserError(f"{json_file} lists no segment: there is nothing to learn")
    _, labels, crowd = np.concatenate(segments).T
    if crowd.all():
        raise UserError(f"{json_file} lists nothing but crowd regions: there is nothing to learn")
    warn_of_one_class(names, json_file)
    occurring = set(labels.tolist())
    missing = [repr(name) for k, name in enumerate(names) if k not in occurring]
    if missing:
        warn(f"{json_file}: no segment of the category {listing(missing)}")


def read_panoptic_png(annotation):
    """A PNG and its `listed_segments` -> segment map [H, W], {segment id: class}, crowd ids.

    Segment ids are 1, 2, ... in the order of the json's ids.
    """
    path, segments = annotation
    listed = np.append(0, segments[:, 0])                            # 0 is void
    ids = read_ids(path, listed)
    segment_map = np.searchsorted(listed, ids).clip(max=len(segments))
    unlisted = np.unique(ids[listed[segment_map] != ids]).tolist()
    if unlisted:
        raise UserError(f"{path} holds the ids [{listing(unlisted)}] (R + 256 G + 65536 B, or the "
                        "value of a single channel), which its json entry does not list")
    class_of = dict(enumerate(segments[:, 1].tolist(), 1))
    crowd = (np.flatnonzero(segments[:, 2]) + 1).tolist()
    return segment_map.astype(np.uint8 if len(segments) <= 255 else np.int32), class_of, crowd


def read_ids(path, listed):
    """-> the segment ids [H, W] of a panoptic PNG: R + 256 G + 65536 B, or its only channel."""
    image = open_image(path)
    if image.mode == "LA":                                           # gray with transparency
        image = image.getchannel("L")
    if image.mode in ("RGB", "RGBA", "P"):
        ids = np.array(image.convert("RGB")) @ np.array([1, 256, 65536], np.int32)
        # A palette may merely compress the colors; otherwise its indices are the ids.
        if image.mode != "P" or np.isin(ids, listed).all():
            return ids
    return np.array(image).astype(np.int32)


# ----------------------------------------------------------------------- comparing lists of classes
def align_classes(dataset, info):
    """The dataset with its classes numbered as in a checkpoint, which may know more of them.

    info: the checkpoint's dict of "classes", "is_thing" and "category_ids" (old ones lack the last)
    UserError, naming the classes, if the dataset has others than the checkpoint.
    """
    # A model for semantic segmentation may be tested on panoptic data, and the other way round.
    semantic = not dataset.panoptic or info.get("config", {}).get("task") == "semantic"
    if dataset.classes == info["classes"] and (semantic or dataset.is_thing == info["is_thing"]):
        return dataset                           # the same classes in the same order
    sizes = (f"{len(dataset.classes)} classes in the dataset, {len(info['classes'])} in the "
             "checkpoint")
    remedy = "choose the data it was trained on (--dataset, --data-root)"
    if not info.get("category_ids"):
        if len(info["classes"]) != len(dataset.classes):
            raise UserError(f"{sizes}: {remedy}")
        if dataset.classes != info["classes"]:
            warn("classes of the dataset that the checkpoint calls otherwise: "
                 f"{renamed(dataset.classes, info['classes'])}")
        else:
            warn("the dataset and the checkpoint differ in which classes are things; the dataset's "
                 "are scored")
        return dataset

    known = class_table(info["category_ids"], info["classes"], info["is_thing"])
    own = class_table(dataset.category_ids, dataset.classes, dataset.is_thing)
    differing = differences(own, known, compare_things=not semantic)
    differing += [f"{i}: {name!r}, which the checkpoint lacks"
                  for i, (name, _) in own.items() if i not in known]
    if differing:
        raise UserError(f"{sizes}; they differ in {listing(differing)}: {remedy}")

    number = {category_id: k for k, category_id in enumerate(info["category_ids"])}
    aligned = copy.copy(dataset)
    aligned.classes = list(info["classes"])
    aligned.is_thing = list(info["is_thing"])
    aligned.category_ids = list(info["category_ids"])
    aligned.label_values = list(info.get("label_values") or info["category_ids"])
    aligned.read_segments = partial(renumbered_segments, read_segments=dataset.read_segments,
                                    new_number=[number[i] for i in dataset.category_ids])
    return aligned


def renumbered_segments(annotation, read_segments, new_number):
    """`read_segments`, with class new_number[k] instead of k."""
    segment_map, class_of, crowd = read_segments(annotation)
    return segment_map, {i: new_number[k] for i, k in class_of.items()}, crowd


def renamed(ours, theirs):
    """The places at which two lists of class names differ, as text."""
    return listing(f"{mine!r} is {other!r}" for mine, other in zip(ours, theirs) if mine != other)


def class_table(category_ids, classes, is_thing):
    """-> {category id: (name, is it a thing?)}"""
    return {i: (name, thing) for i, name, thing in zip(category_ids, classes, is_thing)}


def differences(ours, theirs, compare_things=True):
    """Classes that two class tables have under one id but with another name or thing flag."""
    differing = []
    for i in sorted(ours.keys() & theirs.keys()):
        (name, thing), (other_name, other_thing) = ours[i], theirs[i]
        if name != other_name:
            differing.append(f"{i}: {name!r} against {other_name!r}")
        elif compare_things and thing != other_thing:
            kinds = "a thing against stuff" if thing else "stuff against a thing"
            differing.append(f"{i}: {name!r}, {kinds}")
    return differing


# --------------------------------------------------------------------------------- all the datasets
DATASETS = {
    "shapes": Shapes,
    "folder": label_folder,
    "panoptic": coco_folder,
    "ade20k": ade20k,
    "ade20k-full": ade20k_full,
    "ade20k-panoptic": partial(ade20k, panoptic=True),
    "coco-panoptic": coco_panoptic,
    "voc": voc,
    "coco-stuff-10k": coco_stuff_10k,
    "cityscapes": cityscapes,
    "mapillary": mapillary,
    "cityscapes-panoptic": partial(cityscapes, panoptic=True),
}
LAYOUT = {
    "folder": "classes.txt (a class in each line), images/{train,val}/X.jpg, "
              "annotations/{train,val}/X.png (class indices, 255 is void)",
    "panoptic": "images/{train,val}/X.jpg and, in COCO's format, panoptic_{train,val}/X.png and "
                "panoptic_{train,val}.json",
    "ade20k": "ADEChallengeData2016/{images,annotations}/{training,validation}/X.{jpg,png}",
    "ade20k-full": "ADE20K_2021_17_01/images/ADE/{training,validation}/SCENE/{X.jpg,X_seg.png} "
                   "(https://ade20k.csail.mit.edu)",
    "ade20k-panoptic": "ADEChallengeData2016/{images,annotations,annotations_instance}/"
                       "{training,validation}/X.{jpg,png}",
    "coco-panoptic": "coco/{train,val,test}2017/X.jpg, "
                     "coco/annotations/panoptic_{train,val}2017.json, "
                     "and PNGs in panoptic_{train,val}2017/ in coco or coco/annotations",
    "voc": "VOCdevkit/VOC2012/{JPEGImages/X.jpg,SegmentationClass/X.png,"
           "ImageSets/Segmentation/{train,val}.txt}",
    "coco-stuff-10k": "coco/coco_stuff_10k/{images/X.jpg,annotations/X.mat,"
                      "imageLists/{train,test}.txt} or, instead of the last two, "
                      "annotations_detectron2/{train,test}/X.png "
                      "(https://github.com/nightrome/cocostuff10k)",
    "cityscapes": "cityscapes/leftImg8bit/{train,val,test}/CITY/X_leftImg8bit.png and "
                  "cityscapes/gtFine/{train,val}/CITY/X_gtFine_labelIds.png "
                  "(https://www.cityscapes-dataset.com)",
    "mapillary": "mapillary_vistas/{training,validation,testing}/{images/X.jpg,labels/X.png} "
                 "(https://www.mapillary.com/dataset/vistas, version 1.2)",
    "cityscapes-panoptic": "cityscapes/leftImg8bit/{train,val,test}/CITY/X_leftImg8bit.png and "
                           "cityscapes/gtFine/{train,val}/CITY/X_gtFine_instanceIds.png "
                           "(https://www.cityscapes-dataset.com)",
}
