"""Training: what a run guarantees, on one process and on two."""
import contextlib
import importlib.util
import json
import math
import os
import re
import socket
import sysconfig
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn
from torch._dynamo.utils import counters
from torchvision.transforms import v2

import evaluate
import train
from data import Shapes, TrainingSamples, UserError, collate
from evaluate import load
from losses import mask_classification_loss
from maskformer import MaskFormer
from matcher import hungarian_match

pytestmark = pytest.mark.usefixtures("short_tests", "signals_as_before")

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = ("--dim 32 --ffn-dim 64 --heads 2 --decoder-layers 2 --queries 7 --batch-size 4 "
        "--workers 0 --log-every 1 --backbone test_resnet").split()


def run(*flags):
    return train.main([*TINY, *map(str, flags)])


def content(path):
    return torch.load(path, weights_only=True)


def weights(path):
    return content(path)["model"]


def equal(weights, other):
    return all(torch.equal(weights[name], other[name]) for name in weights | other)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def steps_and_tests(folder):
    """(step, whether it is a test) of each row of the log."""
    return [(row["step"], "mIoU" in row) for row in log_of(folder)]


# -------------------------------------------------------------------------------------------- a run
def test_a_run_leaves_everything_it_promises(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_predictions", evaluate.draw_predictions)
    monkeypatch.setattr(train, "draw_queries", evaluate.draw_queries)
    run("--steps", 2, "--output", tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "log.jsonl", "last.pt", "best.pt", "metrics.json",
                     "predictions.png", "queries.png"}

    row = log_of(tmp_path / "run")[0]
    assert {"step", "loss", "loss_ce", "loss_mask", "loss_dice", "matched_dice", "grad_norm", "lr",
            "images_per_s", "data_time", "memory_gb"} == set(row)
    total = row["loss_ce"] + 20 * row["loss_mask"] + row["loss_dice"]
    assert row["loss"] == pytest.approx(total, rel=1e-3)
    assert {"mIoU", "PQ", "SQ", "RQ"} <= metrics_of(tmp_path / "run").keys()

    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["steps"] == 2
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]

    model, info = load(tmp_path / "run" / "last.pt")
    assert info["step"] == 2
    assert info["classes"][0] == "stripes"
    assert info["category_ids"] == [0, 1, 2, 3, 4, 5]
    assert not model.training


class Interrupted(Exception):
    """Ends a run at a certain place."""


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(tmp_path, monkeypatch):
    flags = ["--steps", 6, "--dropout", 0.1, "--save-every", 3]
    run(*flags, "--output", tmp_path / "whole")

    def save_and_stop(path, model, optimizer, scaler, step, *rest):
        save(path, model, optimizer, scaler, step, *rest)
        raise Interrupted(step)

    with monkeypatch.context() as patch:
        save = train.save_checkpoint
        patch.setattr(train, "save_checkpoint", save_and_stop)
        with pytest.raises(Interrupted, match="3"):
            run(*flags, "--output", tmp_path / "cut")
    run(*flags, "--output", tmp_path / "cut", "--resume")

    whole = content(tmp_path / "whole" / "last.pt")
    cut = content(tmp_path / "cut" / "last.pt")
    assert equal(whole["model"], cut["model"])
    for index, state in whole["optimizer"]["state"].items():
        assert equal(state, cut["optimizer"]["state"][index])


def test_the_first_step_is_logged_so_that_its_time_is_known_early(tmp_path):
    run("--steps", 6, "--log-every", 5, "--output", tmp_path)
    assert [row["step"] for row in log_of(tmp_path) if "loss" in row] == [1, 5, 6]


def test_runs_without_output_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--steps", 1)
    run("--steps", 1)
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["shapes-001", "shapes-002"]


def no_metrics(*_, **__):
    return {"mIoU": 0., "IoU": [0.] * 6}


@pytest.mark.parametrize("every, tested", [(2, [2, 4, 5]), (0, [5])])
def test_a_run_is_tested_as_often_as_told_and_saved_before(tmp_path, monkeypatch, every, tested):
    steps = []

    def evaluate_run(model, test_set, folder, step, args):
        steps.append((step, content(folder / "last.pt")["step"]))
        return no_metrics()

    monkeypatch.setattr(train, "evaluate_run", evaluate_run)
    run("--steps", 5, "--eval-every", every, "--save-every", 100, "--output", tmp_path)
    assert steps == [(step, step) for step in tested]


@pytest.mark.parametrize("model", ["per-pixel", "per-pixel-plus"])
def test_the_baselines_train_and_score(tmp_path, model):
    run("--steps", 2, "--model", model, "--output", tmp_path)
    metrics = metrics_of(tmp_path)
    assert "mIoU" in metrics
    assert "PQ_st" in metrics
    assert "PQ" not in metrics


def test_a_run_for_semantic_masks_is_scored_without_instances(tmp_path):
    run("--steps", 1, "--task", "semantic", "--matching", "fixed", "--queries", 6,
        "--output", tmp_path)
    assert "PQ" not in metrics_of(tmp_path)


def test_twenty_steps_lower_the_loss_that_starts_at_the_log_of_the_label_count(tmp_path):
    run("--steps", 20, "--overfit", 4, "--lr", 2e-3, "--output", tmp_path)
    losses = [row for row in log_of(tmp_path) if "loss" in row]
    of_a_layer = losses[0]["loss_ce"] / 2
    assert of_a_layer == pytest.approx(math.log(7), rel=0.25)
    assert losses[-1]["loss"] < 0.8 * losses[0]["loss"]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_starts_within_one_percent_of_float32(tmp_path, amp):
    run("--steps", 1, "--output", tmp_path / "off", "--amp", "off")
    run("--steps", 1, "--output", tmp_path / amp, "--amp", amp)
    exact = log_of(tmp_path / "off")[0]["loss"]
    mixed = log_of(tmp_path / amp)[0]["loss"]
    assert mixed == pytest.approx(exact, rel=0.01)


def test_a_class_that_no_training_image_showed_is_named_at_the_end(tmp_path, monkeypatch, capsys):
    original = TrainingSamples.__getitem__

    def without_class_2(self, n):
        image, segment_map, ids, labels, name = original(self, n)
        return image, segment_map, ids[labels != 2], labels[labels != 2], name

    monkeypatch.setattr(train.TrainingSamples, "__getitem__", without_class_2)
    run("--steps", 5, "--output", tmp_path)
    assert "warning: no training image showed dots\n" in capsys.readouterr().err


def test_classes_that_another_process_has_seen_are_not_named(monkeypatch, capsys):
    monkeypatch.setattr(train, "sum_over_processes",
                        lambda seen: seen + torch.tensor([0, 1, 0], dtype=torch.int))
    train.warn_of_unseen(["sky", "road", "car"], torch.tensor([True, False, False]), 70)
    assert capsys.readouterr().err == "warning: no training image since step 70 showed car\n"


# ------------------------------------------------------------------------------------------ weights
def test_init_skips_a_class_head_of_another_size_and_nothing_else(tmp_path, capsys):
    run("--steps", 1, "--output", tmp_path / "six")
    capsys.readouterr()
    source = tmp_path / "six" / "last.pt"
    run("--steps", 1, "--lr", 0, "--num-classes", 9, "--output", tmp_path / "nine",
        "--init", source)
    assert "skipped: to_class.bias, to_class.weight\n" in capsys.readouterr().out

    six = weights(source)
    nine = weights(tmp_path / "nine" / "last.pt")
    for name in six:
        if not name.startswith("to_class") and "running" not in name and "num_b" not in name:
            assert torch.equal(six[name], nine[name]), name
    assert nine["to_class.bias"].shape == (10,)

    with pytest.raises(UserError, match="another model"):
        run("--steps", 1, "--dim", 64, "--output", tmp_path / "x", "--init", source)


def test_init_tells_if_it_keeps_the_class_head_of_other_classes(tmp_path, capsys):
    run("--steps", 1, "--output", tmp_path / "shapes")
    checkpoint = content(tmp_path / "shapes" / "last.pt")
    checkpoint["classes"][1] = "plaid"
    torch.save(checkpoint, tmp_path / "other.pt")
    run("--steps", 1, "--output", tmp_path / "x", "--init", tmp_path / "other.pt")
    assert "other names: 'checks' is 'plaid' there\n" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_renamed_classes(tmp_path):
    run("--steps", 1, "--output", tmp_path)
    checkpoint = content(tmp_path / "last.pt")
    checkpoint["classes"][1] = "plaid"
    torch.save(checkpoint, tmp_path / "last.pt")
    with pytest.raises(UserError, match="whose 'checks' is 'plaid' there"):
        run("--steps", 2, "--output", tmp_path, "--resume")


def test_init_skips_the_queries_of_the_baseline_whose_queries_are_classes(tmp_path, capsys):
    run("--model", "per-pixel-plus", "--steps", 1, "--output", tmp_path / "six")
    source = tmp_path / "six" / "last.pt"
    run("--model", "per-pixel-plus", "--steps", 1, "--num-classes", 9,
        "--output", tmp_path / "nine", "--init", source)
    assert "skipped: query_pos.weight\n" in capsys.readouterr().out

    with pytest.raises(UserError, match="another model"):        # where queries are no classes
        run("--queries", 9, "--steps", 1, "--output", tmp_path / "x", "--init", source)


def test_init_backbone_takes_the_backbone_of_any_model_and_nothing_else(tmp_path):
    run("--steps", 1, "--model", "per-pixel", "--dim", 64, "--output", tmp_path / "old")
    source = tmp_path / "old" / "last.pt"
    flags = ["--steps", 1, "--lr", 0, "--freeze-bn"]
    run(*flags, "--output", tmp_path / "new", "--init-backbone", source)
    run(*flags, "--output", tmp_path / "fresh")

    old = weights(source)
    new = weights(tmp_path / "new" / "last.pt")
    fresh = weights(tmp_path / "fresh" / "last.pt")
    for name in new:
        expected = old if name.startswith("backbone.") else fresh
        assert torch.equal(new[name], expected[name]), name

    with pytest.raises(UserError, match="--init-backbone .*another backbone"):
        run("--steps", 1, "--backbone", "resnet10t", "--output", tmp_path / "x",
            "--init-backbone", source)


# ----------------------------------------------------------------------------------------- resuming
def test_a_resumed_run_follows_the_new_rate_and_needs_an_output(tmp_path):
    run("--steps", 1, "--output", tmp_path)
    run("--steps", 2, "--lr", 1e-9, "--weight-decay", 0, "--output", tmp_path, "--resume")
    state = content(tmp_path / "last.pt")
    groups = state["optimizer"]["param_groups"]
    assert {(group["rate"], group["weight_decay"]) for group in groups} == {(1e-9, 0)}
    assert state["step"] == 2
    with pytest.raises(UserError, match="--resume needs the --output"):
        run("--resume")


def test_rows_after_the_resumed_step_are_dropped_from_the_log(tmp_path):
    flags = ["--steps", 4, "--eval-every", 2, "--save-every", 2, "--output", tmp_path]
    run(*flags)
    torch.save(content(tmp_path / "last.pt") | {"step": 2}, tmp_path / "last.pt")
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')                             # a kill may cut a line
    run(*flags, "--resume")
    assert steps_and_tests(tmp_path) == [(1, False), (2, False), (2, True), (3, False), (4, False),
                                         (4, True)]


def test_a_run_that_was_killed_in_its_last_test_is_tested_and_has_a_best(tmp_path, monkeypatch):
    def killed(*_):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_run", killed)
        with pytest.raises(Interrupted):
            run("--steps", 2, "--output", tmp_path)
    assert not (tmp_path / "best.pt").exists()
    run("--steps", 2, "--output", tmp_path, "--resume")
    assert steps_and_tests(tmp_path) == [(1, False), (2, False), (2, True)]
    assert content(tmp_path / "best.pt")["best"] == pytest.approx(metrics_of(tmp_path)["PQ"])


def test_a_test_that_was_cut_off_is_done_again_by_a_resumed_run(tmp_path, monkeypatch):
    def killed(*_):
        raise Interrupted

    flags = ["--steps", 4, "--eval-every", 2, "--output", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_run", killed)
        with pytest.raises(Interrupted):
            run(*flags)
    assert content(tmp_path / "last.pt")["step"] == 2
    run(*flags, "--resume")
    assert steps_and_tests(tmp_path) == [(1, False), (2, False), (2, True), (3, False),
                                         (4, False), (4, True)]


def test_more_segments_than_queries_are_told_once_with_the_image(tmp_path, capsys):
    run("--steps", 3, "--queries", 1, "--workers", 0, "--output", tmp_path)
    told = [line for line in capsys.readouterr().err.splitlines() if "segments for" in line]
    assert len(told) == 1
    assert re.match(r"warning: \d{5} has \d segments for 1 queries", told[0])


def test_two_runs_started_together_get_folders_of_their_own(tmp_path):
    assert train.make_next_folder(f"{tmp_path}/runs/x") == tmp_path / "runs" / "x-001"
    assert train.make_next_folder(f"{tmp_path}/runs/x") == tmp_path / "runs" / "x-002"


def test_no_imagenet_weights_are_fetched_for_a_backbone_that_is_replaced(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "build_model", lambda config, pretrained: asked.append(pretrained)
                        or tiny_model())
    monkeypatch.setattr(train, "start_backbone_from", lambda *_: None)
    args = train.parse_args([*TINY, "--init-backbone", "x.pt", "--pretrained"])
    train.start_model(args, None, torch.device("cpu"))
    assert asked == [False]


def test_a_resumed_run_keeps_the_flags_that_are_not_given_again(tmp_path):
    run("--steps", 2, "--seed", 3, "--lr", 0.003, "--num-classes", 8, "--task", "semantic",
        "--output", tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    train.main(["--output", str(tmp_path), "--resume", "--steps", "3"])
    after = json.loads((tmp_path / "config.json").read_text())
    assert after == before | {"steps": 3, "resume": True}
    assert log_of(tmp_path)[-1]["step"] == 3


def test_a_longer_run_keeps_what_was_logged_and_best(tmp_path):
    run("--steps", 2, "--output", tmp_path)
    best = weights(tmp_path / "best.pt")
    last = content(tmp_path / "last.pt")
    assert last["best"] == pytest.approx(metrics_of(tmp_path)["PQ"], abs=1e-3)

    torch.save(last | {"best": 99.}, tmp_path / "last.pt")       # as if nothing could be better
    train.main(["--output", str(tmp_path), "--resume", "--steps", "3", "--no-compile"])
    assert steps_and_tests(tmp_path) == [(1, False), (2, False), (2, True), (3, False), (3, True)]
    assert equal(best, weights(tmp_path / "best.pt"))


def test_a_resumed_run_on_own_data_needs_no_other_flags(tmp_path):
    for split in ("train", "val"):
        for part, shape in (("images", (40, 50, 3)), ("annotations", (40, 50))):
            (tmp_path / part / split).mkdir(parents=True)
            picture = np.zeros(shape, np.uint8)
            Image.fromarray(picture).save(tmp_path / part / split / "a.png")
    (tmp_path / "classes.txt").write_text("floor\nwall\n")
    run("--dataset", "folder", "--data-root", tmp_path, "--crop", 32, 32,
        "--test-short-side", 32, "--steps", 1, "--no-pretrained", "--output", tmp_path / "run")
    train.main(["--output", str(tmp_path / "run"), "--resume", "--steps", "2"])
    assert metrics_of(tmp_path / "run")["step"] == 2


def test_older_runs_and_checkpoints_are_continued_and_loaded(tmp_path):
    """Before revision 6733643 frozen norms had no num_batches_tracked, and flags were others."""
    run("--steps", 2, "--freeze-bn", "--output", tmp_path)
    state = content(tmp_path / "last.pt")
    metrics = metrics_of(tmp_path)
    for name in list(state["model"]):
        module, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            del state["model"][name]
            state["model"]._metadata[module]["version"] = 1      # as of a norm without it
    assert len(state["model"]) < len(weights(tmp_path / "last.pt"))

    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("category_ids", "label_values"):
        del state[name]
    for some in (config, state["config"]):
        del some["init_backbone"]
        some |= {"download": False, "compile": False}
    torch.save(state | {"seed": 0}, tmp_path / "last.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))

    model, info = load(tmp_path / "last.pt")
    assert info["classes"] == state["classes"]
    evaluate.main(["--checkpoint", str(tmp_path / "last.pt"), "--workers", "0",
                   "--save", str(tmp_path / "again")])
    assert metrics_of(tmp_path / "again") == {name: value for name, value in metrics.items()
                                              if name != "step"}
    train.main(["--output", str(tmp_path), "--resume", "--steps", "3"])
    assert steps_and_tests(tmp_path) == [(1, False), (2, False), (2, True), (3, False), (3, True)]


def test_a_resumed_run_goes_on_with_its_loss_scale(tmp_path):
    args = args_of("--amp", "fp16", "--output", tmp_path, "--resume")
    model = train.start_model(args, None, CPU)
    optimizer, scaler = train.start_optimizer(model, args, None, CPU)
    scaler.scale(torch.ones(()))
    scaler.update(8.)
    dataset = SimpleNamespace(classes=[""] * 6, is_thing=[False] * 6, category_ids=[],
                              label_values=[])
    train.save_checkpoint(tmp_path / "last.pt", model, optimizer, scaler, 1, 0., args, dataset)

    last = train.checkpoint_to_continue(args, [""] * 6)
    _, scaler = train.start_optimizer(model, args, last, CPU)
    assert scaler.get_scale() == 8


# ------------------------------------------------------------------------------------- optimization
def args_of(*flags):
    """The settings of a tiny run on six drawn classes."""
    args = train.parse_args([*TINY, *map(str, flags)])
    args.num_classes = 6
    args.amp = train.pick_amp(args.amp, CPU)
    return args


def test_rates_and_decay_of_the_recipe():
    args = train.parse_args(["--dataset", "ade20k"])
    assert (args.batch_size, args.steps, args.clip) == (16, 160_000, 0.01)
    assert (args.lr, args.backbone_lr_factor) == (1e-4, 0.1)
    groups = train.parameter_groups(MaskFormer(5, "resnet18", False), args)
    rates = {(group["rate"], group["weight_decay"]) for group in groups}
    assert rates == {(1e-4, 1e-4), (1e-4, 0), (1e-5, 1e-4), (1e-5, 0)}
    assert train.lr_factor(0, args) == 1
    assert train.lr_factor(80_000, args) == pytest.approx(0.5 ** 0.9)


def test_rates_and_decay_of_swin():
    args = train.parse_args(["--dataset", "ade20k", "--backbone", "swin_tiny_patch4_window7_224"])
    assert (args.lr, args.weight_decay, args.backbone_lr_factor) == (6e-5, 1e-2, 1.)
    assert args.warmup == 1500
    assert train.lr_factor(0, args) == pytest.approx(1e-6)
    assert train.lr_factor(1500, args) == pytest.approx((1 - 1500 / 160_000) ** 0.9)


def test_the_rate_may_fall_in_steps():
    args = train.parse_args("--dataset ade20k --schedule step --milestones 100 200".split())
    factors = [train.lr_factor(step, args) for step in (99, 100, 199, 200)]
    assert factors == pytest.approx([1, 0.1, 0.1, 0.01])


def test_what_a_recipe_does_not_say_is_as_in_the_paper():
    args = train.parse_args(["--dataset", "ade20k"])
    assert (args.queries, args.dim, args.decoder_layers, args.encoder_layers) == (100, 256, 6, 0)
    assert (args.heads, args.ffn_dim, args.freeze_bn) == (8, 2048, True)
    assert (args.class_weight, args.focal_weight, args.dice_weight) == (1, 20, 1)
    assert (args.no_object_weight, args.dropout, args.weight_decay) == (0.1, 0.1, 1e-4)
    assert (args.object_threshold, args.overlap_threshold) == (0.8, 0.8)
    assert (args.size_divisibility, args.schedule, args.warmup) == (32, "poly", 0)


@pytest.mark.parametrize("dataset", train.RECIPES)
def test_a_recipe_is_the_default_also_of_a_resumed_run(tmp_path, dataset):
    given = ["--dataset", dataset, "--output", str(tmp_path)]
    args = vars(train.parse_args(given))
    assert train.RECIPES[dataset].items() <= args.items()
    older = {name: value for name, value in args.items() if name not in ("dim", "crop")}
    (tmp_path / "config.json").write_text(json.dumps(older | {"git": None, "seed": 5}))
    resumed = vars(train.parse_args(["--output", str(tmp_path), "--resume"]))
    assert resumed == args | {"resume": True, "seed": 5}


def test_a_recipe_gives_way_to_a_flag():
    assert train.parse_args("--steps 7 --crop 32 64".split()).crop == [32, 64]
    assert train.parse_args("--no-pretrained --dataset ade20k".split()).backbone_lr_factor == 1


def test_every_flag_has_a_sentence_of_help(capsys):
    with pytest.raises(SystemExit) as ending:
        train.parse_args(["--help"])
    assert ending.value.code == 0
    text = capsys.readouterr().out
    entries = re.split(r"\n  (?=-)", text)[1:]
    assert len(entries) > 50
    for entry in entries:
        flag, sentence = re.split(r"\s{2,}", entry, maxsplit=1)
        assert len(sentence.split()) >= 4, flag


def test_norms_embeddings_and_relative_positions_do_not_decay_and_all_else_does():
    args = train.parse_args(["--dataset", "ade20k"])
    without_decay = re.compile(r"norm|bn\d|downsample\.1|query_pos|relative_position"
                               r"|decoder\.(stem|\w+\.\d)\.1\.")
    for backbone in ("swin_tiny_patch4_window7_224", "resnet18"):
        with torch.device("meta"):
            model = MaskFormer(5, backbone, False, encoder_layers=1)
        decay = {parameter: group["weight_decay"]
                 for group in train.parameter_groups(model, args)
                 for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            expected = 0 if without_decay.search(name) else 1e-4
            assert decay.pop(parameter) == expected, name
        assert not decay


def test_the_optimizer_is_adamw():
    args = args_of("--no-pretrained")
    optimizer, _ = train.start_optimizer(train.start_model(args, None, CPU), args, None, CPU)
    assert type(optimizer) is torch.optim.AdamW


def step(model, number=0, scaled=False, batches=None, **flags):
    """One training step -> the factors of the rates, the gradient that the optimizer gets, the
    step's scalars."""
    args = args_of()
    for name, value in flags.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = []

    def keep_gradient(*_, **__):
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained]))

    optimizer = torch.optim.AdamW(train.parameter_groups(model, args))
    optimizer.step = keep_gradient
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    batches = batches or [shapes_batch(range(2))]
    terms = train.training_step(number, batches, model, optimizer, scaler, args)
    factors = [group["lr"] / group["rate"] for group in optimizer.param_groups]
    return factors, gradients[0], terms


def test_a_step_takes_the_rate_of_its_own_number():
    model = tiny_model()
    expected = {0: 1e-6, 1: 0.25 * 0.9 ** 0.9, 4: 0.6 ** 0.9, 9: 0.1 ** 0.9}
    for number, factor in expected.items():
        factors, *_ = step(model, number, steps=10, warmup=4)
        assert len(factors) > 2
        assert factors == pytest.approx([factor] * len(factors), rel=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_of_the_whole_model_is_clipped_after_unscaling(scaled):
    _, clipped, terms = step(tiny_model(), scaled=scaled, clip=0.01)
    _, free, _ = step(tiny_model(), scaled=scaled, clip=0)
    assert free.norm() > 0.1
    assert terms["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-4)
    torch.testing.assert_close(clipped, free * 0.01 / free.norm(), rtol=1e-3, atol=1e-8)


def test_every_step_and_process_has_a_dropout_of_its_own(monkeypatch):
    seeds = []
    model = tiny_model()
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for process in range(2):
        monkeypatch.setattr(train, "rank", lambda: process)
        for number in range(3):
            step(model, number)
    assert len(set(seeds)) == 6


def test_weights_of_the_flags_reach_matching_and_loss(monkeypatch):
    given = []

    def noted_match(*args):
        given.append(args)
        return hungarian_match(*args)

    monkeypatch.setattr(train, "hungarian_match", noted_match)
    *_, terms = step(tiny_model(), class_weight=3, focal_weight=5, dice_weight=7,
                     no_object_weight=0.6)
    class_logits, mask_logits, labels, masks, owner, *matching_weights = given[0]
    assert matching_weights[:3] == [3, 5, 7]

    matches = hungarian_match(*given[0])
    ce, focal, dice = mask_classification_loss(class_logits, mask_logits, labels, masks, matches,
                                               no_object_weight=0.6)
    expected = {"loss_ce": ce, "loss_mask": focal, "loss_dice": dice,
                "matched_dice": 1 - dice / 2, "loss": 3 * ce + 5 * focal + 7 * dice}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach())


def test_processes_wait_for_one_another_in_the_last_pass_of_a_step_only(monkeypatch):
    model = tiny_model()
    passes = []

    @contextlib.contextmanager
    def no_sync():
        passes.append("alone")
        yield

    model.no_sync = no_sync
    model.register_forward_hook(lambda *_: passes.append("pass"))
    monkeypatch.setattr(train, "world_size", lambda: 2)
    step(model, batches=[shapes_batch([i]) for i in range(3)], accumulate=3)
    assert passes == ["alone", "pass", "alone", "pass", "pass"]


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    _, whole, _ = step(tiny_model(), batches=[shapes_batch(range(4))], clip=0)
    parts = [shapes_batch(range(2)), shapes_batch(range(2, 4))]
    _, accumulated, _ = step(tiny_model(), batches=parts, clip=0, accumulate=2)
    assert (whole - accumulated).norm() < 1e-5 * whole.norm()


def test_the_baselines_count_labeled_pixels():
    batch = shapes_batch(range(2), emptied=[1])
    labeled = (batch.segment_maps[0] > 0).sum()
    args = args_of("--model", "per-pixel")
    assert train.target_count([batch, batch], args) == labeled > 0


# ------------------------------------------------------------------------------------- samples, log
def test_overfitting_trains_and_tests_on_the_same_few_images_as_they_are():
    samples, test_set = train.load_datasets(train.parse_args(["--overfit", "3"]))
    truth = {name: image for image, *_, name in map(test_set.__getitem__, range(len(test_set)))}
    names = set()
    for n in range(6):
        image, *_, name = samples[n]
        assert torch.equal(image, truth[name])
        names.add(name)
    assert len(truth) == 3
    assert names == truth.keys()


def test_color_distortion_is_a_flag():
    for flag, kind in (("--color-distortion", v2.Compose), ("--no-color-distortion", v2.Identity)):
        samples, _ = train.load_datasets(train.parse_args([flag]))
        assert type(samples.augment.distort) is kind


def test_a_log_row_holds_the_means_since_the_last_one(tmp_path):
    terms = [{"loss": torch.tensor(x), "grad_norm": torch.tensor(3 * x)} for x in (1., 2., 6.)]
    train.write_log(tmp_path, train.parse_args([]), 7, terms, time.time() - 10, 1.5)
    row, = log_of(tmp_path)
    assert (row["step"], row["loss"], row["grad_norm"], row["data_time"]) == (7, 3, 9, 0.5)
    assert row["images_per_s"] == pytest.approx(3 * 16 / 10, rel=0.1)


def test_a_step_that_float16_skips_leaves_a_log_of_plain_numbers(tmp_path, monkeypatch):
    norms = iter([torch.inf, 1., 1.])
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: clip(*args).fill_(next(norms)))
    run("--steps", 3, "--amp", "fp16", "--output", tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert ["grad_norm" in row for row in rows[:3]] == [False, True, True]


def test_a_gradient_that_is_not_finite_stops_before_a_checkpoint(tmp_path, monkeypatch):
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * torch.nan)
    with pytest.raises(UserError, match="gradient is not finite"):
        run("--steps", 2, "--output", tmp_path)
    assert not list(tmp_path.glob("*.pt"))


def test_a_non_finite_loss_stops_with_step_rate_and_names_and_saves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"step \d+, learning rate 1e\+30, images \d{5}, "):
        run("--steps", 5, "--lr", 1e30, "--warmup", 0, "--clip", 0, "--schedule", "step",
            "--milestones", 9, "--output", tmp_path)
    assert not list(tmp_path.glob("*.pt"))


# ---------------------------------------------------------------------------------------- compiling
BACKENDS = [pytest.param("eager", id="traced"),
            pytest.param("inductor", id="compiled", marks=pytest.mark.skipif(
                "TEST_COMPILER" not in os.environ, reason="minutes: set TEST_COMPILER=1"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_run_has_the_weights_of_a_plain_one_and_compiles_a_few_times(
        tmp_path, monkeypatch, backend):
    """The backend "eager" traces, and traces again, as torch.compile does, but compiles nothing."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    flags = ["--steps", 6, "--batch-size", 2, "--decoder-layers", 1]
    numbers = {len(shapes_batch([2 * n, 2 * n + 1]).labels) for n in range(6)}
    assert len(numbers) > 3                                      # of segments, as in the run
    torch._dynamo.reset()
    counters.clear()
    run(*flags, "--compile", "--output", tmp_path / "compiled")
    # The model, costs and mask terms, each at most a second time when a size turns out to vary.
    assert 3 <= counters["stats"]["unique_graphs"] <= 6
    assert not counters["graph_break"]

    run(*flags, "--no-compile", "--output", tmp_path / "plain")
    plain = weights(tmp_path / "plain" / "last.pt")
    compiled = weights(tmp_path / "compiled" / "last.pt")
    assert plain.keys() == compiled.keys()                       # no prefix such as `_orig_mod.`
    for name, value in plain.items():
        torch.testing.assert_close(value, compiled[name], rtol=1e-4, atol=1e-4)


def settings(compile):
    return SimpleNamespace(compile=compile)


def test_training_is_compiled_on_a_gpu_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "has_compiler", lambda *_: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert not train.should_compile(settings(True), gpu)
    (tmp_path / "Python.h").touch()
    assert [train.should_compile(settings(given), gpu) for given in (None, True, False)] == [
        True, True, False]
    assert [train.should_compile(settings(given), CPU) for given in (None, True, False)] == [
        False, True, False]


@pytest.mark.parametrize("device, missing", [("cpu", "a C++ compiler"),
                                             ("cuda", "Triton, a C compiler or Python.h")])
def test_without_a_compiler_nothing_is_compiled_and_a_line_says_so(
        monkeypatch, capsys, device, missing):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    device = torch.device(device)
    assert not train.should_compile(settings(True), device)
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {missing} is missing, so nothing is compiled")
    assert told.count("\n") == 1

    assert not train.should_compile(settings(False), device)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------- processes
def tiny_model():
    """Without dropout and batch norms in training mode, so that a batch may be split."""
    torch.manual_seed(0)
    return MaskFormer(6, "test_resnet", False, 7, dim=32, decoder_layers=2, heads=2, ffn_dim=64,
                      dropout=0., freeze_bn=True).train()


def shapes_batch(indices, emptied=()):
    """Some drawn images; those whose numbers in the batch are `emptied` lose their segments."""
    args = train.parse_args([])
    augment = train.Augmentation(args.short_side, 256, args.crop, False)
    samples = TrainingSamples(Shapes(), augment)
    batch = collate([samples[i] for i in indices])
    keep = torch.tensor([b not in emptied for b in batch.owner.tolist()], dtype=torch.bool)
    return batch._replace(ids=batch.ids[keep], labels=batch.labels[keep], owner=batch.owner[keep])


def one_of_two(rank, port, path, emptied):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(tiny_model())
    batch = shapes_batch(range(2 * rank, 2 * rank + 2), emptied[rank])
    _, gradient, _ = step(model, batches=[batch], clip=0)
    if rank == 0:
        torch.save(gradient, path)
    dist.destroy_process_group()


@pytest.mark.parametrize("emptied", [([], []), ([], [0, 1])], ids=["full", "one process empty"])
def test_two_processes_have_the_gradient_of_one(tmp_path, emptied):
    of_both = [*emptied[0], *(b + 2 for b in emptied[1])]
    batch = shapes_batch(range(4), of_both)
    counts = torch.bincount(batch.owner, minlength=4).view(2, 2).sum(1)
    assert counts[0] != counts[1]
    _, whole, _ = step(tiny_model(), batches=[batch], clip=0)

    arguments = (free_port(), tmp_path / "gradient.pt", emptied)
    mp.start_processes(one_of_two, arguments, nprocs=2, start_method="fork")
    split = torch.load(tmp_path / "gradient.pt", weights_only=True)
    assert (whole - split).norm() < 1e-5 * whole.norm()


def free_port():
    """A port that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_processes_share_batch_norm_statistics_before_a_test_and_go_on_in_training_mode(
        monkeypatch):
    model = MaskFormer(6, "test_resnet", False, 7, dim=32, decoder_layers=1, heads=2, ffn_dim=64)
    happened = []
    monkeypatch.setattr(train, "world_size", lambda: 2)
    monkeypatch.setattr(train, "rank", lambda: 1)
    monkeypatch.setattr(train.dist, "broadcast",
                        lambda buffer, source: happened.append((id(buffer), source)))
    monkeypatch.setattr(train, "evaluate",
                        lambda model, *_, **__: happened.append(model.training))
    train.evaluate_run(model.train(), None, None, 1, train.parse_args([]))
    assert happened == [*((id(buffer), 0) for buffer in model.buffers()), False]
    assert model.training
