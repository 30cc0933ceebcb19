"""What is guaranteed of tools/plot.py, on logs as train.py writes them."""
import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from data import UserError
from tools.plot import MAX_POINTS, PANELS, curve, draw, labels_of, main, read_log

SCRIPT = str(Path(__file__).resolve().parent.parent / "tools" / "plot.py")
TRAINING = ["loss", "loss_ce", "loss_mask", "loss_dice", "matched_dice"]


def training_row(step):
    return {"step": step, "loss": 30 / step, "loss_ce": 6 / step, "loss_mask": 1 / step,
            "loss_dice": 2 / step, "matched_dice": 1 - 1 / step, "lr": 1e-4}


def write_run(folder, rows, rest=""):
    folder.mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "log.jsonl").write_text("".join(lines) + rest)
    return folder


@pytest.fixture
def run(tmp_path):
    """The folder of a run of 40 steps with one evaluation."""
    rows = [training_row(step) for step in (10, 20, 30, 40)]
    rows.append({"step": 40, "mIoU": 61.5, "pACC": 80.0, "PQ": 0.0})
    return write_run(tmp_path / "shapes-001", rows)


# ------------------------------------------------------------------------------------------ reading
def test_a_log_is_read_up_to_a_line_that_a_killed_run_cut_off(tmp_path):
    rows = [training_row(10), training_row(20)]
    for i, rest in enumerate(["", '{"step": 30, "lo', '{"step": 30, "loss": 1.0']):
        assert read_log(write_run(tmp_path / str(i), rows, rest)) == rows


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has no log.jsonl"):
        read_log(tmp_path)
    with pytest.raises(UserError, match="nowhere has no log.jsonl"):
        read_log("nowhere")


@pytest.mark.parametrize("rest", ["", '{"step": 1, "lo', '{"step": 1, "lr": 0.1}\n'])
def test_a_log_without_a_value_to_draw_is_named(rest, tmp_path):
    folder = write_run(tmp_path / "run", [], rest)
    with pytest.raises(UserError, match=f"{folder}/log.jsonl has no row to draw yet"):
        read_log(folder)


def test_a_curve_is_the_logged_values_at_their_steps(run):
    steps, values = curve(read_log(run), "loss")
    assert steps.tolist() == [10, 20, 30, 40]
    assert values.tolist() == [3, 1.5, 1, 0.75]
    steps, values = curve(read_log(run), "PQ")
    assert steps.tolist() == [40] and values.tolist() == [0]


def test_a_long_curve_is_the_means_of_neighboring_rows():
    rows = [{"step": step, "loss": 7.0 * step} for step in range(1, 3 * MAX_POINTS + 1)]
    steps, values = curve(rows, "loss")
    assert steps.tolist() == list(range(2, 3 * MAX_POINTS, 3))
    assert values.tolist() == [7 * step for step in steps]


# ------------------------------------------------------------------------------------------ drawing
def test_there_is_a_panel_for_each_value_that_a_run_has_and_no_other(run):
    pytest.importorskip("matplotlib")
    panels = draw({"shapes-001": read_log(run)}).axes
    assert [axes.get_title() for axes in panels] == list(PANELS.values())

    semantic = [training_row(10), {"step": 10, "mIoU": 61.5}]
    panels = draw({"semantic": semantic}).axes
    assert [axes.get_title() for axes in panels] == [PANELS[name] for name in [*TRAINING, "mIoU"]]

    per_pixel = [{"step": 10, "loss": 2.5, "loss_ce": 2.5}]
    panels = draw({"per-pixel": per_pixel}).axes
    assert [axes.get_title() for axes in panels] == [PANELS["loss"], PANELS["loss_ce"]]


def test_every_run_is_a_line_in_every_panel_and_a_name_in_the_legend(run):
    pytest.importorskip("matplotlib")
    figure = draw({"first": read_log(run), "second": [training_row(15), training_row(25)]})
    for axes in figure.axes:
        first, second = axes.get_lines()
        assert (first.get_label(), second.get_label()) == ("first", "second")
        if axes.get_title() == PANELS["loss"]:
            assert first.get_ydata().tolist() == [3, 1.5, 1, 0.75]
            assert second.get_xdata().tolist() == [15, 25]
        if axes.get_title() == PANELS["PQ"]:                 # the second was not evaluated
            assert len(second.get_xdata()) == 0
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "second"]


# -------------------------------------------------------------------------------------- the command
def test_the_command_writes_a_picture_of_several_runs(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    other = write_run(tmp_path / "shapes-002", [training_row(10)])
    output = tmp_path / "two.png"
    main([str(run), str(other), "--output", str(output)])
    assert capsys.readouterr().out == f"saved {output}\n"
    with Image.open(output) as picture:
        assert picture.width > picture.height > 300


def test_runs_are_called_by_their_folders_and_by_their_paths_where_these_are_equal():
    assert labels_of(["runs/voc-001/", "/data/runs/voc-002"]) == ["voc-001", "voc-002"]
    assert labels_of(["mine/voc-001", "yours/voc-001"]) == ["mine/voc-001", "yours/voc-001"]


def test_a_format_that_does_not_exist_is_named(run, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="--output .*curves.xyz.*png"):
        main([str(run), "--output", str(tmp_path / "curves.xyz")])


def command_error(monkeypatch, capsys, *arguments):
    """What `python tools/plot.py ARGUMENTS`, which must fail with exit code 2, prints."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(SCRIPT, run_name="__main__")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_a_folder_without_a_log_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    message = command_error(monkeypatch, capsys, tmp_path)
    assert message.startswith(f"error: {tmp_path} has no log.jsonl")


def test_a_missing_matplotlib_is_one_line_and_exit_code_2(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)          # importing it now fails
    message = command_error(monkeypatch, capsys, run)
    assert "pip install matplotlib" in message
