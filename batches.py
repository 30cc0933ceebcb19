"""How pictures reach the model: augmentation, samples, batches (MaskFormer, appendix A).

The integer segment map goes through augmentation and to the device; only there is it split into binary masks.

Letters   B images · N segments in the batch · H W image size

    samples = TrainingSamples(dataset, Augmentation([512], 2048, (512, 512)))
    batch = collate([samples[0], samples[1]])
"""
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from data import label_map, resized


# ---------------------------------------------------------------------------------------- augmentation
class Augmentation:
    """Appendix A: random short side, crop, flip, color distortion; padding at the right and the bottom."""

    def __init__(self, short_side, max_long_side, crop, color_distortion=True):
        self.short_side, self.max_long_side, self.crop = short_side, max_long_side, crop
        # NOTE 7: the released code distorts colors as SSD does; here brightness is a factor, not a sum, and
        # the order is always this one. (v2.RandomPhotometricDistort would also shuffle channels.)
        # On Pillow images: their 8-bit hue takes a third of the time of torchvision's on tensors.
        strengths = dict(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.1)
        distort = [v2.RandomApply([v2.ColorJitter(**{name: most})]) for name, most in strengths.items()]
        on_pillow = v2.Compose([v2.ToPILImage(), *distort, v2.PILToTensor()])
        self.distort = on_pillow if color_distortion else v2.Identity()
        self.flip = v2.RandomHorizontalFlip()

    def __call__(self, image, segment_map):
        image, segment_map = resized(image, segment_map, one_of(self.short_side), self.max_long_side)
        crop = v2.RandomCrop([min(side, most) for side, most in zip(image.shape[-2:], self.crop)])
        image, segment_map = self.flip(crop(image, segment_map))
        return pad_to(self.distort(image), self.crop, 128), pad_to(segment_map, self.crop, 0)


class DetrAugmentation:
    """DETR's, for COCO: a flip; half the time a resize and a crop; then a resize. `collate` pads."""

    def __init__(self, short_side, max_long_side):
        self.short_side, self.max_long_side, self.flip = short_side, max_long_side, v2.RandomHorizontalFlip()

    def __call__(self, image, segment_map):
        image, segment_map = self.flip(tv_tensors.Image(image), tv_tensors.Mask(segment_map))
        if torch.rand(()) < 0.5:
            image, segment_map = resized(image, segment_map, one_of([400, 500, 600]))
            size = [int(torch.randint(min(384, side), min(600, side) + 1, ())) for side in image.shape[-2:]]
            image, segment_map = v2.RandomCrop(size)(image, segment_map)
        return resized(image, segment_map, one_of(self.short_side), self.max_long_side)


def one_of(values):
    return values[int(torch.randint(len(values), ()))]                   # at random


def pad_to(x, size, value):
    """Pads [..., H, W] at the right and the bottom to `size`, with one value or one for each channel."""
    if list(x.shape[-2:]) == list(size):
        return x
    padded = torch.empty(*x.shape[:-2], *size, dtype=x.dtype)
    padded[:] = torch.tensor(value)[..., None, None]
    padded[..., :x.shape[-2], :x.shape[-1]] = x
    return padded


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
        """Everything on `device` except `owner`: the matcher needs the segment counts on the CPU."""
        moved = [x.to(device, non_blocking=True) for x in self[:4]]
        return Batch(*moved, self.owner, self.names)

    def masks(self):
        """-> [N, H, W] bool."""
        owner = self.owner.to(self.ids.device, non_blocking=True)
        return self.segment_maps[owner] == self.ids[:, None, None].to(self.segment_maps.dtype)

    def label_map(self, void):
        """-> [B, H, W] int64: the class of each pixel, or `void`."""
        ids_at_most = 2 ** 8 if self.segment_maps.dtype == torch.uint8 else 2 ** 16
        table = torch.full((len(self.images), ids_at_most), void, device=self.ids.device)
        table[self.owner.to(self.ids.device, non_blocking=True), self.ids] = self.labels
        return table.gather(1, self.segment_maps.flatten(1).long()).view(self.segment_maps.shape)


def seed_of(*numbers):
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TrainingSamples(Dataset):
    """An endless stream of augmented samples: the n-th is a function of (seed, n) and nothing else. Task
    "semantic" merges the segments of a class, crowds too; "panoptic" drops crowds. Segments that the crop
    emptied are dropped."""

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
            torch.default_generator.manual_seed(seed_of(self.seed, n))
            image, segment_map = self.augment(image, segment_map)
        present = torch.bincount(segment_map.flatten()).nonzero().squeeze(1)
        ids = [i for i in present.tolist() if i in class_of and i not in crowd]
        labels = torch.tensor([class_of[i] for i in ids], dtype=torch.long)
        return image, segment_map, torch.tensor(ids, dtype=torch.long), labels, name


def merge_classes(segment_map, class_of):
    """Panoptic -> semantic: merges the segments of a class, crowds too; if any merge, ids are class + 1."""
    if len({*class_of.values()}) == len(class_of):
        return segment_map, class_of
    labels = label_map(segment_map, class_of, void=-1) + 1
    most = max(class_of.values(), default=0)
    return labels.to(torch.uint8 if most < 255 else torch.int32), {k + 1: k for k in class_of.values()}


def collate(samples):
    """Samples -> Batch. Smaller images are padded right and bottom, with ImageNet's mean (zeros after its
    normalisation) and void."""
    images, segment_maps, ids, labels, names = zip(*samples)
    size = [max(image.shape[d] for image in images) for d in (1, 2)]
    images = torch.stack([pad_to(image, size, (124, 116, 104)) for image in images])
    segment_maps = torch.stack([pad_to(segment_map, size, 0) for segment_map in segment_maps])
    owner = torch.repeat_interleave(torch.tensor([len(i) for i in ids]))
    return Batch(images, segment_maps, torch.cat(ids), torch.cat(labels), owner, list(names))


def step_batches(first, steps, batch_size, rank=0, world_size=1, accumulate=1):
    """Sample numbers of every forward pass of one process: step s takes batch_size samples from number
    s * batch_size on, and each process an equal share of them."""
    share = batch_size // world_size // accumulate                       # images of a forward pass
    starts = (((step * world_size + rank) * accumulate + part) * share
              for step in range(first, steps) for part in range(accumulate))
    return (range(start, start + share) for start in starts)             # one by one: there may be millions


def training_batches(samples, sampler, workers, device):
    """-> iterator over `Batch`es, read ahead by `workers` processes."""
    return iter(DataLoader(samples, batch_sampler=sampler, collate_fn=collate, num_workers=workers,
                           pin_memory=device.type == "cuda", persistent_workers=workers > 0,
                           prefetch_factor=4 if workers else None))
