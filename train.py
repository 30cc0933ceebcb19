"""How it learns: recipes, flags, step, loop, checkpoints (MaskFormer, Sec. 4.2, appendix A).

    python train.py                                              # drawn shapes, minutes on a CPU
    torchrun --nproc-per-node 8 train.py --dataset ade20k        # the paper's recipe is the default

Letters   B images · L decoder layers · Q queries · K classes · N ground-truth segments in the batch
          H W image size · h w = H/4 W/4, rounded up
"""
import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from data import (DATASETS, Augmentation, DetrAugmentation, TrainingSamples, UserError,
                  build_dataset, listing, renamed, resized, seed_of, step_batches,
                  training_batches, warn)
from evaluate import (AMP, TEST_OPTIONS, ArgumentParser, backend_for, draw_predictions,
                      draw_queries, evaluate, fraction, load, load_checkpoint, pick_amp,
                      non_negative, pick_device, positive_int, rank, rendezvous, run_command,
                      save_metrics, single_numbers, sum_over_processes, table_of_classes,
                      whole_number, world_size)
from losses import mask_classification_loss, mask_terms, per_pixel_loss
from maskformer import build_model
from matcher import fixed_match, hungarian_match, matching_cost

STOPPED = 75                                     # exit code of a run that a signal has stopped


# ------------------------------------------------------------------------------------------ recipes
def table_row(crop, side, tenths, test_max_long_side, batch_size, steps, **more):
    """A row of appendix A's table: the settings that it gives. Sizes are in pixels.

    In training the short side becomes one of int(0.1 k side) for k in `tenths`, the long side at
    most 4 * side, and `crop` (H, W) is cut out. In a test the short side becomes `side`, the long
    side at most `test_max_long_side`.
    """
    return {"crop": crop,
            "short_side": [int(0.1 * k * side) for k in tenths],
            "max_long_side": 4 * side,
            "test_short_side": side,
            "test_max_long_side": test_max_long_side,
            "batch_size": batch_size,
            "steps": steps} | more


HALF_TO_1_5 = range(5, 16)
HALF_TO_2 = range(5, 21)
RECIPES = {
    # The paper's:             crop          side  tenths       test   batch  steps
    "ade20k":         table_row((512, 512),   512,  HALF_TO_2,   2048,  16,    160_000),
    "ade20k-full":    table_row((512, 512),   512,  HALF_TO_2,   2048,  16,    200_000),
    "coco-stuff-10k": table_row((640, 640),   640,  HALF_TO_1_5, 2560,  32,     60_000,
                                size_divisibility=0),
    "cityscapes":     table_row((512, 1024),  1024, HALF_TO_2,   2048,  16,     90_000),
    "mapillary":      table_row((1280, 1280), 2048, HALF_TO_2,   2048,  16,    300_000),
    "ade20k-panoptic": table_row((640, 640),  640,  HALF_TO_2,   2560,  16,    720_000,
                                 encoder_layers=6, object_threshold=0.7),
    "coco-panoptic": {"augmentation": "detr", "crop": None,
                      "short_side": list(range(480, 801, 32)), "max_long_side": 1333,
                      "test_short_side": 800, "test_max_long_side": 1333,
                      "batch_size": 64, "steps": 554_400,
                      "schedule": "step", "milestones": [369_600],
                      "encoder_layers": 6, "size_divisibility": 0},

    # Modeled on the closest of these:
    "cityscapes-panoptic": table_row((512, 1024), 1024, HALF_TO_2, 2048, 16, 90_000,
                                     encoder_layers=6),
    "voc":            table_row((512, 512),   512,  HALF_TO_2,   2048,  16,     40_000),
    "folder":         table_row((512, 512),   512,  HALF_TO_2,   2048,  16,     40_000),
    "panoptic":       table_row((640, 640),   640,  HALF_TO_2,   2560,  16,     40_000,
                                object_threshold=0.7),

    # Small enough for a CPU, and from scratch:
    "shapes": {"crop": (64, 96), "short_side": [56, 64, 72], "max_long_side": 256,
               "test_short_side": 64, "test_max_long_side": 96, "color_distortion": False,
               "batch_size": 16, "steps": 500, "lr": 2e-3, "clip": 0.1, "warmup": 20,
               "backbone": "resnet10t", "pretrained": False, "queries": 20, "decoder_layers": 3,
               "dim": 64, "heads": 4, "ffn_dim": 256, "dropout": 0.},
}
SWIN = {"lr": 6e-5, "weight_decay": 1e-2, "backbone_lr_factor": 1., "warmup": 1500,
        "encoder_layers": 0}


def recipe(dataset, backbone="resnet50"):
    """The settings of a run on a dataset with a backbone: {flag: value}."""
    settings = dict(RECIPES[dataset])
    if backbone.startswith("swin_") and dataset != "shapes":
        settings |= SWIN
        if dataset == "ade20k" and "384" in backbone:            # Swin-B and Swin-L
            settings |= table_row((640, 640), 640, HALF_TO_2, 2560, 16, 160_000)
    return settings


# -------------------------------------------------------------------------------------------- flags
def parse_args(argv=None):
    """The command line -> all settings of a run.

    Each of these overrides the one before: the paper's values, the recipe of the dataset, the flags
    of a resumed run, the command line.
    """
    deciding = ArgumentParser(add_help=False, allow_abbrev=False)
    add_deciding_flags(deciding)
    known, _ = deciding.parse_known_args(argv)
    resumed = flags_of_resumed_run(known)
    dataset = resumed.get("dataset", known.dataset)
    backbone = resumed.get("backbone", known.backbone)

    parser = ArgumentParser(description=__doc__, parents=[deciding], allow_abbrev=False,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)                                       # with the paper's values
    add_model_flags(parser)
    add_loss_flags(parser)
    add_optimization_flags(parser)
    add_test_and_log_flags(parser)
    parser.set_defaults(**recipe(dataset, backbone))             # override the paper's values
    parser.set_defaults(**resumed)                               # override the recipe
    args = parser.parse_args(argv)                               # overrides all

    if args.freeze_bn is None:
        args.freeze_bn = args.pretrained
    if args.backbone_lr_factor is None:
        args.backbone_lr_factor = 0.1 if args.pretrained else 1.
    return args


def add_deciding_flags(parser):
    """The flags on which the defaults of all others depend."""
    add = parser.add_argument
    add("--dataset", default="shapes", choices=DATASETS,
        help="the dataset, and with it the recipe (default: %(default)s)")
    add("--backbone", default="resnet50",
        help="any timm model with feature maps at strides 4, 8, 16 and 32 (default: %(default)s; "
             "shapes: resnet10t)")
    add("--output", metavar="DIR",
        help="folder of the run (default: the next free one of runs/DATASET-001, -002, ...)")
    add("--resume", action="store_true",
        help="continue the run in --output with its flags, if it has a checkpoint")


def add_data_flags(parser):
    """What is trained and tested on, and how images are cut and scaled."""
    add = parser.add_argument_group("data").add_argument
    add("--data-root", metavar="DIR",
        help="folder of the datasets, for `folder` and `panoptic` of your own data (default: "
             "$DATA_ROOT, else ./datasets)")
    add("--num-classes", type=positive_int, metavar="K",
        help="classes of the drawn shapes (default: 6); other datasets have their own")
    add("--task", choices=["semantic", "panoptic"],
        help="whether a segment is all of a class or one object (default: what the dataset has)")
    add("--augmentation", default="crop", choices=["crop", "detr"],
        help="random size and crop, or DETR's for COCO (default: %(default)s)")
    add("--crop", type=positive_int, nargs=2, metavar=("H", "W"),
        help="size of the crops that are trained on (default: %(default)s)")
    add("--short-side", type=positive_int, nargs="+", metavar="N",
        help="short side of a training image before the crop, one of these at random")
    add("--max-long-side", type=positive_int, metavar="N",
        help="upper limit of its long side (default: %(default)s)")
    add("--color-distortion", action=argparse.BooleanOptionalAction, default=True,
        help="distort the colors of training images as SSD does")
    add("--test-short-side", type=positive_int, metavar="N",
        help="short side at which held-out images are seen (default: %(default)s)")
    add("--test-max-long-side", type=positive_int, metavar="N",
        help="upper limit of their long side (default: %(default)s)")
    add("--workers", type=whole_number, default=default_workers(), metavar="N",
        help="processes that read and augment images, per training process (default here: "
             "%(default)s; at most 8 on a GPU, 4 on a CPU)")
    add("--overfit", type=positive_int, metavar="N",
        help="debugging: train and test on the same N images, not augmented")


def default_workers():
    """Loader workers of a training process: as many as it needs, if it has the cores for them."""
    needed = 8 if torch.cuda.is_available() else 4
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun
    return max(1, min(needed, cores))


def add_model_flags(parser):
    """The architecture (Sec. 4.1), and the weights it starts from."""
    add = parser.add_argument_group("model").add_argument
    add("--model", default="maskformer", choices=["maskformer", "per-pixel", "per-pixel-plus"],
        help="MaskFormer, or one of the per-pixel baselines of Sec. 4 (default: %(default)s)")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True,
        help="start the backbone from ImageNet weights, which timm downloads")
    add("--freeze-bn", action=argparse.BooleanOptionalAction,
        help="keep the batch norms of the backbone as they are (default: if pretrained)")
    add("--init", metavar="WEIGHTS",
        help="start from a checkpoint, or from the name or file of released weights; a class head "
             "of another size starts anew")
    add("--init-backbone", metavar="WEIGHTS",
        help="start the backbone alone from the one in a checkpoint")
    add("--queries", type=positive_int, default=100, metavar="Q",
        help="number of queries (default: %(default)s; Sec. 4.1: 100); per-pixel-plus has one for "
             "each class")
    add("--dim", type=positive_int, default=256, metavar="D",
        help="channels of all embeddings (default: %(default)s; Sec. 4.1: 256)")
    add("--decoder-layers", type=positive_int, default=6, metavar="L",
        help="layers of the transformer decoder (default: %(default)s; Sec. 4.1: 6)")
    add("--encoder-layers", type=whole_number, default=0, metavar="N",
        help="layers of a transformer encoder below it (default: %(default)s; 6 in the panoptic "
             "ResNet models)")
    add("--heads", type=positive_int, default=8, metavar="N",
        help="attention heads (default: %(default)s)")
    add("--ffn-dim", type=positive_int, default=2048, metavar="N",
        help="width of the transformer's feed-forward networks (default: %(default)s)")
    add("--dropout", type=fraction, default=0.1, metavar="P",
        help="dropout in the transformer (default: %(default)s)")
    add("--size-divisibility", type=whole_number, default=32, metavar="N",
        help="held-out images are padded to a multiple of this, 0: not at all, like those of the "
             "baselines (default: %(default)s)")


def add_loss_flags(parser):
    """Matching (Sec. 3.2) and the weights of its costs, which are those of the loss."""
    add = parser.add_argument_group("matching and loss").add_argument
    add("--matching", default="hungarian", choices=["hungarian", "fixed"],
        help="bipartite matching (Sec. 3.2), or query k for class k (Table 4)")
    add("--class-weight", type=non_negative, default=1., metavar="X",
        help="weight of the cross entropy in loss and matching (default: %(default)s)")
    add("--focal-weight", type=non_negative, default=20., metavar="X",
        help="weight of the focal term in loss and matching (default: %(default)s; Sec. 4.1: 20)")
    add("--dice-weight", type=non_negative, default=1., metavar="X",
        help="weight of the dice term in loss and matching (default: %(default)s; Sec. 4.1: 1)")
    add("--no-object-weight", type=non_negative, default=0.1, metavar="X",
        help='weight of "no object" in the cross entropy (default: %(default)s; Sec. 4.1: 0.1)')


def add_optimization_flags(parser):
    """Steps, batch, learning rate (appendix A), precision."""
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=positive_int, metavar="N",
        help="optimizer steps of the whole run (default: %(default)s)")
    add("--batch-size", type=positive_int, metavar="N",
        help="images of a step, over all processes (default: %(default)s)")
    add("--accumulate", type=positive_int, default=1, metavar="N",
        help="forward passes of a step, each on a part of the batch (default: %(default)s)")
    add("--lr", type=non_negative, default=1e-4, metavar="X",
        help="learning rate of AdamW (default: %(default)s)")
    add("--backbone-lr-factor", type=non_negative, metavar="X",
        help="the backbone's rate is this times --lr (default: 0.1 if pretrained, else 1; Swin: 1)")
    add("--weight-decay", type=non_negative, default=1e-4, metavar="X",
        help="weight decay, except on norms, embeddings and relative positions "
             "(default: %(default)s)")
    add("--warmup", type=whole_number, default=0, metavar="N",
        help="steps in which the learning rate rises linearly from 1e-6 of its value "
             "(default: %(default)s)")
    add("--schedule", default="poly", choices=["poly", "step"],
        help="the rate falls as (1 - step / steps)^0.9, or by 10 at each milestone "
             "(default: %(default)s)")
    add("--milestones", type=positive_int, nargs="*", default=[], metavar="N",
        help="steps at which --schedule step divides the rate by 10")
    add("--clip", type=non_negative, default=0.01, metavar="X",
        help="limit of the gradient's norm, 0: none (default: %(default)s; appendix A: 0.01)")
    add("--amp", default="auto", choices=["auto", *AMP],
        help="mixed precision (default: bf16 on GPUs that have it, else off: float32)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile model, matching costs and mask losses (default: on a GPU)")
    add("--seed", type=whole_number, default=0, metavar="N",
        help="seed of weights, order, augmentation and dropout (default: %(default)s)")


def add_test_and_log_flags(parser):
    """Thresholds of general inference (Sec. 3.4), and how often to test, save and log."""
    add = parser.add_argument_group("tests, log, checkpoints").add_argument
    add("--object-threshold", type=fraction, default=0.8, metavar="P",
        help="class probability that makes a query a segment (default: %(default)s)")
    add("--overlap-threshold", type=fraction, default=0.8, metavar="P",
        help="share of its mask that a segment must keep (default: %(default)s)")
    add("--eval-every", type=whole_number, default=5000, metavar="N",
        help="steps between two tests on the held-out images, 0: only at the end "
             "(default: %(default)s)")
    add("--save-every", type=positive_int, default=1000, metavar="N",
        help="steps between two checkpoints (default: %(default)s)")
    add("--log-every", type=positive_int, default=20, metavar="N",
        help="steps between two lines of the log (default: %(default)s)")


def flags_of_resumed_run(args):
    """-> {flag: value} of the run that --resume continues, from its config.json; {} without one."""
    path = Path(args.output or "", "config.json")
    if not (args.resume and args.output and path.exists()):
        return {}
    try:
        config = json.loads(path.read_text())
        return {name: config[name] for name in config.keys() - {"versions", "git", "processes"}}
    except (AttributeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and give all flags "
                        "again") from error


def validate_args(args):
    """UserError for flags that contradict one another. Called before anything is written."""
    def require_that(condition, message):
        if not condition:
            raise UserError(message)

    used = args.output and Path(args.output, "config.json").exists()
    require_that(args.output or not args.resume, "--resume needs the --output to continue")
    require_that(args.resume or not used,
                 f"{args.output} holds a run: choose another --output, or add --resume")
    # The config of a resumed run may hold these two flags.
    if args.dataset == "shapes":
        require_that(used or not args.data_root, "--data-root is not for --dataset shapes")
    else:
        require_that(used or not args.num_classes, "--num-classes is for --dataset shapes")
    parts = world_size() * args.accumulate
    require_that(args.batch_size % parts == 0,
                 f"--batch-size {args.batch_size} is not divisible by {world_size()} processes x "
                 f"--accumulate {args.accumulate}")
    require_that(args.dim % 32 == 0 and args.dim % args.heads == 0,
                 f"--dim {args.dim} must be divisible by 32 and by --heads {args.heads}")
    require_that(args.matching == "hungarian" or args.model == "maskformer",
                 "--matching is for --model maskformer")
    require_that(args.augmentation == "detr" or args.crop, "--augmentation crop needs a --crop H W")
    require_that(args.schedule == "poly" or args.milestones, "--schedule step needs --milestones")
    require_that(not (args.init and args.init_backbone),
                 "--init sets the backbone, too: drop --init-backbone")


# ------------------------------------------------------------------------------------- optimization
def parameter_groups(model, args):
    """Appendix A: the backbone's own rate; no decay on norms, embeddings and relative positions."""
    without_decay = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Embedding)
    groups = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            in_backbone = prefix.startswith("backbone")
            decays = not isinstance(module, without_decay) and "relative_position" not in name
            groups.setdefault((in_backbone, decays), []).append(parameter)

    result = []
    for (in_backbone, decays), parameters in groups.items():
        result.append({"params": parameters,
                       "rate": args.lr * (args.backbone_lr_factor if in_backbone else 1.),
                       "weight_decay": args.weight_decay if decays else 0.})
    return result


def lr_factor(step, args):
    """What the learning rates are multiplied by at this step."""
    if args.schedule == "poly":
        factor = (1 - step / args.steps) ** 0.9
    else:
        factor = 0.1 ** sum(step >= milestone for milestone in args.milestones)
    if step < args.warmup:
        factor *= 1e-6 + (1 - 1e-6) * step / args.warmup
    return factor


def target_count(batches, args):
    """Segments (baselines: labeled pixels) of a forward pass, a mean over passes and processes."""
    if args.model == "maskformer":
        count = sum(len(batch.labels) for batch in batches)
        count = torch.full((), count, device=batches[0].labels.device)
    else:
        count = sum((batch.label_map(void=-1) >= 0).sum() for batch in batches)
    return sum_over_processes(count / len(batches)) / world_size()


def compute_loss(output, batch, count, args, cost_function=matching_cost,
                 terms_function=mask_terms):
    """-> {"loss": what is minimized (Eq. 1); "loss_ce", "loss_mask", "loss_dice": its raw terms;
    "matched_dice": 1 - loss_dice / L, the mean overlap of segments and their masks; segments that
    stay unmatched count as 1, and so does a batch without segments}.

    output: of the model; count: `target_count`; the two functions: as they are, or compiled
    """
    if args.model != "maskformer":
        ce = per_pixel_loss(output, batch.label_map(void=-1), void=-1, num_pixels=count)
        return {"loss": ce, "loss_ce": ce}

    class_logits, mask_logits = output                           # [L, B, Q, K+1], [L, B, Q, h, w]
    labels, masks = batch.labels, batch.masks()                  # [N], [N, H, W]
    if args.matching == "hungarian":
        matches = hungarian_match(class_logits, mask_logits, labels, masks, batch.owner,
                                  args.class_weight, args.focal_weight, args.dice_weight,
                                  cost_function)
    else:
        matches = fixed_match(class_logits, mask_logits, labels, masks, batch.owner)

    ce, focal, dice = mask_classification_loss(class_logits, mask_logits, labels, masks, matches,
                                               count, args.no_object_weight, terms_function)
    loss = args.class_weight * ce + args.focal_weight * focal + args.dice_weight * dice
    return {"loss": loss, "loss_ce": ce, "loss_mask": focal, "loss_dice": dice,
            "matched_dice": 1 - dice / len(mask_logits)}


def compiled_loss():
    """`compute_loss` with its two expensive parts compiled; the number of segments varies."""
    return partial(compute_loss,
                   cost_function=torch.compile(matching_cost, dynamic=True),
                   terms_function=torch.compile(mask_terms, dynamic=True))


def training_step(step, batches, model, optimizer, scaler, args, loss_of=compute_loss):
    """Sec. 4.2: one step, on `--accumulate` batches -> the scalars of `compute_loss`, grad_norm."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * lr_factor(step, args)
    torch.manual_seed(seed_of(args.seed, step, rank()))          # a resumed run: the same dropout
    device = batches[0].images.device
    count = target_count(batches, args)

    sums = {}
    for batch in batches:
        # DDP averages the gradients of the processes in the last pass only.
        is_last = batch is batches[-1]
        sync = contextlib.nullcontext() if is_last or world_size() == 1 else model.no_sync()
        with sync:
            with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
                output = model(batch.images)
            terms = loss_of(output, batch, count, args)
            if device.type == "cpu" and not terms["loss"].isfinite():    # asking stalls a GPU
                raise FloatingPointError("the loss is not finite")
            scaler.scale(terms["loss"] / len(batches)).backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach() / len(batches)

    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return sums | {"grad_norm": grad_norm}


# -------------------------------------------------------------------------------------------- start
def load_datasets(args):
    """-> training samples, held-out images; sets `args.num_classes` and `args.task`."""
    options = {}
    if args.dataset == "shapes" and args.num_classes:
        options["num_classes"] = args.num_classes
    train_set = build_dataset(args.dataset, args.data_root, "train", **options)
    test_set = build_dataset(args.dataset, args.data_root, "val", **options)

    if args.augmentation == "crop":
        augment = Augmentation(args.short_side, args.max_long_side, args.crop,
                               args.color_distortion)
    else:
        augment = DetrAugmentation(args.short_side, args.max_long_side)
    if args.overfit:
        del train_set.pairs[args.overfit:]
        test_set = train_set
        augment = partial(resized, short_side=args.test_short_side,
                          max_long_side=args.test_max_long_side)

    args.num_classes = len(test_set.classes)
    args.task = args.task or ("panoptic" if test_set.panoptic else "semantic")
    if args.task == "panoptic" and not test_set.panoptic:
        raise UserError(f"--task panoptic: {args.dataset} labels classes, not objects")
    if args.matching == "fixed" and (args.task != "semantic" or args.queries != args.num_classes):
        raise UserError(f"--matching fixed needs --task semantic and --queries {args.num_classes}")
    return TrainingSamples(train_set, augment, args.seed, args.task), test_set


def checkpoint_to_continue(args, classes):
    """The content of last.pt for --resume, or None. UserError if it is of another run."""
    path = Path(args.output or "", "last.pt")
    last = load_checkpoint(path) if args.resume and path.exists() else None
    step = last["step"] if last else 0
    if step > args.steps:
        raise UserError(f"{path} is of step {step}, which is after --steps {args.steps}")
    if last and len(last["classes"]) != len(classes):
        raise UserError(f"{path} has {len(last['classes'])} classes, the dataset {len(classes)}")
    if last and last["classes"] != classes:
        raise UserError(f"{path} has other classes than the dataset, whose "
                        f"{renamed(classes, last['classes'])} there")
    if last and not {"optimizer", "scaler", "best"} <= last.keys():
        raise UserError(f"{path} is not of a run: start from it with --init instead")
    if world_size() > 1 and step != step_of_process_0(step):
        raise UserError(f"not all processes see {path}: all machines must share --output")
    return last


def step_of_process_0(step):
    step = torch.tensor(step)
    dist.broadcast(step, 0)
    return step.item()


def load_into(part, state):
    """part.load_state_dict(state), which must be of the run that the flags describe."""
    try:
        part.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"last.pt is of another run than the flags describe: {error}") from error


def start_model(args, last, device, classes=None):
    """The model in training mode, of a new run or of the checkpoint `last`.

    classes: of the dataset; a warning tells if those of --init have other names
    """
    torch.manual_seed(args.seed)
    from_imagenet = args.pretrained and not (args.init or args.init_backbone or last)
    try:
        model = build_model(vars(args), from_imagenet)
    except (OSError, RuntimeError, ValueError) as error:         # timm: no such name, no weights
        raise UserError(f"--backbone {args.backbone}: {error}") from error

    if last:
        load_into(model, last["model"])
    elif args.init:
        skipped = start_from(model, args, classes)
        if rank() == 0:
            print(f"starts from {args.init}; skipped: {', '.join(skipped) or 'nothing'}")
    elif args.init_backbone:
        start_backbone_from(model, args.init_backbone)

    if norms_are_synchronized(args, device):
        model = convert_sync_batchnorm(model)
    return model.to(device).train()


def norms_are_synchronized(args, device):
    """Whether trained batch norms see the images of all processes; torch can do this on GPUs."""
    return device.type == "cuda" and world_size() > 1 and not args.freeze_bn


def start_from(model, args, classes=None):
    """--init: takes over all weights but a class head of another size (baseline+: queries), whose
    names are returned. UserError if anything else differs."""
    other, info = load(args.init)
    heads = info["config"].get("heads", args.heads)
    if heads != args.heads:                                      # no shape would tell
        raise UserError(f"--init {args.init} has {heads} attention heads: add --heads {heads}")

    theirs, ours = other.state_dict(), model.state_dict()
    fitting = {name: value for name, value in theirs.items()
               if name in ours and value.shape == ours[name].shape}
    head = ("to_class.",) if hasattr(model, "to_class") else ("to_class.", "query_pos.")
    skipped = [name for name in sorted(ours | theirs) if name not in fitting]
    wrong = [name for name in skipped if not name.startswith(head)]
    if wrong:
        raise UserError(f"--init {args.init}: the flags describe another model: it differs in "
                        f"{listing(wrong, 4)}")
    model.load_state_dict(fitting, strict=False)
    if classes and len(classes) == len(info["classes"]) and classes != info["classes"]:
        warn(f"--init {args.init} has as many classes, so its class head is kept, but other names: "
             f"{renamed(classes, info['classes'])} there")
    return skipped


def start_backbone_from(model, source):
    """--init-backbone: takes over the weights of the backbone. UserError if they do not fit."""
    backbone = load(source)[0].backbone
    try:
        model.backbone.load_state_dict(backbone.state_dict())
    except RuntimeError as error:
        raise UserError(f"--init-backbone {source}: another backbone: {error}") from error


def start_optimizer(model, args, last, device):
    """-> AdamW and the scaler of fp16 gradients, in the state of the checkpoint `last`, if any."""
    optimizer = torch.optim.AdamW(parameter_groups(model, args), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if last:
        load_into(optimizer, last["optimizer"])
        if last["scaler"]:                                       # empty unless fp16
            load_into(scaler, last["scaler"])
    for group, wanted in zip(optimizer.param_groups, parameter_groups(model, args)):
        group["rate"] = wanted["rate"]                           # from the flags, also if resumed
        group["weight_decay"] = wanted["weight_decay"]
    return optimizer, scaler


def start_folder(args, first_step):
    """Makes the folder of the run and its config.json: flags, versions, git revision -> its path.

    Rows of the log after `first_step` are dropped: what a killed run did after its last checkpoint
    is done again. Process 0 does all this; the others get None.
    """
    if rank() > 0:                                               # only process 0 writes
        return None
    if args.output:
        folder = Path(args.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {folder} cannot be made ({error.strerror})") from error
    else:
        folder = make_next_folder(f"runs/{args.dataset}")

    packages = ("torch", "torchvision", "timm", "scipy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    config = vars(args) | {"versions": versions, "git": git_revision(), "processes": world_size()}
    write_atomically(folder / "config.json", json.dumps(config, indent=1) + "\n")

    log = folder / "log.jsonl"
    if log.exists():
        lines = log.read_text().splitlines()
        lines = [line for line in lines if line.endswith("}")]   # the last may be cut off
        kept = [line for line in lines if stays(json.loads(line), first_step, args)]
        write_atomically(log, "".join(line + "\n" for line in kept))
    return folder


def stays(row, first_step, args):
    """Whether a row of the log stays: those after the checkpoint will be written again, and so will
    the checkpoint's own test if the resumed run repeats it."""
    test_is_repeated = "mIoU" in row and is_test_step(first_step, args)
    return row["step"] < first_step or (row["step"] == first_step and not test_is_repeated)


def make_next_folder(prefix):
    """Makes the first of the folders prefix-001, -002, ... that does not exist -> its path."""
    for number in itertools.count(1):
        folder = Path(f"{prefix}-{number:03d}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:                                  # maybe of a run started just now
            continue


def git_revision():
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:                                              # no git here
        return None
    return result.stdout.strip() or None


# ------------------------------------------------------------------------------------- log and save
def write_atomically(path, content):
    """Writes text (anything else: torch.save) under another name and renames: never half a file."""
    unfinished = path.with_suffix(".part")
    try:
        with open(unfinished, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:                     # torch: RuntimeError if disk full
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}); the file that was there is "
                        "untouched. Fix this, then continue with --output DIR --resume") from error


def save_checkpoint(path, model, optimizer, scaler, step, best, args, dataset):
    """Writes all that a resumed run needs."""
    write_atomically(path, {"model": model.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "scaler": scaler.state_dict(),
                            "step": step,
                            "best": best,
                            "config": vars(args),
                            "classes": dataset.classes,
                            "is_thing": dataset.is_thing,
                            "category_ids": dataset.category_ids,
                            "label_values": dataset.label_values})


def log_row(folder, row):
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def write_log(folder, args, step, logged, since, data_seconds):
    """Means since the last row, to log.jsonl and the console. FloatingPointError if not finite.

    logged: the scalars of these steps; since: when they began; data_seconds: their wait for data
    """
    names = list(logged[0])
    table = torch.stack([torch.stack([scalars[name] for name in names]) for scalars in logged])
    means = sum_over_processes(table.mean(0)) / world_size()
    means = dict(zip(names, means.tolist()))                     # waits for the GPU
    seconds = time.time() - since
    for name, value in means.items():
        skipped = name == "grad_norm" and args.amp == "fp16"     # the scaler skips such a step
        if not math.isfinite(value) and not skipped:
            raise FloatingPointError("the loss or its gradient is not finite")
    if rank() > 0:
        return

    row = {"step": step}
    row |= {name: round(value, 5) for name, value in means.items() if math.isfinite(value)}
    row["lr"] = args.lr * lr_factor(step - 1, args)
    row["images_per_s"] = round(len(logged) * args.batch_size / seconds, 2)
    row["data_time"] = round(data_seconds / len(logged), 4)
    row["memory_gb"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    log_row(folder, row)
    eta = datetime.timedelta(seconds=round(seconds / len(logged) * (args.steps - step)))
    numbers = "  ".join(f"{name} {value:.3g}" for name, value in row.items() if name != "step")
    print(f"step {step}/{args.steps}  eta {eta}  {numbers}", flush=True)


def evaluate_run(model, test_set, folder, step, args):
    """Evaluates -> metrics; writes metrics.json, a row of the log and the two pictures."""
    options = {name: getattr(args, name) for name in TEST_OPTIONS} | {"amp": args.amp}
    if world_size() > 1:
        # Batch-norm statistics: all processes evaluate with those that process 0 saves.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    model.eval()
    metrics = evaluate(model, test_set, workers=args.workers, task=args.task, **options)
    if rank() == 0:
        save_metrics(folder / "metrics.json", metrics, test_set.classes, step=step)
        log_row(folder, {"step": step} | single_numbers(metrics))
        print(f"step {step}/{args.steps}  held-out  {single_numbers(metrics)}", flush=True)
        draw_predictions(model, test_set, folder / "predictions.png", **options)
        if args.model == "maskformer":
            draw_queries(model, test_set, folder / "queries.png", args.test_short_side,
                         args.test_max_long_side)
    model.train()
    return metrics


class StopSignal:
    """Notes SIGTERM and SIGUSR1, with which a cluster asks for its machine back."""

    def __init__(self):
        self.received = False
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):                            # Windows lacks the second
                signal.signal(getattr(signal, name), self.note)

    def note(self, *_):
        self.received = True

    def anywhere(self):
        """Whether any process has received one; all must ask together."""
        return sum_over_processes(torch.tensor(int(self.received))).item() > 0


# ----------------------------------------------------------------------------------------- training
@record                                          # torchrun reports the process that failed first
def train(args, device):
    """A whole run -> held-out images, metrics (None if a signal stopped it), folder."""
    samples, test_set = load_datasets(args)
    last = checkpoint_to_continue(args, test_set.classes)
    first_step, best = (last["step"], last["best"]) if last else (0, -1.)
    model = start_model(args, last, device, test_set.classes)
    optimizer, scaler = start_optimizer(model, args, last, device)
    folder = start_folder(args, first_step)
    resumed = last is not None
    del last                                                     # three times the model's size

    trained_model, loss_of = compile_and_parallelize(model, args, device)
    if rank() == 0:
        print_start(args, model, len(samples.dataset), device, folder)

    def save(name, step):
        if rank() == 0:
            save_checkpoint(folder / name, model, optimizer, scaler, step, best, args, test_set)

    def test_and_keep_best(step):
        """Evaluates; saves the checkpoint if it is the best so far -> metrics."""
        nonlocal best
        metrics = evaluate_run(model, test_set, folder, step, args)
        score = metrics.get("PQ", metrics["mIoU"])
        if score > best:
            best = score
            save("best.pt", step)
            save("last.pt", step)                                # a resumed run must know it, too
        return metrics

    stop = StopSignal()
    sampler = step_batches(first_step, args.steps, args.batch_size, rank(), world_size(),
                           args.accumulate)
    stream = training_batches(samples, sampler, args.workers, device)
    trained_on = torch.zeros(args.num_classes, dtype=torch.bool)
    metrics, warned = None, False
    if resumed and is_test_step(first_step, args):               # this test may have been cut off
        metrics = test_and_keep_best(first_step)
    logged, clock, data_seconds = [], time.time(), 0.            # since the last row of the log

    for step in range(first_step, args.steps):
        done = step + 1                                          # steps, after this one

        # Load.
        tick = time.time()
        batches = [next(stream) for _ in range(args.accumulate)]
        for batch in batches:
            trained_on[batch.labels] = True
            warned = warned or warn_of_unmatched(batch, args)
        batches = [batch.to(device) for batch in batches]
        data_seconds += time.time() - tick

        # Step, and log.
        try:
            logged.append(training_step(step, batches, trained_model, optimizer, scaler, args,
                                        loss_of))
            stopping = stop.anywhere()
            test_now = is_test_step(done, args)
            save_now = test_now or stopping or done % args.save_every == 0
            if save_now or done == 1 or done % args.log_every == 0:
                write_log(folder, args, done, logged, clock, data_seconds)
                logged, clock, data_seconds = [], time.time(), 0.
        except FloatingPointError as error:
            raise UserError(explain_divergence(error, step, batches, args)) from error

        # Save.
        if save_now:
            save("last.pt", done)
        if stopping:
            wait_for_processes()                                 # until it is saved
            return test_set, None, folder

        # Evaluate.
        if test_now:
            metrics = test_and_keep_best(done)
            clock = time.time()

    if first_step < args.steps:
        warn_of_unseen(test_set.classes, trained_on, first_step)
    return test_set, metrics, folder


def compile_and_parallelize(model, args, device):
    """-> the model that `training_step` calls (compiled, in DDP, where that applies), its loss."""
    trained_model, loss_of = model, compute_loss
    if should_compile(args, device):
        loss_of = compiled_loss()
        sizes_vary = args.augmentation == "detr" or args.overfit
        # Swin takes over five minutes to compile for sizes that vary, and every synchronized norm
        # breaks the compiled graph.
        takes_long = sizes_vary and args.backbone.startswith("swin_")
        if not (takes_long or norms_are_synchronized(args, device)):
            trained_model = torch.compile(model)
    if world_size() > 1:
        trained_model = DistributedDataParallel(trained_model)
    return trained_model, loss_of


def print_start(args, model, num_images, device, folder):
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{args.model}, {args.backbone}, {millions:.1f}M parameters, {args.dataset}, "
          f"{num_images} images, {world_size()} x {device}, {folder}", flush=True)


def is_test_step(step, args):
    return step == args.steps or (args.eval_every > 0 and step % args.eval_every == 0)


def explain_divergence(error, step, batches, args):
    """The message for a loss that is not finite."""
    lr = args.lr * lr_factor(step, args)
    names = ", ".join(name for batch in batches for name in batch.names)
    return (f"{error}: step {step + 1}, learning rate {lr:.3g}, images {names} (on a GPU, the "
            f"cause may lie up to {args.log_every} steps back). Checkpoints are untouched. Try a "
            "lower --lr or --amp off")


def wait_for_processes():
    sum_over_processes(torch.zeros(()))


def warn_of_unmatched(batch, args):
    """Names an image that has more segments than there are queries -> whether there is one."""
    counts = torch.bincount(batch.owner, minlength=len(batch.names)).tolist()
    too_many = args.model == "maskformer" and max(counts) > args.queries
    if too_many:
        # Not `warn`, which is silent in all processes but the first.
        print(f"warning: {batch.names[counts.index(max(counts))]} has {max(counts)} segments for "
              f"{args.queries} queries: those that fit worst stay unmatched (told once by each "
              "process)", file=sys.stderr, flush=True)
    return too_many


def should_compile(args, device):
    """Whether to compile: by default on a GPU, and never without a compiler."""
    on_gpu = device.type == "cuda"
    if not (on_gpu if args.compile is None else args.compile):
        return False
    if on_gpu:
        needed = "Triton, a C compiler or Python.h"
        headers = Path(sysconfig.get_paths()["include"])
        able = (importlib.util.find_spec("triton") and has_compiler("CC", "gcc", "clang")
                and (headers / "Python.h").exists())
    else:
        needed = "a C++ compiler"
        able = has_compiler("CXX", "g++")
    if not able:
        warn(f"{needed} is missing, so nothing is compiled (--no-compile: no warning)")
    return bool(able)


def has_compiler(variable, *names):
    """Whether the environment variable or the search path has a compiler."""
    return variable in os.environ or any(shutil.which(name) for name in names)


def warn_of_unseen(classes, trained_on, first_step):
    """Names the classes without a training image. trained_on: [K] bool, of this process."""
    trained_on = sum_over_processes(trained_on.int())
    unseen = [name for name, seen in zip(classes, trained_on.tolist()) if not seen]
    if unseen:
        since = f" since step {first_step}" if first_step else ""
        warn(f"no training image{since} showed {listing(unseen)}")


def main(argv=None):
    """The command: see the top of this file. -> its exit code."""
    started = time.time()
    args = parse_args(argv)
    device = pick_device()
    if "RANK" in os.environ:                                     # started by torchrun
        dist.init_process_group(backend_for(device), **rendezvous())
    validate_args(args)
    args.amp = pick_amp(args.amp, device)
    torch.set_float32_matmul_precision("high")                   # TF32 on GPUs that have it
    warnings.filterwarnings("ignore", "image .* segments but")    # `warn_of_unmatched` names files

    test_set, metrics, folder = train(args, device)
    if rank() == 0 and metrics:
        print(table_of_classes(metrics, test_set.classes))
        duration = datetime.timedelta(seconds=round(time.time() - started))
        print(f"{duration} in all; everything is in {folder}")
    elif rank() == 0:
        print(f"stopped by a signal, and saved: continue with --output {folder} --resume")
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if metrics else STOPPED


if __name__ == "__main__":
    run_command(main)
