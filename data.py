"""Where segments come from: datasets, augmentation, batching (MaskFormer, Sec. 4 and appendix A).

Every dataset gives the same five things for an image: the image, ONE integer map that tells the segment of
each pixel (0 is void), the class of each segment id, the ids of crowd segments, a name. Semantic data have a
segment for each class in the image, panoptic data one for each object; nothing else differs. The map goes
through augmentation and onto the device as it is; binary masks are cut there.

Letters   B images · N segments in the batch · K classes · H W image size

    dataset = build_dataset("shapes", split="val")
    image, segment_map, class_of, crowd, name = dataset[0]    # [3, H, W], [H, W], {id: class}, [], "00000"

Another dataset is one more function that returns a `SegmentationDataset`, and a line in DATASETS and RECIPES.
"""
import colorsys
import json
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


# ---------------------------------------------------------------------------------------- recipes
def tenths(side, first, last):
    """The paper's training sizes: int(0.1 k side) for k = first..last."""
    return [int(0.1 * k * side) for k in range(first, last + 1)]


# Appendix A; the defaults of `train.py`. The short side of an image is resized to one of `short_side` (its
# long side to no more than `max_long_side`), then `crop` is cut out. All are pixels.
RECIPES = {
    "ade20k": dict(crop=(512, 512), short_side=tenths(512, 5, 20), max_long_side=2048, test_short_side=512,
                   test_max_long_side=2048, batch_size=16, steps=160_000),
    "folder": dict(crop=(512, 512), short_side=tenths(512, 5, 20), max_long_side=2048, test_short_side=512,
                   test_max_long_side=2048, batch_size=16, steps=40_000),
    "panoptic": dict(crop=(640, 640), short_side=tenths(640, 5, 20), max_long_side=2560, test_short_side=640,
                     test_max_long_side=2560, batch_size=16, steps=40_000, object_threshold=0.7),
    "shapes": dict(crop=(64, 96), short_side=[56, 64, 72], max_long_side=256, test_short_side=64,
                   test_max_long_side=96, batch_size=16, steps=700, backbone="resnet10t", pretrained=False,
                   queries=20, decoder_layers=3, dim=64, heads=4, ffn_dim=256, dropout=0., lr=2e-3, clip=0.1,
                   warmup=20, color_distortion=False),
}


# ---------------------------------------------------------------------------------------- datasets
class SegmentationDataset(Dataset):
    """Images with segment maps.

    pairs: [(image file, annotation)]; read_segments(annotation) -> segment map [H, W], {id: class}, crowd
    ids; panoptic: a segment of a thing is an instance; category_ids, image_ids: the publisher's.
    """

    def __init__(self, pairs, classes, is_thing, read_segments, panoptic=False, category_ids=None,
                 image_ids=None):
        self.pairs, self.classes, self.is_thing = pairs, list(classes), list(is_thing)
        self.read_segments, self.panoptic = read_segments, panoptic
        self.category_ids, self.image_ids = category_ids or list(range(len(classes))), image_ids or {}

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        path, annotation = self.pairs[index]
        image = torch.from_numpy(read_image(path)).permute(2, 0, 1)      # [3, H, W]
        segment_map, class_of, crowd = self.read_segments(annotation)
        if segment_map.shape != image.shape[1:]:
            raise ValueError(f"{path} is {tuple(image.shape[1:])}, its annotation {segment_map.shape}: "
                             "make their heights and widths equal")
        return image, torch.from_numpy(segment_map), class_of, crowd, Path(path).stem


def build_dataset(name, root=None, split="train", **options):
    """A dataset of DATASETS -> with `.classes` [K] names, `.is_thing` [K] bools and `.panoptic`.

    root: where the datasets lie (default $DATA_ROOT, else ./datasets); split: train or val. Raises ValueError
    for an unknown name or split, FileNotFoundError for another layout than the publisher's.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; choose from {', '.join(DATASETS)}")
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}; choose train or val")
    root = Path(root or os.environ.get("DATA_ROOT") or "datasets")
    dataset = DATASETS[name](root, split, **options)
    if len(dataset) == 0:
        raise FileNotFoundError(f"dataset {name!r} has no images in split {split!r} below {root}")
    return dataset


def folder(root, split):
    """Own semantic data: index PNGs (255 void) and a file of class names."""
    layout = "classes.txt, images/{train,val}/X.jpg, annotations/{train,val}/X.png"
    lines = expect(root / "classes.txt", layout).read_text(encoding="utf-8-sig").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    classes = [line.removesuffix(" thing").removesuffix(" stuff") for line in lines]
    pairs = pair_files(expect(root / "images" / split, layout), expect(root / "annotations" / split, layout))
    table = id_table(range(len(classes)), void=void_label(len(classes)))
    return SegmentationDataset(pairs, classes, [line.endswith(" thing") for line in lines],
                               partial(read_class_png, table=table))


def ade20k(root, split):
    """ADE20K scene parsing, 150 classes, as the challenge ships it: PNG value 0 is void, v is class v - 1."""
    root = root / "ADEChallengeData2016"
    part = {"train": "training", "val": "validation"}[split]
    layout = "{images,annotations}/{training,validation} and objectInfo150.txt in ADEChallengeData2016"
    pairs = pair_files(expect(root / "images" / part, layout), expect(root / "annotations" / part, layout))
    classes = [f"class {k}" for k in range(1, 151)]
    if (root / "objectInfo150.txt").exists():                            # Idx, Ratio, Train, Val, Name
        rows = (root / "objectInfo150.txt").read_text(encoding="utf-8").strip().split("\n")[1:]
        classes = [row.split("\t")[-1].split(",")[0].strip() for row in rows]
    table = id_table(range(1, 151), void=0)
    return SegmentationDataset(pairs, classes, [False] * 150, partial(read_class_png, table=table))


def panoptic(root, split):
    """Own panoptic data in COCO's format."""
    layout = "images/{train,val}/X.jpg, panoptic_{train,val}/X.png, panoptic_{train,val}.json"
    return coco_format(expect(root / "images" / split, layout), expect(root / f"panoptic_{split}", layout),
                       expect(root / f"panoptic_{split}.json", layout))


def coco_format(images, maps, json_file):
    """COCO's panoptic format: a folder of images, one of PNGs, a json of categories, images, annotations."""
    content = json.loads(json_file.read_text(encoding="utf-8"))
    categories = sorted(content["categories"], key=lambda category: category["id"])
    category_ids = [category["id"] for category in categories]                       # with gaps
    file_of = {image["id"]: images / image["file_name"] for image in content["images"]}
    annotations = sorted(content["annotations"], key=lambda annotation: annotation["image_id"])
    pairs = [(file_of[annotation["image_id"]], annotation) for annotation in annotations]
    index_of = {category_id: k for k, category_id in enumerate(category_ids)}
    return SegmentationDataset(pairs, [category["name"] for category in categories],
                               [bool(category["isthing"]) for category in categories],
                               partial(read_panoptic_png, folder=maps, index_of=index_of), True, category_ids,
                               {path.stem: annotation["image_id"] for path, annotation in pairs})


# ---------------------------------------------------------------------------------------- drawn shapes
class Shapes(Dataset):
    """Drawn pictures: two or three textured regions (stuff) and one to three forms on them (things, each an
    instance).

    A picture is a function of (seed, split, index). num_classes: half are textures, half are forms; each
    class has its own hue, and beyond five of each kind the hue alone tells some apart, so that K changes
    nothing but the number of classes.
    """

    textures = ["stripes", "checks", "dots", "waves", "plain"]
    forms = ["disk", "square", "triangle", "ring", "cross"]
    panoptic = True

    def __init__(self, root=None, split="train", num_classes=6, size=(64, 96), length=None, seed=0):
        self.split, self.size, self.seed = split, size, seed
        self.length = length or {"train": 20_000, "val": 100}[split]
        self.category_ids, self.image_ids = list(range(num_classes)), {}
        self.num_stuff, things = (num_classes + 1) // 2, num_classes // 2
        self.is_thing = [False] * self.num_stuff + [True] * things
        self.kinds = ((self.textures * num_classes)[:self.num_stuff] + (self.forms * num_classes)[:things])
        self.hues = [k / n for n in (self.num_stuff, things) for k in range(n)]
        self.classes = self.kinds
        if num_classes > 10:
            self.classes = [f"{kind} of hue {360 * hue:.0f}" for kind, hue in zip(self.kinds, self.hues)]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, ("train", "val").index(self.split), index])
        (H, W), K = self.size, len(self.classes)
        y, x = np.mgrid[:H, :W].astype(np.float32)
        image, segment_map, class_of = np.zeros((H, W, 3), np.float32), np.zeros((H, W), np.uint8), {}
        boundary = np.zeros(W)
        stuff = rng.permutation(self.num_stuff)[:rng.integers(2, 4)].tolist()
        things = rng.integers(self.num_stuff, K, rng.integers(1, 4)).tolist() if K > self.num_stuff else []
        for label in stuff + things:                                     # painted over one another
            if label in stuff:
                region, shade = y >= boundary, self.texture(self.kinds[label], rng, y, x)
                wave = 4 * np.sin(x[0] / rng.uniform(6, 12) + rng.uniform(0, 6))
                boundary = boundary + rng.uniform(0.25, 0.5) * H + wave
            else:
                region, shade = self.form(self.kinds[label], rng, y, x), np.ones_like(x)
            class_of[len(class_of) + 1] = label
            segment_map[region] = len(class_of)
            hue = self.hues[label] + rng.uniform(-0.35, 0.35) / max(3, K / 2)
            color = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 0.9), rng.uniform(0.5, 1))
            image[region] = shade[region][:, None] * np.float32(color)
        image += rng.standard_normal(image.shape, np.float32) * 0.03
        area = np.bincount(segment_map.ravel(), minlength=len(class_of) + 1)
        class_of = {i: label for i, label in class_of.items() if area[i] >= 16}          # slivers become void
        segment_map[~np.isin(segment_map, list(class_of))] = 0
        image = torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8)).permute(2, 0, 1)
        return image, torch.from_numpy(segment_map), class_of, [], f"{index:05d}"

    @staticmethod
    def texture(kind, rng, y, x):
        """-> shade [H, W] of a turned pattern with a period of 6 to 12 pixels."""
        angle, period = rng.uniform(0, np.pi), rng.uniform(6, 12) / (2 * np.pi)
        c, s = np.float32(np.cos(angle) / period), np.float32(np.sin(angle) / period)
        u, v = c * x + s * y, c * y - s * x
        dark = {"stripes": lambda: np.sin(u) < 0, "checks": lambda: np.sin(u) * np.sin(v) < 0,
                "dots": lambda: np.cos(u) + np.cos(v) < 0.8, "plain": lambda: np.zeros(u.shape, bool),
                "waves": lambda: np.sin(u + 2 * np.sin(v / 2)) < 0}[kind]()
        return np.where(dark, np.float32(0.55), np.float32(1))

    def form(self, kind, rng, y, x):
        """-> region [H, W] of a turned form somewhere in the picture."""
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.13, 0.26) * min(self.size)
        y, x = ((p - rng.uniform(0.1, 0.9) * side) / radius for p, side in zip((y, x), self.size))
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = c * x + s * y, c * y - s * x
        a, b = abs(u), abs(v)
        return {"disk": lambda: u * u + v * v < 1, "square": lambda: np.maximum(a, b) < 0.85,
                "triangle": lambda: (v > -0.6) & (v < 1.2 - 1.8 * a),
                "ring": lambda: abs(np.hypot(u, v) - 0.8) < 0.3,
                "cross": lambda: (np.minimum(a, b) < 0.35) & (np.maximum(a, b) < 1.1)}[kind]()


DATASETS = {"shapes": Shapes, "folder": folder, "panoptic": panoptic, "ade20k": ade20k}


# ---------------------------------------------------------------------------------------- files
def expect(path, layout):
    """`path`, or FileNotFoundError with the layout expected and what was found instead."""
    if path.exists():
        return path
    nearest = next(parent for parent in path.absolute().parents if parent.is_dir())
    found = ", ".join(sorted(entry.name for entry in nearest.iterdir())[:12]) or "nothing"
    raise FileNotFoundError(f"{path} does not exist. Expected below --data-root: {layout}. "
                            f"Found in {nearest}: {found}")


def pair_files(images, annotations):
    """[(image file, annotation PNG)] of equal stems, sorted; FileNotFoundError if an image lacks its PNG."""
    files = sorted(path for path in images.rglob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES)
    pairs = [(path, annotations / path.relative_to(images).with_suffix(".png")) for path in files]
    missing = [annotation for _, annotation in pairs if not annotation.exists()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(pairs)} images have no annotation: {missing[0]} ..")
    return pairs


def read_image(path):
    """-> RGB [H, W, 3] uint8, turned as the camera's EXIF entry says."""
    with Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def id_table(class_values, void):
    """The k-th of `class_values` is what a PNG holds for class k -> table [65536] from values to segment ids:
    k + 1, 0 for void, -1 for what must not occur."""
    table = np.full(65536, -1, np.int32)
    table[void] = 0
    table[list(class_values)] = np.arange(len(class_values)) + 1
    return table


def read_class_png(path, table):
    """A one-channel PNG, read with `id_table` -> segment map [H, W] with ids class + 1, {id: class}, [].

    Raises ValueError for a value that is neither a class nor void.
    """
    with Image.open(path) as png:
        values = np.array(png)
    if values.ndim != 2:
        raise ValueError(f"{path} has shape {values.shape}: a label PNG has one channel, of class indices")
    segment_map = table[values.astype(np.uint16)]
    if segment_map.min() < 0:
        wrong, good = np.unique(values[segment_map < 0]).tolist(), np.flatnonzero(table > 0)
        raise ValueError(f"{path} holds {wrong[:10]}; classes are {good.min()}..{good.max()} and void is "
                         f"{np.flatnonzero(table == 0).tolist()}. If labels start at 1, subtract 1; if the "
                         "list of classes is too short, complete it")
    if table.max() <= 255:
        segment_map = segment_map.astype(np.uint8)
    ids = np.flatnonzero(np.bincount(segment_map.ravel())).tolist()
    return segment_map, {i: i - 1 for i in ids if i > 0}, []


def read_panoptic_png(annotation, folder, index_of):
    """An entry of COCO's json and its PNG, where id = R + 256 G + 65536 B -> segment map [H, W] with ids 1,
    2, .. in the order of the json's ids, {id: class}, crowd ids. index_of: {category id: class}.

    Raises ValueError for ids in the PNG that the json does not list.
    """
    path = folder / annotation["file_name"]
    with Image.open(path) as png:
        ids = np.array(png.convert("RGB")).astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    segments = sorted(annotation["segments_info"], key=lambda segment: segment["id"])
    listed = np.array([0] + [segment["id"] for segment in segments])
    segment_map = np.searchsorted(listed, ids).clip(max=len(segments))
    if (listed[segment_map] != ids).any():
        wrong = np.unique(ids[listed[segment_map] != ids]).tolist()
        raise ValueError(f"{path} holds the segment ids {wrong[:10]} that its entry in the json lacks")
    class_of = {i: index_of[segment["category_id"]] for i, segment in enumerate(segments, 1)}
    crowd = [i for i, segment in enumerate(segments, 1) if segment.get("iscrowd")]
    return segment_map.astype(np.uint8 if len(segments) <= 255 else np.int32), class_of, crowd


# ---------------------------------------------------------------------------------------- augmentation
class Augmentation:
    """Appendix A: random short side, crop, flip, color distortion; padding at the right and the bottom."""

    def __init__(self, short_side, max_long_side, crop, color_distortion=True):
        self.crop = crop
        self.resize = v2.RandomShortestSize(short_side, max_long_side)
        # NOTE 7: the released code distorts colors as SSD does; here brightness is a factor, not a sum, and
        # the order is always this one. (v2.RandomPhotometricDistort would also shuffle channels.)
        strengths = dict(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.1) if color_distortion else {}
        self.distort = [v2.RandomApply([v2.ColorJitter(**{name: most})]) for name, most in strengths.items()]
        self.flip = v2.RandomHorizontalFlip()

    def __call__(self, image, segment_map):
        image, segment_map = self.resize(tv_tensors.Image(image), tv_tensors.Mask(segment_map))
        crop = v2.RandomCrop([min(side, most) for side, most in zip(image.shape[-2:], self.crop)])
        image, segment_map = self.flip(crop(image, segment_map))
        for distort in self.distort:
            image = distort(image)
        return pad_to(image, self.crop, 128), pad_to(segment_map, self.crop, 0)


class ToTestSize:
    """Resizes images as for a test; nothing is random."""

    def __init__(self, short_side, max_long_side):
        self.short_side, self.max_long_side = short_side, max_long_side

    def __call__(self, image, segment_map):
        size = fit(image.shape[-2:], self.short_side, self.max_long_side)
        return v2.functional.resize(image, size), v2.functional.resize(tv_tensors.Mask(segment_map), size)


def fit(size, short_side, max_long_side):
    """(H, W) -> (H, W) with that short side, or that long side if it would get longer."""
    scale = min(short_side / min(size), max_long_side / max(size))
    return [max(1, int(side * scale + 0.5)) for side in size]


def pad_to(x, size, value):
    """Pads [..., H, W] at the right and the bottom to `size`."""
    return F.pad(torch.as_tensor(x), (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]), value=value)


# ---------------------------------------------------------------------------------------- batches
class Batch(NamedTuple):
    """What loader workers send. Segment n is where segment_maps[owner[n]] == ids[n]."""
    images: torch.Tensor          # [B, 3, H, W] uint8
    segment_maps: torch.Tensor    # [B, H, W] uint8 or int32, 0 void
    ids: torch.Tensor             # [N]
    labels: torch.Tensor          # [N]
    owner: torch.Tensor           # [N], the image of each segment
    names: list                   # [B]

    def to(self, device):
        """Everything on `device` but `owner`, whose counts the matcher needs on the CPU."""
        moved = [x.to(device, non_blocking=True) for x in self[:4]]
        return Batch(*moved, self.owner, self.names)

    def pin_memory(self):
        return Batch(*(x.pin_memory() for x in self[:5]), self.names)

    def masks(self):
        """-> [N, H, W] bool."""
        owner = self.owner.to(self.ids.device, non_blocking=True)
        return self.segment_maps[owner] == self.ids[:, None, None]

    def label_map(self, void):
        """-> [B, H, W] int64: the class of each pixel, or `void`."""
        ids_at_most = 2 ** 8 if self.segment_maps.dtype == torch.uint8 else 2 ** 16
        table = torch.full((len(self.images), ids_at_most), void, device=self.ids.device)
        table[self.owner.to(self.ids.device), self.ids] = self.labels
        return table.gather(1, self.segment_maps.flatten(1).long()).view(self.segment_maps.shape)


def seed_of(*numbers):
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class FirstImages(Subset):
    """The first n images of a dataset."""

    def __init__(self, dataset, n):
        super().__init__(dataset, range(min(n, len(dataset))))
        self.classes, self.is_thing, self.panoptic = dataset.classes, dataset.is_thing, dataset.panoptic


class TrainingSamples(Dataset):
    """An endless stream of augmented samples: the n-th is a function of (seed, n) and nothing else.

    task "semantic" merges the segments of a class. Crowd segments and what the crop emptied are dropped.
    """

    def __init__(self, dataset, augment, seed=0, task="panoptic"):
        self.dataset, self.augment, self.seed, self.task = dataset, augment, seed, task
        self.epoch, self.order = None, None

    def __getitem__(self, n):
        epoch, place = divmod(n, len(self.dataset))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset)).tolist()
        image, segment_map, class_of, crowd, name = self.dataset[self.order[place]]
        if self.task == "semantic":
            segment_map, class_of, crowd = *merge_classes(segment_map, class_of), []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, n))
            image, segment_map = self.augment(image, segment_map)
        present = torch.bincount(segment_map.flatten()).nonzero().squeeze(1)
        ids = [i for i in present.tolist() if i in class_of and i not in crowd]
        labels = torch.tensor([class_of[i] for i in ids], dtype=torch.long)
        return image, segment_map, torch.tensor(ids, dtype=torch.long), labels, name


def merge_classes(segment_map, class_of):
    """Panoptic -> semantic: the segments of a class, crowd too, become one with id class + 1."""
    labels = label_map(segment_map, class_of, void=-1) + 1
    most = max(class_of.values(), default=0)
    return labels.to(torch.uint8 if most < 255 else torch.int32), {k + 1: k for k in class_of.values()}


def label_map(segment_map, class_of, void):
    """Segments -> classes of pixels [H, W] int64, `void` where no segment is."""
    table = torch.full((int(segment_map.max()) + 1,), void)
    for i, label in class_of.items():
        table[i:i + 1] = label
    return table[segment_map.long()]


def void_label(num_classes):
    """The value of void in label maps and index PNGs: 255, or 65535 where 255 is a class."""
    return 255 if num_classes <= 255 else 65535


def collate(samples):
    """Samples -> Batch. Smaller images are padded right and bottom, with ImageNet's mean (zeros after its
    normalisation) and void."""
    images, segment_maps, ids, labels, names = zip(*samples)
    size = [max(image.shape[d] for image in images) for d in (1, 2)]
    if any(list(image.shape[1:]) != size for image in images):
        images = [torch.stack([pad_to(channel, size, mean) for channel, mean in zip(image, (124, 116, 104))])
                  for image in images]
    owner = torch.arange(len(ids)).repeat_interleave(torch.tensor([len(i) for i in ids]))
    segment_maps = torch.stack([pad_to(segment_map, size, 0) for segment_map in segment_maps])
    return Batch(torch.stack(images), segment_maps, torch.cat(ids), torch.cat(labels), owner, list(names))


class StepBatches:
    """Batch sampler of one process: step s takes the samples from s * batch_size on, an equal share each."""

    def __init__(self, first_step, steps, batch_size, rank=0, world_size=1, accumulate=1):
        self.first, self.steps, self.accumulate = first_step, steps, accumulate
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __len__(self):
        return (self.steps - self.first) * self.accumulate

    def __iter__(self):
        share = self.batch_size // self.world_size // self.accumulate    # images of one forward pass
        for step in range(self.first, self.steps):
            start = step * self.batch_size + self.rank * share * self.accumulate
            for part in range(self.accumulate):
                yield list(range(start + part * share, start + (part + 1) * share))


def training_batches(samples, sampler, workers, device):
    """-> iterator over `Batch`es, read ahead by `workers` processes."""
    return iter(DataLoader(samples, batch_sampler=sampler, collate_fn=collate, num_workers=workers,
                           pin_memory=device.type == "cuda", persistent_workers=workers > 0,
                           prefetch_factor=4 if workers else None))
