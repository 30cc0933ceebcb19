"""What is guaranteed of the metrics and of the way from logits to them (evaluate.py; Sec. 3.4, 4)."""
import colorsys
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.utils import draw_segmentation_masks

import evaluate
from data import SegmentationDataset, build_dataset
from evaluate import ConfusionMatrix, PanopticQuality
from maskformer import panoptic_inference, semantic_inference

ROOT = Path(__file__).parent.parent

K = 11
IS_THING = [k >= 6 for k in range(K)]


def miou(prediction, target, num_classes=K, **options):
    matrix = ConfusionMatrix(num_classes, **options)
    matrix.update(torch.as_tensor(prediction), torch.as_tensor(target))
    return matrix.compute()


# ------------------------------------------------------------------ mIoU

def test_the_example_in_the_docstring_of_the_confusion_matrix():
    result = miou([[0, 1, 1, 1]], [[0, 0, 1, 255]], num_classes=2)
    assert (result["mIoU"], result["mACC"], round(result["pACC"], 1)) == (50, 75, 66.7)
    for value in ("mIoU 50", "mACC 75", "pACC 66.7"):
        assert value in " ".join(ConfusionMatrix.__doc__.split())


def test_a_case_of_iou_worked_by_hand():
    target = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 255, 255, 1]])
    prediction = torch.tensor([[0, 0, 1, 1, 1], [2, 3, 3, 0, 2]])
    result = miou(prediction, target, num_classes=5)  # classes 3 and 4 are not in the truth
    assert result["IoU"][:3] == pytest.approx([200 / 3, 50, 100 / 3])    # 2 of 3, 2 of 4, 1 of 3
    assert all(math.isnan(x) for x in result["IoU"][3:])
    assert result["mIoU"] == pytest.approx(50) and result["pACC"] == pytest.approx(500 / 8)
    assert result["mACC"] == pytest.approx((200 / 3 + 200 / 3 + 50) / 3)
    assert result["fwIoU"] == pytest.approx((3 * 200 / 3 + 3 * 50 + 2 * 100 / 3) / 8)


@pytest.mark.parametrize("prediction", [[[0, 1, 1]], [[0], [1]], [[0, 1], [1, 0], [0, 0]], 1])   # the third: turned
def test_a_prediction_of_another_size_is_refused(prediction):
    with pytest.raises(RuntimeError, match="equal size"):
        miou(prediction, [[0, 1, 1], [1, 1, 0]])


def test_class_regions_are_segments_of_the_ids_class_plus_one():
    for void in (-1, 255):
        ids, segments = evaluate.class_regions(torch.tensor([[void, 0], [2, 2]]), void)
        assert ids.tolist() == [[0, 1], [3, 3]] and [(s["id"], s["category_id"]) for s in segments] == [(1, 0), (3, 2)]


def test_void_in_a_prediction_is_wrong_but_is_no_class():
    result = miou([[0, 255, 1, 255]], [[0, 0, 1, 255]], num_classes=2)
    assert result["IoU"] == [50, 100] and result["pACC"] == pytest.approx(200 / 3)


def test_counts_do_not_depend_on_order_split_or_integer_type():
    g = torch.Generator().manual_seed(0)
    target, prediction = torch.randint(K, (6, 5, 9), generator=g), torch.randint(K, (6, 5, 9), generator=g)
    target[torch.rand(target.shape, generator=g) < 0.2] = 255
    whole = miou(prediction.flatten(0, 1), target.flatten(0, 1))
    matrix = ConfusionMatrix(K)
    for i, dtype in zip((4, 2, 0, 1, 5, 3), [torch.uint8, torch.int32, torch.int64] * 2):
        matrix.update(prediction[i].to(dtype).T, target[i].to(dtype).T)
    assert matrix.compute() == whole
    assert matrix.counts.dtype == torch.int64 and matrix.counts.sum() == (target != 255).sum()


def test_renaming_classes_renames_their_ious():
    g = torch.Generator().manual_seed(0)
    target, prediction = torch.randint(K, (9, 9), generator=g), torch.randint(K, (9, 9), generator=g)
    order = torch.randperm(K, generator=g)
    before, after = miou(prediction, target), miou(order[prediction], order[target])
    assert [after["IoU"][order[k]] for k in range(K)] == before["IoU"]
    assert after["mIoU"] == pytest.approx(before["mIoU"])


def test_iou_equals_sets_of_pixels():
    g = torch.Generator().manual_seed(1)
    target, prediction = torch.randint(4, (7, 8), generator=g), torch.randint(4, (7, 8), generator=g)
    pixels = [(y, x) for y in range(7) for x in range(8)]
    for k, iou in enumerate(miou(prediction, target, num_classes=4)["IoU"]):
        true, found = {i for i in pixels if target[i] == k}, {i for i in pixels if prediction[i] == k}
        assert iou == pytest.approx(100 * len(true & found) / len(true | found))


def test_nothing_but_void_scores_zero_without_division_by_zero():
    for result in (ConfusionMatrix(K).compute(), miou([[3, 4]], [[255, 255]])):
        assert [result[name] for name in ("mIoU", "mACC", "pACC", "fwIoU")] == [0, 0, 0, 0]


@pytest.mark.parametrize("prediction, target",
                         [(3, K), (3, 254), (3, -1), (K, 3), (K + 1, 3), (254, 3), (-1, 3)])
def test_labels_outside_the_classes_raise_with_the_value(prediction, target):
    wrong = target if prediction == 3 else prediction
    with pytest.raises(ValueError, match=str(wrong)):
        miou([[0, prediction]], [[1, target]])


def test_void_may_be_another_value_where_255_is_a_class():
    assert evaluate.void_label(150) == evaluate.void_label(255) == 255 and evaluate.void_label(256) == 65535
    result = miou([[255, 7, 7]], [[255, 7, 65535]], num_classes=300, void=65535)
    assert result["mIoU"] == 100 and result["IoU"][255] == 100


# ------------------------------------------------------------------ PQ

def segment(i, category, crowd=False):
    return {"id": i, "category_id": category} | ({"iscrowd": 1} if crowd else {})


def pq(pred_map, pred_segments, true_map, true_segments, is_thing=IS_THING):
    quality = PanopticQuality(len(is_thing), is_thing)
    quality.update(torch.as_tensor(pred_map), pred_segments, torch.as_tensor(true_map), true_segments)
    return quality.compute()


def test_the_example_in_the_docstring_of_panoptic_quality():
    result = pq([[1, 1, 1, 1]], [segment(1, 0)], [[1, 1, 2, 0]], [segment(1, 0), segment(2, 0)], [True])
    assert [round(result[name], 1) for name in ("PQ", "SQ", "RQ")] == [44.4, 66.7, 66.7]
    assert "PQ 44.4, SQ 66.7, RQ 66.7" in " ".join(PanopticQuality.__doc__.split())


def test_a_case_of_pq_with_void_and_crowd_worked_by_hand():
    true_map = [[1, 1, 1, 1, 2, 2, 2, 2],
                [3, 3, 3, 3, 4, 4, 4, 4],
                [0, 0, 0, 0, 5, 5, 5, 5]]
    true_segments = [segment(1, 7), segment(2, 7), segment(3, 2), segment(4, 7, crowd=True), segment(5, 3)]
    pred_map = [[10, 10, 10, 10, 20, 20, 0, 0],
                [30, 30, 30, 40, 50, 50, 50, 50],
                [10, 60, 60, 60, 60, 70, 70, 70]]
    pred_segments = [segment(10, 7),  # IoU 4/4, as its fifth pixel is void: TP
                     segment(20, 7),  # IoU 2/4, not above 1/2: FP, and segment 2 FN
                     segment(30, 2),                                     # IoU 3/4: TP
                     segment(40, 2),                                     # FP
                     segment(50, 7),                                     # all crowd of its class: ignored
                     segment(60, 8),                                     # three quarters void: ignored
                     segment(70, 4)]  # FP of class 4; segment 5 of class 3 is FN
    result = pq(pred_map, pred_segments, true_map, true_segments)
    per_class = result["PQ_per_class"]
    assert per_class[7] == pytest.approx(100 * 1 / (1 + 0.5 + 0.5))
    assert per_class[2] == pytest.approx(100 * 0.75 / (1 + 0.5))
    assert per_class[3] == per_class[4] == 0
    assert all(math.isnan(per_class[k]) for k in (0, 1, 5, 6, 8, 9, 10))
    assert result["PQ_th"] == pytest.approx(50) and result["PQ_st"] == pytest.approx(50 / 3)
    assert result["PQ"] == pytest.approx(25)
    assert result["SQ"] == pytest.approx((100 + 75 + 0 + 0) / 4)
    assert result["RQ"] == pytest.approx((50 + 200 / 3) / 4)


def test_crowd_of_another_class_does_not_excuse_a_false_positive():
    arguments = [[1, 1]], [segment(1, 7)], [[5, 5]]
    assert math.isnan(pq(*arguments, [segment(5, 7, crowd=True)])["PQ_per_class"][7])
    assert pq(*arguments, [segment(5, 8, crowd=True)])["PQ_per_class"][7] == 0


def test_exactly_half_void_is_still_a_false_positive():
    assert pq([[1, 1]], [segment(1, 7)], [[0, 2]], [segment(2, 8)])["PQ_per_class"][7] == 0


def slow_pq(pairs):
    """The definition, pixel by pixel and pair by pair -> {class: (sum of IoU, TP, FP, FN)}."""
    totals = {k: [0., 0, 0, 0] for k in range(K)}
    for pred_map, pred_segments, true_map, true_segments in pairs:
        predicted = {s["id"]: s["category_id"] for s in pred_segments}
        true = {s["id"]: s["category_id"] for s in true_segments}
        crowd = {s["id"] for s in true_segments if s.get("iscrowd")}
        pixels = list(zip(pred_map.flatten().tolist(), true_map.flatten().tolist()))

        def count(test):
            return sum(test(p, t) for p, t in pixels)
        matched_true, matched_pred = set(), set()
        for t, label in true.items():
            for p, answer in predicted.items():
                if answer != label or t in crowd:
                    continue
                both = count(lambda a, b: a == p and b == t)
                either = count(lambda a, b: (a == p and b != 0) or b == t)
                if both / either > 0.5:
                    totals[label][0] += both / either
                    totals[label][1] += 1
                    matched_true.add(t)
                    matched_pred.add(p)
        for p, answer in predicted.items():
            area = count(lambda a, b: a == p)
            excused = count(lambda a, b: a == p and (b == 0 or (b in crowd and true[b] == answer)))
            totals[answer][2] += p not in matched_pred and excused / area <= 0.5
        for t, label in true.items():
            totals[label][3] += t not in matched_true and t not in crowd
    return totals


def random_pair(rng):
    """A truth of blobs with void and crowd, and a prediction that is the truth with some segments changed."""
    H, W = 9, 10
    true_map = np.zeros((H, W), np.int64)
    for i in rng.permutation(6)[:rng.integers(1, 7)]:
        y, x = rng.integers(0, H - 3), rng.integers(0, W - 3)
        true_map[y:y + rng.integers(2, 7), x:x + rng.integers(2, 7)] = 1000 + 17 * i
    category = {int(i): int(rng.choice([2, 7, 8])) for i in np.unique(true_map)}
    pred_map = np.where(true_map > 0, true_map + 5, 0)
    for _ in range(rng.integers(0, 5)):
        y, x = rng.integers(0, H - 1), rng.integers(0, W - 1)
        height, width = rng.integers(1, 5, 2)
        pred_map[y:y + height, x:x + width] = rng.choice([0, 3, 70_000, *np.unique(pred_map)])
    true_segments = [segment(i, c, rng.random() < 0.25) for i, c in category.items() if i]
    pred_segments = [segment(int(i), category.get(int(i) - 5, 7) if rng.random() < 0.8 else 8)
                     for i in np.unique(pred_map) if i]
    rng.shuffle(true_segments), rng.shuffle(pred_segments)
    return torch.from_numpy(pred_map), pred_segments, torch.from_numpy(true_map), true_segments


def test_pq_equals_the_definition_written_as_loops_on_two_hundred_random_pairs():
    rng, quality = np.random.default_rng(0), PanopticQuality(K, IS_THING)
    pairs = [random_pair(rng) for _ in range(200)]
    for pair in pairs:
        quality.update(*pair)
    slow = slow_pq(pairs)
    assert min(sum(t[i] for t in slow.values()) for i in (1, 2, 3)) > 50  # the pairs test all three
    for k, (iou, tp, fp, fn) in slow.items():
        if tp + fp + fn:
            assert quality.compute()["PQ_per_class"][k] == pytest.approx(100 * iou / (tp + fp / 2 + fn / 2))
    occur = [k for k, t in slow.items() if sum(t[1:])]
    for name, group in (("", occur), ("_th", [k for k in occur if IS_THING[k]]),
                        ("_st", [k for k in occur if not IS_THING[k]])):
        sq = [slow[k][0] / max(slow[k][1], 1) for k in group]
        rq = [slow[k][1] / (slow[k][1] + slow[k][2] / 2 + slow[k][3] / 2) for k in group]
        result = quality.compute()
        assert result["PQ" + name] == pytest.approx(100 * np.mean([a * b for a, b in zip(sq, rq)]))
        assert result["SQ" + name] == pytest.approx(100 * np.mean(sq))
        assert result["RQ" + name] == pytest.approx(100 * np.mean(rq))


def test_pq_does_not_depend_on_ids_order_or_integer_type():
    pred_map, pred_segments, true_map, true_segments = random_pair(np.random.default_rng(3))
    expected = pq(pred_map, pred_segments, true_map, true_segments)
    ids = {s["id"]: 16_000_000 - 3 * n for n, s in enumerate(pred_segments)}
    renamed = pred_map.clone()
    for old, new in ids.items():
        renamed[pred_map == old] = new
    segments = [s | {"id": ids[s["id"]]} for s in reversed(pred_segments)]
    np.testing.assert_equal(pq(renamed.int(), segments, true_map.int(), true_segments[::-1]), expected)


def test_truth_as_prediction_scores_100_whatever_is_void_or_crowd():
    rng, quality = np.random.default_rng(5), PanopticQuality(K, IS_THING)
    for _ in range(20):
        _, _, true_map, true_segments = random_pair(rng)
        quality.update(true_map, true_segments, true_map, true_segments)
    assert quality.compute()["PQ"] == quality.compute()["SQ"] == quality.compute()["RQ"] == 100


def test_pq_of_nothing_is_zero_without_division_by_zero():
    void = torch.zeros(4, 5, dtype=torch.int32)
    assert PanopticQuality(K, IS_THING).compute()["PQ"] == 0
    for result in (pq(void, [], void, []), pq(void + 1, [segment(1, 7)], void, []),
                   pq(void, [segment(3, 7)], void, [segment(4, 7)])):
        assert [result[name + group] for name in ("PQ", "SQ", "RQ")
                for group in ("", "_th", "_st")] == [0] * 9
        assert all(math.isnan(x) for x in result["PQ_per_class"])


def test_a_segment_of_an_unknown_class_raises():
    with pytest.raises((IndexError, ValueError)):
        pq([[1, 1]], [segment(1, K)], [[2, 2]], [segment(2, 3)])
    with pytest.raises((IndexError, ValueError)):
        pq([[1, 1]], [segment(1, 3)], [[2, 2]], [segment(2, K)])


# ------------------------------------------------------------------ from logits to metrics

def test_ground_truth_as_logits_scores_100():
    dataset = build_dataset("shapes", split="val", num_classes=K)
    matrix, quality = ConfusionMatrix(K), PanopticQuality(K, dataset.is_thing)
    for index in range(8):
        _, segment_map, class_of, _, _ = dataset[index]
        class_logits = torch.full((len(class_of) + 3, K + 1), -9.)
        class_logits[len(class_of):, K] = 9.                             # three queries without a segment
        mask_logits = torch.randn(len(class_of) + 3, *segment_map.shape)
        for q, (i, label) in enumerate(class_of.items()):
            class_logits[q, label] = 9.
            mask_logits[q] = torch.where(segment_map == i, 20., -20.)
        target = torch.full(segment_map.shape, 255)
        for i, label in class_of.items():
            target[segment_map == i] = label
        matrix.update(semantic_inference(class_logits[None], mask_logits[None])[0].argmax(0), target)
        found = panoptic_inference(class_logits, mask_logits, dataset.is_thing)
        quality.update(*found, segment_map, [segment(i, label) for i, label in class_of.items()])
    assert matrix.compute()["mIoU"] == 100
    assert [quality.compute()[name] for name in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st")] == [100] * 5


class StripesModel(nn.Module):
    """Answers the same for every image: query q sees 8 columns of the input from 8 q on and says class q."""

    def __init__(self, size_divisibility):
        super().__init__()
        self.backbone, self.size_divisibility, self.seen = nn.Module(), size_divisibility, []
        self.backbone.mean = torch.tensor([124., 116., 104.]).view(3, 1, 1)

    def forward(self, images):
        self.seen.append(images)
        h, w = (math.ceil(side / 4) for side in images.shape[-2:])
        class_logits = torch.full((1, 1, K, K + 1), -9.)
        class_logits[0, 0].diagonal().fill_(9.)
        mask_logits = torch.full((1, 1, K, h, w), -20.)
        for q in range(K):
            mask_logits[..., q, :, 2 * q:2 * q + 2] = 20.
        return class_logits, mask_logits


@pytest.mark.parametrize("size_divisibility", [0, 32])
def test_padding_is_cropped_before_masks_return_to_the_original_size(size_divisibility):
    model, image = StripesModel(size_divisibility), torch.randint(256, (3, 40, 72), dtype=torch.uint8)
    columns = (torch.arange(72) // 8).expand(40, 72)
    label, segment_map, segments = evaluate.predict(model, image, [True] * K, 40, 400)
    assert torch.equal(label, columns)
    assert torch.equal(segment_map, (columns + 1).int())  # padding beyond the image makes no segment
    assert [s["category_id"] for s in segments] == list(range(9))
    canvas, = model.seen[0]
    assert canvas.shape == ((3, 64, 96) if size_divisibility else (3, 40, 72))
    assert torch.equal(canvas[:, :40, :72], image.float())
    assert (canvas[:, 40:] == model.backbone.mean).all() and (canvas[:, :, 72:] == model.backbone.mean).all()


def test_predictions_have_the_size_of_the_original():
    image = torch.randint(256, (3, 80, 144), dtype=torch.uint8)          # twice the test size
    label, segment_map, _ = evaluate.predict(StripesModel(32), image, [True] * K, 40, 400)
    columns = (torch.arange(144) // 16).expand(80, 144)
    assert torch.equal(label, columns) and torch.equal(segment_map, (columns + 1).int())


def test_flip_mirrors_the_input_and_the_answer_back():
    model, image = StripesModel(32), torch.randint(256, (3, 40, 72), dtype=torch.uint8)
    label, _, _ = evaluate.predict(model, image, [True] * K, 40, 400, flip=True)
    assert torch.equal(model.seen[1][0, :, :40, :72], image.flip(-1).float())
    assert torch.equal(label[:, 32:40], torch.full((40, 8), 4))  # the middle stripe is its own mirror image
    answers = {tuple(sorted((k, 8 - k))) for k in range(9)}
    assert all(label[0, x].item() in pair for x in range(72) for pair in answers if x // 8 in pair)


class ColorsModel(StripesModel):
    """Query q sees where channel q is bright and says class q; in large images, less sure, it confuses them."""

    def forward(self, images):
        class_logits, _ = super().forward(images)
        bright = F.interpolate(images, scale_factor=0.25)[None] > 128    # [1, 1, 3, h, w]
        large = images.shape[-2] >= 60
        return class_logits[:, :, :3], torch.where(bright.flip(2) if large else bright, 0.4 if large else 9., -9.)


def test_scores_of_all_scales_and_mirror_images_are_added_up_where_they_belong():
    model, truth = ColorsModel(0), (torch.arange(160) // 40).clamp(max=2).expand(80, 160)
    image = 255 * F.one_hot(truth, 3).permute(2, 0, 1).to(torch.uint8)
    label, _, _ = evaluate.predict(model, image, [True] * K, 40, 60, scales=(0.5, 1., 2.), flip=True)
    assert label[:, 20::40].tolist() == [[0, 1, 2, 2]] * 80              # far from borders
    # of scale 1, then every scale and its mirror image; the long side is limited to 60 times the scale
    assert [tuple(x.shape[2:]) for x in model.seen] == [(30, 60), (15, 30), (15, 30), (30, 60), (60, 120), (60, 120)]


def test_inference_panoptic_takes_classes_from_the_segments_and_each_threshold_has_its_own_place():
    model, image = StripesModel(0), torch.randint(256, (3, 40, 72), dtype=torch.uint8)
    for thresholds, kept in (((0.5, 1.), True), ((1., 0.), False)):      # no class is surer than 1
        label, _, segments = evaluate.predict(model, image, [True] * K, 40, 400, *thresholds, inference="panoptic")
        assert len(segments) == 9 * kept
        assert torch.equal(label, (torch.arange(72) // 8).expand(40, 72) if kept else torch.full((40, 72), 255))


def test_images_are_shrunk_as_pillow_shrinks_them():
    model, image = StripesModel(0), torch.randint(256, (3, 120, 216), dtype=torch.uint8)
    evaluate.predict(model, image, [True] * K, 40, 400)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((72, 40), Image.BILINEAR)
    assert (model.seen[0][0].permute(1, 2, 0) - torch.from_numpy(np.array(expected))).abs().max() <= 1


def test_scores_of_the_baselines_are_upsampled_four_times_and_cropped_as_in_their_loss():
    logits = torch.randn(1, 1, K, 10, 18)
    model = StripesModel(0)
    model.forward = lambda images: logits
    _, scores = evaluate.network_output(model, torch.zeros(3, 38, 71, dtype=torch.uint8), (38, 71))
    expected = F.interpolate(logits[0], scale_factor=4, mode="bilinear", align_corners=False)[0, :, :38, :71]
    torch.testing.assert_close(scores, expected)


class OneImage:
    """A thing and a crowd of its class; what `evaluate` needs of a dataset."""
    classes, is_thing, panoptic, pairs = [""] * K, IS_THING, True, [("x.png", None)]

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.zeros(3, 1, 4, dtype=torch.uint8), torch.tensor([[1, 1, 2, 2]]), {1: 7, 2: 7}, [2], "x"


def test_a_crowd_that_is_not_found_costs_nothing(monkeypatch):
    monkeypatch.setattr(evaluate, "MaskFormer", StripesModel)
    found = torch.full((1, 4), 7), torch.tensor([[1, 1, 0, 0]]), [segment(1, 7)]
    monkeypatch.setattr(evaluate, "predict", lambda *_, **__: found)
    metrics = evaluate.evaluate(StripesModel(0), OneImage())
    assert metrics["PQ"] == metrics["mIoU"] == 100


class FiveImages(OneImage):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return torch.full((3, 1, 4), index, dtype=torch.uint8), *super().__getitem__(index)[1:]


def test_processes_share_the_images_of_an_evaluation(monkeypatch):
    seen = [], []
    monkeypatch.setattr(evaluate, "world_size", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(evaluate, "rank", lambda: process)
        monkeypatch.setattr(evaluate, "predict", lambda model, image, *_, **__: seen[process].append(int(image.max())) or (
            torch.zeros(1, 4, dtype=torch.long), None, None))
        evaluate.evaluate(StripesModel(0), FiveImages())
    assert seen == ([0, 2, 4], [1, 3])


def test_saved_segments_are_in_cocos_format_with_the_publishers_numbers(tmp_path):
    dataset = SegmentationDataset([], ["a", "b", "c"], [True] * 3, None, [7, 8, 33], True, {"x": 42})
    segment_map = torch.tensor([[1, 300, 300, 0]], dtype=torch.int32)
    segments = [{"id": 1, "category_id": 0, "isthing": True}, {"id": 300, "category_id": 2, "isthing": True}]
    label, image = torch.tensor([[0, 2, 2, 255]]), torch.zeros(3, 1, 4, dtype=torch.uint8)
    annotation, = evaluate.save_prediction(tmp_path, "x", image, dataset, label, segment_map, segments)
    with Image.open(tmp_path / "panoptic/x.png") as png:
        assert np.array(png).tolist() == [[[1, 0, 0], [44, 1, 0], [44, 1, 0], [0, 0, 0]]]    # 300 = 44 + 256
    assert (annotation["image_id"], annotation["file_name"]) == (42, "x.png")
    assert [(s["id"], s["category_id"], s["area"]) for s in annotation["segments_info"]] == [(1, 7, 1), (300, 33, 2)]


def test_the_json_of_segments_holds_the_annotations_of_all_processes(tmp_path, monkeypatch):
    def gather(parts, mine):
        parts[:] = [mine, [{"image_id": 2}]]
    monkeypatch.setattr(evaluate, "world_size", lambda: 2)
    monkeypatch.setattr(evaluate.dist, "all_gather_object", gather)
    dataset = SegmentationDataset([], ["a", "b"], [True, False], None, [7, 33])
    evaluate.save_coco_json(tmp_path, dataset, [{"image_id": 1}])
    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert content["annotations"] == [{"image_id": 1}, {"image_id": 2}]
    assert [(c["id"], c["isthing"]) for c in content["categories"]] == [(7, 1), (33, 0)]


def test_some_classes_or_rows_at_a_time_give_the_same_labels(monkeypatch):
    scores = [torch.rand(20, 7, 9), torch.rand(20, 13, 17)]
    whole = sum(F.interpolate(x[None], size=(19, 23), mode="bilinear")[0] for x in scores).argmax(0)
    assert torch.equal(evaluate.best_class(scores, (19, 23)), whole)
    torch.manual_seed(0)
    class_logits, mask_logits = 4 * torch.eye(K, K + 1), torch.randn(K, 19, 23)
    whole = semantic_inference(class_logits[None], mask_logits[None])[0].argmax(0)
    for rows in (1, 4, 19):
        monkeypatch.setattr(evaluate, "PIXELS_AT_ONCE", (rows * 23, rows * 23))
        assert torch.equal(evaluate.semantic_map(class_logits, mask_logits), whole)
    assert whole.unique().numel() > 5


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_classes_of_a_large_photo_need_little_memory():
    code = ("import evaluate, torch; from resource import RUSAGE_SELF, getrusage; scores = torch.rand(150, 375, 500); "
            "before = getrusage(RUSAGE_SELF).ru_maxrss; evaluate.best_class([scores], (1500, 2000)); "
            "print(getrusage(RUSAGE_SELF).ru_maxrss - before)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert int(result.stdout) < 400_000, result.stderr                   # KiB; all scores at once: 1,800,000


def test_an_overlay_is_torchvisions_one_segment_at_a_time():
    image = torch.randint(256, (3, 40, 60), dtype=torch.uint8)
    segment_map = torch.zeros(40, 60, dtype=torch.int32)
    segment_map[:20], segment_map[25:, 30:] = 1, 2
    segments = [{"id": 1, "category_id": 1, "isthing": False}, {"id": 2, "category_id": 0, "isthing": True},
                {"id": 3, "category_id": 0, "isthing": True}]            # the last has no pixel
    found = torch.from_numpy(np.array(evaluate.overlay(image, segment_map, segments, ["", ""]))).permute(2, 0, 1)
    hues = 0.618, 0.618 * 2.5 % 1
    colors = [tuple(int(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, 0.9)) for hue in hues]
    masks = torch.stack([segment_map == 1, segment_map == 2])
    expected = draw_segmentation_masks(image, masks, 0.6, colors)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert torch.equal(found[:, segment_map == 0], image[:, segment_map == 0]) and not torch.equal(found, image)
