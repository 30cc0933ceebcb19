"""Training: what a run guarantees, on one process and on two."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
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
from torchvision.transforms import v2

import evaluate
import train
from batches import Batch, TrainingSamples, collate, step_batches
from data import RECIPES, Shapes, UserError
from evaluate import load
from losses import mask_classification_loss
from maskformer import MaskFormer
from matcher import hungarian_match
from run import STOP_SIGNALS

ROOT = Path(__file__).parent.parent
TINY = ("--dim 32 --ffn-dim 64 --heads 2 --decoder-layers 2 --queries 7 --batch-size 4 --workers 0 --log-every 1 "
        "--backbone test_resnet").split()


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Held-out shapes: 4 instead of 100, so that a run ends in seconds."""
    monkeypatch.setitem(train.DATASETS, "shapes", partial(original, length=4))


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run takes SIGTERM and SIGUSR1 over; the tests, and the processes they start, give them back."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number, handler in handlers.items():
        signal.signal(number, handler)


original = train.DATASETS["shapes"]


def run(*flags):
    torch.use_deterministic_algorithms(True)
    train.main([*TINY, *map(str, flags)])


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------- a run
def test_a_run_leaves_everything_it_promises(tmp_path):
    run("--steps", 2, "--output", tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "log.jsonl", "last.pt", "best.pt", "metrics.json", "predictions.png", "queries.png"}
    row = log_of(tmp_path / "run")[0]
    assert {"step", "loss", "loss_ce", "loss_mask", "loss_dice", "lr", "images_per_s", "data_time", "memory_gb"} <= set(row)
    assert row["loss"] == pytest.approx(row["loss_ce"] + 20 * row["loss_mask"] + row["loss_dice"], rel=1e-3)
    assert {"mIoU", "PQ", "SQ", "RQ"} <= set(json.loads((tmp_path / "run" / "metrics.json").read_text()))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["steps"] == 2 and config["versions"]["torch"] == torch.__version__.split("+")[0]
    model, state = load(tmp_path / "run" / "last.pt")
    assert state["step"] == 2 and state["classes"][0] == "stripes" and not model.training


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(tmp_path):
    flags = ["--dropout", 0.1, "--save-every", 3]
    run("--steps", 6, "--output", tmp_path / "whole", *flags)
    real_save, saved = train.save_checkpoint, []

    def interrupted(path, parts, step, *rest):
        real_save(path, parts, step, *rest)
        saved.append(step)
        raise KeyboardInterrupt
    train.save_checkpoint = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            run("--steps", 6, "--output", tmp_path / "cut", *flags)
    finally:
        train.save_checkpoint = real_save
    assert saved == [3]
    run("--steps", 6, "--output", tmp_path / "cut", "--resume", *flags)
    whole, cut = weights(tmp_path / "whole" / "last.pt"), weights(tmp_path / "cut" / "last.pt")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_the_first_step_is_logged_so_that_its_time_is_known_early(tmp_path):
    run("--steps", 6, "--log-every", 5, "--output", tmp_path)
    assert [row["step"] for row in log_of(tmp_path) if "loss" in row] == [1, 5, 6]


@pytest.mark.parametrize("name", ["truth", "semantic", "panoptic"])
def test_an_image_may_be_called_like_a_caption(tmp_path, name):
    images = original(split="val", length=1)
    images.pairs = [(name, None)]
    evaluate.draw_predictions(tiny_model().eval(), images, tmp_path / "x.png", test_short_side=64, test_max_long_side=96)
    assert Image.open(tmp_path / "x.png").size == (4 * 320, 240)


def test_runs_without_output_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--steps", 1)
    run("--steps", 1)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["shapes-001", "shapes-002"]


def test_init_skips_a_class_head_of_another_size_and_nothing_else(tmp_path, capsys):
    run("--steps", 1, "--output", tmp_path / "six")
    capsys.readouterr()
    run("--steps", 1, "--lr", 0, "--num-classes", 9, "--output", tmp_path / "nine", "--init", tmp_path / "six" / "last.pt")
    assert "skipped: to_class.bias, to_class.weight" in capsys.readouterr().out
    six, nine = weights(tmp_path / "six" / "last.pt"), weights(tmp_path / "nine" / "last.pt")
    kept = [name for name in six if not name.startswith("to_class") and "running" not in name and "num_b" not in name]
    assert all(torch.equal(six[name], nine[name]) for name in kept) and nine["to_class.bias"].shape == (10,)
    with pytest.raises(UserError, match="another model"):
        run("--steps", 1, "--dim", 64, "--output", tmp_path / "x", "--init", tmp_path / "six" / "last.pt")


def test_init_skips_the_queries_of_the_baseline_whose_queries_are_classes(tmp_path, capsys):
    run("--model", "per-pixel-plus", "--steps", 1, "--output", tmp_path / "six")
    run("--model", "per-pixel-plus", "--steps", 1, "--num-classes", 9, "--output", tmp_path / "nine",
        "--init", tmp_path / "six" / "last.pt")
    assert "skipped: query_pos.weight\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="another model"):                # where queries are no classes
        run("--queries", 9, "--steps", 1, "--output", tmp_path / "x", "--init", tmp_path / "six" / "last.pt")


def test_a_run_is_saved_before_each_of_its_tests(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(train, "test", lambda model, images, folder, step, args: steps.append(
        (step, torch.load(folder / "last.pt", weights_only=True)["step"])) or {"mIoU": 0.})
    monkeypatch.setattr(train, "table_of_classes", lambda *_: "")
    run("--steps", 5, "--eval-every", 2, "--save-every", 100, "--output", tmp_path)
    assert steps == [(2, 2), (4, 4), (5, 5)]


@pytest.mark.parametrize("model", ["per-pixel", "per-pixel-plus"])
def test_the_baselines_train_and_score(tmp_path, model):
    run("--steps", 2, "--model", model, "--output", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert "mIoU" in metrics and "PQ_st" in metrics and "PQ" not in metrics


def test_twenty_steps_lower_the_loss_and_start_at_the_log_of_the_label_count(tmp_path):
    run("--steps", 20, "--overfit", 4, "--lr", 2e-3, "--output", tmp_path)
    losses = [row for row in log_of(tmp_path) if "loss" in row]
    assert losses[0]["loss_ce"] / 2 == pytest.approx(torch.tensor(7.).log().item(), rel=0.25)
    assert losses[-1]["loss"] < 0.8 * losses[0]["loss"]


def test_a_non_finite_loss_stops_with_step_rate_and_names_and_saves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"step \d+, learning rate 1e\+30, images \d{5}, "):
        run("--steps", 5, "--lr", 1e30, "--warmup", 0, "--clip", 0, "--schedule", "step", "--output", tmp_path)
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_starts_within_one_percent_of_float32(tmp_path, amp):
    run("--steps", 1, "--output", tmp_path / "off", "--amp", "off")
    run("--steps", 1, "--output", tmp_path / amp, "--amp", amp)
    exact, mixed = (log_of(tmp_path / name)[0]["loss"] for name in ("off", amp))
    assert mixed == pytest.approx(exact, rel=0.01)


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    model, batch = tiny_model(), shapes_batch(range(4))
    whole = gradient(model, [batch])
    parts = [shapes_batch(range(2)), shapes_batch(range(2, 4))]
    assert (whole - gradient(tiny_model(), parts)).norm() < 1e-5 * whole.norm()


# ---------------------------------------------------------------------------------------- optimisation
def test_rates_and_decay_of_the_recipe():
    args = train.parse(["--dataset", "ade20k"])
    assert (args.batch_size, args.steps, args.clip, args.lr, args.backbone_lr_factor) == (16, 160_000, 0.01, 1e-4, 0.1)
    groups = train.parameter_groups(MaskFormer(5, "resnet18", False), args)
    rates = {(group["rate"], group["weight_decay"]) for group in groups}
    assert rates == {(1e-4, 1e-4), (1e-4, 0), (1e-5, 1e-4), (1e-5, 0)}
    assert train.lr_factor(0, args) == 1 and train.lr_factor(80_000, args) == pytest.approx(0.5 ** 0.9)
    swin = train.parse(["--dataset", "ade20k", "--backbone", "swin_tiny_patch4_window7_224"])
    assert (swin.lr, swin.weight_decay, swin.backbone_lr_factor, swin.warmup) == (6e-5, 1e-2, 1., 1500)
    assert train.lr_factor(0, swin) == pytest.approx(1e-6)
    assert train.lr_factor(1500, swin) == pytest.approx((1 - 1500 / 160_000) ** 0.9)
    steps = train.parse(["--dataset", "ade20k", "--schedule", "step", "--milestones", "100", "200"])
    assert [round(train.lr_factor(s, steps), 6) for s in (99, 100, 200)] == [1, 0.1, 0.01]


def test_what_a_recipe_does_not_say_is_as_in_the_paper():
    args = train.parse(["--dataset", "ade20k"])
    assert (args.queries, args.dim, args.decoder_layers, args.encoder_layers) == (100, 256, 6, 0)
    assert (args.heads, args.ffn_dim, args.freeze_bn) == (8, 2048, True)
    assert (args.class_weight, args.focal_weight, args.dice_weight, args.no_object_weight) == (1, 20, 1, 0.1)
    assert (args.dropout, args.weight_decay, args.object_threshold, args.overlap_threshold) == (0.1, 1e-4, 0.8, 0.8)
    assert (args.size_divisibility, args.schedule, args.warmup) == (32, "poly", 0)


def test_norms_embeddings_and_relative_positions_do_not_decay_and_all_else_does():
    args, undecayed = train.parse(["--dataset", "ade20k"]), 0
    for backbone in ("swin_tiny_patch4_window7_224", "resnet18"):
        with torch.device("meta"):
            model = MaskFormer(5, backbone, False, encoder_layers=1)
        groups = train.parameter_groups(model, args)
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            exempt = re.search(r"norm|bn\d|downsample\.1|query_pos|relative_position|decoder\.(stem|\w+\.\d)\.1\.", name)
            assert decay.pop(id(parameter)) == (0 if exempt else 1e-4), name
        assert not decay


def step(model, number=0, scaled=False, batches=None, **flags):
    """One training step -> rates of the two groups, gradient as the optimizer gets it, the step's scalars."""
    args = train.parse([str(part) for name, value in flags.items() for part in ("--" + name.replace("_", "-"), value)])
    args.num_classes, found = 6, []
    optimizer = torch.optim.AdamW(train.parameter_groups(model, args))
    optimizer.step = lambda: found.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    terms = train.training_step(number, batches or [shapes_batch(range(2))], model, optimizer, scaler, args)
    return [group["lr"] / group["rate"] for group in optimizer.param_groups], found[0], terms


def test_a_step_takes_the_rate_of_its_own_number():
    model = tiny_model()
    for number, factor in ((0, 1e-6), (1, 0.25 * 0.9 ** 0.9), (4, 0.6 ** 0.9), (9, 0.1 ** 0.9)):
        factors, *_ = step(model, number, steps=10, warmup=4)
        assert factors == pytest.approx([factor] * len(factors), rel=1e-5) and len(factors) > 2


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_of_the_whole_model_is_clipped_after_unscaling(scaled):
    (_, clipped, terms), (_, free, _) = (step(tiny_model(), scaled=scaled, clip=most) for most in (0.01, 1e9))
    assert terms["grad_norm"] == pytest.approx(free.norm().item(), rel=1e-4) and free.norm() > 0.1
    torch.testing.assert_close(clipped, free * 0.01 / free.norm(), rtol=1e-3, atol=1e-8)


def test_every_step_and_process_has_a_dropout_of_its_own(monkeypatch):
    seeds, model = [], tiny_model()
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for process in range(2):
        monkeypatch.setattr(train, "rank", lambda: process)
        for number in range(3):
            step(model, number)
    assert len(set(seeds)) == 6


def test_weights_of_the_flags_reach_matching_and_loss(monkeypatch):
    model, batch, given = tiny_model(), shapes_batch(range(2)), []
    monkeypatch.setattr(train, "hungarian_match", lambda *args: given.append(args) or hungarian_match(*args))
    *_, terms = step(model, batches=[batch], class_weight=3, focal_weight=5, dice_weight=7, no_object_weight=0.6)
    ce, focal, dice = mask_classification_loss(*given[0][:4], hungarian_match(*given[0]), no_object_weight=0.6)
    assert given[0][5:] == (3, 5, 7)
    for name, value in (("loss_ce", ce), ("loss_mask", focal), ("loss_dice", dice), ("matched_dice", 1 - dice / 2),
                        ("loss", 3 * ce + 5 * focal + 7 * dice)):
        torch.testing.assert_close(terms[name], value.detach())


def test_processes_wait_for_one_another_in_the_last_pass_of_a_step_only(monkeypatch):
    model, passes = tiny_model(), []
    @contextlib.contextmanager
    def no_sync():
        passes.append("alone")
        yield
    model.no_sync = no_sync
    model.register_forward_hook(lambda *_: passes.append("pass"))
    monkeypatch.setattr(train, "world_size", lambda: 2)
    step(model, batches=[shapes_batch([i]) for i in range(3)], accumulate=3)
    assert passes == ["alone", "pass", "alone", "pass", "pass"]


def test_the_optimizer_is_adamw():
    args = train.parse([*TINY, "--no-pretrained"])
    args.num_classes = 6
    parts, *_ = train.prepare(args, torch.device("cpu"), [""] * 6)
    assert type(parts["optimizer"]) is torch.optim.AdamW


def test_overfitting_trains_and_tests_on_the_same_few_images_as_they_are():
    samples, test_set = train.load_datasets(train.parse(["--overfit", "3"]))
    truth = {name: image for image, *_, name in map(test_set.__getitem__, range(len(test_set)))}
    drawn = [samples[n] for n in range(6)]
    assert [*truth] == ["00000", "00001", "00002"] and {name for *_, name in drawn} == set(truth)
    assert all(torch.equal(image, truth[name]) for image, *_, name in drawn)


def test_color_distortion_is_a_flag():
    for flag, kind in (("--color-distortion", v2.Compose), ("--no-color-distortion", v2.Identity)):
        samples, _ = train.load_datasets(train.parse([flag]))
        assert type(samples.augment.distort) is kind


def test_a_checkpoint_is_loaded_with_its_batch_norms_frozen_or_not():
    for flag, frozen in (("--freeze-bn", True), ("--no-freeze-bn", False)):
        model = evaluate.build_model(vars(train.parse([*TINY, flag])), 6)            # not pretrained, as by `load`
        assert any("num_batches" in name for name in model.state_dict()) != frozen


def test_the_baselines_count_labelled_pixels():
    batch = shapes_batch(range(2), emptied=[1])
    labelled = (batch.segment_maps[0] > 0).sum()
    assert train.target_count([batch, batch], train.parse(["--model", "per-pixel"])) == labelled > 0


def test_a_resumed_run_goes_on_with_its_loss_scale(tmp_path):
    args = train.parse([*TINY, "--no-pretrained", "--amp", "fp16", "--output", str(tmp_path), "--resume"])
    args.num_classes = 6
    parts, *_ = train.prepare(args, torch.device("cpu"), [""] * 6)
    parts["scaler"].scale(torch.ones(()))
    parts["scaler"].update(8.)
    dataset = SimpleNamespace(classes=[""] * 6, is_thing=[False] * 6)
    train.save_checkpoint(tmp_path / "last.pt", parts, 1, 0., args, dataset)
    assert train.prepare(args, torch.device("cpu"), [""] * 6)[0]["scaler"].get_scale() == 8


def test_a_log_row_holds_the_means_since_the_last_one(tmp_path):
    args, terms = train.parse([]), [{"loss": torch.tensor(x), "grad_norm": torch.tensor(3 * x)} for x in (1., 2., 6.)]
    train.write_log(tmp_path, args, 7, terms, 1., 0.5)
    row, = log_of(tmp_path)
    assert (row["step"], row["loss"], row["grad_norm"]) == (7, 3, 9)


def test_processes_share_batch_norm_statistics_before_a_test_and_go_on_in_training_mode(monkeypatch):
    model, shared = MaskFormer(6, "test_resnet", False, 7, dim=32, decoder_layers=1, heads=2, ffn_dim=64), []
    monkeypatch.setattr(train, "world_size", lambda: 2)
    monkeypatch.setattr(train, "rank", lambda: 1)
    monkeypatch.setattr(train.dist, "broadcast", lambda buffer, source: shared.append((id(buffer), source)))
    monkeypatch.setattr(train, "evaluate", lambda model, *_, **__: shared.append(model.training))
    train.test(model.train(), None, None, 1, train.parse([]))
    assert shared == [*((id(buffer), 0) for buffer in model.buffers()), False] and model.training


@pytest.mark.parametrize("dataset", RECIPES)
def test_a_recipe_is_the_default_also_of_a_resumed_run(tmp_path, dataset):
    given = ["--dataset", dataset, "--output", str(tmp_path)]
    args = vars(train.parse(given))
    assert RECIPES[dataset].items() <= args.items() and args["backbone"] in ("resnet50", "resnet10t")
    kept = {name: value for name, value in args.items() if name not in ("dim", "crop")}  # older, without these
    (tmp_path / "config.json").write_text(json.dumps(kept | {"git": None, "seed": 5}))
    assert vars(train.parse(["--output", str(tmp_path), "--resume"])) == args | {"resume": True, "seed": 5}


def test_a_recipe_gives_way_to_a_flag():
    assert train.parse(["--steps", "7", "--crop", "32", "64"]).crop == [32, 64]
    assert train.parse(["--no-pretrained", "--dataset", "ade20k"]).backbone_lr_factor == 1


# ---------------------------------------------------------------------------------------- processes
def tiny_model():
    """Dropout 0 and no batch norm in training mode, so that a batch may be split."""
    torch.manual_seed(0)
    return MaskFormer(6, "test_resnet", False, 7, dim=32, decoder_layers=2, heads=2, ffn_dim=64, dropout=0.,
                      freeze_bn=True).train()


def shapes_batch(indices, emptied=()):
    args = train.parse([])
    samples = TrainingSamples(Shapes(), train.Augmentation(args.short_side, 256, args.crop, False))
    batch = collate([samples[i] for i in indices])
    keep = torch.tensor([b not in emptied for b in batch.owner.tolist()], dtype=torch.bool)
    return Batch(batch.images, batch.segment_maps, batch.ids[keep], batch.labels[keep], batch.owner[keep], batch.names)


def gradient(model, batches):
    """The gradient that one training step would use, as one vector."""
    args = train.parse(["--accumulate", str(len(batches))])
    args.num_classes = 6
    optimizer = torch.optim.SGD([{"params": model.parameters(), "rate": 1.}], lr=0.)
    found = []
    optimizer.step = lambda: found.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))
    train.nn.utils.clip_grad_norm_, clip = lambda *_: torch.zeros(()), train.nn.utils.clip_grad_norm_
    try:
        train.training_step(0, batches, model, optimizer, torch.amp.GradScaler("cpu", enabled=False), args)
    finally:
        train.nn.utils.clip_grad_norm_ = clip
    return found[0]


def one_of_two(rank, port, path, emptied):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(tiny_model())
    batch = shapes_batch(range(2 * rank, 2 * rank + 2), emptied[rank])
    found = gradient(model, [batch])
    if rank == 0:
        torch.save(found, path)
    dist.destroy_process_group()


@pytest.mark.parametrize("emptied", [([], []), ([], [0, 1])], ids=["full", "one process empty"])
def test_two_processes_have_the_gradient_of_one(tmp_path, emptied):
    batch = shapes_batch(range(4), [*emptied[0], *(b + 2 for b in emptied[1])])
    assert len(set(torch.bincount(batch.owner, minlength=4).view(2, 2).sum(1).tolist())) == 2      # unequal counts
    whole = gradient(tiny_model(), [batch])
    port = 20_000 + os.getpid() % 20_000
    mp.spawn(one_of_two, (port, tmp_path / "gradient.pt", emptied), nprocs=2)
    split = torch.load(tmp_path / "gradient.pt", weights_only=True)
    assert (whole - split).norm() < 1e-5 * whole.norm()


def test_torchrun_with_two_processes_trains_evaluates_and_ends(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(20_000 + os.getpid() % 20_000), str(ROOT / "train.py"), *TINY, "--steps", "2", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((tmp_path / "config.json").read_text())["processes"] == 2
    assert log_of(tmp_path)[-1]["mIoU"] >= 0


# ---------------------------------------------------------------------------------------- evaluation as a command
def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--workers", "0", *map(str, flags)])
    evaluate.main()


def test_a_checkpoint_is_evaluated_and_its_predictions_saved(tmp_path, monkeypatch, capsys):
    run("--steps", 1, "--output", tmp_path)
    command(monkeypatch, "--checkpoint", tmp_path / "last.pt", "--save", tmp_path / "out", "--scales", 0.5, 1, "--flip")
    assert "mIoU" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert len(content["annotations"]) == 4 and [c["isthing"] for c in content["categories"]] == [0, 0, 0, 1, 1, 1]
    for kind in ("semantic", "panoptic", "overlay"):
        assert len(list((tmp_path / "out" / kind).iterdir())) == 4
    assert "PQ" in json.loads((tmp_path / "out" / "metrics.json").read_text())


def test_flags_of_an_evaluation_reach_it_and_come_before_those_of_the_run(monkeypatch):
    given, state = {}, dict(config=vars(train.parse([])) | {"task": "panoptic"}, classes=[""] * 6, is_thing=[False] * 6)
    monkeypatch.setattr(evaluate, "load", lambda source: (tiny_model(), state))
    monkeypatch.setattr(evaluate, "evaluate", lambda model, images, *args, **options: given.update(
        options, args=args) or {"IoU": []})
    command(monkeypatch, "--checkpoint", "x.pt", "--scales", 0.5, 1.5, "--flip", "--object-threshold", 0.3,
            "--test-short-side", 48, "--inference", "panoptic")
    assert given == dict(scales=[0.5, 1.5], flip=True, object_threshold=0.3, overlap_threshold=0.8, test_short_side=48,
                         test_max_long_side=96, args=("panoptic", None, 0, "panoptic"))


def test_own_photos_get_a_label_map_an_overlay_and_segments(tmp_path, monkeypatch):
    run("--steps", 1, "--output", tmp_path)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "photo.jpg")
    command(monkeypatch, "--checkpoint", tmp_path / "last.pt", "--images", tmp_path / "photo.jpg", "--save", tmp_path / "out")
    assert Image.open(tmp_path / "out" / "semantic" / "photo.png").size == (50, 40)
    assert (tmp_path / "out" / "panoptic.json").exists() and (tmp_path / "out" / "overlay" / "photo.jpg").exists()


def test_a_folder_stands_for_the_photos_in_it_even_for_one_pixel(tmp_path, monkeypatch):
    run("--steps", 1, "--output", tmp_path / "run")
    (tmp_path / "photos").mkdir()
    for name in ("notes.txt", "._a.png"):
        (tmp_path / "photos" / name).write_text("no photo")
    (tmp_path / "photos" / "x.png").mkdir()
    for name, size in (("b.JPG", (1, 1)), ("a.png", (7, 300))):
        Image.new("RGB", size, "red").save(tmp_path / "photos" / name)
    command(monkeypatch, "--checkpoint", tmp_path / "run/last.pt", "--images", tmp_path / "photos",
            "--save", tmp_path / "out")
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out/semantic").iterdir()}
    assert sizes == {"a.png": (7, 300), "b.png": (1, 1)}
    with pytest.raises(UserError, match="no images"):
        command(monkeypatch, "--checkpoint", tmp_path / "run/last.pt", "--images", tmp_path / "photos" / "x.png")


def test_a_dataset_of_another_class_count_is_refused(tmp_path, monkeypatch):
    run("--steps", 1, "--output", tmp_path)
    monkeypatch.setitem(train.DATASETS, "folder", lambda root, split: original(root, split, num_classes=9, length=4))
    with pytest.raises(UserError, match="6 classes, the dataset 9"):
        command(monkeypatch, "--checkpoint", tmp_path / "last.pt", "--dataset", "folder")


def test_drawn_shapes_of_nine_classes_are_drawn_again_for_their_checkpoint(tmp_path, monkeypatch, capsys):
    run("--steps", 1, "--num-classes", 9, "--output", tmp_path)
    capsys.readouterr()
    command(monkeypatch, "--checkpoint", tmp_path / "last.pt")
    assert "mIoU" in capsys.readouterr().out and len(load(tmp_path / "last.pt")[1]["classes"]) == 9


def test_a_photo_has_no_panoptic_result_where_the_model_has_none(tmp_path, monkeypatch):
    run("--steps", 1, "--model", "per-pixel", "--output", tmp_path / "run")
    Image.new("RGB", (60, 40)).save(tmp_path / "photo.png")
    command(monkeypatch, "--checkpoint", tmp_path / "run/last.pt", "--images", tmp_path / "photo.png",
            "--save", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["overlay", "semantic"]


def test_a_run_for_semantic_masks_is_scored_without_instances(tmp_path):
    run("--steps", 1, "--task", "semantic", "--matching", "fixed", "--queries", 6, "--output", tmp_path)
    assert "PQ" not in json.loads((tmp_path / "metrics.json").read_text())


def test_a_resumed_run_follows_the_new_rate_and_needs_an_output(tmp_path):
    run("--steps", 1, "--output", tmp_path)
    run("--steps", 2, "--lr", 1e-9, "--weight-decay", 0, "--output", tmp_path, "--resume")
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert {group["rate"] for group in state["optimizer"]["param_groups"]} == {1e-9} and state["step"] == 2
    with pytest.raises(UserError, match="--output"):
        run("--resume")


def test_a_resumed_run_says_what_it_is_tested_at_once_more_and_logs_it_once(tmp_path):
    run("--steps", 4, "--eval-every", 2, "--save-every", 2, "--output", tmp_path)
    step_two = torch.load(tmp_path / "last.pt", weights_only=True) | {"step": 2}
    torch.save(step_two, tmp_path / "last.pt")                           # killed after it was tested
    run("--steps", 4, "--eval-every", 2, "--save-every", 2, "--output", tmp_path, "--resume")
    rows = [(row["step"], "mIoU" in row) for row in log_of(tmp_path)]
    assert rows == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]


def test_a_resumed_run_keeps_the_flags_that_are_not_given_again(tmp_path):
    run("--steps", 2, "--seed", 3, "--lr", 0.003, "--num-classes", 8, "--task", "semantic", "--output", tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    train.main(["--output", str(tmp_path), "--resume", "--steps", "3"])
    assert json.loads((tmp_path / "config.json").read_text()) == before | {"steps": 3, "resume": True}
    assert log_of(tmp_path)[-1]["step"] == 3


def test_a_longer_run_keeps_what_was_logged_and_best(tmp_path):
    run("--steps", 2, "--output", tmp_path)
    best = weights(tmp_path / "best.pt")
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert last["best"] == json.loads((tmp_path / "metrics.json").read_text())["PQ"]
    torch.save(last | {"best": 99.}, tmp_path / "last.pt")               # as if nothing could be better
    train.main(["--output", str(tmp_path), "--resume", "--steps", "3", "--no-compile", "--no-download"])
    assert [(row["step"], "mIoU" in row) for row in log_of(tmp_path)] == [
        (1, False), (2, False), (2, True), (3, False), (3, True)]
    assert all(torch.equal(best[name], value) for name, value in weights(tmp_path / "best.pt").items())


def test_a_resumed_run_on_own_data_needs_no_other_flags(tmp_path):
    for part in ("images", "annotations"):
        for split in ("train", "val"):
            (tmp_path / part / split).mkdir(parents=True)
            picture = np.zeros((40, 50) if part == "annotations" else (40, 50, 3), np.uint8)
            Image.fromarray(picture).save(tmp_path / part / split / "a.png")
    (tmp_path / "classes.txt").write_text("floor\nwall\n")
    run("--dataset", "folder", "--data-root", tmp_path, "--crop", 32, 32, "--test-short-side", 32, "--steps", 1,
        "--no-pretrained", "--output", tmp_path / "run")
    train.main(["--output", str(tmp_path / "run"), "--resume", "--steps", "2"])
    assert json.loads((tmp_path / "run/metrics.json").read_text())["step"] == 2


def test_a_gradient_that_is_not_finite_stops_before_a_checkpoint(tmp_path, monkeypatch):
    clip = train.nn.utils.clip_grad_norm_
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * torch.nan)
    with pytest.raises(UserError, match="gradient is not finite"):
        run("--steps", 2, "--output", tmp_path)
    assert not (tmp_path / "last.pt").exists() and not (tmp_path / "best.pt").exists()
