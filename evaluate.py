"""How good it is: mIoU, PQ, pictures, one's own photos (MaskFormer, Sec. 3.4, 4).

    python evaluate.py --checkpoint runs/shapes-001/last.pt          # the metrics of its dataset
    python evaluate.py --weights maskformer_R50_bs16_160k --images photo.jpg --save out

Letters   Q queries · K classes · H W size of the original image · n segments or classes at a time
"""
import argparse
import colorsys
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2.functional import resize, to_pil_image

from data import (DATASETS, IMAGE_SUFFIXES, SegmentationDataset, UserError, align_classes,
                  build_dataset, fit, ignore_stop_signals, listing, read_image,
                  to_label_map, void_label, without_truth)
from maskformer import MaskFormer, build_model, panoptic_inference, semantic_inference

TEST_OPTIONS = ("test_short_side", "test_max_long_side", "object_threshold", "overlap_threshold")
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ------------------------------------------------------------------------------------------ metrics
class ConfusionMatrix:
    """Counts of (true class, predicted class) over a whole set, without void pixels of the truth.

    IoU of a class = TP / (TP + FP + FN). With truth [0, 0, 1, 255] and prediction [0, 1, 1, 1] both
    classes have an IoU of 1/2: mIoU 50, mACC 75, pACC 66.7. All values are percentages.

    void: its value in label maps (default: 255, or 65535 where 255 is a class)
    """

    def __init__(self, num_classes, void=None):
        self.num_classes = num_classes
        self.void = void_label(num_classes) if void is None else void
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)   # last: void

    def update(self, prediction, target):
        """prediction, target [H, W]: classes or void. ValueError for other values or sizes."""
        target = torch.as_tensor(target).long()
        prediction = torch.as_tensor(prediction).to(target.device).long()
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)}")
        target = self.without_void(target, "target")
        prediction = self.without_void(prediction, "prediction")

        columns = self.num_classes + 1
        pair = target * columns + prediction
        counts = torch.bincount(pair.flatten(), minlength=columns * columns).view(columns, columns)
        self.counts += counts[:self.num_classes].cpu()               # the last row: void in truth

    def without_void(self, labels, name):
        """The labels with K in place of void. ValueError if any other value is not a class."""
        is_void = labels == self.void
        low, high = (int(x) for x in labels.masked_fill(is_void, 0).aminmax())
        if low < 0 or high >= self.num_classes:
            raise ValueError(f"a {name} holds {low}..{high}, not 0..{self.num_classes - 1}")
        return labels.masked_fill(is_void, self.num_classes)

    def compute(self):
        """-> mIoU and mACC (means over classes that occur in the truth), pACC, fwIoU, and IoU [K],
        NaN for the other classes."""
        counts = sum_over_processes(self.counts.clone()).double()
        hit = counts.diagonal()
        true = counts.sum(1)
        predicted = counts[:, :-1].sum(0)
        occurs = true > 0
        iou = torch.where(occurs, hit / (true + predicted - hit).clamp(min=1), torch.nan)
        accuracy = hit / true.clamp(min=1)
        num_classes = occurs.sum().clamp(min=1)
        num_pixels = true.sum().clamp(min=1)
        return {"mIoU": 100 * (iou[occurs].sum() / num_classes).item(),
                "mACC": 100 * (accuracy[occurs].sum() / num_classes).item(),
                "pACC": 100 * (hit.sum() / num_pixels).item(),
                "fwIoU": 100 * ((true * iou)[occurs].sum() / num_pixels).item(),
                "IoU": (100 * iou).tolist()}


class PanopticQuality:
    """PQ of a class = (sum of IoU over matched pairs) / (TP + FP/2 + FN/2); then the class mean.

    A predicted and a true segment match if they agree in class and their IoU is above 0.5; void
    pixels of the truth do not count in the prediction's area. A prediction more than half on void
    plus crowd of its class is no false positive; crowd is never a false negative. Truth
    [1, 1, 2, 0] and prediction [1, 1, 1, 1] of one class: IoU 2/3, one TP, one FN: PQ 44.4, SQ and
    RQ 66.7. All values are percentages, means over the classes that occur; where none does, 0.
    """

    def __init__(self, num_classes, is_thing):
        self.is_thing = torch.as_tensor(is_thing, dtype=torch.bool)
        self.iou = torch.zeros(num_classes, dtype=torch.float64)     # sum over the matched pairs
        self.tp = torch.zeros(num_classes, dtype=torch.float64)
        self.fp = torch.zeros(num_classes, dtype=torch.float64)
        self.fn = torch.zeros(num_classes, dtype=torch.float64)

    def update(self, pred_map, pred_segments, true_map, true_segments):
        """Maps [H, W] of segment ids, 0 void (like ids that are not listed); segments
        [{"id", "category_id", "iscrowd" (optional)}]. IndexError for a class of K or more,
        ValueError for a negative one."""
        if any(segment["category_id"] < 0 for segment in [*pred_segments, *true_segments]):
            raise ValueError("a segment has a negative class")
        pred_map, pred_class, _ = compact(pred_map, pred_segments)
        true_map, true_class, crowd = compact(true_map, true_segments)
        num_true, num_pred = len(true_class), len(pred_class)        # entry 0 is void, of class -1
        overlap = torch.bincount((true_map * num_pred + pred_map).flatten(),
                                 minlength=num_true * num_pred)
        overlap = overlap.view(num_true, num_pred).double()
        true_area, pred_area, void = overlap.sum(1), overlap.sum(0), overlap[0]

        same = (true_class[:, None] == pred_class) & (true_class[:, None] >= 0)
        union = true_area[:, None] + pred_area - void - overlap
        iou = torch.where(same & ~crowd[:, None], overlap / union.clamp(min=1), 0)
        t, p = (iou > 0.5).nonzero().unbind(1)                       # each in one pair at most

        ignored = void + (overlap * (same & crowd[:, None])).sum(0)
        false_positive = (pred_class >= 0) & (pred_area > 0) & (ignored <= pred_area / 2)
        false_positive[p] = False
        false_negative = (true_class >= 0) & ~crowd
        false_negative[t] = False

        add_to(self.iou, true_class[t], iou[t, p])
        add_to(self.tp, true_class[t])
        add_to(self.fp, pred_class[false_positive])
        add_to(self.fn, true_class[false_negative])

    def compute(self):
        """-> PQ, SQ, RQ; the same with _th over things, _st over stuff; PQ_per_class [K] or NaN."""
        sums = torch.stack([self.iou, self.tp, self.fp, self.fn])
        iou, tp, fp, fn = sum_over_processes(sums)
        occurs = tp + fp + fn > 0
        sq = iou / tp.clamp(min=1)
        rq = tp / (tp + fp / 2 + fn / 2).clamp(min=0.5)
        pq = sq * rq

        result = {"PQ_per_class": (100 * torch.where(occurs, pq, torch.nan)).tolist()}
        things, stuff = occurs & self.is_thing, occurs & ~self.is_thing
        for suffix, group in (("", occurs), ("_th", things), ("_st", stuff)):
            for name, value in (("PQ", pq), ("SQ", sq), ("RQ", rq)):
                mean = value[group].sum() / group.sum().clamp(min=1)
                result[name + suffix] = 100 * mean.item()
        return result


def compact(segment_map, segments):
    """-> map of 0 (void), 1, 2, ... in the order of the ids; their classes (void: -1); crowd."""
    segment_map = torch.as_tensor(segment_map).cpu().long()
    segments = sorted(segments, key=lambda segment: segment["id"])
    ids = torch.tensor([0] + [segment["id"] for segment in segments])
    classes = torch.tensor([-1] + [segment["category_id"] for segment in segments])
    crowd = torch.tensor([False] + [bool(segment.get("iscrowd")) for segment in segments])
    place = torch.searchsorted(ids, segment_map).clamp(max=len(ids) - 1)
    return torch.where(ids[place] == segment_map, place, 0), classes, crowd


def add_to(sums, classes, values=None):
    """sums[classes] += values, or += 1, also where a class occurs twice."""
    values = torch.ones(len(classes), dtype=sums.dtype) if values is None else values
    sums.index_add_(0, classes, values)


# --------------------------------------------------------------------------------------- prediction
@torch.no_grad()
def network_output(model, image, size, amp="off"):
    """image [3, H, W] uint8 -> class_logits [Q, K+1], mask_logits [Q, *size]; of the per-pixel
    baselines None, pixel_logits [K, *size].

    The model sees the image at `size`.
    """
    x = network_input(model, image, size)                            # [3, padded size]
    with torch.autocast(x.device.type, AMP[amp], enabled=amp != "off"):
        output = model(x[None])

    if isinstance(output, tuple):
        class_logits, logits = output[0][-1, 0], output[1][-1, 0]    # of the last layer
        logits = upsample(logits, x.shape[-2:])
    else:                                                            # 4 times, as in the loss
        class_logits, logits = None, output[-1, 0]
        logits = upsample(logits, [4 * side for side in logits.shape[-2:]])

    finite = logits.isfinite().all()
    if class_logits is not None:
        finite &= class_logits.isfinite().all()
    if not finite:
        raise UserError("the output of the network is not finite: try --amp off, or another "
                        "checkpoint")
    return class_logits, logits[:, :size[0], :size[1]]               # without the padding


def network_input(model, image, size):
    """image [3, H, W] uint8 -> [3, padded size]: resized to `size`, then padded at the right and
    the bottom to a multiple of the model's `size_divisibility`, with zeros after normalization."""
    mean = model.backbone.mean
    multiple = model.size_divisibility or 1
    padded_size = [side + -side % multiple for side in size]
    x = mean.expand(3, *padded_size).clone()
    x[:, :size[0], :size[1]] = resize(image.to(mean.device), list(size), antialias=True)
    return x


def upsample(x, size):                                               # [n, ., .] -> [n, *size]
    return F.interpolate(x[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def class_scores(class_logits, logits):
    """What `network_output` returns -> scores [K, height, width]."""
    if class_logits is None:
        return logits
    return semantic_inference(class_logits[None], logits[None])[0]


def best_class(score_maps, size):
    """Class scores [K, ., .] of several scales, resized to `size` and added up -> argmax [H, W].

    Eight classes at a time: all scores of a photo of 3000x4000 and 150 classes would take 7 GB.
    """
    device = score_maps[0].device
    best_score = torch.full(size, -torch.inf, device=device)
    best = torch.zeros(size, dtype=torch.int32, device=device)
    for k in range(0, len(score_maps[0]), 8):
        scores = upsample(score_maps[0][k:k + 8], size)
        for other_scale in score_maps[1:]:
            scores += upsample(other_scale[k:k + 8], size)
        score, label = scores.max(0)
        best = torch.where(score > best_score, label.to(torch.int32) + k, best)
        best_score = torch.maximum(score, best_score)
    return best


def predict(model, image, is_thing, test_short_side, test_max_long_side, object_threshold=0.8,
            overlap_threshold=0.8, scales=(1.,), flip=False, panoptic=True, inference=None,
            amp="off"):
    """image [3, H, W] uint8 -> label map [H, W] int32, segment map [H, W] int32, segments.

    test_short_side, test_max_long_side: the size at which the model sees the image
    scales, flip: class scores are averaged over these scales, and over mirror images
    panoptic: also find segments, at scale 1; else, and for the per-pixel baselines, they are None.
        That takes about 16 bytes for each pixel and sure query: 30 on 3000x4000 pixels, 6 GB
    inference: "panoptic" takes the class of each pixel from its segment (Table VII)
    """
    if inference == "panoptic" and (flip or tuple(scales) != (1.,)):
        raise UserError("--inference panoptic works at scale 1 alone: drop --scales and --flip")
    original = list(image.shape[-2:])
    size = fit(original, test_short_side, test_max_long_side)
    class_logits, logits = network_output(model, image, size, amp=amp)
    if inference == "panoptic" and class_logits is None:
        raise UserError("--inference panoptic: the per-pixel baselines predict no segments")

    segment_map, segments = None, None
    if (panoptic or inference == "panoptic") and class_logits is not None:
        segment_map, segments = panoptic_inference(class_logits, logits, is_thing,
                                                   object_threshold, overlap_threshold, original)
    if inference == "panoptic":
        void = void_label(len(is_thing))
        class_of_id = [void] + [segment["category_id"] for segment in segments]      # ids 1, 2, ..
        class_of_id = torch.tensor(class_of_id, dtype=torch.int32, device=segment_map.device)
        return class_of_id[segment_map], segment_map, segments

    score_maps = []
    for scale in scales:
        scaled = fit(original, int(test_short_side * scale), int(test_max_long_side * scale))
        if scaled == size:
            scores = class_scores(class_logits, logits)              # of the output above
        else:
            scores = class_scores(*network_output(model, image, scaled, amp=amp))
        if flip:
            mirrored = class_scores(*network_output(model, image.flip(-1), scaled, amp=amp))
            scores = scores + mirrored.flip(-1)
        score_maps.append(scores)
    return best_class(score_maps, original), segment_map, segments


def predict_file(model, info, path, **options):
    """A photo -> {"image", "label_map", "segment_map", "segments"}, each segment with its "name".

    model, info: from `load`; options: those of `predict` (default: as the model was trained). A
    model for semantic segmentation has a segment for each class in the photo, without a score.
    """
    image = torch.from_numpy(read_image(path)).permute(2, 0, 1)      # [3, H, W]
    options = {name: info["config"][name] for name in TEST_OPTIONS} | options
    panoptic = has_instances(model, info["config"]["task"])
    label_map, segment_map, segments = predict(model, image, info["is_thing"],
                                               **{"panoptic": panoptic} | options)
    if segments is None:
        segment_map, segments = class_regions(label_map, void_label(model.num_classes))
    segments = [segment | {"name": info["classes"][segment["category_id"]]} for segment in segments]
    return {"image": image, "label_map": label_map, "segment_map": segment_map,
            "segments": segments}


def has_instances(model, task):
    """Whether a model tells one object from another: a MaskFormer that was trained on objects."""
    # Not isinstance: PerPixelBaselinePlus is a subclass.
    return type(model) is MaskFormer and task == "panoptic"


# --------------------------------------------------------------------------------------- evaluation
def evaluate(model, dataset, inference=None, save=None, workers=0, task="panoptic", **options):
    """Metrics of a model in eval mode: {"mIoU", "fwIoU", "mACC", "pACC", "IoU" [K], "PQ", ...}.

    If truth, model or `task` has no instances, "PQ_st" alone: every class region is a segment (the
    paper's PQ^St). Every image counts once, however many processes share the work.

    dataset: one of build_dataset; if it has no truth, predictions are saved and None is returned
    save: the folder for predictions; inference and options: those of `predict`
    """
    K = len(dataset.classes)
    void = void_label(K)
    instances = dataset.panoptic and has_instances(model, task)
    panoptic = instances or inference == "panoptic"
    if save:
        check_names(save, dataset)

    matrix = ConfusionMatrix(K)
    quality = PanopticQuality(K, dataset.is_thing if instances else [False] * K)
    annotations = []                                                 # of COCO's json
    mine = range(rank(), len(dataset), world_size())                 # this process's images
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=workers,
                        worker_init_fn=ignore_stop_signals)
    for image, segment_map, class_of, crowd, name in with_progress(loader, "evaluating"):
        label_map, predicted, segments = predict(model, image, dataset.is_thing, panoptic=panoptic,
                                                 inference=inference, **options)
        if save:
            save_label_map(save, name, dataset, label_map)
            save_overlay(save, name, dataset, image, label_map, predicted, segments)
            if panoptic:
                annotations.append(save_segments(save, name, dataset, predicted, segments))
        if not dataset.has_truth:
            found = [dataset.classes[k] for k in label_map.unique().tolist() if k < K]
            print(f"{name}: {', '.join(found)}", flush=True)
            continue
        label_map = label_map.cpu()
        target = to_label_map(segment_map, class_of, void)
        matrix.update(label_map, target)
        if instances:
            truth = [{"id": i, "category_id": k, "iscrowd": i in crowd}
                     for i, k in class_of.items()]
            quality.update(predicted, segments, segment_map, truth)
        else:
            quality.update(*class_regions(label_map, void), *class_regions(target, void))

    if save and panoptic:
        save_coco_json(save, dataset, annotations)
    if not dataset.has_truth:
        return None
    metrics = matrix.compute()
    segment_metrics = quality.compute()
    if instances:
        return metrics | segment_metrics
    return metrics | {"PQ_st": segment_metrics["PQ_st"]}


def with_progress(items, text):
    """Yields the items; process 0 prints every ten seconds how many are done."""
    last = time.time()
    for i, item in enumerate(items):
        if rank() == 0 and time.time() - last > 10:
            print(f"{text} {i}/{len(items)}", flush=True)
            last = time.time()
        yield item


def class_regions(label_map, void):
    """Classes of pixels [H, W] -> segment map of ids class + 1, 0 void; its segments, all stuff."""
    ids = torch.where(label_map == void, 0, label_map + 1)
    present = ids.flatten().bincount().nonzero().flatten().tolist()  # unique() is 20 times slower
    return ids, [{"id": i, "category_id": i - 1, "isthing": False} for i in present if i > 0]


def single_numbers(metrics):
    """The metrics that are one number, rounded."""
    return {name: round(value, 3) for name, value in metrics.items() if isinstance(value, float)}


def table_of_classes(metrics, classes):
    """The metrics as text: a line for each class (nan: not in the truth), then the numbers."""
    lines = [f"{'class':28s}    IoU"]
    lines += [f"{name[:28]:28s} {iou:6.2f}" for name, iou in zip(classes, metrics["IoU"])]
    lines += ["  ".join(f"{name} {value:.2f}" for name, value in single_numbers(metrics).items())]
    missing = [name for name, iou in zip(classes, metrics["IoU"]) if iou != iou]
    if missing:
        lines += [f"mIoU over {len(classes) - len(missing)} of {len(classes)} classes; the truth "
                  f"never has {listing(missing)}"]
    return "\n".join(lines)


def save_metrics(path, metrics, classes, **more):
    """metrics.json: the single numbers, and by name the IoU of each class that the truth has."""
    per_class = {}
    for k, (name, iou) in enumerate(zip(classes, metrics["IoU"])):
        if iou == iou:                                               # not NaN
            key = name if classes.count(name) == 1 else f"{name} ({k})"
            per_class[key] = round(iou, 3)
    content = more | single_numbers(metrics) | {"IoU_per_class": per_class}
    content["classes_without_truth"] = len(classes) - len(per_class)
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


# ------------------------------------------------------------------------------------ saved results
def check_names(folder, dataset):
    """UserError if the results of two images would overwrite each other."""
    names = [Path(path).stem for path, _ in dataset.pairs]
    if len(set(names)) < len(names):
        raise UserError(f"--save {folder}: some images have the same name; so would their results")


def save_label_map(folder, name, dataset, label_map):
    """Writes semantic/NAME.png: the publisher's label value of each pixel, and a void value."""
    void = 0                                         # or, if that is a class, a value that is none
    if 0 in dataset.label_values:
        void = void_label(max(dataset.label_values) + 1)
    value_of_class = np.array([*dataset.label_values, void])         # the last: void
    value_of_class = value_of_class.astype(np.uint8 if value_of_class.max() <= 255 else np.uint16)
    K = len(dataset.classes)
    values = value_of_class[label_map.cpu().clamp(max=K).numpy()]    # void_label(K) is at least K
    save_image(values, Path(folder) / "semantic" / f"{name}.png")


def save_overlay(folder, name, dataset, image, label_map, segment_map, segments):
    """Writes overlay/NAME.jpg: the image under its segments, or else under its classes."""
    if segments is None:
        segment_map, segments = class_regions(label_map, void_label(len(dataset.classes)))
    picture = overlay(image, segment_map, segments, dataset.classes)
    path = Path(folder) / "overlay" / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=92)


def save_segments(folder, name, dataset, segment_map, segments):
    """Writes panoptic/NAME.png, in COCO's format (id = R + 256 G + 65536 B).

    -> the entry of this image in COCO's json, and the image's size
    """
    ids = segment_map.cpu().numpy()
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    save_image(rgb, Path(folder) / "panoptic" / f"{name}.png")
    listed = []
    for segment in segments:
        category = dataset.category_ids[segment["category_id"]]
        area = int((ids == segment["id"]).sum())
        listed.append(segment | {"category_id": category, "area": area})
    image_id = dataset.image_ids.get(name, name)
    return {"image_id": image_id, "file_name": f"{name}.png", "segments_info": listed,
            "height": ids.shape[0], "width": ids.shape[1]}


def save_image(values, path):
    """Saves an array as an image file; makes its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def save_coco_json(folder, dataset, annotations):
    """Writes panoptic.json in COCO's format, with the annotations of all processes."""
    parts = [annotations]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, annotations)
    if rank() > 0:
        return

    images, entries = [], []
    for entry in sum(parts, []):
        height, width = entry.pop("height"), entry.pop("width")
        images.append({"id": entry["image_id"], "file_name": entry["file_name"],
                       "height": height, "width": width})
        entries.append(entry)
    categories = []
    for k, (i, name, thing) in enumerate(zip(dataset.category_ids, dataset.classes,
                                             dataset.is_thing)):
        categories.append({"id": i, "name": name, "supercategory": name, "isthing": int(thing),
                           "color": color_of(k)})
    content = {"images": images, "annotations": entries, "categories": categories}
    (Path(folder) / "panoptic.json").write_text(json.dumps(content))


# ----------------------------------------------------------------------------------------- pictures
def color_of(k):
    """A color [R, G, B] for number k, far from those of its neighbors."""
    return [int(255 * x) for x in colorsys.hsv_to_rgb(0.618 * k % 1, 0.75, 0.9)]


def overlay(image, segment_map, segments, classes, caption="", box=None):
    """image [3, H, W] uint8 under its named segments -> PIL picture, of size `box` if given.

    Stuff has the color of its class, every thing its own; void stays as it is. A name is written on
    its segment where there is room; without a box, a legend on the right lists the others.
    """
    image = image.cpu().clone()
    segment_map = segment_map.cpu()
    width, height = box or (image.shape[2], image.shape[1])
    zoom = min(width / image.shape[2], height / image.shape[1])
    font = ImageFont.load_default(max(10, min(width, height) // 20))

    names, legend = [], {}                                           # (x, y, name); name: color
    for segment in segments:
        mask = segment_map == segment["id"]
        if not mask.any():
            continue
        name = classes[segment["category_id"]]
        color = color_of(segment["id"] + 0.5 if segment["isthing"] else segment["category_id"])
        tint = torch.tensor(color)[:, None]
        image[:, mask] = (0.4 * image[:, mask] + 0.6 * tint).byte()

        text_width, text_height = font.getbbox(name)[2:]
        fits = text_width <= zoom * image.shape[2]
        if fits and text_width * text_height < zoom ** 2 * mask.sum():
            y, x = (mask.nonzero().float().median(0).values * zoom).tolist()
            x = min(max(x, text_width / 2), zoom * image.shape[2] - text_width / 2)
            y = min(max(y, text_height / 2), zoom * image.shape[1] - text_height / 2)
            names.append((x, y, name))
        else:
            legend.setdefault(name, color)

    picture = ImageOps.contain(to_pil_image(image), (width, height))
    draw = ImageDraw.Draw(picture)
    style = {"fill": "white", "font": font, "stroke_width": 1, "stroke_fill": "black"}
    for x, y, name in names:
        draw.text((x, y), name, anchor="mm", **style)
    draw.text((3, 1), caption, **style)
    if box:
        return ImageOps.pad(picture, box, color="white")
    return with_legend(picture, legend, font)


def with_legend(picture, legend, font):
    """The picture, and right of it a column of colors and their names, as far as it goes."""
    if not legend:
        return picture
    line = int(1.4 * font.getbbox("Ag")[3])
    shown = list(legend.items())[:max(1, picture.height // line)]
    column = 2 * line + max(int(font.getlength(name)) for name, _ in shown)
    wider = Image.new("RGB", (picture.width + column, picture.height), "white")
    wider.paste(picture)
    draw = ImageDraw.Draw(wider)
    for i, (name, color) in enumerate(shown):
        x, y = picture.width + line // 3, i * line
        draw.rectangle((x, y + line // 6, x + line, y + line * 5 // 6), fill=tuple(color))
        draw.text((x + line * 4 // 3, y), name, fill="black", font=font)
    return wider


def save_grid(rows, path):
    """Saves rows of PIL pictures of one size as one picture; short rows end in white."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (width * columns, height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    sheet.save(path)


def evenly_spread(dataset, count):
    """The numbers of up to `count` images of a dataset."""
    return np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist()


def draw_predictions(model, dataset, path, **options):
    """predictions.png: image | truth | semantic | panoptic result of four images."""
    box = (320, 240)
    classes = dataset.classes
    rows = []
    for i in evenly_spread(dataset, 4):
        image, segment_map, class_of, crowd, name = dataset[i]
        truth = [{"id": id_, "category_id": k, "isthing": dataset.is_thing[k]}
                 for id_, k in class_of.items()]
        label_map, predicted, segments = predict(model, image, dataset.is_thing, **options)
        regions, region_list = class_regions(label_map, void_label(len(classes)))
        row = [overlay(image, segment_map, [], classes, name, box),
               overlay(image, segment_map, truth, classes, "truth", box),
               overlay(image, regions, region_list, classes, "semantic", box)]
        if segments is not None:
            caption = f"panoptic, {len(segments)} segments"
            row.append(overlay(image, predicted, segments, classes, caption, box))
        rows.append(row)
    save_grid(rows, path)


@torch.no_grad()
def draw_queries(model, dataset, path, test_short_side, test_max_long_side):
    """queries.png: for three images, the masks of the seven queries that are surest of their class;
    in the last row, those of the surest query of the last image after each decoder layer."""
    box = (240, 180)
    rows = []
    for i in evenly_spread(dataset, 3):
        image, *_, name = dataset[i]
        size = fit(image.shape[-2:], test_short_side, test_max_long_side)
        class_logits, mask_logits = network_output(model, image, size)
        prob, label = class_logits.softmax(-1)[:, :-1].max(-1)       # [Q]
        surest = prob.topk(min(7, len(prob))).indices.tolist()
        row = [picture_with_caption(image, name, box)]
        for q in surest:
            caption = f"{q}: {dataset.classes[label[q]]} {prob[q]:.2f}"
            row.append(picture_of_mask(mask_logits[q], caption, box))
        rows.append(row)

    row = [picture_with_caption(image, f"query {surest[0]} after each layer", box)]
    for l, (class_logits, mask_logits) in enumerate(outputs_of_layers(model, image, size), 1):
        prob, label = class_logits[surest[0]].softmax(-1)[:-1].max(-1)
        caption = f"layer {l}: {dataset.classes[label]} {prob:.2f}"
        row.append(picture_of_mask(mask_logits[surest[0]], caption, box))
    save_grid(rows + [row], path)


def outputs_of_layers(model, image, size):
    """-> for each decoder layer class_logits [Q, K+1] and mask_logits [Q, *size] of an image."""
    x = network_input(model, image, size)
    model.training = True                # the model alone, not its parts: all layers, no dropout
    try:
        class_logits, mask_logits = model(x[None])
    finally:
        model.training = False
    mask_logits = [upsample(layer, x.shape[-2:])[:, :size[0], :size[1]]
                   for layer in mask_logits[:, 0]]
    return zip(class_logits[:, 0], mask_logits)


def picture_of_mask(mask_logits, caption, box):                      # [., .] -> PIL picture
    gray = mask_logits.sigmoid().mul(255).byte().cpu()
    return picture_with_caption(gray.expand(3, -1, -1), caption, box)


def picture_with_caption(image, caption, box):                       # [3, ., .] -> PIL picture
    return overlay(image, image[0], [], [], caption, box)


# ------------------------------------------------------------------------------------------ loading
def load_checkpoint(path):
    """-> the content of a checkpoint of train.py. No code in the file is run."""
    try:
        with open(path, "rb") as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
        missing = {"model", "config", "classes", "is_thing", "step"} - state.keys()
    except OSError:
        raise
    except Exception as error:                                       # pickle raises all kinds
        raise UserError(f"{path} is not a whole checkpoint of train.py ({error!r:.60})") from error
    if missing:
        raise UserError(f"{path} is not a checkpoint of train.py: it lacks {', '.join(missing)}")
    state["config"]["num_classes"] = len(state["classes"])           # older files hold None
    return state


def load(source):
    """-> model in eval mode, {"config", "classes", "is_thing", "category_ids", ...}.

    source: a checkpoint of train.py (.pt), the name of a released model, or a file of the authors'
    or Hugging Face's (see tools/official_weights.py). No code in a file is run. UserError if it
    cannot be read.
    """
    if Path(source).suffix == ".pt":
        info = load_checkpoint(source)
    else:
        from tools.official_weights import official_checkpoint
        info = official_checkpoint(source)
    try:
        model = build_model(info["config"])
        model.load_state_dict(info.pop("model"))
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{source} does not hold the model that it describes: {error}") from error
    return model.eval(), info


def photos(given, info):
    """A dataset of photos, without truth: files, and folders of them, in the classes of `info`."""
    paths = []
    for path in map(Path, given):
        if path.is_dir():
            paths += [file for file in sorted(path.glob("[!.]*.*"))
                      if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
        elif path.is_file():
            paths.append(path)
        else:
            raise UserError(f"--images {path}: no such file or folder")
    if not paths:
        raise UserError(f"--images {' '.join(given)}: no images there; name a folder that has some")
    return without_truth(paths, info)


# ---------------------------------------------------------------------------------------- processes
def rank():
    return dist.get_rank() if dist.is_initialized() else 0           # the number of this process


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1     # how many processes there are


def sum_over_processes(value):
    """Adds up a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def pick_device():
    """The GPU of this process, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc-per-node: there are only {torch.cuda.device_count()} GPUs here")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def backend_for(device):
    """CPU tensors go by gloo, GPU tensors by nccl where it exists (not on Windows)."""
    on_gpu = device.type == "cuda" and dist.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if on_gpu else "gloo"


def rendezvous():
    """-> the store, rank and world size that torchrun gives, for `init_process_group`.

    A job that torchrun restarts finds in the store the addresses of its dead processes, and might
    wait for them forever: the prefix hides them.
    """
    store, number, count = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"attempt {attempt}", store),
            "rank": number,
            "world_size": count}


def pick_amp(name, device):
    """The precision that `--amp auto` stands for: bf16 on a GPU that has it, else float32."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "off"


# -------------------------------------------------------------------------------------- the command
class ArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; there are too many flags to list them all."""

    def error(self, message):
        raise UserError(f"{message}; --help shows all flags")


def positive_int(text):
    return checked(int(text), 1, math.inf)


def whole_number(text):
    return checked(int(text), 0, math.inf)


def non_negative(text):
    return checked(float(text), 0, math.inf)


def scale_factor(text):
    return checked(float(text), 0.1, 10)


def fraction(text):
    return checked(float(text), 0, 1)


def checked(number, least, most):
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{number} is not a finite number")
    if not least <= number <= most:
        limits = f"from {least} to {most}" if most < math.inf else f"{least} or more"
        raise argparse.ArgumentTypeError(f"{number} is not {limits}")
    return number


def run_command(main):
    """Runs a script's main function and exits with its code.

    A mistake that the user can fix is one line and exit code 2, a bug a traceback and exit code 1.
    """
    sys.stdout.reconfigure(errors="replace")                         # a console may lack characters
    try:
        code = main()
    except (UserError, OSError, dist.DistNetworkError, torch.OutOfMemoryError) as error:
        message = str(error)
        if "Original Traceback" in message:                          # of a loader worker
            message = message.rpartition(f"{type(error).__name__}: ")[2]
        print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    kill_loader_workers()
    sys.exit(code)


def kill_loader_workers():
    """Kills the loader workers that an error has left behind.

    Python would end them with SIGTERM, which they ignore, and then wait for them forever.
    """
    if hasattr(signal, "SIGCHLD"):                                   # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                # torch's handler would raise
    for worker in multiprocessing.active_children():
        worker.kill()


def parse_args(argv=None):
    """The command line -> flags; those that are not given and have no default are None."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", "--weights", required=True, metavar="FILE",
        help="a checkpoint of train.py, or the name or file of released weights")
    add("--images", nargs="+", metavar="FILE",
        help="photos, or folders of photos, instead of a dataset")
    add("--dataset", choices=DATASETS, help="the dataset (default: the one of the training)")
    add("--data-root", metavar="DIR", help="where the dataset lies (default: as in the training)")
    add("--split", help="the part of the dataset (default: val)")
    add("--test-short-side", type=positive_int, metavar="N",
        help="short side in pixels at which the model sees an image (default: as in the training)")
    add("--test-max-long-side", type=positive_int, metavar="N",
        help="upper limit of the long side there (default: as in the training)")
    add("--object-threshold", type=fraction, metavar="P",
        help="class probability that makes a query a segment (default: as in the training)")
    add("--overlap-threshold", type=fraction, metavar="P",
        help="share of its mask that a segment must keep (default: as in the training)")
    add("--scales", type=scale_factor, nargs="+", default=[1.], metavar="S",
        help="class scores are averaged over these multiples of the test size (default: 1)")
    add("--flip", action="store_true", help="and over the mirror image of each")
    add("--inference", choices=["semantic", "panoptic"],
        help="how pixels get their class: by Sec. 3.4's semantic inference (default), or from the "
             "panoptic segments (Table VII)")
    add("--amp", default="auto", choices=["auto", *AMP],
        help="precision of the network (default: bf16 on GPUs that have it, else off: float32)")
    add("--workers", type=whole_number, default=2, metavar="N",
        help="processes that read images (default: 2)")
    add("--save", metavar="DIR",
        help="folder for label maps, overlays, panoptic segments and metrics (photos: predictions)")
    return parser.parse_args(argv)


def main(argv=None):
    """The command: see the top of this file."""
    args = parse_args(argv)
    if args.images and (args.dataset or args.data_root or args.split):
        raise UserError("--images takes no --dataset, --data-root or --split")
    device = pick_device()
    torch.set_float32_matmul_precision("high")                       # as in training
    if "RANK" in os.environ:                                         # started by torchrun
        dist.init_process_group(backend_for(device), **rendezvous())

    model, info = load(args.checkpoint)
    given = {name: value for name, value in vars(args).items() if value is not None}
    config = info["config"] | given                                  # flags come first
    options = {name: config[name] for name in TEST_OPTIONS}
    options |= {"scales": args.scales, "flip": args.flip, "amp": pick_amp(args.amp, device)}

    if args.images:
        save = args.save or "predictions"
        dataset = photos(args.images, info)
        dataset.panoptic = config["task"] == "panoptic"
    else:
        save = args.save
        drawn = {"num_classes": len(info["classes"])} if config["dataset"] == "shapes" else {}
        dataset = build_dataset(config["dataset"], config["data_root"], args.split or "val",
                                **drawn)
        dataset = align_classes(dataset, info)
        if not dataset.has_truth and not save:
            raise UserError(f"--split {args.split} has no truth: add --save DIR to predict it")

    model.to(device, memory_format=torch.channels_last)              # 0.91 of the time on two cores
    metrics = evaluate(model, dataset, args.inference, save, args.workers, config["task"],
                       **options)
    if rank() == 0 and metrics:
        if save:
            save_metrics(Path(save) / "metrics.json", metrics, dataset.classes)
        print(table_of_classes(metrics, dataset.classes))
    if rank() == 0 and save:
        print(f"saved in {save}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
