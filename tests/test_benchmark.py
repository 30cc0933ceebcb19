"""What is guaranteed of tools/benchmark.py and tools/train_transformers.py."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import train
from data import UserError
from tools import benchmark
from tools.benchmark import Work

TINY = Work(segments=3, images=2, size=(64, 96), num_classes=5)
FIELDS = {"part", "what", "ours", "theirs", "ratio", "unit"}


# ---------------------------------------------------------------------------------------- benchmark
def test_both_sides_of_the_benchmark_have_the_same_targets():
    batch = benchmark.made_up_batch(TINY)
    masks, labels = benchmark.their_targets(batch)
    assert [len(n) for n in masks] == [len(n) for n in labels] == [3, 3]
    assert torch.equal(torch.cat(masks), batch.masks().float())
    assert torch.equal(torch.cat(labels), batch.labels)
    assert torch.cat(masks).sum() == 2 * 64 * 96                     # no void, no overlap


def test_both_sides_of_the_benchmark_find_the_same_pairs():
    pytest.importorskip("transformers")
    layer, image, query, segment = benchmark.our_matching(TINY)()
    ours = set(zip(layer.tolist(), image.tolist(), query.tolist(), (segment % 3).tolist()))
    theirs = {(l, b, int(q), int(s))
              for l, pairs_of_layer in enumerate(benchmark.their_matching(TINY)())
              for b, pairs in enumerate(pairs_of_layer)
              for q, s in zip(*pairs)}
    assert len(ours) == 6 * 2 * 3
    assert ours == theirs


def test_both_sides_of_the_benchmark_have_the_same_gradients():
    pytest.importorskip("transformers")
    for ours, theirs in zip(benchmark.our_loss(TINY)(), benchmark.their_loss(TINY)()):
        torch.testing.assert_close(ours, theirs)


def test_a_step_of_each_side_is_a_row_of_the_table(capsys):
    row = benchmark.compare("step", "tiny", benchmark.our_step, benchmark.their_step, TINY, 1)
    assert row.keys() == FIELDS
    assert (row["part"], row["what"], row["unit"]) == ("step", "tiny", "ms")
    assert row["ours"] > 0
    if benchmark.transformers:
        assert row["ratio"] == row["ours"] / row["theirs"]
    printed = capsys.readouterr().out
    assert printed.count("|") == 6
    assert f"{benchmark.rounded(row['ours'])} ms" in printed


@pytest.mark.parametrize("number, text", [(12345.6, "12346"), (0.5, "0.5"), (7.126, "7.13")])
def test_numbers_are_printed_with_three_digits_and_no_exponent(number, text):
    assert benchmark.rounded(number) == text


def test_the_ratio_is_the_median_over_neighboring_runs(monkeypatch):
    monkeypatch.setattr(benchmark, "transformers", True)
    monkeypatch.setattr(benchmark, "race", lambda *_: ([1., 2., 8.], [2., 8., 16.]))
    row = benchmark.compare("step", "", lambda work: None, lambda work: None, TINY, 3)
    assert (row["ours"], row["theirs"], row["ratio"]) == (2000, 8000, 0.5)


def test_the_command_writes_its_rows_to_a_file(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    benchmark.main(["--only", "recipes", "--repeats", "1", "--output", str(file)])
    content = json.loads(file.read_text())
    assert content["about"]["torch"] == torch.__version__
    assert {"device", "timm", "transformers", "date"} <= content["about"].keys()
    [row] = content["rows"]
    assert row.keys() == FIELDS
    assert row["theirs"] is None and row["ratio"] is None
    assert row["what"] in capsys.readouterr().out


def test_parts_are_given_by_name_with_commas_between(capsys):
    assert benchmark.parse_args(["--only", "memory,data"]).only == ["memory", "data"]
    assert benchmark.parse_args([]).only == ["step", "memory", "inference", "recipes", "data"]
    with pytest.raises(SystemExit):
        benchmark.parse_args(["--only", "memory,date"])
    assert "no part is called 'date'" in capsys.readouterr().err


def test_the_speed_of_data_loading_is_measured():
    assert benchmark.samples_per_second(2) > 0


def test_resident_memory_is_read_in_bytes(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t     512 kB\n")
    monkeypatch.setattr(benchmark, "MEMORY_FILE", status)
    assert benchmark.resident_memory("VmRSS") == 512 * 1024
    assert benchmark.resident_memory("VmHWM") == 2048 * 1024


def test_a_trace_is_summed_up_as_busy_time_kernels_and_waits():
    trace = [{"cat": "kernel", "name": "gemm", "dur": 1500},         # microseconds
             {"cat": "gpu_memcpy", "name": "Memcpy DtoH", "dur": 400},
             {"cat": "gpu_memset", "name": "Memset", "dur": 100},
             {"cat": "gpu_user_annotation", "name": "Optimizer.step", "dur": 9000},
             {"cat": "cpu_op", "name": "aten::mm", "dur": 7000},
             {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "dur": 800},
             {"cat": "cuda_runtime", "name": "cudaDeviceSynchronize", "dur": 800},
             {"name": "process_name"}]
    assert benchmark.summary_of(trace) == {"busy": 2., "kernels": 3, "waits": 1}


def test_the_largest_batch_is_the_largest_power_of_two_that_fits(monkeypatch):
    monkeypatch.setattr(benchmark, "fits", lambda work: work.images <= 21)
    assert benchmark.largest_batch(TINY) == 16


# ----------------------------------------------------------------------------- training their model
def write_dataset(root):
    """Four images of two classes, left and right, for training and two for the test."""
    (root / "classes.txt").write_text("left\nright\n")
    label_map = np.zeros((48, 64), np.uint8)
    label_map[:, 32:] = 1
    rng = np.random.default_rng(0)
    for split, count in [("train", 4), ("val", 2)]:
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / "images" / split / f"{i}.png")
            Image.fromarray(label_map).save(root / "annotations" / split / f"{i}.png")


def test_train_py_trains_their_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from tools import train_transformers

    for name in ("build_model", "compute_loss"):                     # given back afterwards
        monkeypatch.setattr(train, name, getattr(train, name))
    write_dataset(tmp_path)
    run = tmp_path / "run"
    code = train_transformers.main(
        ["--dataset", "folder", "--data-root", str(tmp_path), "--output", str(run),
         "--backbone", "resnet18", "--crop", "64", "64", "--short-side", "64",
         "--test-short-side", "64", "--batch-size", "2", "--steps", "2", "--log-every", "1",
         "--queries", "7", "--dim", "32", "--heads", "4", "--ffn-dim", "64",
         "--decoder-layers", "2", "--workers", "0"])
    assert code == 0

    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and losses[0] != losses[1]
    state = torch.load(run / "last.pt", weights_only=True)
    assert state["step"] == 2
    assert any(name.startswith("model.class_predictor") for name in state["model"])
    assert (run / "metrics.json").exists()


def test_flags_that_their_model_would_ignore_are_refused():
    pytest.importorskip("transformers")
    from tools import train_transformers

    with pytest.raises(UserError, match="needs --encoder-layers 0"):
        train_transformers.main(["--dataset", "ade20k-panoptic"])
    with pytest.raises(UserError, match="needs --no-freeze-bn"):
        train_transformers.main(["--dataset", "ade20k", "--freeze-bn"])
    with pytest.raises(UserError, match="--backbone resnet101: choose resnet18 or resnet50"):
        train_transformers.main(["--dataset", "ade20k", "--backbone", "resnet101"])
