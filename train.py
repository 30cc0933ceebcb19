"""How it learns: one script (MaskFormer, Sec. 4.2 and appendix A).

    python train.py                                           # drawn shapes, minutes on a CPU
    torchrun --nproc-per-node 8 train.py --dataset ade20k     # the paper's recipe is the default

Letters   B images · L decoder layers · Q queries · K classes · N ground-truth segments in the batch
"""
import argparse
import contextlib
import datetime
import math
import os
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn

import losses
from batches import Augmentation, DetrAugmentation, TrainingSamples, seed_of, step_batches, training_batches
from data import DATASETS, UserError, build_dataset, recipe, resized
from evaluate import (TEST_OPTIONS, build_model, draw_predictions, draw_queries, evaluate, load, save_metrics,
                      single_numbers, table_of_classes)
from matcher import fixed_match, hungarian_match
from run import (STOPPED, Flags, command, download, earlier_flags, hear_signals, log_row, rank,
                 read_checkpoint, start_folder, start_process, sum_over_processes, world_size, write_whole)

AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUMBERS = dict(                                       # flags that take a number; the paper's are the defaults
    queries=100, dim=256, decoder_layers=6, encoder_layers=0, heads=8, ffn_dim=2048, dropout=0.1, # Sec. 4.1
    class_weight=1., focal_weight=20., dice_weight=1., no_object_weight=0.1,                      # Eq. (1)
    object_threshold=0.8, overlap_threshold=0.8, size_divisibility=32,                            # Sec. 3.4
    lr=1e-4, weight_decay=1e-4, warmup=0, clip=0.01, accumulate=1, seed=0,                        # appendix A
    eval_every=5000, save_every=1000, log_every=20, workers=min(4, os.cpu_count() or 1))


def parse(argv=None):
    """The command line -> all settings of a run. Defaults: the recipe of the dataset and the backbone."""
    parser = Flags(__doc__)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--dataset", default="shapes", choices=DATASETS)
    add("--data-root", metavar="DIR", help="default: $DATA_ROOT, else ./datasets; own data: its folder")
    add("--download", action=switch, default=False, help="first fetch what is missing of the dataset")
    add("--num-classes", type=int, metavar="N", help="of drawn shapes (default: 6); other datasets set it")
    add("--task", choices=["semantic", "panoptic"], help="a segment is a class region, or an object")
    add("--model", default="maskformer", choices=["maskformer", "per-pixel", "per-pixel-plus"])
    add("--backbone", default="resnet50", help="any timm model with features at strides 4 to 32")
    add("--pretrained", action=switch, default=True, help="start from timm's ImageNet weights")
    add("--freeze-bn", action=switch, help="of the backbone (default: if pretrained)")
    add("--init", metavar="WEIGHTS", help="start from a checkpoint, or a name or file of the authors'")
    add("--matching", default="hungarian", choices=["hungarian", "fixed"])
    add("--crop", type=int, nargs=2, metavar=("H", "W"))
    add("--short-side", type=int, nargs="+", metavar="N", help="one of these, at random")
    add("--augmentation", default="crop", choices=["crop", "detr"], help="random crop, or DETR's for COCO")
    add("--color-distortion", action=switch, default=True)
    add("--backbone-lr-factor", type=float, help="default: 0.1 if pretrained (Swin: 1), else 1")
    add("--schedule", default="poly", choices=["poly", "step"])
    add("--milestones", type=int, nargs="*", default=[], help="of --schedule step: where it divides by 10")
    add("--amp", default="auto", choices=["auto", *AMP], help="auto: bf16 on GPUs that have it")
    add("--compile", action=switch, default=False)
    add("--output", metavar="DIR", help="default: the next free runs/DATASET-001")
    add("--resume", action="store_true", help="continue DIR/last.pt with its flags; those given override")
    add("--overfit", type=int, metavar="N", help="debugging: train and test on N unaugmented images")
    for name in ("batch_size", "steps", "max_long_side", "test_short_side", "test_max_long_side"):
        add("--" + name.replace("_", "-"), type=int, metavar="N", help="default: as the recipe says")
    for name, default in NUMBERS.items():
        add("--" + name.replace("_", "-"), type=type(default), metavar="N", help=f"{default} or the recipe's")
    chosen, _ = parser.parse_known_args(argv)                            # for the defaults of all others
    earlier = earlier_flags(chosen)
    defaults = recipe(earlier.get("dataset", chosen.dataset), earlier.get("backbone", chosen.backbone))
    parser.set_defaults(**NUMBERS | defaults | earlier)
    args = parser.parse_args(argv)
    args.freeze_bn = args.pretrained if args.freeze_bn is None else args.freeze_bn
    if args.backbone_lr_factor is None:
        args.backbone_lr_factor = 0.1 if args.pretrained else 1.
    if args.amp == "auto":
        args.amp = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else "off"
    return args


def check(args):
    """UserError for flags that contradict one another; nothing has been written yet."""
    used = args.output and Path(args.output, "config.json").exists()
    mistakes = [
        (args.resume and not args.output, "--resume needs the --output to continue"),
        (used and not args.resume, f"{args.output} holds a run: choose another --output, or add --resume"),
        (args.data_root and args.dataset == "shapes" and not used, "--data-root is not for --dataset shapes"),
        (args.batch_size % (world_size() * args.accumulate), f"--batch-size {args.batch_size} is not "
         f"divisible by {world_size()} processes x --accumulate {args.accumulate}"),
        (args.dim % 32 or args.dim % args.heads,
         f"--dim {args.dim} is not divisible by 32 and by --heads {args.heads}"),
        (args.matching == "fixed" and args.model != "maskformer", "--matching is for --model maskformer"),
        (args.num_classes and args.dataset != "shapes" and not used, "--num-classes is for --dataset shapes"),
        (args.augmentation == "crop" and not args.crop, "--augmentation crop needs a --crop H W")]
    for made, message in mistakes:
        if made:
            raise UserError(message)


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
        ce = losses.per_pixel_loss(output, batch.label_map(void=-1), void=-1, num_pixels=count)
        return {"loss": ce, "loss_ce": ce}
    class_logits, mask_logits = output                                   # [L, B, Q, K+1], [L, B, Q, h, w]
    masks = batch.masks()                                                # [N, H, W]
    match = {"hungarian": hungarian_match, "fixed": fixed_match}[args.matching]
    matches = match(class_logits, mask_logits, batch.labels, masks, batch.owner,
                    args.class_weight, args.focal_weight, args.dice_weight)
    ce, focal, dice = losses.mask_classification_loss(class_logits, mask_logits, batch.labels, masks, matches,
                                                      count, args.no_object_weight)
    return {"loss": args.class_weight * ce + args.focal_weight * focal + args.dice_weight * dice,
            "loss_ce": ce, "loss_mask": focal, "loss_dice": dice, "matched_dice": 1 - dice / len(mask_logits)}


def target_count(batches, args):
    """Segments (baselines: labelled pixels) of a forward pass, averaged over passes and processes."""
    if args.model == "maskformer":                                       # torch.full: no wait for a GPU
        count = torch.full((), sum(len(batch.labels) for batch in batches), device=batches[0].labels.device)
    else:
        count = sum((batch.label_map(void=-1) >= 0).sum() for batch in batches)
    return sum_over_processes(count / len(batches)) / world_size()


def training_step(step, batches, model, optimizer, scaler, args):
    """Sec. 4.2: one step on `--accumulate` batches -> the scalars of `compute_loss` and grad_norm."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * lr_factor(step, args)
    torch.manual_seed(seed_of(args.seed, step, rank()))                  # dropout, too, repeats when resumed
    count, sums, device = target_count(batches, args), {}, batches[0].images.device
    for batch in batches:
        wait = world_size() > 1 and batch is not batches[-1]             # DDP reduces in the last pass only
        with model.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                output = model(batch.images)
            terms = compute_loss(output, batch, count, args)
            if device.type == "cpu" and not terms["loss"].isfinite():    # on a GPU this would force a sync
                raise FloatingPointError("the loss is not finite")
            scaler.scale(terms["loss"] / len(batches)).backward()
        sums = {name: sums.get(name, 0) + term.detach() / len(batches) for name, term in terms.items()}
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or float("inf"))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return sums | {"grad_norm": norm}


# ---------------------------------------------------------------------------------------- start and log
def start_from(model, source):
    """--init: the weights of `source` but a class head (baseline+: queries) of another size -> skipped."""
    state, own = load(source)[0].state_dict(), model.state_dict()
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    skipped = [name for name in sorted(own | state) if name not in fitting and "num_batches" not in name]
    head = ("to_class.",) if hasattr(model, "to_class") else ("to_class.", "query_pos.")     # of baseline+
    wrong = [name for name in skipped if not name.startswith(head)]
    if wrong:
        raise UserError(f"--init {source}: another model than the flags describe: {', '.join(wrong[:4])} ..")
    model.load_state_dict(fitting, strict=False)
    return skipped


def write_log(folder, args, step, terms, seconds, data_seconds):
    """Means over the last steps, to log.jsonl and console; FloatingPointError if one is not finite."""
    names, n, memory = list(terms[0]), len(terms), torch.cuda.max_memory_allocated()
    means = torch.stack([torch.stack([term[name] for name in names]) for term in terms]).mean(0)
    means = (sum_over_processes(means) / world_size()).tolist()
    if not all(map(math.isfinite, means[:-1] if args.amp == "fp16" else means)):     # fp16 may skip a step
        raise FloatingPointError("the loss or its gradient is not finite")
    if rank() > 0:
        return
    row = {"step": step} | {name: round(x, 5) for name, x in zip(names, means) if math.isfinite(x)} | {
        "lr": args.lr * lr_factor(step - 1, args), "images_per_s": round(n * args.batch_size / seconds, 2),
        "data_time": round(data_seconds / n, 4), "memory_gb": round(memory / 2 ** 30, 2)}
    log_row(folder, row)
    eta = datetime.timedelta(seconds=round(seconds / n * (args.steps - step)))
    numbers = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "step")
    print(f"step {step}/{args.steps}  eta {eta}  {numbers}", flush=True)


# ---------------------------------------------------------------------------------------- training
def load_datasets(args):
    """-> training samples, held-out images; sets `args.num_classes` and `args.task`."""
    if args.download:                                                    # process 0 does, the others wait
        patient = world_size() > 1 and dist.new_group(timeout=datetime.timedelta(days=1), backend="gloo")
        if rank() == 0:
            download(args.dataset, args.data_root)
        if patient:
            dist.barrier(patient)
    options = {"num_classes": args.num_classes} if args.num_classes and args.dataset == "shapes" else {}
    train_set, test_set = (build_dataset(args.dataset, args.data_root, split, **options)
                           for split in ("train", "val"))
    crop = (args.crop, args.color_distortion) if args.augmentation == "crop" else ()
    augment = (Augmentation if crop else DetrAugmentation)(args.short_side, args.max_long_side, *crop)
    if args.overfit:
        del train_set.pairs[args.overfit:]
        test_set = train_set
        augment = partial(resized, short_side=args.test_short_side, max_long_side=args.test_max_long_side)
    args.num_classes = len(test_set.classes)
    args.task = args.task or ("panoptic" if test_set.panoptic else "semantic")
    if args.matching == "fixed" and (args.task, args.queries) != ("semantic", args.num_classes):
        raise UserError(f"--matching fixed needs --task semantic and --queries {args.num_classes}")
    return TrainingSamples(train_set, augment, args.seed, args.task), test_set


def save_checkpoint(path, parts, step, best, args, dataset):
    """All that a resumed run needs; process 0 writes it."""
    if rank() == 0:
        state = {name: part.state_dict() for name, part in parts.items()}
        write_whole(path, state | dict(step=step, best=best, seed=args.seed, config=vars(args),
                                       classes=dataset.classes, is_thing=dataset.is_thing))


def test(model, test_set, folder, step, args):
    """Evaluates -> metrics; writes metrics.json and a line of log.jsonl, draws the two pictures."""
    options = {name: getattr(args, name) for name in TEST_OPTIONS}
    for buffer in model.buffers() if world_size() > 1 else []:           # statistics of batch norms
        dist.broadcast(buffer, 0)
    metrics = evaluate(model.eval(), test_set, workers=args.workers, task=args.task, **options)
    if rank() == 0:
        draw_predictions(model, test_set, folder / "predictions.png", **options)
        if args.model == "maskformer":
            draw_queries(model, test_set, folder / "queries.png", **options)
        save_metrics(folder / "metrics.json", metrics, test_set.classes, step=step)
        log_row(folder, {"step": step} | single_numbers(metrics))
        print(f"step {step}/{args.steps}  held-out  {single_numbers(metrics)}", flush=True)
    model.train()
    return metrics


def prepare(args, device, classes):
    """-> {"model", "optimizer", "scaler"}, first step, best score so far: of a new run or of last.pt."""
    path = Path(args.output or "", "last.pt")
    last = read_checkpoint(path) if args.resume and path.exists() else None
    torch.manual_seed(args.seed)
    model = build_model(vars(args), args.num_classes, args.pretrained and not args.init and not last)
    if args.init and not last:
        skipped = start_from(model, args.init)
        if rank() == 0:
            print(f"starts from {args.init}; skipped: {', '.join(skipped) or 'nothing'}")
    if device.type == "cuda" and world_size() > 1:
        model = convert_sync_batchnorm(model)
    model.to(device).train()
    parts = {"model": model, "optimizer": torch.optim.AdamW(parameter_groups(model, args), fused=True),
             "scaler": torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")}
    first, best = (last["step"], last["best"]) if last else (0, -1.)
    try:
        if first > args.steps or last and last["classes"] != classes:
            raise ValueError(f"it is of step {first}, with {len(last['classes'])} classes")
        for name, part in parts.items():
            if last and last[name]:
                part.load_state_dict(last[name])
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is of another run than the flags describe: {' '.join(str(error).split())}")
    for group, new in zip(parts["optimizer"].param_groups, parameter_groups(model, args)):
        group |= {"rate": new["rate"], "weight_decay": new["weight_decay"]}  # from the flags, even if resumed
    if sum_over_processes(torch.tensor(first)) != first * world_size():
        raise UserError(f"not all processes see {path}: they would resume from different steps")
    return parts, first, best


def train(args, device):
    """A whole run -> held-out images, metrics (None if a signal stopped it), folder."""
    samples, test_set = load_datasets(args)
    parts, first, best = prepare(args, device, test_set.classes)
    model, optimizer, scaler = parts.values()
    folder = start_folder(args, first)
    if rank() == 0:
        print(f"{args.model}, {args.backbone}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M, "
              f"{args.dataset}, {len(samples.dataset)} images, {world_size()}x{device}, {folder}", flush=True)
    parallel = torch.compile(model) if args.compile else model
    if args.compile:                                                     # uncompiled 30 % of a step (H100)
        losses.focal_loss, losses.dice_loss = map(torch.compile, (losses.focal_loss, losses.dice_loss))
    if world_size() > 1:
        parallel = nn.parallel.DistributedDataParallel(parallel, [device] if device.type == "cuda" else None)
    asked_to_stop = hear_signals()
    sampler = step_batches(first, args.steps, args.batch_size, rank(), world_size(), args.accumulate)
    stream = training_batches(samples, sampler, args.workers, device)
    terms, clock, data_seconds = [], time.time(), 0.
    for step in range(first, args.steps + 1):
        if step == args.steps or step > 0 and step % args.eval_every == 0:       # also right after a resume
            metrics, clock = test(model, test_set, folder, step, args), time.time()
            if (score := metrics.get("PQ", metrics["mIoU"])) > best:
                best = score
                for name in ("best.pt", "last.pt"):                      # last.pt, too, knows this best
                    save_checkpoint(folder / name, parts, step, best, args, test_set)
        if step == args.steps:
            return test_set, metrics, folder
        done, tick = step + 1, time.time()
        batches = [next(stream).to(device) for _ in range(args.accumulate)]
        data_seconds += time.time() - tick
        try:
            terms.append(training_step(step, batches, parallel, optimizer, scaler, args))
            stops = asked_to_stop()
            saves = stops or done == args.steps or 0 in (done % args.save_every, done % args.eval_every)
            if saves or done == 1 or done % args.log_every == 0:
                write_log(folder, args, done, terms, time.time() - clock, data_seconds)
                terms, clock, data_seconds = [], time.time(), 0.
        except FloatingPointError as error:
            names = ", ".join(name for batch in batches for name in batch.names)
            raise UserError(f"{error}: step {done}, learning rate {args.lr * lr_factor(step, args):.3g}, "
                            f"images {names}. Checkpoints are untouched. Try a lower --lr or --amp off")
        if saves:
            save_checkpoint(folder / "last.pt", parts, done, best, args, test_set)
        if stops:
            asked_to_stop()                                              # all wait here until it is saved
            return test_set, None, folder


def main(argv=None):
    """The command: see the top of this file. -> its exit code."""
    args, device, started = parse(argv), start_process(), time.time()
    check(args)
    test_set, metrics, folder = train(args, device)
    if rank() == 0:
        print(table_of_classes(metrics, test_set.classes) if metrics else "stopped by a signal, and saved")
        print(f"{datetime.timedelta(seconds=round(time.time() - started))} in all; everything is in {folder}")
    return 0 if metrics else STOPPED


if __name__ == "__main__":
    command(main)
