"""How fast MaskFormer trains and predicts, and how much memory it takes, with random weights.

    python tools/benchmark.py                                    # a short table, in minutes
    python tools/benchmark.py --only step,memory --output numbers.json
    python tools/benchmark.py --full                             # all combinations

Prints a table. "ours" stands beside "theirs", the MaskFormer of Hugging Face transformers, if that
is installed. Both do the same work in the same process, and take turns, so that a busy machine
slows both down. Times are medians, the ratio is the median of the ratios of neighboring runs.

Where the libraries differ, the work is made equal: the backbone's batch norms are frozen on both
sides, and both losses get the outputs of the six decoder layers. (Left alone, theirs also gets the
queries before the first layer.) In a compiled step, model, matching costs and mask terms of ours
are compiled, as train.py does by default on a GPU; of theirs the network, not the loss, which loops
over the images in Python.
"""
import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image

try:
    import transformers
    from transformers.models.maskformer import modeling_maskformer as their_code
except ImportError:
    transformers = None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import Augmentation, TrainingSamples, build_dataset, collate
from evaluate import AMP, predict
from losses import mask_classification_loss, mask_terms
from maskformer import build_model, semantic_inference
from matcher import hungarian_match, matching_cost

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BACKBONES = {"resnet50": "R50",
             "swin_tiny_patch4_window7_224": "Swin-T",
             "swin_large_patch4_window12_384": "Swin-L"}
RESNET, SWIN_TINY, SWIN_LARGE = BACKBONES
LAYERS = 6                                               # of the decoder
QUERIES = 100
MEAN = torch.tensor([124., 116., 104.], device=DEVICE).view(3, 1, 1)
STD = torch.tensor([58., 57., 57.], device=DEVICE).view(3, 1, 1)
MEMORY_FILE = Path("/proc/self/status")                  # of this process; only Linux has it


class Work(NamedTuple):
    """What is measured: a step, or a part of it, on `images` images of `segments` segments each."""
    backbone: str = RESNET
    segments: int = 10
    images: int = 16 if GPU else 2
    size: tuple = (512, 512)                             # H, W
    num_classes: int = 150
    freeze_bn: bool = True
    amp: str = "off"                                     # a name of evaluate.AMP
    compiled: bool = False

    def __str__(self):
        precision = "float32" if self.amp == "off" else self.amp
        mode = "compiled" if self.compiled else "eager"
        return f"{BACKBONES[self.backbone]}, {self.segments} segments, {precision}, {mode}"


# ------------------------------------------------------------------------------------ made-up input
def made_up_picture(height, width):
    """-> [3, H, W] uint8: smooth colors with noise, which a JPEG file holds as it does a photo."""
    smooth = F.interpolate(torch.rand(1, 3, 9, 12), size=(height, width), mode="bicubic")[0]
    noisy = smooth + 0.1 * torch.randn(3, height, width)
    return (255 * noisy.clamp(0, 1)).to(torch.uint8)


def made_up_segments(count, height, width):
    """-> segment map [H, W] uint8: a pixel belongs to the nearest of `count` points, 1..count."""
    points = torch.rand(count, 2) * torch.tensor([height, width])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([y, x], -1).flatten(0, 1).float()
    nearest = torch.cdist(pixels, points).argmin(1)
    return (1 + nearest).view(height, width).to(torch.uint8)


def made_up_batch(work):
    """-> data.Batch on the device."""
    torch.manual_seed(0)
    samples = []
    for i in range(work.images):
        segment_map = made_up_segments(work.segments, *work.size)
        ids = segment_map.unique().long()
        labels = torch.randint(work.num_classes, ids.shape)
        samples.append((made_up_picture(*work.size), segment_map, ids, labels, str(i)))
    return collate(samples).to(DEVICE)


def made_up_logits(work):
    """-> class_logits [L, B, Q, K+1], mask_logits [L, B, Q, h, w], leaves that want a gradient."""
    torch.manual_seed(0)
    shape = LAYERS, work.images, QUERIES
    class_logits = torch.randn(*shape, work.num_classes + 1, device=DEVICE)
    mask_logits = torch.randn(*shape, work.size[0] // 4, work.size[1] // 4, device=DEVICE)
    return class_logits.requires_grad_(), mask_logits.requires_grad_()


def their_targets(batch):
    """-> lists of their float masks [n, H, W] and labels [n], an item for each image."""
    counts = batch.owner.bincount(minlength=len(batch.images)).tolist()
    return list(batch.masks().float().split(counts)), list(batch.labels.split(counts))


# ------------------------------------------------------------------------------------------- models
def our_flags(work):
    """train.py's settings: those of the paper, which ADE20K's recipe has."""
    args = train.parse_args(["--dataset", "ade20k", "--backbone", work.backbone, "--no-pretrained",
                             "--amp", work.amp])
    args.num_classes = work.num_classes
    args.freeze_bn = work.freeze_bn
    return args


def our_model(work):
    torch.manual_seed(0)
    return build_model(vars(our_flags(work))).to(DEVICE)


def their_model(work):
    """transformers' model in training mode, with the layers, queries and drop paths of ours."""
    stages = ["stage1", "stage2", "stage3", "stage4"]
    if work.backbone == RESNET:
        backbone = transformers.ResNetConfig(out_features=stages)
    else:                                                # Swin-T; dropped paths as in ours
        backbone = transformers.SwinConfig(depths=[2, 2, 6, 2], drop_path_rate=0.3,
                                           out_features=stages)
    config = transformers.MaskFormerConfig(backbone_config=backbone, num_labels=work.num_classes,
                                           use_auxiliary_loss=True)
    torch.manual_seed(0)
    model = transformers.MaskFormerForInstanceSegmentation(config).to(DEVICE).train()
    if work.freeze_bn:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)
    return model


def normalized(images):
    """Our model does this by itself, theirs wants it done."""
    return (images.to(DEVICE).float() - MEAN) / STD


def autocast(work):
    return torch.autocast(DEVICE.type, AMP[work.amp], enabled=work.amp != "off")


# ----------------------------------------------------------------------------------- training steps
# Each function prepares a piece of work and returns a function that does it.
def our_step(work):
    return step_of(our_model(work), our_flags(work), made_up_batch(work), work.compiled)


def step_of(model, args, batch, compiled=False):
    """A step of train.py, always on the same batch."""
    optimizer = torch.optim.AdamW(train.parameter_groups(model.train(), args), fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    loss_of = train.compute_loss
    if compiled:
        model, loss_of = torch.compile(model), train.compiled_loss()
    return lambda: train.training_step(0, [batch], model, optimizer, scaler, args, loss_of)


def their_step(work):
    """A training step of transformers' model on the batch of `our_step`."""
    model = their_model(work)
    batch = made_up_batch(work)
    masks, labels = their_targets(batch)
    network = torch.compile(model.model) if work.compiled else model.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)

    def step():
        with autocast(work):
            output = network(normalized(batch.images), output_hidden_states=True)
            states = output.transformer_decoder_hidden_states[-LAYERS:]
            output.transformer_decoder_hidden_states = states
            class_logits, mask_logits, other_layers = model.get_logits(output)

        # As in ours, whatever follows the logits is float32.
        other_layers = [{name: logits.float() for name, logits in layer.items()}
                        for layer in other_layers]
        losses = model.get_loss_dict(mask_logits.float(), class_logits.float(), masks, labels,
                                     other_layers)
        model.get_loss(losses).backward()
        nn.utils.clip_grad_norm_(parameters, 0.01)
        optimizer.step()
        optimizer.zero_grad()
    return step


def shapes_step(_):
    """A step of `python train.py`, always on the first batch of its drawn shapes."""
    args = train.parse_args([])
    args.amp = "off"
    samples, _ = train.load_datasets(args)
    batch = collate([samples[i] for i in range(args.batch_size)]).to(DEVICE)
    torch.manual_seed(0)
    return step_of(build_model(vars(args)).to(DEVICE), args, batch)


SIDES = {"ours": our_step, "theirs": their_step}


# ---------------------------------------------------------------------------------- parts of a step
def our_matching(work):
    batch, logits = made_up_batch(work), made_up_logits(work)
    masks = batch.masks()
    cost = torch.compile(matching_cost, dynamic=True) if work.compiled else matching_cost
    return lambda: hungarian_match(*logits, batch.labels, masks, batch.owner, cost_function=cost)


def their_matching(work):
    class_logits, mask_logits = made_up_logits(work)
    masks, labels = their_targets(made_up_batch(work))
    matcher = their_code.MaskFormerHungarianMatcher(1., 20., 1.)

    def match():
        return [matcher(mask_logits[l], class_logits[l], masks, labels) for l in range(LAYERS)]
    return match


def our_loss(work):
    """Our loss and its gradient by the logits, for pairs that are already matched."""
    batch, logits = made_up_batch(work), made_up_logits(work)
    matches = our_matching(work)()
    masks = batch.masks()
    terms = torch.compile(mask_terms, dynamic=True) if work.compiled else mask_terms

    def loss():
        ce, focal, dice = mask_classification_loss(*logits, batch.labels, masks, matches,
                                                   terms_function=terms)
        return torch.autograd.grad(ce + 20 * focal + dice, logits)
    return loss


def their_loss(work):
    """The same of theirs, for the same logits and their own pairs."""
    class_logits, mask_logits = made_up_logits(work)
    masks, labels = their_targets(made_up_batch(work))
    matches = their_matching(work)()
    criterion = their_code.MaskFormerLoss(work.num_classes, None, {}, 0.1).to(DEVICE)
    count = sum(len(n) for n in labels)

    def loss():
        total = 0
        for l in range(LAYERS):
            terms = criterion.loss_labels(class_logits[l], labels, matches[l])
            terms |= criterion.loss_masks(mask_logits[l], masks, matches[l], count)
            total += terms["loss_cross_entropy"] + 20 * terms["loss_mask"] + terms["loss_dice"]
        return torch.autograd.grad(total, (class_logits, mask_logits))
    return loss


# ---------------------------------------------------------------------------------------- inference
def our_prediction(work):
    """evaluate.py's: masks are upsampled to the image, and each of its pixels gets a class."""
    model = our_model(work).eval().to(memory_format=torch.channels_last)
    images = made_up_batch(work).images.cpu()
    is_thing = [False] * work.num_classes

    def inference():
        return [predict(model, image, is_thing, min(work.size), max(work.size), panoptic=False,
                        amp=work.amp)[0].cpu() for image in images]
    return inference


def our_prediction_as_theirs(work):
    """Their work: class scores are made at stride 4, and these are upsampled to the image."""
    model = our_model(work).eval().to(memory_format=torch.channels_last)
    images = made_up_batch(work).images.cpu()

    @torch.no_grad()
    def inference():
        with autocast(work):
            class_logits, mask_logits = model(images.to(DEVICE))
            scores = semantic_inference(class_logits[-1], mask_logits[-1])       # [B, K, h, w]
            return [F.interpolate(image_scores[None], size=work.size, mode="bilinear").argmax(1)
                    .cpu() for image_scores in scores]
    return inference


def their_prediction(work):
    """Photo to label map, with the post-processing of their image processor."""
    model = their_model(work).eval()
    model.config.use_auxiliary_loss = False
    images = made_up_batch(work).images.cpu()
    finish = transformers.MaskFormerImageProcessor().post_process_semantic_segmentation

    @torch.no_grad()
    def inference():
        with autocast(work):
            output = model(normalized(images))
            label_maps = finish(output, target_sizes=[work.size] * work.images)
        return [label_map.cpu() for label_map in label_maps]
    return inference


# ---------------------------------------------------------------------------------------- measuring
def seconds(run):
    if GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(ours, theirs, repeats):
    """Runs two functions in turns -> the seconds of each run of ours, of theirs (none without)."""
    sides = [ours, theirs] if theirs else [ours]
    for run in sides:
        for _ in range(3 if GPU else 1):                 # allocates, and compiles
            run()

    our_times, their_times = [], []
    for _ in range(repeats):
        our_times.append(seconds(ours))
        if theirs:
            their_times.append(seconds(theirs))
    return our_times, their_times


def compare(part, what, our_side, their_side, work, repeats):
    """Times both sides -> a row of the table, in milliseconds. their_side may be None."""
    clean_up()
    theirs = their_side(work) if their_side and transformers else None
    our_times, their_times = race(our_side(work), theirs, repeats)

    ours = 1000 * statistics.median(our_times)
    if not their_times:
        return report(part, what, ours)
    ratio = statistics.median(a / b for a, b in zip(our_times, their_times))
    return report(part, what, ours, 1000 * statistics.median(their_times), ratio)


def clean_up():
    gc.collect()
    torch.compiler.reset()                               # it stops after eight models of a kind
    if GPU:
        torch.cuda.empty_cache()


def report(part, what, ours, theirs=None, ratio=None, unit="ms"):
    """Prints and returns a row of the table. ratio: by default of the two numbers."""
    cells = [f"{part:<9}", f"{what:<62}", f"{rounded(ours):>8} {unit:<8}", " " * 17, " " * 5]
    if theirs is not None:
        if ratio is None:
            ratio = ours / theirs
        cells[3] = f"{rounded(theirs):>8} {unit:<8}"
        cells[4] = f"{ratio:5.2f}"
    print("| " + " | ".join(cells) + " |", flush=True)
    return {"part": part, "what": what, "ours": ours, "theirs": theirs, "ratio": ratio,
            "unit": unit}


def rounded(number):
    """To three digits, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


# ------------------------------------------------------------------------------------------- memory
def peak_memory(side, work):
    """GiB that two steps, with the optimizer's state, take beyond the model and its inputs."""
    clean_up()
    step = SIDES[side](work)
    before = torch.cuda.memory_allocated() if GPU else resident_memory("VmRSS")
    step()
    if GPU:
        torch.cuda.reset_peak_memory_stats()             # the first step has compiled
    step()
    peak = torch.cuda.max_memory_allocated() if GPU else resident_memory("VmHWM")
    return (peak - before) / 2 ** 30


def resident_memory(name):
    """Bytes of this process: VmRSS now, VmHWM at most. (resource's peak starts at the parent's.)"""
    lines = MEMORY_FILE.read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(kilobytes)


def peak_memory_of_child(side, work):
    """`peak_memory` in a new process, because a process cannot forget its peak."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", side, json.dumps(work)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(answer.split()[-1])


# ------------------------------------------------------------------------------------- inside a GPU
def trace_of(step):
    """-> the events of a step that torch.profiler saw on the GPU and in CUDA's runtime, dicts."""
    kinds = torch.profiler.ProfilerActivity
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profile.export_chrome_trace(str(file))
        return json.loads(file.read_text())["traceEvents"]


def summary_of(trace):
    """-> {"busy": ms, "kernels": kernels and copies, "waits": times the CPU waited for the GPU}."""
    kernels = [event for event in trace
               if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    waits = [event for event in trace
             if event.get("name", "").startswith(("cudaStreamSynchronize", "cudaEventSynchronize"))]
    return {"busy": sum(event["dur"] for event in kernels) / 1000,
            "kernels": len(kernels),
            "waits": len(waits)}


def multiply_adds(work):
    """Of the model alone, forward and backward."""
    model, images = our_model(work).train(), made_up_batch(work).images
    with FlopCounterMode(display=False) as counter, autocast(work):
        class_logits, mask_logits = model(images)
        (class_logits.sum() + mask_logits.sum()).backward()
    return counter.get_total_flops() / 2


def matrix_rate(amp):
    """Multiply-adds per second of a large matrix product."""
    n = 8192
    a = torch.randn(n, n, device=DEVICE, dtype=AMP[amp])
    times, _ = race(lambda: a @ a, None, 9)
    return n ** 3 / statistics.median(times)


# ------------------------------------------------------------------------------------- data loading
def samples_per_second(count):
    """Reads, augments and collates images on one thread, as a loader worker does."""
    args = train.parse_args(["--dataset", "ade20k"])
    augment = Augmentation(args.short_side, args.max_long_side, args.crop)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        write_dataset(Path(root))
        samples = TrainingSamples(build_dataset("folder", root, "train"), augment)
        times, _ = race(lambda: [collate([samples[i]]) for i in range(count)], None, 1)
    torch.set_num_threads(threads)
    return count / times[0]


def write_dataset(root):
    """Files that --dataset folder reads: images of ADE20K's usual size, 10 classes."""
    (root / "images/train").mkdir(parents=True)
    (root / "annotations/train").mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(f"class {k}" for k in range(10)))
    for i in range(8):
        picture = to_pil_image(made_up_picture(512, 683))
        picture.save(root / f"images/train/{i}.jpg", quality=90)
        label_map = to_pil_image(made_up_segments(10, 512, 683) - 1)
        label_map.save(root / f"annotations/train/{i}.png")


# ------------------------------------------------------------------------------------ largest batch
def largest_batch(work):
    """The largest power of two that fits."""
    images = 1
    while fits(work._replace(images=images)):
        images *= 2
    return images // 2


def fits(work):
    """Whether two training steps fit into the memory of the GPU."""
    clean_up()
    try:
        step = our_step(work)
        step()
        step()                                           # the first one made the optimizer's state
    except torch.OutOfMemoryError:
        return False
    return True


# ---------------------------------------------------------------------------------------- the table
def usual_work():
    """As train.py runs on this device by default."""
    return Work(amp="bf16", compiled=True) if GPU else Work()


def works_of_steps(full):
    """-> the steps to measure; without --full the most telling ones."""
    usual = usual_work()
    if not full and GPU:
        return [usual, usual._replace(segments=40), usual._replace(backbone=SWIN_TINY),
                Work(amp="bf16"), Work(compiled=True)]
    if not full:
        return [usual]
    return [Work(backbone, segments, amp=amp, compiled=compiled)
            for backbone in (RESNET, SWIN_TINY)
            for segments in (10, 40)
            for amp in (["bf16", "off"] if GPU else ["off"])
            for compiled in (False, True)]


def measure_step(full, repeats):
    """Rows of training steps, and of matching and loss alone; on a GPU, where its time goes."""
    steps = {work: compare("step", str(work), our_step, their_step, work, repeats)
             for work in works_of_steps(full)}

    # Neither matching nor loss depends on the backbone.
    rows = list(steps.values())
    for segments in (10, 40) if full or GPU else (10,):
        work = usual_work()._replace(segments=segments)
        matching = compare("step", f"matching alone, {segments} segments", our_matching,
                           their_matching, work, repeats)
        loss = compare("step", f"loss of matched pairs alone, {segments} segments", our_loss,
                       their_loss, work, repeats)
        rows += [matching, loss]
        if work in steps:
            step = steps[work]
            ours = 100 * matching["ours"] / step["ours"]
            theirs = 100 * matching["theirs"] / step["theirs"] if transformers else None
            rows.append(report("step", f"share of matching in a step, {segments} segments", ours,
                               theirs, unit="%"))
    if GPU:
        rows += look_into(usual_work())
    return rows


def look_into(work):
    """What a GPU does in a step."""
    summaries = []
    for prepare in [our_step, their_step] if transformers else [our_step]:
        clean_up()
        step = prepare(work)
        for _ in range(3):                               # allocates, and compiles
            step()
        summaries.append(summary_of(trace_of(step)))

    busy = [summary["busy"] for summary in summaries]
    kernels = [summary["kernels"] for summary in summaries]
    waits = [summary["waits"] for summary in summaries]
    rate = multiply_adds(work) / (busy[0] / 1000)
    limit = matrix_rate(work.amp)
    return [report("step", f"{work}: busy", *busy),
            report("step", f"{work}: kernels and copies", *kernels, unit=""),
            report("step", f"{work}: waits for the GPU", *waits, unit=""),
            report("step", f"multiply-adds of a large matrix product, {work.amp}", limit / 1e12,
                   unit="T/s"),
            report("step", f"{work}: model's multiply-adds by busy time", rate / 1e12, unit="T/s"),
            report("step", f"{work}: share of the matrix product's rate", 100 * rate / limit,
                   unit="%")]


def measure_memory(full, repeats):
    """Rows of the peak memory of a step."""
    if not GPU and not MEMORY_FILE.exists():             # neither Linux
        return []
    usual = usual_work()
    rows = []
    for work in [usual, usual._replace(segments=40)] if full else [usual]:
        numbers = []
        for side in SIDES if transformers else ["ours"]:
            measure = peak_memory if GPU else peak_memory_of_child
            numbers.append(measure(side, work))
        rows.append(report("memory", str(work), *numbers, unit="GiB"))
    return rows


def measure_inference(full, repeats):
    """Rows of photo to label map."""
    work = usual_work()._replace(compiled=False, images=1)
    rows = [compare("inference", "one image; ours: masks upsampled, theirs: class scores",
                    our_prediction, their_prediction, work, repeats),
            compare("inference", "one image, equal work: class scores upsampled",
                    our_prediction_as_theirs, their_prediction, work, repeats)]
    if full or GPU:
        rows.append(compare("inference", "16 images, equal work: class scores upsampled",
                            our_prediction_as_theirs, their_prediction,
                            work._replace(images=16), repeats))
    return rows


def measure_recipes(full, repeats):
    """Rows of steps of small recipes."""
    rows = [compare("recipes", "step of `shapes`: 16 x 64x96, resnet10t, float32, eager",
                    shapes_step, None, Work(), repeats)]
    if full or GPU:
        camvid = usual_work()._replace(images=16, size=(360, 480), num_classes=11,
                                       freeze_bn=False)
        rows.append(compare("recipes", "step of CamVid: 16 x 360x480, R50, 11 classes", our_step,
                            their_step, camvid, repeats))
    return rows


def measure_data(full, repeats):
    """Rows of what one core reads and augments and, on a GPU, what a step needs."""
    rate = samples_per_second(128 if full else 32)
    rows = [report("data", "512x683 JPEG -> sample of 512x512, on one core", rate, unit="images/s")]
    if not GPU:
        return rows

    clean_up()
    work = usual_work()
    step_times, _ = race(our_step(work), None, repeats)
    need = work.images / statistics.median(step_times)
    return rows + [
        report("data", f"need of a step: {work}", need, unit="images/s"),
        report("data", "cores that keep up with the step", need / rate, unit="cores")]


def measure_largest_batch(full, repeats):
    """The paper's crops; on a CPU there is nothing to measure."""
    rows = []
    for backbone, side in [(RESNET, 512), (SWIN_TINY, 512), (SWIN_LARGE, 640)] if GPU else []:
        work = usual_work()._replace(backbone=backbone, size=(side, side))
        rows.append(report("batch", f"largest of {side}x{side}, {BACKBONES[backbone]}",
                           largest_batch(work), unit="images"))
    return rows


# -------------------------------------------------------------------------------------- the command
PARTS = {"step": measure_step,
         "memory": measure_memory,
         "inference": measure_inference,
         "recipes": measure_recipes,
         "data": measure_data,
         "largest-batch": measure_largest_batch}


def part_names(text):
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        message = f"no part is called {unknown[0]!r}; choose from {', '.join(PARTS)}"
        raise argparse.ArgumentTypeError(message)
    return names


def parse_args(argv=None):
    """The command line -> flags."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", type=part_names, default=list(PARTS)[:-1], metavar="PART,..",
        help=f"parts of the table, of {', '.join(PARTS)} (default: all but the last, which needs "
             "a GPU)")
    add("--full", action="store_true", help="all combinations, and what is slow")
    add("--repeats", type=int, default=10 if GPU else 2, metavar="N",
        help="timed runs of each side (default: %(default)s)")
    add("--output", metavar="FILE", help="also write the table to this JSON file")
    add("--child", nargs=2, help=argparse.SUPPRESS)      # measures memory in a new process
    return parser.parse_args(argv)


def main(argv=None):
    """The command: see the top of this file."""
    args = parse_args(argv)
    torch.set_float32_matmul_precision("high")           # as in train.py
    if args.child:
        side, work = args.child
        print(peak_memory(side, Work(*json.loads(work))))
        return

    threads = f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    about = {"device": torch.cuda.get_device_name() if GPU else threads,
             "torch": torch.__version__,
             "timm": timm.__version__,
             "transformers": transformers.__version__ if transformers else None,
             "date": datetime.date.today().isoformat()}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"R50 and Swin-T steps: {Work().images} images of 512x512, 150 classes, 100 queries\n")
    print(f"| {'part':<9} | {'what':<62} | {'ours':<17} | {'theirs':<17} | ratio |")
    print("|---|---|---|---|---|")

    rows = []
    for name in args.only:
        rows += PARTS[name](args.full, args.repeats)

    if hasattr(os, "getloadavg"):                        # not on Windows
        about["load"] = [round(load, 1) for load in os.getloadavg()]
        print(f"\nload of the machine in the last 1, 5 and 15 minutes: {about['load']}")
    if args.output:
        text = json.dumps({"about": about, "rows": rows}, indent=1)
        Path(args.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
