"""How fast and how large this code is, beside transformers' MaskFormer on the same work in the same run.

    python tests/benchmark.py --quick                       # R50, 10 segments: some minutes on two cores
    python tests/benchmark.py --json numbers.json           # all; on a GPU if there is one
    python tests/benchmark.py --only loss memory --segments 10 100

Prints a markdown table. The two sides take turns, and a ratio (ours / theirs) is the median of the ratios of
neighbouring runs, so that whatever else the machine does hits both. Random weights, made-up images. Work is
made equal where the libraries differ: batch norms of the backbone are frozen, and their loss is given the
six decoder layers (left alone, it also supervises the queries before the first).
"""
import argparse
import gc
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import losses
import matcher
import train
from batches import Augmentation, Batch, TrainingSamples, collate
from data import build_dataset
from evaluate import ConfusionMatrix, PanopticQuality, build_model, predict, semantic_map, upsample
from losses import mask_classification_loss
from maskformer import panoptic_inference
from matcher import hungarian_match

try:
    import transformers
    from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss
except ImportError:
    transformers = None

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
L, K = 6, 150                                                            # decoder layers, classes
THINGS = [k < 100 for k in range(K)]
WORK = dict(backbone="resnet50", queries=100, segments=10, side=512, images=16 if GPU else 2, amp="off",
            compiled=False, size=(640, 853))                             # size: of a panoptic result
BACKBONES = {"resnet50": "R50", "swin_tiny_patch4_window7_224": "Swin-T"}
PARTS_OF_LOSS = losses.focal_loss, losses.dice_loss
ROWS = []


# ---------------------------------------------------------------------------------------- made-up input
def regions(n, height, width, seed=0, device=DEVICE):
    """-> segment map [H, W] of ids 1..n: each pixel belongs to the nearest of n random points."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.rand(2, n, generator=g).to(device) * torch.tensor([[height], [width]], device=device)
    best, nearest = torch.full((height, width), torch.inf, device=device), 0
    for i in range(n):
        distance = (torch.arange(height, device=device)[:, None] - y[i]) ** 2 + (
            torch.arange(width, device=device) - x[i]) ** 2
        nearest = torch.where(distance < best, i + 1, nearest)
        best = torch.minimum(best, distance)
    return nearest.to(torch.uint8)


def picture(*size):                                                      # -> [3, H, W] uint8, smooth and noisy
    coarse = F.interpolate(torch.rand(1, 3, 9, 12), size=size, mode="bicubic")[0]
    return (255 * (coarse + 0.1 * torch.randn(3, *size)).clamp(0, 1)).to(torch.uint8)


def made_up_batch(o):
    maps = torch.stack([regions(o.segments, o.side, o.side, seed) for seed in range(o.images)])
    images = torch.stack([picture(o.side, o.side) for _ in range(o.images)]).to(DEVICE)
    ids = torch.arange(1, o.segments + 1, device=DEVICE).repeat(o.images)
    labels = torch.randint(K, ids.shape).to(DEVICE)
    return Batch(images, maps, ids, labels, torch.arange(o.images).repeat_interleave(o.segments), [])


def as_theirs(batch, o):
    """-> their float masks and labels, a list entry for each image; normalised images are made in the step."""
    return list(batch.masks().float().split(o.segments)), list(batch.labels.split(o.segments))


def made_up_logits(o):
    torch.manual_seed(0)
    class_logits = torch.randn(L, o.images, o.queries, K + 1)
    mask_logits = torch.randn(L, o.images, o.queries, o.side // 4, o.side // 4)
    return class_logits.to(DEVICE).requires_grad_(), mask_logits.to(DEVICE).requires_grad_()


def sure_queries(n=30, queries=100, h=128, w=171):
    """-> class_logits [1, Q, K+1], mask_logits [1, Q, h, w] in which n queries are sure of a region each."""
    class_logits = torch.zeros(1, queries, K + 1)
    class_logits[0, torch.arange(queries), torch.arange(queries).where(torch.arange(queries) < n, K)] = 12.
    own = torch.arange(1, queries + 1)[:, None, None] == regions(n, h, w, device="cpu")
    return class_logits.to(DEVICE), torch.where(own, 6., -6.)[None].to(DEVICE)


# ---------------------------------------------------------------------------------------- models
def our_model(o):
    """-> train.py's model, and its flags."""
    args = train.parse(["--dataset", "ade20k", "--no-pretrained", "--freeze-bn", "--backbone", o.backbone,
                        "--queries", str(o.queries), "--amp", o.amp])
    torch.manual_seed(0)
    return build_model(vars(args), K).to(DEVICE), args


def in_use(model):                                                       # as evaluate.py does
    return model.eval().to(memory_format=torch.channels_last)


def their_model(o):
    stages = dict(out_features=["stage1", "stage2", "stage3", "stage4"])
    swin = transformers.SwinConfig(depths=[2, 2, 6, 2], drop_path_rate=0.3, **stages)
    backbone = transformers.ResNetConfig(**stages) if o.backbone == "resnet50" else swin
    config = transformers.MaskFormerConfig(backbone_config=backbone, num_labels=K, use_auxiliary_loss=True)
    config.decoder_config.num_queries = o.queries
    torch.manual_seed(0)
    model = transformers.MaskFormerForInstanceSegmentation(config).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model.to(DEVICE)


def normalised(images):
    """What our model does to its images itself."""
    mean, std = (torch.tensor(x, device=DEVICE).view(3, 1, 1) for x in ([124., 116., 104.], [58., 57., 57.]))
    return (images.float() - mean) / std


def autocast(o):
    return torch.autocast(DEVICE.type, train.AMP[o.amp], enabled=o.amp != "off")


# ---------------------------------------------------------------------------------------- the same work, twice
def our_step(o):
    model, args = our_model(o)
    optimizer = torch.optim.AdamW(train.parameter_groups(model.train(), args), fused=True)
    scaler, batch = torch.amp.GradScaler(DEVICE.type, enabled=False), made_up_batch(o)
    losses.focal_loss, losses.dice_loss = PARTS_OF_LOSS                  # as train.py --compile does
    if o.compiled:
        model = torch.compile(model)
        losses.focal_loss, losses.dice_loss = map(torch.compile, PARTS_OF_LOSS)
    return lambda: train.training_step(0, [batch], model, optimizer, scaler, args)


def their_step(o):
    model, batch = their_model(o), made_up_batch(o)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    targets = as_theirs(batch, o)
    network = torch.compile(model.model) if o.compiled else model.model

    def run():
        with autocast(o):
            output = network(normalised(batch.images), output_hidden_states=True)
            output.transformer_decoder_hidden_states = output.transformer_decoder_hidden_states[-L:]
            class_logits, mask_logits, others = model.get_logits(output)
        others = [{name: x.float() for name, x in layer.items()} for layer in others]
        model.get_loss(model.get_loss_dict(mask_logits.float(), class_logits.float(), *targets, others)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    return run


def our_loss(o):
    batch, logits = made_up_batch(o), made_up_logits(o)
    masks, count = batch.masks(), torch.full((), len(batch.ids), device=DEVICE)

    def run():
        matches = hungarian_match(*logits, batch.labels, masks, batch.owner)
        ce, focal, dice = mask_classification_loss(*logits, batch.labels, masks, matches, count)
        torch.autograd.grad(ce + 20 * focal + dice, logits)
    return run


def their_loss(o):
    (class_logits, mask_logits), targets = made_up_logits(o), as_theirs(made_up_batch(o), o)
    criterion = MaskFormerLoss(K, MaskFormerHungarianMatcher(1., 20., 1.), {}, 0.1).to(DEVICE)

    def run():
        others = [dict(masks_queries_logits=x, class_queries_logits=y)
                  for x, y in zip(mask_logits[:-1], class_logits[:-1])]
        terms = criterion(mask_logits[-1], class_logits[-1], *targets, others)
        loss = sum(20 * term if "mask" in name else term for name, term in terms.items())
        torch.autograd.grad(loss, (class_logits, mask_logits))
    return run


def our_image(o):
    model, image = in_use(our_model(o)[0]), picture(o.side, o.side)
    return lambda: inference(o, predict, model, image, THINGS, o.side, 4 * o.side, panoptic=False)[0].cpu()


def their_image(o):
    model, image = their_model(o).eval(), picture(o.side, o.side)[None]
    finish = transformers.MaskFormerImageProcessor().post_process_semantic_segmentation
    model.config.use_auxiliary_loss = False

    def answer():
        return finish(model(normalised(image.to(DEVICE))), target_sizes=[(o.side, o.side)])
    return lambda: inference(o, answer)[0].cpu()


def our_photo(o):
    model, image = in_use(our_model(o)[0]), picture(*o.size)
    return lambda: inference(o, predict, model, image, THINGS, 512, 2048, panoptic=False)[0].cpu()


def their_photo(o):
    model, image = their_model(o).eval(), picture(*o.size)[None]
    finish = transformers.MaskFormerImageProcessor().post_process_semantic_segmentation
    model.config.use_auxiliary_loss = False

    def answer():
        small = TF.resize(image.to(DEVICE), 512, antialias=True)
        return finish(model(normalised(small)), target_sizes=[o.size])
    return lambda: inference(o, answer)[0].cpu()


def our_batch(o):
    model, images = in_use(our_model(o)[0]), made_up_batch(o).images

    def answer():
        class_logits, mask_logits = (x[-1] for x in model(images))
        return torch.stack([semantic_map(classes, upsample(masks, images.shape[-2:]))
                            for classes, masks in zip(class_logits, mask_logits)])
    return lambda: inference(o, answer).cpu()


def their_batch(o):
    model, images = their_model(o).eval(), made_up_batch(o).images
    finish = transformers.MaskFormerImageProcessor().post_process_semantic_segmentation
    model.config.use_auxiliary_loss = False

    def answer():
        return finish(model(normalised(images)), target_sizes=[(o.side, o.side)] * len(images))
    return lambda: torch.stack(inference(o, answer)).cpu()


@torch.no_grad()
def inference(o, answer, *inputs, **options):
    with autocast(o):
        return answer(*inputs, **options)


def our_panoptic(o):
    class_logits, mask_logits = (x[0] for x in sure_queries())
    return lambda: panoptic_inference(class_logits, mask_logits, THINGS, size=o.size)


def their_panoptic(o):
    class_logits, mask_logits = sure_queries()
    output = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)
    finish = transformers.MaskFormerImageProcessor().post_process_panoptic_segmentation
    return lambda: finish(output, 0.8, 0.5, 0.8, set(range(100, K)), [o.size])


SIDES = {"step": (our_step, their_step), "loss": (our_loss, their_loss), "image": (our_image, their_image),
         "photo": (our_photo, their_photo), "batch": (our_batch, their_batch),
         "panoptic": (our_panoptic, their_panoptic)}


# ---------------------------------------------------------------------------------------- measuring
def seconds(run):
    if not GPU:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def race(ours, theirs, repeat):
    """-> median seconds of both, median ratio of neighbouring runs. theirs may be None."""
    sides = [side for side in (ours, theirs) if side]
    for side in sides * (3 if GPU else 1):                               # warm up
        side()
    times = []
    for i in range(repeat):
        order = sides if i % 2 else sides[::-1]
        times.append({side: seconds(side) for side in order})
    medians = [statistics.median(t[side] for t in times) for side in sides]
    return medians[0], *(medians[1:] or [None]), theirs and statistics.median(t[ours] / t[theirs] for t in times)


def row(part, what, ours, theirs=None, ratio=None, unit="ms"):
    ROWS.append(dict(part=part, what=what, ours=ours, theirs=theirs, ratio=ratio, unit=unit))
    print(line(ROWS[-1]), file=sys.stderr, flush=True)


def line(r):
    cells = [r["part"], r["what"], f"{r['ours']:.4g} {r['unit']}"]
    if transformers:
        cells += [f"{r['theirs']:.4g} {r['unit']}", f"{r['ratio']:.2f}"] if r["theirs"] else ["", ""]
    return "| " + " | ".join(cells) + " |"


def compare(part, what, kind, options, **work):
    """A row of the table: one kind of SIDES, raced -> our side, to measure more of it."""
    o = SimpleNamespace(**WORK | work)
    gc.collect()
    ours, theirs = (build(o) if build is SIDES[kind][0] or transformers else None for build in SIDES[kind])
    mine, other, ratio = race(ours, theirs, options.repeat)
    row(part, what, 1000 * mine, other and 1000 * other, ratio)
    return ours, mine


def peak_memory(kind, side, **work):
    """GiB that a run needs beyond what its model and inputs take, in a process of its own; NaN if it died."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", kind, str(side), json.dumps(work)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.split()
    return float(answer[-1]) if answer else math.nan


def child(kind, side, work):
    run = SIDES[kind][int(side)](SimpleNamespace(**WORK | json.loads(work)))
    before = memory("VmRSS")
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        run()
    print(((torch.cuda.max_memory_allocated() if GPU else memory("VmHWM")) - before) / 2 ** 30)


def memory(name):
    """Bytes of this process, now (VmRSS) or at most (VmHWM; ru_maxrss would begin with the parent's)."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[name].split()[0])


def waits(step):
    """Names of the calls in which a step waits for the GPU. One is wanted: the copy of the matching costs."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        with torch.profiler.record_function("the whole step"):
            step()
        torch.cuda.synchronize()
    events = profile.events()
    whole = next(e for e in events if e.name == "the whole step").time_range
    return [e.name for e in events if "Synchronize" in e.name and whole.start <= e.time_range.start <= whole.end]


def solver_seconds(step):
    """Seconds from the first to the last assignment problem of a step, while a GPU has nothing to do."""
    solve, times = matcher.linear_sum_assignment, []

    def timed(cost):
        times.append(time.perf_counter())
        result = solve(cost)
        times.append(time.perf_counter())
        return result
    matcher.linear_sum_assignment = timed
    step()
    matcher.linear_sum_assignment = solve
    return times[-1] - times[0]


def matmul_rate(amp):
    """Multiply-adds per second of a large square matrix product."""
    n = 8192 if GPU else 2048
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=train.AMP[amp])
    return n ** 3 / race(lambda: a @ b, None, 9)[0]


# ---------------------------------------------------------------------------------------- parts of the table
def measure_step(options):
    for backbone in options.backbones:
        for amp in options.amp:
            for compiled in (False, True)[:1 + options.compile]:
                name = f"{BACKBONES[backbone]}, {amp}" + ", compiled" * compiled
                for segments in options.segments:
                    work = dict(backbone=backbone, segments=segments, amp=amp, compiled=compiled)
                    step, spent = compare("training step", f"{name}, {segments} segments", "step", options, **work)
                    if segments == WORK["segments"] and not compiled:
                        look_into(step, spent, name, amp)


def look_into(step, spent, name, amp):
    """What a step does in its `spent` seconds."""
    row("training step", f"{name}: share of the assignment solver, on the CPU", 100 * solver_seconds(step) / spent,
        unit="%")
    if GPU:
        found = waits(step)
        row("training step", f"{name}: waits for the GPU ({', '.join(found)})", len(found), unit="")
    with FlopCounterMode(display=False) as counter:
        step()
    rate = counter.get_total_flops() / 2 / spent
    row("training step", f"{name}: multiply-adds", rate / 1e9, unit="G/s")
    row("training step", f"{name}: share of the measured rate of a matrix product", 100 * rate / matmul_rate(amp), unit="%")


def measure_loss(options):
    for segments in options.segments:
        compare("matching + loss", f"{segments} segments, forward and backward", "loss", options, segments=segments)


def measure_inference(options):
    for amp in options.amp:
        compare("inference", f"R50, one image, semantic, {amp}", "image", options, amp=amp)
        compare("inference", f"R50, batch of {WORK['images']}, semantic, {amp}", "batch", options, amp=amp)
    compare("inference", "panoptic result alone, 640x853, 30 sure queries", "panoptic", options)


def measure_metrics(options):
    model = in_use(our_model(SimpleNamespace(**WORK))[0])
    for size in ((512, 683), (2000, 2600)):
        image, truth = picture(*size), regions(40, *size, device="cpu")
        segments = [{"id": i, "category_id": 2 * i, "isthing": True} for i in range(1, 41)]
        guess, matrix, quality = truth.roll(7, 0), ConfusionMatrix(K), PanopticQuality(K, THINGS)

        def update():
            matrix.update(2 * guess.long(), 2 * truth.long())
            quality.update(guess, segments, truth, segments)
        started = time.perf_counter()
        for _ in range(options.repeat):
            update()
        spent = (time.perf_counter() - started) / options.repeat
        whole = race(lambda: predict(model, image, THINGS, 512, 2048), None, 1 if options.quick else 3)[0]
        name = f"{size[0]}x{size[1]}"
        row("metrics", f"{name}, mIoU and PQ, an image", 1000 * spent)
        row("metrics", f"{name}, beside R50's inference of it", 100 * spent / whole, unit="%")


def measure_data(options):
    """On one core. Theirs: the usual pipeline of Pillow and torchvision's transforms."""
    threads, count = torch.get_num_threads(), 32 if options.quick else 128
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        for folder in ("images/train", "annotations/train"):
            Path(root, folder).mkdir(parents=True)
        for i in range(16):
            TF.to_pil_image(picture(512, 683)).save(Path(root, f"images/train/{i}.jpg"), quality=90)
            labels = 2 * regions(10, 512, 683, i, "cpu").numpy()
            Image.fromarray(labels).save(Path(root, f"annotations/train/{i}.png"))
        Path(root, "classes.txt").write_text("\n".join(f"class {k}" for k in range(K)))
        args, dataset = train.parse(["--dataset", "ade20k"]), build_dataset("folder", root, "train")
        augment = Augmentation(args.short_side, args.max_long_side, args.crop)
        samples, usual = TrainingSamples(dataset, augment, task="semantic"), UsualPipeline(Path(root), args)

        def rate(one):
            return lambda: [one(i) for i in range(count)]
        mine, other, ratio = race(rate(lambda i: collate([samples[i]])), rate(usual.sample), options.repeat)
    torch.set_num_threads(threads)
    ROWS.append(dict(part="data loading", what="683x512 JPEG to a 512x512 training sample, one core; beside it "
                     "Pillow and torchvision", ours=count / mine, theirs=count / other, ratio=1 / ratio,
                     unit="images/s"))
    print(line(ROWS[-1]), file=sys.stderr)


class UsualPipeline:
    """The same augmentation as it is mostly written."""

    def __init__(self, root, args):
        self.root, self.args = root, args
        self.jitter = [transforms.RandomApply([transforms.ColorJitter(**{name: most})]) for name, most in
                       dict(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.1).items()]

    def sample(self, i):
        image = Image.open(self.root / f"images/train/{i % 16}.jpg").convert("RGB")
        mask = Image.open(self.root / f"annotations/train/{i % 16}.png")
        short = random.choice(self.args.short_side)
        image = TF.resize(image, short, max_size=self.args.max_long_side)
        mask = TF.resize(mask, short, TF.InterpolationMode.NEAREST, max_size=self.args.max_long_side)
        H, W = self.args.crop
        missing = [0, 0, max(0, W - image.width), max(0, H - image.height)]
        image, mask = TF.pad(image, missing, 128), TF.pad(mask, missing, 255)
        box = transforms.RandomCrop.get_params(image, (H, W))
        image, mask = TF.crop(image, *box), TF.crop(mask, *box)
        if random.random() < 0.5:
            image, mask = TF.hflip(image), TF.hflip(mask)
        for jitter in self.jitter:
            image = jitter(image)
        mask = torch.from_numpy(np.array(mask))
        return TF.pil_to_tensor(image), mask, mask.unique()


def measure_growth(options):
    loss, ends = "matching + loss", slice(None, None, 3 if options.quick else 1)
    for queries in (50, 100, 200, 400)[ends]:
        compare("growth", f"{loss}, {queries} queries", "loss", options, queries=queries)
    for segments in (5, 20, 50, 100)[ends]:
        compare("growth", f"{loss}, {segments} segments", "loss", options, segments=segments)
    for side in (256,) if options.quick else (256, 512, 768, 1024):      # ours alone: the slowest rows
        step = our_step(SimpleNamespace(**WORK | dict(side=side)))
        row("growth", f"training step, R50, images {side}x{side}", 1000 * race(step, None, options.repeat)[0])


def measure_memory(options):
    kinds = [("step", f"training step, {BACKBONES[backbone]}, {amp}", dict(backbone=backbone, amp=amp))
             for backbone in options.backbones for amp in options.amp]
    if not options.quick:
        kinds += [("loss", f"matching + loss, {n} segments, {q} queries", dict(segments=n, queries=q))
                  for n, q in ((10, 100), (100, 100), (10, 400))]
    kinds += [("photo", "semantic prediction of a 3000x4000 photo, R50", dict(size=(3000, 4000))),
              ("panoptic", "panoptic result alone, 3000x4000, 30 sure queries", dict(size=(3000, 4000)))]
    for kind, what, work in kinds:
        mine, other = (peak_memory(kind, side, **work) if side == 0 or transformers else None for side in (0, 1))
        row("peak memory", what, mine, other, other and mine / other, unit="GiB")


PARTS = {"step": measure_step, "loss": measure_loss, "inference": measure_inference, "metrics": measure_metrics,
         "data": measure_data, "growth": measure_growth, "memory": measure_memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts of the table")
    add("--quick", action="store_true", help="R50, 10 segments, few repetitions")
    add("--backbones", nargs="+", choices=BACKBONES)
    add("--segments", nargs="+", type=int, metavar="N", help="in an image (default: 5 10 40)")
    add("--amp", nargs="+", choices=train.AMP, help="default: off, on a GPU also bf16")
    add("--compile", action="store_true", help="training steps with torch.compile, too")
    add("--repeat", type=int, metavar="N", help="runs of each side")
    add("--json", metavar="FILE", help="the same numbers for programs")
    add("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child)
    options.backbones = options.backbones or list(BACKBONES)[:1 if options.quick else 2]
    options.segments = options.segments or ([10] if options.quick else [5, 10, 40])
    options.amp = options.amp or (["off", "bf16"] if GPU else ["off"])
    options.repeat = options.repeat or (20 if GPU else 2 if options.quick else 5)
    loads = [os.getloadavg()[0]]
    for part in options.only:
        PARTS[part](options)
        loads.append(os.getloadavg()[0])
    about = dict(torch=torch.__version__, transformers=transformers and transformers.__version__,
                 device=torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} CPU threads",
                 load=[round(load, 1) for load in loads], work=WORK, repeat=options.repeat)
    head = ["part", "what", "ours"] + (["theirs", "ratio"] if transformers else [])
    print(f"\n{', '.join(f'{name} {value}' for name, value in about.items())}\n")
    print("\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *map(line, ROWS)]))
    if options.json:
        Path(options.json).write_text(json.dumps(dict(about=about, rows=ROWS), indent=1) + "\n")


if __name__ == "__main__":
    main()
