"""Where tensors lie. Without a GPU a pretended one tells, on which any mixture of devices is an error; with one,
real training and evaluation run on it."""
import traceback
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

import evaluate
import losses
import train
from batches import step_batches, training_batches
from test_train import few_images, signals_as_before                     # noqa: F401

ROOT, CPU, GPU = Path(__file__).parent.parent, torch.device("cpu"), torch.device("cuda", 0)
MODELS = [("--model", "maskformer"), ("--model", "maskformer", "--encoder-layers", "1", "--task", "semantic"),
          ("--matching", "fixed", "--queries", "6", "--task", "semantic"), ("--model", "per-pixel"),
          ("--model", "per-pixel-plus")]
WAITING = {"__bool__", "__float__", "__index__", "__int__", "bincount", "equal", "item", "masked_select", "nonzero",
           "tolist", "unique"}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


class PretendedGpu(TorchFunctionMode):
    """Tensors with the attribute `pretended` say that they lie on the GPU, and so do results of them. `waits`
    lists the lines that would wait for it. AssertionError where they meet CPU tensors that are no scalars."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.__name__
        tensors = tensors_in((args, kwargs))
        on_gpu = any(map(pretended, tensors))
        attribute = resolve_name(function) if name in ("__get__", "__set__") else ""
        if attribute in ("torch.Tensor.device.__get__", "torch.Tensor.is_cuda.__get__"):
            return (GPU if on_gpu else CPU) if "device" in attribute else on_gpu
        if name in ("to", "cpu"):
            return self.move(name, function, *args, **kwargs)
        indexed = name in ("__getitem__", "__setitem__") and pretended(args[0])      # by indices from the CPU, too
        if on_gpu and name in WAITING or indexed and waits_for_indices(*args):
            self.waits.append(where())
        met = (args[0], args[2:]) if indexed else () if attribute else tensors
        mixed = on_gpu and any(x.dim() > 0 and not pretended(x) for x in tensors_in(met))
        numpy = on_gpu and name in ("__array__", "numpy") and not kwargs.get("force")
        assert not mixed and not numpy, f"{name} mixes devices: {where()}"
        if kwargs.get("device") is not None:
            on_gpu = torch.device(kwargs.pop("device")) == GPU
        result = function(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                x.pretended = on_gpu
        return result

    def move(self, name, function, x, *args, **kwargs):
        """`to` and `cpu`."""
        devices = [a for a in (*args, kwargs.pop("device", None)) if isinstance(a, (str, torch.device))]
        to_gpu = torch.device(devices[0]) == GPU if devices else pretended(x) and name == "to"
        if pretended(x) != to_gpu and not (to_gpu and kwargs.get("non_blocking")):
            self.waits.append(where())
        result = function(x, *(a for a in args if a not in devices), **kwargs) if name == "to" else x
        result = result.view_as(result) if result is x else result       # not the tensor that stays behind
        result.pretended = to_gpu
        return result


def tensors_in(arguments):
    return [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]


def pretended(x):
    return getattr(x, "pretended", False)


def waits_for_indices(x, index, *value):
    """Masks have to be counted, indices and (before torch 2.15) a number for one place sent from the CPU."""
    number_sent = value and isinstance(index, int) and not isinstance(value[0], torch.Tensor)
    return number_sent or any(x.dtype == torch.bool or not pretended(x) for x in tensors_in(index))


def where():
    """The line of this project that torch was called from."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
    return f"{Path(frames[-1].filename).name}: {frames[-1].line}" if frames else "no line of ours"


def start(flags, device=CPU, batches=2):
    """-> flags, model, optimizer, scaler, held-out images, some batches, all on `device`."""
    tiny = "--no-pretrained --backbone test_resnet --steps 8 --workers 0 --batch-size 4".split()
    args = train.parse([*tiny, *flags])
    samples, test_set = train.load_datasets(args)
    parts, *_ = train.prepare(args, device, test_set.classes)
    stream = training_batches(samples, step_batches(0, batches, 4), 0, device)
    return args, *parts.values(), test_set, [next(stream) for _ in range(batches)]


def without_segments(batch):
    none = torch.zeros(0, dtype=torch.long)
    return batch._replace(segment_maps=torch.zeros_like(batch.segment_maps), ids=none, labels=none, owner=none)


def pretend(model):
    for x in (*model.parameters(), *model.buffers()):
        x.pretended = True


def test_the_pretended_gpu_tells_mixtures_and_waits():
    with PretendedGpu() as gpu:
        x, y = torch.arange(3).to(GPU, non_blocking=True), torch.arange(3)
        assert (x + 1).is_cuda and x.device == torch.ones(2, device=GPU).device == GPU and not y.is_cuda
        assert x.cpu().device == CPU and len(gpu.waits) == 1
        assert x[y].is_cuda and x[x > 0].is_cuda and len(gpu.waits) == 3
        assert x.sum().item() == 3 and len(gpu.waits) == 4
        x[0] = 0
        assert y.to(GPU).is_cuda and len(gpu.waits) == 6
        for mixture in (lambda: x + y, lambda: y[x], lambda: torch.where(x > 0, x, y), x.numpy,
                        lambda: x.__setitem__(x, y)):
            with pytest.raises(AssertionError, match="mixes devices"):
                mixture()


@pytest.mark.parametrize("flags", MODELS, ids=" ".join)
def test_a_training_step_mixes_no_devices_and_waits_once(flags, monkeypatch):
    args, model, optimizer, scaler, _, batches = start(flags)
    pretend(model)
    # Left out: autocast, which asks for a real GPU, and torch's own clipping, which groups by real device.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, most: torch.zeros((), device=GPU))
    with PretendedGpu() as gpu:
        for step, batch in enumerate([batches[0], without_segments(batches[1])]):
            terms = train.training_step(step, [batch.to(GPU)], model, optimizer, scaler, args)
            assert all(term.is_cuda for term in terms.values())
    wanted = {"hungarian": "matcher.py: costs = torch.cat(costs).cpu()", "fixed": "matcher.py: if len((owner * K"}
    wanted = [wanted[args.matching]] * 2 if args.model == "maskformer" else []
    assert [wait[:len(line)] for wait, line in zip(gpu.waits, wanted, strict=True)] == wanted


@pytest.mark.parametrize("flags", MODELS, ids=" ".join)
@pytest.mark.parametrize("more", [{}, {"scales": (0.5, 1.), "flip": True}], ids=["plain", "scales"])
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
            evaluate.draw_queries(model, test_set, tmp_path / "queries.png", **options)
    # torchvision resizes bytes on a CPU, rounded floats elsewhere: hence the tolerance.
    assert evaluate.single_numbers(found) == pytest.approx(evaluate.single_numbers(expected), abs=0.5)


@needs_gpu
@pytest.mark.parametrize("amp", train.AMP)
def test_steps_on_the_gpu_have_the_losses_of_those_on_the_cpu(amp):
    if amp == "bf16" and not torch.cuda.is_bf16_supported(False):
        pytest.skip("a GPU without bf16")
    losses = []
    for device, precision in ((CPU, "off"), (GPU, amp)):
        args, model, optimizer, scaler, _, batches = start(["--amp", precision], device)
        for batch in (batches[0], without_segments(batches[1])):
            terms = train.training_step(0, [batch.to(device)], model, optimizer, scaler, args)
            losses.append(terms["loss"].item())
    assert losses[2:] == pytest.approx(losses[:2], rel=0.01)


@needs_gpu
@pytest.mark.parametrize("model", ["maskformer", "per-pixel", "per-pixel-plus"])
def test_a_step_on_the_gpu_waits_for_the_matching_costs_only(model):
    args, model, optimizer, scaler, _, batches = start(["--model", model], GPU)
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
@pytest.mark.parametrize("flags", [*MODELS, ("--amp", "fp16"), ("--compile",)], ids=" ".join)
def test_a_run_on_the_gpu_ends(flags, monkeypatch, tmp_path):
    for name in ("focal_loss", "dice_loss"):                             # --compile replaces them
        monkeypatch.setattr(losses, name, getattr(losses, name))
    tiny = "--no-pretrained --backbone test_resnet --steps 4 --workers 1 --batch-size 4".split()
    train.main([*tiny, *flags, "--output", str(tmp_path)])
    assert (tmp_path / "best.pt").exists() and (tmp_path / "metrics.json").exists()
