"""How it learns: one script (MaskFormer, Sec. 4.2 and appendix A).

    python train.py                                           # drawn shapes, minutes on a CPU
    torchrun --nproc-per-node 8 train.py --dataset ade20k     # the paper's recipe is the default

Letters   B images · L decoder layers · Q queries · K classes · N ground-truth segments in the batch
"""
import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import subprocess
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn

from data import (DATASETS, Augmentation, DetrAugmentation, FirstImages, TrainingSamples, build_dataset,
                  download, recipe, resized, seed_of, step_batches, training_batches)
from evaluate import (TEST_OPTIONS, build_model, draw_predictions, draw_queries, evaluate, load, process,
                      save_metrics, single_numbers, start_process, table_of_classes)
from losses import mask_classification_loss, per_pixel_loss
from matcher import fixed_match, hungarian_match

AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUMBERS = dict(                                       # flags that take a number; the paper's are the defaults
    queries=100, dim=256, decoder_layers=6, encoder_layers=0, heads=8, ffn_dim=2048, dropout=0.1, # Sec. 4.1
    class_weight=1., focal_weight=20., dice_weight=1., no_object_weight=0.1,                      # Eq. (1)
    object_threshold=0.8, overlap_threshold=0.8, size_divisibility=32,                            # Sec. 3.4
    lr=1e-4, weight_decay=1e-4, warmup=0, clip=0.01, accumulate=1, seed=0,                        # appendix A
    eval_every=5000, save_every=1000, log_every=20, workers=min(4, os.cpu_count() or 1))


def parse(argv=None):
    """The command line -> every number of a run. Defaults: the backbone's, then the dataset's recipe."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--dataset", default="shapes", choices=DATASETS)
    add("--data-root", metavar="DIR", help="default: $DATA_ROOT, else ./datasets; own data: its folder")
    add("--task", choices=["semantic", "panoptic"], help="a segment is a class region, or an object")
    add("--model", default="maskformer", choices=["maskformer", "per-pixel", "per-pixel-plus"])
    add("--backbone", default="resnet50", help="any timm model with features at strides 4 to 32")
    add("--pretrained", action=switch, default=True, help="start from timm's ImageNet weights")
    add("--freeze-bn", action=switch, help="of the backbone (default: if pretrained)")
    add("--init", metavar="WEIGHTS", help="start from a checkpoint, or a name or file of the authors'")
    add("--matching", default="hungarian", choices=["hungarian", "fixed"])
    add("--crop", type=int, nargs=2, metavar=("H", "W"))
    add("--short-side", type=int, nargs="+", metavar="N", help="one of these, at random")
    add("--augmentation", default="crop", choices=["crop", "detr"], help="of semantic data, or of COCO's")
    add("--color-distortion", action=switch, default=True)
    add("--backbone-lr-factor", type=float, help="default: 0.1 if pretrained (Swin: 1), else 1")
    add("--schedule", default="poly", choices=["poly", "step"])
    add("--milestones", type=int, nargs="*", default=[], help="where the step schedule divides by 10")
    add("--amp", default="auto", choices=["auto", *AMP], help="auto: bf16 on GPUs that have it")
    add("--compile", action="store_true")
    add("--output", metavar="DIR", help="default: the next free runs/DATASET-001")
    add("--resume", action="store_true", help="continue from DIR/last.pt if it is there")
    add("--overfit", type=int, metavar="N", help="first aid: learn and test N images as they are")
    for name in ("batch_size", "steps", "max_long_side", "test_short_side", "test_max_long_side"):
        add("--" + name.replace("_", "-"), type=int, metavar="N", help="default: as the recipe says")
    for name, default in NUMBERS.items():
        add("--" + name.replace("_", "-"), type=type(default), metavar="N", help=f"{default} or the recipe's")
    chosen, _ = parser.parse_known_args(argv)                            # for the defaults of all others
    parser.set_defaults(**NUMBERS | recipe(chosen.dataset, chosen.backbone))
    args = parser.parse_args(argv)
    args.freeze_bn = args.pretrained if args.freeze_bn is None else args.freeze_bn
    if args.backbone_lr_factor is None:
        args.backbone_lr_factor = 0.1 if args.pretrained else 1.
    if args.amp == "auto":
        args.amp = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "off"
    return args


# ---------------------------------------------------------------------------------------- optimisation
def parameter_groups(model, args):
    """Appendix A: the backbone's own rate; no decay on norms, embeddings and relative-position tables."""
    undecayed = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding)
    groups = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                decays = not isinstance(module, undecayed) and "relative_position" not in name
                groups.setdefault((prefix.startswith("backbone"), decays), []).append(parameter)
    return [{"params": params, "rate": args.lr * (args.backbone_lr_factor if in_backbone else 1.),
             "weight_decay": args.weight_decay * decays} for (in_backbone, decays), params in groups.items()]


def lr_factor(step, args):
    """What the rates are multiplied with at this step."""
    factor = (1 - step / args.steps) ** 0.9
    if args.schedule == "step":
        factor = 0.1 ** sum(step >= milestone for milestone in args.milestones)
    if step < args.warmup:
        factor *= 1e-6 + (1 - 1e-6) * step / args.warmup
    return factor


def compute_loss(output, batch, count, args):
    """-> {"loss": what is minimised (Eq. 1), "loss_ce", "loss_mask", "loss_dice": its raw terms,
    "matched_dice": mean overlap of segments and their masks}. output: the model's; count: `target_count`."""
    if args.model != "maskformer":
        ce = per_pixel_loss(output, batch.label_map(void=-1), void=-1, num_pixels=count)
        return {"loss": ce, "loss_ce": ce}
    class_logits, mask_logits = output                                   # [L, B, Q, K+1], [L, B, Q, h, w]
    masks = batch.masks()                                                # [N, H, W]
    match = {"hungarian": hungarian_match, "fixed": fixed_match}[args.matching]
    matches = match(class_logits, mask_logits, batch.labels, masks, batch.owner,
                    args.class_weight, args.focal_weight, args.dice_weight)
    ce, focal, dice = mask_classification_loss(class_logits, mask_logits, batch.labels, masks, matches, count,
                                               args.no_object_weight)
    loss = args.class_weight * ce + args.focal_weight * focal + args.dice_weight * dice
    return {"loss": loss, "loss_ce": ce, "loss_mask": focal, "loss_dice": dice,
            "matched_dice": 1 - dice / len(class_logits)}


def target_count(batches, args):
    """Segments (baselines: labelled pixels) of a forward pass, averaged over passes and processes."""
    if args.model == "maskformer":                                       # torch.full: no wait for a GPU
        count = torch.full((), sum(len(batch.labels) for batch in batches), device=batches[0].labels.device)
    else:
        count = sum((batch.label_map(void=-1) >= 0).sum() for batch in batches)
    return average_over_processes(count / len(batches))


def average_over_processes(value):
    if process()[1] > 1:
        dist.all_reduce(value)
    return value / process()[1]


def training_step(step, batches, model, optimizer, scaler, args):
    """Sec. 4.2: one step on `--accumulate` batches -> the scalars of `compute_loss` and grad_norm."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * lr_factor(step, args)
    torch.manual_seed(seed_of(args.seed, step, process()[0]))            # dropout, too, is known by the step
    count, sums, device = target_count(batches, args), {}, batches[0].images.device
    for batch in batches:
        wait = process()[1] > 1 and batch is not batches[-1]             # DDP adds up in the last pass
        with model.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                output = model(batch.images)
            terms = compute_loss(output, batch, count, args)
            if device.type == "cpu" and not terms["loss"].isfinite():    # a GPU would have to be waited for
                raise FloatingPointError("the loss is not finite")
            scaler.scale(terms["loss"] / len(batches)).backward()
        sums = {name: sums.get(name, 0) + term.detach() / len(batches) for name, term in terms.items()}
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or float("inf"))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return sums | {"grad_norm": norm}


# ---------------------------------------------------------------------------------------- run folder
def run_folder(args):
    """Makes the folder -> its path, the same on every process. Refuses a used one unless --resume."""
    choice = [args.output]
    if process()[0] == 0 and choice[0] is None:
        numbers = (f"runs/{args.dataset}-{number:03d}" for number in range(1, 1000))
        choice[0] = next(path for path in numbers if not Path(path).exists())
    if process()[0] == 0 and args.output and not args.resume and Path(args.output, "config.json").exists():
        raise SystemExit(f"{args.output} holds a run: choose another --output, or --resume to continue it")
    if process()[1] > 1:
        dist.broadcast_object_list(choice)
    Path(choice[0]).mkdir(parents=True, exist_ok=True)
    return Path(choice[0])


def write_config(folder, args):
    """config.json: every flag, the versions and the git revision."""
    git, command = None, ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with contextlib.suppress(OSError):                                   # no git here
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm", "scipy")}
    content = vars(args) | {"versions": versions, "git": git and git.strip(), "processes": process()[1]}
    (folder / "config.json").write_text(json.dumps(content, indent=1) + "\n")


def save_checkpoint(path, parts, step, best, args, dataset):
    """All that a resumed run needs; written by process 0 under another name, then renamed: always whole."""
    if process()[0] > 0:
        return
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= dict(step=step, best=best, seed=args.seed, config=vars(args), classes=dataset.classes,
                  is_thing=dataset.is_thing)
    unfinished = path.with_suffix(".part")
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def start_from(model, source):
    """--init: the weights of `source` but for a class head of another size -> names of what was skipped."""
    state, own = load(source)[0].state_dict(), model.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    skipped = sorted((own.keys() | state.keys()) - fitting.keys())
    wrong = [name for name in skipped if not name.startswith("to_class.") and "num_batches" not in name]
    if wrong:
        raise SystemExit(f"--init {source}: another model than the flags describe: {', '.join(wrong[:4])} ..")
    model.load_state_dict(fitting, strict=False)
    return [name for name in skipped if "num_batches" not in name]


def write_log(folder, args, step, terms, seconds, data_seconds):
    """Means over the last steps, to log.jsonl and console; FloatingPointError if one is not finite."""
    names, n, memory = list(terms[0]), len(terms), torch.cuda.max_memory_allocated()
    means = torch.stack([torch.stack([term[name] for name in names]) for term in terms]).mean(0)
    means = average_over_processes(means).tolist()
    if not all(map(math.isfinite, means[:-1] if args.amp == "fp16" else means)):     # fp16 may skip a step
        raise FloatingPointError("the loss or its gradient is not finite")
    if process()[0] > 0:
        return
    row = {"step": step} | {name: round(mean, 5) for name, mean in zip(names, means)} | {
        "lr": args.lr * lr_factor(step - 1, args), "images_per_s": round(n * args.batch_size / seconds, 2),
        "data_time": round(data_seconds / n, 4), "memory_gb": round(memory / 2 ** 30, 2)}
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    eta = datetime.timedelta(seconds=round(seconds / n * (args.steps - step)))
    numbers = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "step")
    print(f"step {step}/{args.steps}  eta {eta}  {numbers}", flush=True)


# ---------------------------------------------------------------------------------------- training
def load_datasets(args):
    """-> training samples, held-out images; completes `args` by the number of classes and the task."""
    train_set, test_set = (build_dataset(args.dataset, args.data_root, split) for split in ("train", "val"))
    augment = DetrAugmentation(args.short_side, args.max_long_side)
    if args.augmentation == "crop":
        augment = Augmentation(args.short_side, args.max_long_side, args.crop, args.color_distortion)
    if args.overfit:
        train_set = test_set = FirstImages(train_set, args.overfit)
        augment = partial(resized, short_side=args.test_short_side, max_long_side=args.test_max_long_side)
    args.num_classes = len(test_set.classes)
    args.task = args.task or ("panoptic" if test_set.panoptic else "semantic")
    return TrainingSamples(train_set, augment, args.seed, args.task), test_set


def hold_out(model, test_set, folder, step, args):
    """Evaluates -> metrics; writes metrics.json and a line of log.jsonl, draws the two pictures."""
    options = {name: getattr(args, name) for name in TEST_OPTIONS}
    for buffer in model.buffers() if process()[1] > 1 else []:           # statistics of batch norms
        dist.broadcast(buffer, 0)
    metrics = evaluate(model.eval(), test_set, workers=args.workers, task=args.task, **options)
    if process()[0] == 0:
        draw_predictions(model, test_set, folder / "predictions.png", **options)
        if args.model == "maskformer":
            draw_queries(model, test_set, folder / "queries.png", **options)
        save_metrics(folder / "metrics.json", metrics, test_set.classes, step=step)
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | single_numbers(metrics)) + "\n")
        print(f"step {step}/{args.steps}  held-out  {single_numbers(metrics)}", flush=True)
    model.train()
    return metrics


def prepare(args, folder, device, world_size):
    """-> {"model", "optimizer", "scaler"}, first step, best score so far: of a new run or of last.pt."""
    resumes = args.resume and (folder / "last.pt").exists()
    last = torch.load(folder / "last.pt", "cpu", weights_only=True) if resumes else None
    torch.manual_seed(args.seed)
    model = build_model(vars(args), args.num_classes, args.pretrained and not args.init and not last)
    if args.init and not last:
        skipped = start_from(model, args.init)
        print(f"starts from {args.init}; skipped: {', '.join(skipped) or 'nothing'}")
    if device.type == "cuda" and world_size > 1:
        model = convert_sync_batchnorm(model)
    model.to(device).train()
    parts = {"model": model, "optimizer": torch.optim.AdamW(parameter_groups(model, args), fused=True),
             "scaler": torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")}
    for name, part in parts.items():
        if last and last[name]:
            part.load_state_dict(last[name])
    for group, new in zip(parts["optimizer"].param_groups, parameter_groups(model, args)):
        group |= {"rate": new["rate"], "weight_decay": new["weight_decay"]}  # the flags', also if resumed
    first = last["step"] if last else 0
    if average_over_processes(torch.tensor(float(first), device=device)) != first:
        raise SystemExit(f"not all processes see {folder}/last.pt: they would resume from different steps")
    return parts, first, last["best"] if last else -1.


def train(args, device):
    """A whole run -> held-out images, metrics, folder."""
    rank, world_size = process()
    samples, test_set = load_datasets(args)
    folder = run_folder(args)
    parts, first, best = prepare(args, folder, device, world_size)
    model, optimizer, scaler = parts.values()
    if rank == 0:
        write_config(folder, args)
        print(f"{args.model}, {args.backbone}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M, "
              f"{args.dataset}, {len(samples.dataset)} images, {world_size} x {device}, {folder}", flush=True)
    parallel = torch.compile(model) if args.compile else model
    if world_size > 1:
        parallel = nn.parallel.DistributedDataParallel(parallel, [device] if device.type == "cuda" else None)
    sampler = step_batches(first, args.steps, args.batch_size, rank, world_size, args.accumulate)
    stream = training_batches(samples, sampler, args.workers, device)
    metrics, terms, clock, data_seconds = None, [], time.time(), 0.
    for step in range(first, args.steps):
        done, end = step + 1, step + 1 == args.steps
        tick = time.time()
        batches = [next(stream).to(device) for _ in range(args.accumulate)]
        data_seconds += time.time() - tick
        try:
            terms.append(training_step(step, batches, parallel, optimizer, scaler, args))
            if end or 0 in (done % args.log_every, done % args.save_every, done % args.eval_every):
                write_log(folder, args, done, terms, time.time() - clock, data_seconds)
                terms, clock, data_seconds = [], time.time(), 0.
        except FloatingPointError as error:
            names = ", ".join(name for batch in batches for name in batch.names)
            raise SystemExit(f"{error}: step {done}, learning rate {args.lr * lr_factor(step, args):.3g}, "
                             f"images {names}. Checkpoints are untouched. Try a lower --lr or --amp off")
        if done % args.eval_every == 0 or end:
            metrics, clock = hold_out(model, test_set, folder, done, args), time.time()
            if (score := metrics.get("PQ", metrics["mIoU"])) > best:
                best = score
                save_checkpoint(folder / "best.pt", parts, done, best, args, test_set)
        if done % args.save_every == 0 or end:
            save_checkpoint(folder / "last.pt", parts, done, best, args, test_set)
    return test_set, metrics or hold_out(model, test_set, folder, args.steps, args), folder


def main(argv=None):
    """The command: see the top of this file."""
    args, device = parse(argv), start_process()
    if args.batch_size % (process()[1] * args.accumulate):
        raise SystemExit(f"--batch-size {args.batch_size} is not divisible by {process()[1]} processes x "
                         f"--accumulate {args.accumulate}")
    if args.resume and not args.output:
        raise SystemExit("--resume needs the --output to continue")
    started = time.time()
    test_set, metrics, folder = train(args, device)
    if process()[0] == 0:
        print(table_of_classes(metrics, test_set.classes))
        print(f"{datetime.timedelta(seconds=round(time.time() - started))} in all; everything is in {folder}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
