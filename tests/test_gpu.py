"""Where tensors lie, and what a GPU waits for.

Without a GPU a pretended one tells: on it any mixture of devices is an error. The tests that need a
real one, of which one is enough, run with `pytest tests/test_gpu.py`.
"""
import os
import traceback
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

import evaluate
import train
from data import step_batches, training_batches
from test_train import ROOT, content, free_port, log_of, shapes_batch

pytestmark = pytest.mark.usefixtures("short_tests", "signals_as_before")

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MODELS = ["--model maskformer",
          "--model maskformer --encoder-layers 1 --task semantic",
          "--matching fixed --queries 6 --task semantic",
          "--model per-pixel",
          "--model per-pixel-plus"]
SMALL = "--no-pretrained --backbone test_resnet --steps 8 --workers 0 --batch-size 4".split()
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


# ------------------------------------------------------------------------------------ pretended GPU
WAITING = {"__bool__", "__float__", "__index__", "__int__", "bincount", "equal", "item",
           "masked_select", "nonzero", "tolist", "unique"}


class PretendedGpu(TorchFunctionMode):
    """Tensors with the attribute `pretended` say that they lie on the GPU, and so do results of
    them. AssertionError where they meet CPU tensors that are no scalars.

    waits: the lines of this project that would wait for the GPU
    """

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = function.__name__
        tensors = tensors_in((args, kwargs))
        on_gpu = any(map(pretended, tensors))

        attribute = resolve_name(function) if name in ("__get__", "__set__") else ""
        if attribute == "torch.Tensor.device.__get__":
            return GPU if on_gpu else CPU
        if attribute == "torch.Tensor.is_cuda.__get__":
            return on_gpu
        if name in ("to", "cpu"):
            return self.move(name, function, *args, **kwargs)

        # A tensor on a GPU may be indexed by tensors from the CPU.
        indexed = name in ("__getitem__", "__setitem__") and pretended(args[0])
        if on_gpu and name in WAITING or indexed and waits_for_indices(*args):
            self.waits.append(where())

        meeting = tensors
        if indexed:
            meeting = tensors_in((args[0], args[2:]))
        elif attribute:
            meeting = []
        mixed = on_gpu and any(x.dim() > 0 and not pretended(x) for x in meeting)
        as_numpy = on_gpu and name in ("__array__", "numpy") and not kwargs.get("force")
        assert not mixed and not as_numpy, f"{name} mixes devices: {where()}"

        if kwargs.get("device") is not None:
            on_gpu = torch.device(kwargs.pop("device")) == GPU
        result = function(*args, **kwargs)
        for x in tensors_in(result):
            x.pretended = on_gpu
        return result

    def move(self, name, function, x, *args, **kwargs):
        """`to` and `cpu`."""
        devices = [a for a in (*args, kwargs.pop("device", None))
                   if isinstance(a, (str, torch.device))]
        if devices:
            to_gpu = torch.device(devices[0]) == GPU
        else:
            to_gpu = pretended(x) and name == "to"               # to another type
        if pretended(x) != to_gpu and not (to_gpu and kwargs.get("non_blocking")):
            self.waits.append(where())

        result = x
        if name == "to":
            result = function(x, *(a for a in args if a not in devices), **kwargs)
        if result is x:                                          # not the tensor that stays behind
            result = x.view_as(x)
        result.pretended = to_gpu
        return result


def tensors_in(arguments):
    return [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]


def pretended(x):
    return getattr(x, "pretended", False)


def waits_for_indices(x, index, *value):
    """True values of masks have to be counted, indices to be sent from the CPU; before torch 2.15
    also a number that is written to one place."""
    number_sent = value and isinstance(index, int) and not isinstance(value[0], torch.Tensor)
    return number_sent or any(i.dtype == torch.bool or not pretended(i) for i in tensors_in(index))


def where():
    """The line of this project that torch was called from."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
    if not frames:
        return "no line of ours"
    return f"{Path(frames[-1].filename).name}: {frames[-1].line}"


def pretend(model):
    for x in (*model.parameters(), *model.buffers()):
        x.pretended = True


def start(flags, device=CPU, batches=2):
    """-> settings, model, optimizer, scaler, held-out images and some batches."""
    args = train.parse_args([*SMALL, *flags.split()])
    args.amp = train.pick_amp(args.amp, CPU)                     # off, unless given
    samples, test_set = train.load_datasets(args)
    model = train.start_model(args, None, device)
    optimizer, scaler = train.start_optimizer(model, args, None, device)
    stream = training_batches(samples, step_batches(0, batches, 4), 0, device)
    return args, model, optimizer, scaler, test_set, list(stream)


def without_segments(batch):
    none = torch.zeros(0, dtype=torch.long)
    return batch._replace(segment_maps=torch.zeros_like(batch.segment_maps),
                          ids=none, labels=none, owner=none)


def test_the_pretended_gpu_tells_mixtures_and_waits():
    with PretendedGpu() as gpu:
        x = torch.arange(3).to(GPU, non_blocking=True)
        y = torch.arange(3)
        assert x.device == torch.ones(2, device=GPU).device == GPU
        assert (x + 1).is_cuda and not y.is_cuda
        assert gpu.waits == []

        assert x.cpu().device == CPU
        assert len(gpu.waits) == 1
        assert x[y].is_cuda and x[x > 0].is_cuda
        assert len(gpu.waits) == 3
        assert x.sum().item() == 3
        assert len(gpu.waits) == 4
        x[0] = 0
        assert y.to(GPU).is_cuda
        assert len(gpu.waits) == 6

        for mixture in (lambda: x + y, lambda: y[x], lambda: torch.where(x > 0, x, y), x.numpy,
                        lambda: x.__setitem__(x, y)):
            with pytest.raises(AssertionError, match="mixes devices"):
                mixture()


@pytest.mark.parametrize("flags", MODELS)
def test_a_training_step_mixes_no_devices_and_waits_once(flags, monkeypatch):
    args, model, optimizer, scaler, _, batches = start(flags)
    pretend(model)
    # Left out: autocast, which asks for a real GPU, and torch's clipping, which groups by real
    # device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.zeros((), device=GPU))
    with PretendedGpu() as gpu:
        for step, batch in enumerate([batches[0], without_segments(batches[1])]):
            terms = train.training_step(step, [batch.to(GPU)], model, optimizer, scaler, args)
            assert all(term.is_cuda for term in terms.values())

    if args.model != "maskformer":
        expected = None
    elif args.matching == "hungarian":
        expected = "matcher.py: cost = cost.cpu()"
    else:
        expected = "matcher.py: if len((owner * K"
    waits = [wait[:len(expected or wait)] for wait in gpu.waits]
    assert waits == ([expected] * 2 if expected else [])


@pytest.mark.parametrize("flags, more", [
    *((flags, {}) for flags in MODELS if "fixed" not in flags),
    ("--model maskformer", {"scales": (0.5, 1.), "flip": True}),
    ("--model per-pixel", {"scales": (0.5, 1.), "flip": True}),
])
def test_evaluation_and_pictures_mix_no_devices(flags, more, monkeypatch, tmp_path):
    args, model, *_, test_set, _ = start(flags, batches=0)
    options = {name: getattr(args, name) for name in evaluate.TEST_OPTIONS}
    run = partial(evaluate.evaluate, model.eval(), test_set, task=args.task, **options, **more)
    general = {"inference": "panoptic"} if args.model == "maskformer" and not more else {}
    expected = run(**general)

    pretend(model)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())
    with PretendedGpu():
        found = run(save=tmp_path, **general)
        evaluate.draw_predictions(model, test_set, tmp_path / "predictions.png", **options)
        if args.model == "maskformer":
            evaluate.draw_queries(model, test_set, tmp_path / "queries.png", args.test_short_side,
                                  args.test_max_long_side)
    # torchvision resizes bytes on a CPU, rounded floats elsewhere: hence the tolerance.
    expected = evaluate.single_numbers(expected)
    assert evaluate.single_numbers(found) == pytest.approx(expected, abs=0.5)


# --------------------------------------------------------------------------------------- a real GPU
def needs_bf16(amp):
    if amp == "bf16" and not torch.cuda.is_bf16_supported(False):
        pytest.skip("a GPU without bf16")


@needs_gpu
@pytest.mark.parametrize("amp", evaluate.AMP)
def test_steps_on_the_gpu_have_the_losses_of_those_on_the_cpu(amp):
    needs_bf16(amp)
    losses = []
    for device, precision in ((CPU, "off"), (GPU, amp)):
        args, model, optimizer, scaler, _, batches = start(f"--amp {precision}", device)
        for batch in (batches[0], without_segments(batches[1])):
            terms = train.training_step(0, [batch.to(device)], model, optimizer, scaler, args)
            losses.append(terms["loss"].item())
    assert losses[2:] == pytest.approx(losses[:2], rel=0.01)


@needs_gpu
@pytest.mark.parametrize("model", ["maskformer", "per-pixel", "per-pixel-plus"])
def test_a_step_on_the_gpu_waits_for_the_matching_costs_only(model):
    args, model, optimizer, scaler, _, batches = start(f"--model {model}", GPU)
    batches = [batch.to(GPU) for batch in batches]
    train.training_step(0, batches[:1], model, optimizer, scaler, args)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.training_step(1, batches[1:], model, optimizer, scaler, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [Path(w.filename).name for w in caught if "synchroniz" in str(w.message)]
    assert waits == ["matcher.py"] * (args.model == "maskformer")


@needs_gpu
@pytest.mark.parametrize("amp, tolerance", [("off", 1e-4), ("bf16", 1e-2)])
def test_a_compiled_step_has_the_loss_of_a_plain_one(amp, tolerance):
    needs_bf16(amp)
    losses = []
    for compiled in (False, True):
        args, model, optimizer, scaler, _, batches = start(f"--amp {amp} --dropout 0", GPU)
        loss_of = train.compiled_loss() if compiled else train.compute_loss
        parallel = torch.compile(model) if compiled else model
        for number, batch in enumerate(batches):
            terms = train.training_step(number, [batch.to(GPU)], parallel, optimizer, scaler, args,
                                        loss_of)
            losses.append(terms["loss"].item())
    assert losses[2:] == pytest.approx(losses[:2], rel=tolerance)


@needs_gpu
def test_varying_numbers_of_segments_are_compiled_a_few_times():
    args, model, optimizer, scaler, *_ = start("", GPU, batches=0)
    parallel, loss_of = torch.compile(model), train.compiled_loss()
    torch._dynamo.reset()
    counters.clear()
    counts = set()
    for number in range(12):
        batch = shapes_batch(range(4 * number, 4 * number + 4))
        counts.add(len(batch.labels))
        train.training_step(number, [batch.to(GPU)], parallel, optimizer, scaler, args, loss_of)
    assert len(counts) > 4
    assert counters["stats"]["unique_graphs"] <= 6


@needs_gpu
@pytest.mark.parametrize("flags", [*MODELS, "--amp fp16", "--no-compile"])
def test_a_run_on_the_gpu_ends(flags, tmp_path):
    train.main([*SMALL, "--workers", "1", *flags.split(), "--output", str(tmp_path)])
    assert (tmp_path / "best.pt").exists()
    assert (tmp_path / "metrics.json").exists()
    assert not [name for name in content(tmp_path / "last.pt")["model"] if "_orig_mod" in name]


def one_of_two_on_one_gpu(rank, port, folder, steps):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
                   "RANK": str(rank), "LOCAL_RANK": "0"}
    train.backend_for = lambda device: "gloo"                    # NCCL wants a GPU for each process
    train.main([*SMALL, "--no-freeze-bn", "--log-every", "1", "--steps", str(steps), "--resume",
                "--output", str(folder)])


@needs_gpu
def test_two_processes_share_a_gpu_compiled_with_synchronized_norms_and_are_resumed(tmp_path):
    for steps in (3, 6):
        mp.spawn(one_of_two_on_one_gpu, (free_port(), tmp_path, steps), nprocs=2)
    rows = [row["step"] for row in log_of(tmp_path) if "loss" in row]
    assert rows == [1, 2, 3, 4, 5, 6]
    assert content(tmp_path / "last.pt")["step"] == 6
