"""Saved results are scored by the publisher's own evaluator as they are, where it is installed
(pip install cityscapesscripts)."""
import importlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate
from data import build_dataset, to_label_map

pytest.importorskip("cityscapesscripts")

NAMES = [f"bern_{i:06d}_000019" for i in range(3)]


@pytest.fixture
def cityscapes(tmp_path):
    """A root with a tiny Cityscapes in it: three drawn images of the split val."""
    images = tmp_path / "cityscapes/leftImg8bit/val/bern"
    truth = tmp_path / "cityscapes/gtFine/val/bern"
    images.mkdir(parents=True)
    truth.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in NAMES:
        ids = np.full((24, 36), 7, np.int32)                         # road
        ids[:9] = 23                                                 # sky
        ids[6:12, 20:] = 11                                          # buildings
        ids[20:, :5] = 4                                             # static: not evaluated
        # Two cars, a group of cars (crowd), two persons, and what nobody labeled.
        for i in (26000, 26001, 26, 24000, 24001, 0):
            y, x = rng.integers(0, 16), rng.integers(0, 26)
            ids[y:y + rng.integers(4, 8), x:x + rng.integers(5, 10)] = i
        labels = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
        image = rng.integers(0, 256, (24, 36, 3), dtype=np.uint8)
        Image.fromarray(image).save(images / f"{name}_leftImg8bit.png")
        Image.fromarray(ids.astype(np.uint16)).save(truth / f"{name}_gtFine_instanceIds.png")
        Image.fromarray(labels).save(truth / f"{name}_gtFine_labelIds.png")
    return tmp_path


def shifted(dataset, index):
    """A prediction that is half right: the truth, shifted, with one car taken for a person."""
    _, segment_map, class_of, _, _ = dataset[index]
    car, person = dataset.classes.index("car"), dataset.classes.index("person")
    segment_map = segment_map.roll((1, 2), (0, 1)).int()
    first_car = next((i for i, k in class_of.items() if k == car), None)
    class_of = class_of | {first_car: person} if first_car else class_of
    present = segment_map.unique().tolist()
    segments = [{"id": i, "category_id": k, "isthing": dataset.is_thing[k], "score": 0.9}
                for i, k in class_of.items() if i in present]
    return to_label_map(segment_map, class_of, 255), segment_map, segments


class Model(nn.Module):
    """Stands for a MaskFormer; `predict` is replaced, too."""


def save_results(dataset, folder, monkeypatch):
    """-> our metrics of the shifted predictions, which are saved in `folder`."""
    predictions = iter([shifted(dataset, i) for i in range(len(dataset))])
    monkeypatch.setattr(evaluate, "MaskFormer", Model)
    monkeypatch.setattr(evaluate, "predict", lambda *_, **__: next(predictions))
    return evaluate.evaluate(Model(), dataset, save=folder)


@pytest.mark.parametrize("name", ["cityscapes", "cityscapes-panoptic"])
def test_saved_label_maps_have_the_iou_that_cityscapes_evaluator_gives(
        cityscapes, monkeypatch, name):
    dataset = build_dataset(name, cityscapes, "val")
    ours = save_results(dataset, cityscapes / "out", monkeypatch)

    theirs = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    truth = cityscapes / "cityscapes/gtFine/val/bern"
    truth_files = [str(truth / f"{name}_gtFine_labelIds.png") for name in NAMES]
    args = theirs.args
    # Its instance-level score needs np.in1d, which NumPy has dropped.
    options = {"evalInstLevelScore": False, "quiet": True, "JSONOutput": False,
               "predictionPath": str(cityscapes / "out/semantic"), "predictionWalk": None}
    for option, value in options.items():
        monkeypatch.setattr(args, option, value)
    found = [theirs.getPrediction(args, file) for file in truth_files]
    scores = theirs.evaluateImgLists(found, truth_files, args)

    occurring = [k for k, iou in enumerate(ours["IoU"]) if iou == iou]
    assert {dataset.classes[k] for k in occurring} == {"road", "sky", "building", "car", "person"}
    for k in occurring:
        iou = scores["classScores"][dataset.classes[k]]
        assert ours["IoU"][k] == pytest.approx(100 * iou, abs=1e-6)
    assert ours["mIoU"] == pytest.approx(100 * scores["averageScoreClasses"], abs=1e-6)
    assert 20 < ours["mIoU"] < 95


def test_saved_segments_have_the_pq_that_cityscapes_evaluator_gives(cityscapes, monkeypatch):
    dataset = build_dataset("cityscapes-panoptic", cityscapes, "val")
    ours = save_results(dataset, cityscapes / "out", monkeypatch)

    preparation = importlib.import_module("cityscapesscripts.preparation.createPanopticImgs")
    theirs = importlib.import_module("cityscapesscripts.evaluation.evalPanopticSemanticLabeling")
    truth = cityscapes / "cityscapes/gtFine"
    preparation.convert2panoptic(str(truth), setNames=["val"])
    monkeypatch.setattr(theirs.multiprocessing, "cpu_count", lambda: 1)
    scores = theirs.evaluatePanoptic(str(truth / "cityscapes_panoptic_val.json"),
                                     str(truth / "cityscapes_panoptic_val"),
                                     str(cityscapes / "out/panoptic.json"),
                                     str(cityscapes / "out/panoptic"),
                                     str(cityscapes / "scores.json"))

    for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
        for name in ("PQ", "SQ", "RQ"):
            expected = 100 * scores[group][name.lower()]
            assert ours[name + suffix] == pytest.approx(expected, abs=1e-6)
    for category_id, pq in zip(dataset.category_ids, ours["PQ_per_class"]):
        if pq == pq:
            expected = 100 * scores["per_class"][category_id]["pq"]
            assert pq == pytest.approx(expected, abs=1e-6)
    assert 20 < ours["PQ"] < 95
