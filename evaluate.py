"""How good it is: mIoU, PQ, pictures, one's own photos (MaskFormer, Sec. 3.4, 4).

Letters   Q queries · K classes · H W size of the original image · h w size of the network's input

    python evaluate.py --checkpoint runs/shapes-001/last.pt                  # the metrics of its dataset
    python evaluate.py --weights maskformer_R50_bs16_160k --images photo.jpg --save out
"""
import colorsys
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2.functional import resize, to_pil_image

from data import (ADE20K_STUFF, DATASETS, IMAGE_SUFFIXES, SegmentationDataset, UserError, build_dataset, fit,
                  label_map, read_image, recipe, void_label)
from maskformer import (MaskFormer, PerPixelBaseline, PerPixelBaselinePlus, panoptic_inference,
                        semantic_inference)
from pretrained import load_official
from run import (Flags, command, counter, rank, read_checkpoint, start_process, sum_over_processes,
                 world_size)

PIXELS_AT_ONCE = 2 ** 13, 2 ** 20     # classified at a time: CPU (fits its cache), GPU
TEST_OPTIONS = ("test_short_side", "test_max_long_side", "object_threshold", "overlap_threshold")


# ---------------------------------------------------------------------------------------- metrics
class ConfusionMatrix:
    """Counts of (true class, predicted class) over a whole set; void pixels of the truth do not count.

    IoU of a class = TP / (TP + FP + FN). With truth [0, 0, 1, 255] and prediction [0, 1, 1, 1] both classes
    have IoU 1/2: mIoU 50, mACC 75, pACC 66.7. All values are percentages.
    """

    def __init__(self, num_classes, void=255):
        self.num_classes, self.void = num_classes, void
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64)   # last: predicted void

    def update(self, prediction, target):
        """prediction, target [H, W]: classes or void, else ValueError; RuntimeError for unequal sizes."""
        K, target = self.num_classes, torch.as_tensor(target).long()
        both = torch.stack([target, torch.as_tensor(prediction).to(target.device).long()])   # of equal size
        for what, values in zip(("target", "prediction"), both):
            low, high = map(int, values.masked_fill(values == self.void, 0).aminmax())
            if not 0 <= low <= high < K:
                raise ValueError(f"a {what} holds {low}..{high}, not 0..{K - 1}")
        truth, answer = both.masked_fill(both == self.void, K)           # void: the last row, not counted
        counts = torch.bincount((truth * (K + 1) + answer).flatten(), minlength=(K + 1) ** 2)
        self.counts += counts.view(K + 1, K + 1)[:K].cpu()

    def compute(self):
        """-> mIoU and mACC (means over classes that occur in the truth), pACC, fwIoU, IoU [K] (else NaN)."""
        counts = sum_over_processes(self.counts.clone()).double()
        hit, true, predicted = counts.diagonal(), counts.sum(1), counts[:, :-1].sum(0)
        occurs, total = true > 0, true.sum().clamp(min=1)
        iou = torch.where(occurs, hit / (true + predicted - hit).clamp(min=1), torch.nan)
        n = occurs.sum().clamp(min=1)
        return {"mIoU": (100 * iou[occurs].sum() / n).item(),
                "mACC": (100 * (hit / true)[occurs].sum() / n).item(),
                "pACC": (100 * hit.sum() / total).item(),
                "fwIoU": (100 * (true * iou)[occurs].sum() / total).item(), "IoU": (100 * iou).tolist()}


class PanopticQuality:
    """PQ of a class = (sum of IoU over matched pairs) / (TP + FP/2 + FN/2); then the mean over classes.

    A predicted and a true segment match if they agree in class and their IoU is above 0.5; void pixels of the
    truth do not count in the prediction's area. A prediction more than half on void plus crowd of its class
    is no false positive; crowd is never a false negative. Truth [1, 1, 2, 0] and prediction [1, 1, 1, 1]
    of one class: IoU 2/3, one TP, one FN: PQ 44.4, SQ 66.7, RQ 66.7. All values are percentages, means over
    the classes that occur; where none does, 0.
    """

    def __init__(self, num_classes, is_thing):
        self.is_thing = torch.as_tensor(is_thing, dtype=torch.bool)
        self.sums = torch.zeros(4, num_classes, dtype=torch.float64)     # IoU, TP, FP, FN of each class

    def update(self, pred_map, pred_segments, true_map, true_segments):
        """Maps [H, W] of segment ids, 0 void (like ids that are not listed); segments [{"id", "category_id",
        "iscrowd" (optional)}]."""
        pred_map, pred_class, _ = compact(pred_map, pred_segments)
        true_map, true_class, crowd = compact(true_map, true_segments)
        P, T = len(pred_class), len(true_class)                          # entry 0 is void, of class -1
        overlap = torch.bincount(true_map.flatten() * P + pred_map.flatten(), minlength=T * P)
        overlap = overlap.view(T, P).double()
        true_area, pred_area, void = overlap.sum(1), overlap.sum(0), overlap[0]
        same = (true_class[:, None] == pred_class) & (true_class[:, None] >= 0)          # [T, P]
        union = true_area[:, None] + pred_area - void - overlap
        iou = torch.where(same & ~crowd[:, None], overlap / union.clamp(min=1), 0)
        t, p = (iou > 0.5).nonzero().unbind(1)                           # a segment is in one pair at most
        ignored = void + (overlap * (same & crowd[:, None])).sum(0)
        false_positive = (pred_class >= 0) & (pred_area > 0) & (ignored <= pred_area / 2)
        false_negative = (true_class >= 0) & (true_area > 0) & ~crowd
        false_positive[p], false_negative[t] = False, False
        for row, classes, value in ((0, true_class[t], iou[t, p]), (1, true_class[t], 1.),
                                    (2, pred_class[false_positive], 1.), (3, true_class[false_negative], 1.)):
            self.sums[row].index_put_((classes,), torch.as_tensor(value).double(), accumulate=True)

    def compute(self):
        """-> PQ, SQ, RQ; the same with _th over things, _st over stuff; PQ_per_class [K] (or NaN)."""
        iou, tp, fp, fn = sum_over_processes(self.sums.clone())
        occurs = tp + fp + fn > 0
        sq, rq = iou / tp.clamp(min=1), tp / (tp + fp / 2 + fn / 2).clamp(min=0.5)
        values = {"PQ": sq * rq, "SQ": sq, "RQ": rq}
        groups = {"": occurs, "_th": occurs & self.is_thing, "_st": occurs & ~self.is_thing}
        return {"PQ_per_class": (100 * torch.where(occurs, sq * rq, torch.nan)).tolist()} | {
            name + suffix: (100 * value[group].sum() / group.sum().clamp(min=1)).item()
            for suffix, group in groups.items() for name, value in values.items()}


def compact(segment_map, segments):
    """-> map of 0 (void), 1, 2, .. in the order of the ids; their classes, -1 first; which are crowd."""
    segment_map = torch.as_tensor(segment_map).cpu().long()
    segments = sorted(segments, key=lambda segment: segment["id"])
    ids = torch.tensor([0] + [segment["id"] for segment in segments])
    place = torch.searchsorted(ids, segment_map).clamp(max=len(ids) - 1)
    classes = torch.tensor([-1] + [segment["category_id"] for segment in segments])
    crowd = torch.tensor([False] + [bool(segment.get("iscrowd")) for segment in segments])
    return torch.where(ids[place] == segment_map, place, 0), classes, crowd


# ---------------------------------------------------------------------------------------- prediction
@torch.no_grad()
def network_output(model, image, size, flip=False):
    """image [3, H, W] uint8 -> class_logits [Q, K+1], mask_logits [Q, h, w]; baselines: None, [K, h, w].

    The image is resized to `size` (h, w) and padded as the model wants it; the padding is cut off the answer.
    """
    mean, multiple = model.backbone.mean, model.size_divisibility or 1
    x = resize(image.to(mean.device), list(size), antialias=True)
    padded = [side + -side % multiple for side in size]
    canvas = mean.expand(3, *padded).clone()                             # zeros after normalisation
    canvas[:, :size[0], :size[1]] = x.flip(-1) if flip else x
    output = model(canvas[None])
    if isinstance(output, tuple):
        class_logits, logits = output[0][-1, 0], upsample(output[1][-1, 0], padded)
    else:                                                                # the baselines: exactly 4x
        class_logits, logits = None, upsample(output[-1, 0], [4 * side for side in output.shape[-2:]])
    return class_logits, logits[:, :size[0], :size[1]]


def upsample(x, size):                                                   # [n, h, w] -> [n, *size], bilinear
    return F.interpolate(x[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def semantic_map(class_logits, mask_logits):
    """[Q, K+1], [Q, H, W] -> argmax over classes of `semantic_inference` [H, W], some rows at a time."""
    rows = max(1, PIXELS_AT_ONCE[mask_logits.is_cuda] // mask_logits.shape[-1])
    class_prob = class_logits.softmax(-1)[:, :-1]
    return torch.cat([torch.einsum("qk,qhw->hwk", class_prob, some.sigmoid()).argmax(-1)
                      for some in mask_logits.split(rows, 1)])


def best_class(score_maps, size):
    """Class scores [K, h, w] of several scales, resized to the original `size`, added up -> argmax [H, W];
    eight classes at a time, which bounds the memory."""
    best, label = torch.tensor(-torch.inf), torch.tensor(0)
    for start in range(0, len(score_maps[0]), 8):
        few = (upsample(scores[start:start + 8], size) for scores in score_maps)
        score, index = sum(few, next(few)).max(0)                        # starting at 0 would copy
        label = torch.where(score > best, index + start, label)
        best = torch.maximum(score, best)
    return label


def predict(model, image, is_thing, test_short_side, test_max_long_side, object_threshold=0.8,
            overlap_threshold=0.8, scales=(1.,), flip=False, panoptic=True, inference=None):
    """image [3, H, W] uint8 -> class of each pixel [H, W], segment map [H, W], segments (or None, None).

    `scales` and `flip` average class scores; the panoptic result is of scale 1 alone. inference "panoptic":
    classes of pixels come from the panoptic result, too (Table VII).
    """
    original, segment_map, segments, score_maps = list(image.shape[-2:]), None, None, []
    size = fit(original, test_short_side, test_max_long_side)
    class_logits, mask_logits = network_output(model, image, size)
    if panoptic and class_logits is not None:
        segment_map, segments = panoptic_inference(class_logits, mask_logits, is_thing, object_threshold,
                                                   overlap_threshold, size=original)
    if inference == "panoptic":                                          # ids are 1, 2, .. in order
        classes = [void_label(len(is_thing))] + [segment["category_id"] for segment in segments]
        return torch.tensor(classes, device=segment_map.device)[segment_map.long()], segment_map, segments
    if class_logits is not None and size == original and list(scales) == [1] and not flip:
        return semantic_map(class_logits, mask_logits), segment_map, segments
    for scale in scales:
        scaled = fit(original, int(test_short_side * scale), int(test_max_long_side * scale))
        both = []
        for mirrored in (False, True)[:1 + flip]:
            classes, scores = class_logits, mask_logits
            if mirrored or scaled != size:
                classes, scores = network_output(model, image, scaled, mirrored)
            if classes is not None:
                scores = semantic_inference(classes[None], scores[None])[0]          # [K, h, w]
            both.append(scores.flip(-1) if mirrored else scores)
        score_maps.append(sum(both[1:], both[0]))
    return best_class(score_maps, original), segment_map, segments


# ---------------------------------------------------------------------------------------- evaluation
def evaluate(model, dataset, inference=None, save=None, workers=0, task="panoptic", **options):
    """Metrics of a model in eval mode -> {"mIoU", "fwIoU", "mACC", "pACC", "IoU": [K], "PQ", ..}; if truth,
    model or `task` has no instances, PQ_st alone: every class region is a segment (the paper's PQ^St). Every
    image counts once, however many processes share the work. save: a folder for predictions. inference and
    options: those of `predict`."""
    K, void = len(dataset.classes), void_label(len(dataset.classes))
    instances = dataset.panoptic and task == "panoptic" and type(model) is MaskFormer
    panoptic = instances or inference == "panoptic"
    check(model, inference, save, [path for path, _ in dataset.pairs] if save else [])
    matrix = ConfusionMatrix(K, void)
    quality = PanopticQuality(K, dataset.is_thing if instances else [False] * K)
    mine, annotations = range(rank(), len(dataset), world_size()), []
    loader = DataLoader(Subset(dataset, mine), None, num_workers=workers)
    for image, segment_map, class_of, crowd, name in counter(loader, "evaluating"):
        label, predicted, segments = predict(model, image, dataset.is_thing, panoptic=panoptic,
                                             inference=inference, **options)
        label, target = label.cpu(), label_map(segment_map, class_of, void)
        matrix.update(label, target)
        if instances:
            truth = [{"id": i, "category_id": c, "iscrowd": i in crowd} for i, c in class_of.items()]
            quality.update(predicted, segments, segment_map, truth)
        else:
            quality.update(*class_regions(label, void), *class_regions(target, void))
        if save:
            annotations += save_prediction(save, name, image, dataset, label, predicted, segments)
    if save and panoptic:
        save_coco_json(save, dataset, annotations)
    return matrix.compute() | {k: v for k, v in quality.compute().items() if instances or k == "PQ_st"}


def check(model, inference, save, images):
    """UserError for what cannot be evaluated or saved."""
    if inference == "panoptic" and type(model) is not MaskFormer:
        raise UserError("--inference panoptic: the per-pixel baselines predict no segments")
    if save and len({Path(path).stem for path in images}) < len(images):
        raise UserError(f"--save {save}: some images have the same name; their results would, too")


def class_regions(label, void=-1):
    """Classes of pixels [H, W] -> segment map of ids class + 1, 0 where void, and its segments, all stuff."""
    ids = torch.where(label == void, 0, label + 1)
    present = ids.flatten().bincount().nonzero()[:, 0].tolist()          # ids.unique() is 20 times slower
    return ids, [{"id": i, "category_id": i - 1, "isthing": False} for i in present if i > 0]


def single_numbers(metrics):
    return {name: round(value, 3) for name, value in metrics.items() if isinstance(value, float)}


def table_of_classes(metrics, classes):
    """The metrics as text: a line for each class (nan: the truth never has it), then the single numbers."""
    rows = [f"{name[:28]:28s} {iou:6.2f}" for name, iou in zip(classes, metrics["IoU"])]
    means = "  ".join(f"{name} {value:.2f}" for name, value in single_numbers(metrics).items())
    return "\n".join([f"{'class':28s}    IoU", *rows, means])


def save_metrics(path, metrics, classes, **more):
    """metrics.json: the single numbers, and the IoU of each class that occurs by name."""
    per_class = {name: round(iou, 3) for name, iou in zip(classes, metrics["IoU"]) if iou == iou}
    content = more | single_numbers(metrics) | {"IoU_per_class": per_class}
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


# ---------------------------------------------------------------------------------------- files and pictures
def save_prediction(folder, name, image, dataset, label, segment_map, segments):
    """Writes semantic/NAME.png (the publisher's numbers), overlay/NAME.jpg and, given segments, panoptic/
    NAME.png (COCO's format: id = R + 256 G + 65536 B). -> the annotations for COCO's json, one or none."""
    folder, K = Path(folder), len(dataset.classes)
    numbers = dataset.category_ids + [void_label(K) if 0 in dataset.category_ids else 0]     # last: void
    for kind in ("semantic", "overlay", "panoptic")[:2 if segments is None else 3]:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    numbers = np.array(numbers, np.uint8 if max(numbers) <= 255 else np.uint16)
    values = numbers[label.cpu().clamp(max=K).numpy()]
    Image.fromarray(values).save(folder / "semantic" / f"{name}.png")
    shown = class_regions(label, void_label(K)) if segments is None else (segment_map, segments)
    overlay(image, *shown, dataset.classes).save(folder / "overlay" / f"{name}.jpg", quality=92)
    if segments is None:
        return []
    ids = segment_map.cpu().numpy()                                      # int32
    rgb = ids.astype("<i4").view(np.uint8).reshape(*ids.shape, 4)[..., :3]
    Image.fromarray(rgb).save(folder / "panoptic" / f"{name}.png")
    info = [s | {"category_id": dataset.category_ids[s["category_id"]], "area": int((ids == s["id"]).sum())}
            for s in segments]
    image_id = dataset.image_ids.get(name, name)
    return [{"image_id": image_id, "file_name": f"{name}.png", "segments_info": info}]


def save_coco_json(folder, dataset, annotations):
    """Writes panoptic.json in COCO's format with the annotations of all processes."""
    parts = [annotations] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, annotations)
    if rank() == 0:
        categories = [{"id": i, "name": name, "isthing": int(thing)} for i, name, thing in
                      zip(dataset.category_ids, dataset.classes, dataset.is_thing)]
        content = json.dumps({"annotations": sum(parts, []), "categories": categories})
        (Path(folder) / "panoptic.json").write_text(content)


def overlay(image, segment_map, segments, classes, caption="", box=None):
    """image [3, H, W] uint8 under its named segments: stuff in the color of its class, every thing in its
    own, void as it is -> PIL picture, fitted into `box` (width, height)."""
    image, segment_map, centers = image.cpu().clone(), segment_map.cpu(), []
    for segment in segments:     # one by one: torchvision's drawing takes 10 bytes a pixel for each mask
        mask = segment_map == segment["id"]
        if mask.any():
            hue = 0.618 * (segment["id"] + 0.5 if segment["isthing"] else segment["category_id"])
            color = 255 * torch.tensor(colorsys.hsv_to_rgb(hue % 1, 0.75, 0.9))
            image[:, mask] = (0.4 * image[:, mask] + 0.6 * color[:, None]).byte()
            centers.append((mask.nonzero().float().median(0).values, classes[segment["category_id"]]))
    picture = to_pil_image(image)
    picture = ImageOps.contain(picture, box or picture.size)
    zoom = picture.height / image.shape[-2]
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(10, min(picture.size) // 20))
    style = dict(fill="white", font=font, stroke_width=1, stroke_fill="black")
    for center, name in centers:
        y, x = (center * zoom).tolist()
        draw.text((x, y), name, anchor="mm", **style)
    draw.text((3, 1), caption, **style)
    return ImageOps.pad(picture, box or picture.size, color="white")


def draw_predictions(model, dataset, path, **options):
    """predictions.png: image | truth | semantic | panoptic of four images."""
    rows = []
    for i in np.linspace(0, len(dataset) - 1, min(4, len(dataset))).astype(int).tolist():
        image, segment_map, class_of, crowd, name = dataset[i]
        truth = [{"id": i, "category_id": c, "isthing": dataset.is_thing[c]} for i, c in class_of.items()]
        label, predicted, segments = predict(model, image, dataset.is_thing, **options)
        views = [(name, segment_map, []), ("truth", segment_map, truth), ("semantic", *class_regions(label))]
        if segments is not None:
            views.append((f"panoptic, {len(segments)} segments", predicted, segments))
        rows.append(np.concatenate([overlay(image, *view, dataset.classes, caption, box=(320, 240))
                                    for caption, *view in views], axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


def draw_queries(model, dataset, path, test_short_side, test_max_long_side, **_):
    """queries.png: three images, each with the masks of the seven queries that are surest of their class."""
    rows = []
    for i in np.linspace(0, len(dataset) - 1, min(3, len(dataset))).astype(int).tolist():
        image, *_, name = dataset[i]
        image = resize(image, fit(image.shape[-2:], test_short_side, test_max_long_side))
        class_logits, mask_logits = network_output(model, image, image.shape[-2:])
        masks = mask_logits.sigmoid().mul(255).byte().cpu()              # [Q, h, w]
        prob, label = class_logits.softmax(-1)[:, :-1].max(-1)
        views = {name: image} | {f"{q}: {dataset.classes[label[q]]} {prob[q]:.2f}": masks[q].expand(3, -1, -1)
                                 for q in prob.topk(min(7, len(prob))).indices.tolist()}
        rows.append(np.concatenate([overlay(view, masks[0], [], [], caption, box=(240, 180))
                                    for caption, view in views.items()], axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


# ---------------------------------------------------------------------------------------- commands
def build_model(config, num_classes, pretrained=False):
    """The model that a training configuration (a dict of train.py's flags) describes."""
    names = ["backbone", "dim", "freeze_bn"]
    if config["model"] != "per-pixel":
        names += ["decoder_layers", "encoder_layers", "heads", "ffn_dim", "dropout"]
    options = {name: config[name] for name in names} | {"pretrained": pretrained}
    if config["model"] == "maskformer":
        options |= {"num_queries": config["queries"], "size_divisibility": config["size_divisibility"]}
    models = {"maskformer": MaskFormer, "per-pixel": PerPixelBaseline, "per-pixel-plus": PerPixelBaselinePlus}
    try:
        return models[config["model"]](num_classes, **options)
    except (OSError, RuntimeError, ValueError) as error:                 # timm: no such name, no weights
        raise UserError(f"--backbone {config['backbone']}: {error}") from error


def load(source):
    """A checkpoint of train.py, or released weights (see pretrained.py; their classes have numbers for names)
    -> model in eval mode, {"config", "classes", "is_thing", ..}. No code in the file is run."""
    if Path(source).suffix == ".pt":
        state = read_checkpoint(source)
        model = build_model(state["config"], len(state["classes"]))
        model.load_state_dict(state.pop("model"))
        return model.eval(), state
    try:
        model = load_official(source)
    except ValueError as error:
        raise UserError(str(error)) from error
    K, panoptic = model.num_classes, isinstance(model, MaskFormer) and len(model.encoder.layers) > 0
    dataset = {19: "cityscapes", 65: "mapillary", 133: "coco-panoptic", 171: "coco-stuff-10k",
               847: "ade20k-full"}.get(K, "ade20k-panoptic" if panoptic else "ade20k")
    backbone = "swin_384" if model.backbone.nhwc and model.backbone.channels[0] > 96 else ""     # Swin-B, -L
    values = dict(overlap_threshold=0.8, object_threshold=0.8) | recipe(dataset, backbone)
    config = dict(dataset=dataset, data_root=None, task="panoptic" if "panoptic" in dataset else "semantic")
    config |= {name: values[name] for name in TEST_OPTIONS}
    things = {133: range(80), 150: set(range(150)) - {value - 1 for value in ADE20K_STUFF}}.get(K, [])
    return model, dict(config=config, classes=[f"class {k}" for k in range(K)],
                       is_thing=[config["task"] == "panoptic" and k in things for k in range(K)])


def main(argv=None):
    """The command: see the top of this file."""
    parser = Flags(__doc__)
    add = parser.add_argument
    add("--checkpoint", "--weights", required=True, metavar="FILE", help="a run's .pt, or released weights")
    add("--images", nargs="+", metavar="FILE", help="own photos, or folders of them, instead of a dataset")
    add("--dataset", choices=DATASETS, help="default, also of --data-root and test sizes: as in training")
    add("--data-root")
    add("--split", default="val")
    for name in TEST_OPTIONS:
        add("--" + name.replace("_", "-"), type=float if "threshold" in name else int, metavar="N")
    add("--scales", type=float, nargs="+", default=[1.], help="class scores are averaged over these")
    add("--flip", action="store_true", help="and over each one's mirror image")
    add("--inference", choices=["semantic", "panoptic"], help="how pixels get their class (Sec. 3.4)")
    add("--workers", type=int, default=2)
    add("--save", metavar="DIR", help="for label maps, overlays, panoptic segments and metrics")
    args = parser.parse_args(argv)
    device = start_process()
    model, state = load(args.checkpoint)
    config = state["config"] | {name: value for name, value in vars(args).items() if value is not None}
    options = dict(scales=args.scales, flip=args.flip, **{name: config[name] for name in TEST_OPTIONS})
    model.to(device, memory_format=torch.channels_last)                  # 0.91 of the time on two cores
    if args.images:
        numbers = list(range(model.num_classes))
        photos = SegmentationDataset([], state["classes"], state["is_thing"], None, numbers)
        folder, annotations = args.save or "predictions", []
        images = [path for given in map(Path, args.images)
                  for path in (sorted(given.glob("[!.]*.*")) if given.is_dir() else [given])
                  if path == given or path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        if not images:
            raise UserError(f"--images {' '.join(args.images)}: no images in it; name a folder that has some")
        check(model, args.inference, folder, images)
        panoptic = type(model) is MaskFormer and "panoptic" in (config["task"], args.inference)
        for path in images[rank()::world_size()]:
            image = torch.from_numpy(read_image(path)).permute(2, 0, 1)
            answer = predict(model, image, photos.is_thing, panoptic=panoptic, inference=args.inference,
                             **options)
            annotations += save_prediction(folder, path.stem, image, photos, *answer)
            print(f"{path}: " + ", ".join(photos.classes[k] for k in answer[0].unique() if k < len(numbers)))
        return save_coco_json(folder, photos, annotations) if panoptic else None
    drawn = {"num_classes": len(state["classes"])} if config["dataset"] == "shapes" else {}
    dataset = build_dataset(config["dataset"], config["data_root"], args.split, **drawn)
    if len(dataset.classes) != len(state["classes"]):
        raise UserError(f"{args.checkpoint} has {len(state['classes'])} classes, the dataset "
                        f"{len(dataset.classes)}: take the --dataset and --data-root it was trained on")
    metrics = evaluate(model, dataset, args.inference, args.save, args.workers, config["task"], **options)
    if rank() == 0:
        print(table_of_classes(metrics, dataset.classes))
        if args.save:
            save_metrics(Path(args.save) / "metrics.json", metrics, dataset.classes)


if __name__ == "__main__":
    command(main)
