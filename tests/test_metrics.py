"""What is guaranteed of the metrics (evaluate.py; Sec. 4)."""
import json
import math

import numpy as np
import pytest
import torch

from data import build_dataset, void_label
from evaluate import (ConfusionMatrix, PanopticQuality, class_regions, save_metrics,
                      single_numbers, table_of_classes)
from maskformer import panoptic_inference, semantic_inference

K = 11
IS_THING = [k >= 6 for k in range(K)]


# --------------------------------------------------------------------------------------------- mIoU
def miou(prediction, target, num_classes=K, **options):
    matrix = ConfusionMatrix(num_classes, **options)
    matrix.update(torch.as_tensor(prediction), torch.as_tensor(target))
    return matrix.compute()


def random_labels(*shape, num_classes=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_classes, shape, generator=generator)


def test_the_example_in_the_docstring_of_the_confusion_matrix():
    result = miou([[0, 1, 1, 1]], [[0, 0, 1, 255]], num_classes=2)
    assert (result["mIoU"], result["mACC"], round(result["pACC"], 1)) == (50, 75, 66.7)
    for value in ("mIoU 50", "mACC 75", "pACC 66.7"):
        assert value in " ".join(ConfusionMatrix.__doc__.split())


def test_a_case_of_iou_worked_by_hand():
    target = [[0, 0, 0, 1, 1], [2, 2, 255, 255, 1]]
    prediction = [[0, 0, 1, 1, 1], [2, 3, 3, 0, 2]]
    result = miou(prediction, target, num_classes=5)                 # the truth lacks 3 and 4
    assert result["IoU"][:3] == pytest.approx([200 / 3, 50, 100 / 3])
    assert all(math.isnan(iou) for iou in result["IoU"][3:])
    assert result["mIoU"] == pytest.approx(50)
    assert result["pACC"] == pytest.approx(500 / 8)
    assert result["mACC"] == pytest.approx((200 / 3 + 200 / 3 + 50) / 3)
    assert result["fwIoU"] == pytest.approx((3 * 200 / 3 + 3 * 50 + 2 * 100 / 3) / 8)


@pytest.mark.parametrize("prediction", [[[0, 1, 1]], [[0], [1]], [[0, 1], [1, 0], [0, 0]], 1])
def test_a_prediction_of_another_size_is_refused(prediction):
    with pytest.raises(ValueError, match=r"prediction \(.*target \(2, 3\)"):
        miou(prediction, [[0, 1, 1], [1, 1, 0]])


def test_void_in_a_prediction_is_wrong_but_is_no_class():
    result = miou([[0, 255, 1, 255]], [[0, 0, 1, 255]], num_classes=2)
    assert result["IoU"] == [50, 100] and result["pACC"] == pytest.approx(200 / 3)


def test_counts_do_not_depend_on_order_split_or_integer_type():
    target, prediction = random_labels(6, 5, 9), random_labels(6, 5, 9, seed=1)
    target[torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) < 0.2] = 255
    whole = miou(prediction.flatten(0, 1), target.flatten(0, 1))
    matrix = ConfusionMatrix(K)
    for i, dtype in zip((4, 2, 0, 1, 5, 3), [torch.uint8, torch.int32, torch.int64] * 2):
        matrix.update(prediction[i].to(dtype).T, target[i].to(dtype).T)
    assert matrix.compute() == whole
    assert matrix.counts.dtype == torch.int64
    assert matrix.counts.sum() == (target != 255).sum()


def test_renaming_classes_renames_their_ious():
    target, prediction = random_labels(9, 9), random_labels(9, 9, seed=1)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(2))
    before, after = miou(prediction, target), miou(order[prediction], order[target])
    assert [after["IoU"][order[k]] for k in range(K)] == before["IoU"]
    assert after["mIoU"] == pytest.approx(before["mIoU"])


def test_iou_equals_sets_of_pixels():
    target = random_labels(7, 8, num_classes=4)
    prediction = random_labels(7, 8, num_classes=4, seed=1)
    pixels = [(y, x) for y in range(7) for x in range(8)]
    for k, iou in enumerate(miou(prediction, target, num_classes=4)["IoU"]):
        true = {pixel for pixel in pixels if target[pixel] == k}
        found = {pixel for pixel in pixels if prediction[pixel] == k}
        assert iou == pytest.approx(100 * len(true & found) / len(true | found))


def test_nothing_but_void_scores_zero_without_division_by_zero():
    for result in (ConfusionMatrix(K).compute(), miou([[3, 4]], [[255, 255]])):
        assert [result[name] for name in ("mIoU", "mACC", "pACC", "fwIoU")] == [0, 0, 0, 0]


@pytest.mark.parametrize("prediction, target", [
    (3, K), (3, 254), (3, -1), (K, 3), (K + 1, 3), (254, 3), (-1, 3)])
def test_labels_outside_the_classes_raise_with_the_value(prediction, target):
    wrong = target if prediction == 3 else prediction
    with pytest.raises(ValueError, match=str(wrong)):
        miou([[0, prediction]], [[1, target]])


def test_void_may_be_another_value_where_255_is_a_class():
    assert void_label(150) == void_label(255) == 255 and void_label(256) == 65535
    result = miou([[255, 7, 7]], [[255, 7, 65535]], num_classes=300, void=65535)
    assert result["mIoU"] == 100 and result["IoU"][255] == 100


def test_255_is_a_class_of_300_unless_told_otherwise():
    matrix = ConfusionMatrix(300)
    matrix.update(torch.tensor([[0, 3, 3]]), torch.tensor([[255, 3, 65535]]))
    assert matrix.compute()["mIoU"] == 50


# ----------------------------------------------------------------------------------------------- PQ
def segment(i, category, crowd=False):
    return {"id": i, "category_id": category} | ({"iscrowd": 1} if crowd else {})


def pq(pred_map, pred_segments, true_map, true_segments, is_thing=IS_THING):
    quality = PanopticQuality(len(is_thing), is_thing)
    pred_map, true_map = torch.as_tensor(pred_map), torch.as_tensor(true_map)
    quality.update(pred_map, pred_segments, true_map, true_segments)
    return quality.compute()


def test_the_example_in_the_docstring_of_panoptic_quality():
    result = pq([[1, 1, 1, 1]], [segment(1, 0)],
                [[1, 1, 2, 0]], [segment(1, 0), segment(2, 0)], [True])
    assert [round(result[name], 1) for name in ("PQ", "SQ", "RQ")] == [44.4, 66.7, 66.7]
    assert "PQ 44.4, SQ and RQ 66.7" in " ".join(PanopticQuality.__doc__.split())


def test_a_case_of_pq_with_void_and_crowd_worked_by_hand():
    true_map = [[1, 1, 1, 1, 2, 2, 2, 2],
                [3, 3, 3, 3, 4, 4, 4, 4],
                [0, 0, 0, 0, 5, 5, 5, 5]]
    true_segments = [segment(1, 7), segment(2, 7), segment(3, 2), segment(4, 7, crowd=True),
                     segment(5, 3)]
    pred_map = [[10, 10, 10, 10, 20, 20, 0, 0],
                [30, 30, 30, 40, 50, 50, 50, 50],
                [10, 60, 60, 60, 60, 70, 70, 70]]
    pred_segments = [segment(10, 7),         # IoU 4/4, as its fifth pixel is void: TP
                     segment(20, 7),         # IoU 2/4, not above 1/2: FP, and segment 2 FN
                     segment(30, 2),         # IoU 3/4: TP
                     segment(40, 2),         # FP
                     segment(50, 7),         # all crowd of its class: ignored
                     segment(60, 8),         # three quarters void: ignored
                     segment(70, 4)]         # FP of class 4; segment 5 of class 3 is FN
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
    result = pq([[1, 1]], [segment(1, 7)], [[0, 2]], [segment(2, 8)])
    assert result["PQ_per_class"][7] == 0


def test_a_true_segment_that_is_listed_without_pixels_is_a_miss():
    found = [[1, 1]], [segment(1, 7)]
    result = pq(*found, [[5, 5]], [segment(5, 7), segment(6, 7), segment(9, 2)])
    assert result["PQ_per_class"][7] == pytest.approx(100 / 1.5)
    assert result["PQ_per_class"][2] == 0
    crowd = [segment(5, 7), segment(6, 7, crowd=True)]
    assert pq(*found, [[5, 5]], crowd)["PQ_per_class"][7] == 100


def test_a_predicted_segment_without_pixels_is_no_false_positive():
    found = [[1, 1]], [segment(1, 7), segment(2, 7), segment(3, 8)]
    result = pq(*found, [[5, 5]], [segment(5, 7)])
    assert result["PQ_per_class"][7] == 100 and math.isnan(result["PQ_per_class"][8])


def slow_pq(pairs):
    """The definition, pixel by pixel and pair by pair -> {class: [sum of IoU, TP, FP, FN]}."""
    totals = {k: [0., 0, 0, 0] for k in range(K)}
    for pred_map, pred_segments, true_map, true_segments in pairs:
        predicted = {s["id"]: s["category_id"] for s in pred_segments}
        true = {s["id"]: s["category_id"] for s in true_segments}
        crowd = {s["id"] for s in true_segments if s.get("iscrowd")}
        pixels = list(zip(pred_map.flatten().tolist(), true_map.flatten().tolist()))

        matched_true, matched_pred = set(), set()
        for t, label in true.items():
            for p, answer in predicted.items():
                if answer != label or t in crowd:
                    continue
                both = sum(a == p and b == t for a, b in pixels)
                either = sum((a == p and b != 0) or b == t for a, b in pixels)
                if both / either > 0.5:
                    totals[label][0] += both / either
                    totals[label][1] += 1
                    matched_true.add(t)
                    matched_pred.add(p)

        for p, answer in predicted.items():
            excuses = {0} | {t for t in crowd if true[t] == answer}
            area = sum(a == p for a, b in pixels)
            excused = sum(a == p and b in excuses for a, b in pixels)
            totals[answer][2] += p not in matched_pred and excused / area <= 0.5
        for t, label in true.items():
            totals[label][3] += t not in matched_true and t not in crowd
    return totals


def random_pair(rng):
    """A truth of blobs with void and crowd, and a prediction that changes some of its segments."""
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
        changed = rng.choice([0, 3, 70_000, *np.unique(pred_map)])
        pred_map[y:y + height, x:x + width] = changed
    true_segments = [segment(i, c, rng.random() < 0.25) for i, c in category.items() if i]
    pred_segments = [segment(int(i), category.get(int(i) - 5, 7) if rng.random() < 0.8 else 8)
                     for i in np.unique(pred_map) if i]
    rng.shuffle(true_segments)
    rng.shuffle(pred_segments)
    return torch.from_numpy(pred_map), pred_segments, torch.from_numpy(true_map), true_segments


def test_pq_equals_the_definition_written_as_loops_on_two_hundred_random_pairs():
    rng, quality = np.random.default_rng(0), PanopticQuality(K, IS_THING)
    pairs = [random_pair(rng) for _ in range(200)]
    for pair in pairs:
        quality.update(*pair)
    result, slow = quality.compute(), slow_pq(pairs)
    for i in (1, 2, 3):                                              # the pairs test all three
        assert sum(totals[i] for totals in slow.values()) > 50

    occur = [k for k, totals in slow.items() if sum(totals[1:])]
    sq, rq = {}, {}
    for k in occur:
        iou, tp, fp, fn = slow[k]
        sq[k], rq[k] = iou / max(tp, 1), tp / (tp + fp / 2 + fn / 2)
        per_class = 100 * iou / (tp + fp / 2 + fn / 2)
        assert result["PQ_per_class"][k] == pytest.approx(per_class)
    things = [k for k in occur if IS_THING[k]]
    stuff = [k for k in occur if not IS_THING[k]]
    for name, group in (("", occur), ("_th", things), ("_st", stuff)):
        assert result["PQ" + name] == pytest.approx(100 * np.mean([sq[k] * rq[k] for k in group]))
        assert result["SQ" + name] == pytest.approx(100 * np.mean([sq[k] for k in group]))
        assert result["RQ" + name] == pytest.approx(100 * np.mean([rq[k] for k in group]))


def test_pq_does_not_depend_on_ids_order_or_integer_type():
    pred_map, pred_segments, true_map, true_segments = random_pair(np.random.default_rng(3))
    expected = pq(pred_map, pred_segments, true_map, true_segments)
    ids = {s["id"]: 16_000_000 - 3 * n for n, s in enumerate(pred_segments)}
    renamed = pred_map.clone()
    for old, new in ids.items():
        renamed[pred_map == old] = new
    segments = [s | {"id": ids[s["id"]]} for s in reversed(pred_segments)]
    result = pq(renamed.int(), segments, true_map.int(), true_segments[::-1])
    np.testing.assert_equal(result, expected)


def test_truth_as_prediction_scores_100_whatever_is_void_or_crowd():
    rng, quality = np.random.default_rng(5), PanopticQuality(K, IS_THING)
    for _ in range(20):
        _, _, true_map, true_segments = random_pair(rng)
        quality.update(true_map, true_segments, true_map, true_segments)
    assert [quality.compute()[name] for name in ("PQ", "SQ", "RQ")] == [100, 100, 100]


def test_pq_of_nothing_is_zero_without_division_by_zero():
    void = torch.zeros(4, 5, dtype=torch.int32)
    assert PanopticQuality(K, IS_THING).compute()["PQ"] == 0
    for result in (pq(void, [], void, []),
                   pq(void + 1, [segment(1, 7)], void, []),
                   pq(void, [segment(3, 7)], void, [segment(4, 7, crowd=True)])):
        names = [name + group for name in ("PQ", "SQ", "RQ") for group in ("", "_th", "_st")]
        assert [result[name] for name in names] == [0] * 9
        assert all(math.isnan(value) for value in result["PQ_per_class"])


def test_a_segment_of_an_unknown_class_raises():
    with pytest.raises(IndexError):
        pq([[1, 1]], [segment(1, K)], [[2, 2]], [segment(2, 3)])
    with pytest.raises(IndexError):
        pq([[1, 1]], [segment(1, 3)], [[2, 2]], [segment(2, K)])
    with pytest.raises(ValueError, match="negative"):
        pq([[1, 1]], [segment(1, 3)], [[2, 2]], [segment(2, -1)])


def test_class_regions_are_stuff_segments_of_the_ids_class_plus_one():
    for void in (-1, 255):
        ids, segments = class_regions(torch.tensor([[void, 0], [2, 2]]), void)
        assert ids.tolist() == [[0, 1], [3, 3]]
        found = [(s["id"], s["category_id"], s["isthing"]) for s in segments]
        assert found == [(1, 0, False), (3, 2, False)]


# --------------------------------------------------------------------------------------------- both
def test_ground_truth_as_logits_scores_100():
    dataset = build_dataset("shapes", split="val", num_classes=K)
    matrix, quality = ConfusionMatrix(K), PanopticQuality(K, dataset.is_thing)
    for index in range(8):
        _, segment_map, class_of, _, _ = dataset[index]
        Q = len(class_of) + 3                                        # three without a segment
        class_logits = torch.full((Q, K + 1), -9.)
        class_logits[len(class_of):, K] = 9.
        mask_logits = torch.randn(Q, *segment_map.shape)
        target = torch.full(segment_map.shape, 255)
        for q, (i, label) in enumerate(class_of.items()):
            class_logits[q, label] = 9.
            mask_logits[q] = torch.where(segment_map == i, 20., -20.)
            target[segment_map == i] = label
        scores = semantic_inference(class_logits[None], mask_logits[None])[0]
        matrix.update(scores.argmax(0), target)
        found = panoptic_inference(class_logits, mask_logits, dataset.is_thing)
        quality.update(*found, segment_map, [segment(i, k) for i, k in class_of.items()])
    assert matrix.compute()["mIoU"] == 100
    names = "PQ", "SQ", "RQ", "PQ_th", "PQ_st"
    assert [quality.compute()[name] for name in names] == [100] * 5


# ------------------------------------------------------------------------------------------ as text
def metrics_without(missing):
    """Metrics of perfect predictions of all classes but one."""
    target = torch.tensor([[k for k in range(K) if k != missing]])
    return miou(target, target) | {"PQ_st": 87.65432}


def test_single_numbers_are_the_metrics_that_are_one_number():
    numbers = single_numbers(metrics_without(3))
    assert numbers == {"mIoU": 100, "mACC": 100, "pACC": 100, "fwIoU": 100, "PQ_st": 87.654}


def test_the_table_has_a_line_for_each_class_and_says_over_how_many_the_mean_goes():
    names = [f"class {k}" for k in range(K)]
    *lines, numbers, remark = table_of_classes(metrics_without(3), names).split("\n")
    assert [line.split() for line in lines[1:4]] == [["class", f"{k}", "100.00"] for k in range(3)]
    assert lines[4].split() == ["class", "3", "nan"] and len(lines) == 1 + K
    assert numbers == "mIoU 100.00  mACC 100.00  pACC 100.00  fwIoU 100.00  PQ_st 87.65"
    assert remark == "mIoU over 10 of 11 classes; the truth never has class 3"
    assert "of 11 classes" not in table_of_classes(miou([range(K)], [range(K)]), names)


def test_metrics_json_has_numbers_only_and_names_the_classes_that_the_truth_has(tmp_path):
    names = [f"class {k}" for k in range(K)]
    save_metrics(tmp_path / "metrics.json", metrics_without(3), names, step=7)
    content = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert content["step"] == 7 and content["PQ_st"] == 87.654
    assert content["IoU_per_class"] == {f"class {k}": 100 for k in range(K) if k != 3}
    assert content["classes_without_truth"] == 1
