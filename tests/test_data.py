"""What is guaranteed of data.py: drawn shapes, augmentation, samples and batches, real data."""
import colorsys
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import (Augmentation, DetrAugmentation, TrainingSamples, build_dataset, collate,
                  merge_classes, resized, step_batches)
from evaluate import ConfusionMatrix, PanopticQuality

REAL = os.environ.get("DATA_ROOT")


def same(ours, theirs):
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
               for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------- drawn shapes

def test_a_drawn_picture_is_a_function_of_seed_split_and_index():
    first = build_dataset("shapes", split="train")
    again = build_dataset("shapes", split="train")
    assert same(first[3], again[3])
    torch.manual_seed(1)
    np.random.seed(1)
    first[0]
    assert same(first[3], again[3])

    val = build_dataset("shapes", split="val")
    other_seed = build_dataset("shapes", split="train", seed=1)
    for other in (first[4], val[3], other_seed[3]):
        assert not torch.equal(first[3][0], other[0])


def test_a_drawn_picture_is_an_image_a_segment_map_the_class_of_each_id_crowd_and_a_name():
    dataset = build_dataset("shapes", split="val", size=(50, 70))
    for index in range(20):
        image, segment_map, class_of, crowd, name = dataset[index]
        assert image.shape == (3, 50, 70)
        assert image.dtype == torch.uint8
        assert image.float().std() > 5
        assert segment_map.shape == (50, 70)
        assert set(segment_map.unique().tolist()) - {0} == set(class_of)
        assert (segment_map == 0).float().mean() < 0.1
        assert crowd == []
        assert name == f"{index:05d}"
        stuff = [label for label in class_of.values() if not dataset.is_thing[label]]
        assert len(set(stuff)) == len(stuff) >= 1                   # a segment for each stuff class


def test_drawn_pictures_are_those_of_the_recorded_runs():
    image, segment_map, class_of, _, _ = build_dataset("shapes", split="train")[7]
    assert class_of == {1: 2, 2: 0, 3: 5, 4: 5}
    assert segment_map.flatten().bincount().tolist() == [0, 1793, 3401, 398, 552]
    assert image.float().mean((1, 2)).tolist() == pytest.approx([106.28, 67.66, 71.91], abs=0.05)


@pytest.mark.parametrize("num_classes", [2, 6, 40, 150])
def test_shapes_have_as_many_classes_as_asked_for_and_all_appear(num_classes):
    dataset = build_dataset("shapes", split="train", num_classes=num_classes, size=(32, 48))
    assert len(dataset.classes) == len(set(dataset.classes)) == num_classes
    assert len(dataset.is_thing) == num_classes
    assert sum(dataset.is_thing) == num_classes // 2
    seen = set()
    for index in range(2 * num_classes + 60):
        seen |= set(dataset[index][2].values())
    if num_classes < 100:
        assert seen == set(range(num_classes))
    else:
        assert len(seen) > 0.85 * num_classes


def test_two_shapes_of_a_class_are_two_segments():
    dataset = build_dataset("shapes", split="train", num_classes=2)
    counts = [list(dataset[index][2].values()).count(1) for index in range(20)]
    assert max(counts) >= 2


def test_iterating_over_shapes_stops():
    dataset = build_dataset("shapes", split="val", length=3)
    assert len(dataset) == 3
    assert len(list(dataset)) == 3


def test_the_example_in_the_docstring_of_data_runs():
    names = vars(data).copy()
    code = [line.strip() for line in data.__doc__.split("\n") if re.match(r" {4}\S", line)]
    exec("\n".join(code), names)
    assert names["image"].shape[1:] == names["segment_map"].shape
    assert names["name"] == "00000"
    assert names["batch"].images.shape == (2, 3, 64, 96)


# ---------------------------------------------------------------------------------------- real data

def score_of_truth(dataset, indices):
    """The metrics of the truth of some images, given back as the prediction."""
    K = len(dataset.classes)
    matrix = ConfusionMatrix(K)
    quality = PanopticQuality(K, dataset.is_thing)
    for index in indices:
        image, segment_map, class_of, crowd, _ = dataset[index]
        assert image.shape[1:] == segment_map.shape
        assert set(segment_map.unique().tolist()) <= set(class_of) | {0}
        regions, merged = merge_classes(segment_map, class_of)
        label = data.to_label_map(regions, merged, void=255)
        matrix.update(label, label)
        segments = [{"id": i, "category_id": k, "iscrowd": i in crowd} for i, k in class_of.items()]
        answer = [segment for segment in segments if not segment["iscrowd"]]
        quality.update(segment_map, answer, segment_map, segments)
    return matrix.compute() | quality.compute()


def assert_perfect(metrics):
    for name in ("mIoU", "mACC", "pACC", "fwIoU", "PQ", "SQ", "RQ"):
        assert metrics[name] == pytest.approx(100), name


def real(*parts):
    path = Path(REAL or "absent").joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not below $DATA_ROOT")
    return path


def test_truth_as_prediction_scores_100_on_camvid():
    dataset = build_dataset("folder", real("camvid"), "val")
    assert len(dataset) == 101
    assert len(dataset.classes) == 11
    assert_perfect(score_of_truth(dataset, range(0, 101, 25)))


def test_truth_as_prediction_scores_100_on_pedestrians():
    dataset = build_dataset("panoptic", real("pennfudan"), "val")
    assert len(dataset) == 34
    assert dict(zip(dataset.classes, dataset.is_thing)) == {"pedestrian": True, "background": False}
    assert_perfect(score_of_truth(dataset, range(0, 34, 5)))


def test_truth_as_prediction_scores_100_on_ade20k(monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(real("ADEChallengeData2016").parent))
    assert_perfect(score_of_truth(build_dataset("ade20k", split="val"), range(3)))


def test_truth_as_prediction_scores_100_on_coco():
    dataset = build_dataset("coco-panoptic", real("coco").parent, "val")
    assert len(dataset.classes) == 133
    assert sum(dataset.is_thing) == 80
    assert all(dataset[index][3] for index in range(2))              # both images hold crowds
    assert_perfect(score_of_truth(dataset, range(2)))


# ------------------------------------------------------------------------------------- augmentation

def marked(height, width):
    """An image whose red channel tells the segment: 40 * id; ids 1..5 and void 0 are columns."""
    segment_map = torch.zeros(height, width, dtype=torch.uint8)
    for i in range(6):
        segment_map[:, i * width // 6:(i + 1) * width // 6] = i
    image = torch.stack([40 * segment_map, torch.full_like(segment_map, 9),
                         torch.full_like(segment_map, 200)])
    return image, segment_map


def inside_of(image):
    """Which pixels of an augmented `marked` image are no padding; their height and width."""
    inside = image[1] != 128                                         # the green channel is 9
    height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
    assert inside[:height, :width].all()                             # top left
    assert inside.sum() == height * width
    return inside, height, width


@pytest.mark.parametrize("size, expected", [((120, 180), {(50, 75), (64, 96)}),
                                            ((61, 300), {(41, 96)})])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_augmented_image_and_map_stay_aligned_and_padding_is_128_and_void(size, expected, dtype):
    image, segment_map = marked(*size)
    augment = Augmentation([50, 80, 110], 200, (64, 96), color_distortion=False)
    flipped, sizes = set(), set()
    for seed in range(25):
        torch.manual_seed(seed)
        ours, ours_map = augment(image, segment_map.to(dtype))
        assert ours.shape == (3, 64, 96) and ours.dtype == torch.uint8
        assert ours_map.shape == (64, 96) and ours_map.dtype == dtype
        inside, height, width = inside_of(ours)
        assert (ours[:, ~inside] == 128).all()
        assert (ours_map[~inside] == 0).all()
        wrong = (ours[0].int() - 40 * ours_map.int())[inside].abs() > 20
        assert wrong.float().mean() < 0.08                           # but for blurred borders
        flipped.add(bool(ours_map[0, :width].int().diff().sum() < 0))
        sizes.add((height, width))
    assert flipped == {True, False}
    assert sizes == expected


def test_short_and_long_side_obey_their_limits():
    augment = Augmentation([50, 80], 100, (400, 400), color_distortion=False)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, _ = augment(*marked(60, 90))
        _, height, width = inside_of(image)
        seen.add((height, width))
    assert seen == {(50, 75), (67, 100)}                             # 80 would make it 120 long


def test_color_distortion_changes_colors_and_nothing_else():
    image, segment_map = marked(64, 96)
    image = torch.randint(256, image.shape, dtype=torch.uint8)
    changed = 0
    for seed in range(10):
        torch.manual_seed(seed)
        plain_augment = Augmentation([64], 96, (64, 96), color_distortion=False)
        plain, plain_map = plain_augment(image, segment_map)
        torch.manual_seed(seed)
        ours, ours_map = Augmentation([64], 96, (64, 96))(image, segment_map)
        changed += not torch.equal(ours, plain)
        assert torch.equal(ours_map, plain_map)
        assert ours.dtype == torch.uint8
    assert changed >= 6


def test_each_color_distortion_has_a_coin_of_its_own_and_its_limit():
    augment = Augmentation([8], 8, (8, 8))
    gray, red = [], []
    for seed in range(200):
        torch.manual_seed(seed)
        for color, seen in (((100, 100, 100), gray), ((210, 90, 90), red)):
            image = torch.tensor(color, dtype=torch.uint8)[:, None, None].repeat(1, 8, 8)
            distorted, _ = augment(image, torch.zeros(8, 8, dtype=torch.uint8))
            seen.append(distorted[:, 0, 0].tolist())
    levels = [r for r, g, b in gray]                 # only brightness changes a plain gray image
    assert 70 < levels.count(100) < 130
    assert 86 <= min(levels) < 92
    assert 108 < max(levels) <= 113
    hues = [(colorsys.rgb_to_hsv(*color)[0] + 0.5) % 1 - 0.5 for color in red]
    assert 70 < sum(abs(hue) < 0.005 for hue in hues) < 130
    assert 0.08 < max(abs(hue) for hue in hues) <= 0.12


def test_detrs_augmentation_crops_half_of_the_time_within_its_limits(monkeypatch):
    resizes = []

    def noting(image, segment_map, short_side, *limit):
        resizes.append((list(image.shape[1:]), short_side))
        return resized(image, segment_map, short_side, *limit)

    monkeypatch.setattr(data, "resized", noting)
    augment = DetrAugmentation([50, 80], 100)
    flipped, sides, crops = set(), set(), []
    for seed in range(60):
        torch.manual_seed(seed)
        resizes.clear()
        ours, ours_map = augment(*marked(120, 180))
        assert resizes[0][0] == [120, 180]
        assert list(ours.shape[1:]) == data.fit(*resizes[-1], 100)
        assert ((ours[0].int() - 40 * ours_map.int()).abs() > 20).float().mean() < 0.1
        flipped.add(bool(ours_map[0].int().diff().sum() < 0))
        if len(resizes) == 2:                                        # else it was not cropped
            (_, side), (crop, _) = resizes
            sides.add(side)
            crops.append(crop)
            assert 384 <= crop[0] <= side
            assert 384 <= crop[1] <= 600
    assert flipped == {True, False}
    assert sides == {400, 500, 600}
    assert 20 < len(crops) < 40
    assert min(min(crop) for crop in crops) < 400
    assert max(max(crop) for crop in crops) > 575


def test_test_size_is_the_short_side_unless_the_long_side_gets_too_long():
    assert data.fit((100, 200), 50, 1000) == [50, 100]
    assert data.fit((200, 100), 50, 80) == [80, 40]
    assert min(data.fit((1, 5000), 512, 2048)) >= 1
    for side in range(200, 900):                                    # a crop of 512 needs no padding
        assert data.fit((side, side + 100), 512)[0] == 512
        assert data.fit((side + 100, side), 512)[1] == 512
    assert resized(*marked(322, 422), 512)[0].shape == (3, 512, 671)
    image, segment_map = resized(*marked(60, 90), 30, 60)
    assert image.shape == (3, 30, 45)
    assert segment_map.shape == (30, 45)
    assert set(segment_map.unique().tolist()) == set(range(6))


# ------------------------------------------------------------------------------ samples and batches

class FakeDataset:
    """`length` times the same item, but for its name."""
    classes, is_thing, panoptic = ["a", "b", "c", "d"], [True] * 4, True

    def __init__(self, segment_map, class_of, crowd=(), length=5):
        image = torch.zeros(3, *segment_map.shape, dtype=torch.uint8)
        self.item = image, segment_map, class_of, list(crowd)
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return *self.item, f"image {index}"


def unchanged(image, segment_map):
    return image, segment_map


def test_segments_that_the_crop_emptied_are_dropped():
    quarters = torch.tensor([[1, 2], [3, 0]], dtype=torch.uint8)     # of 5 x 7 pixels
    segment_map = quarters.repeat_interleave(5, 0).repeat_interleave(7, 1)
    dataset = FakeDataset(segment_map, {1: 3, 2: 0, 3: 3})

    def left(image, ids):
        return image[:, :, :7], ids[:, :7]

    def lower_right(image, ids):
        return image[:, 5:, 7:], ids[5:, 7:]

    _, _, ids, labels, _ = TrainingSamples(dataset, left)[0]
    assert ids.tolist() == [1, 3]
    assert labels.tolist() == [3, 3]
    assert ids.dtype == labels.dtype == torch.int64
    empty = TrainingSamples(dataset, lower_right)[0]
    assert empty[2].tolist() == empty[3].tolist() == []
    batch = collate([empty, empty])
    assert batch.masks().shape == (0, 5, 7)
    assert batch.owner.shape == batch.labels.shape == (0,)


def test_crowd_segments_are_not_trained_on_as_instances():
    segment_map = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    dataset = FakeDataset(segment_map, {1: 0, 2: 2, 3: 1, 4: 0}, crowd=[2, 4])
    _, _, ids, labels, _ = TrainingSamples(dataset, unchanged)[0]
    assert ids.tolist() == [1, 3]
    assert labels.tolist() == [0, 1]


def test_in_the_semantic_task_crowd_belongs_to_its_class_and_costs_no_other_class_its_segment():
    segment_map = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    dataset = FakeDataset(segment_map, {1: 0, 2: 2, 3: 1, 4: 0}, crowd=[2, 4])
    _, merged, ids, labels, _ = TrainingSamples(dataset, unchanged, task="semantic")[0]
    assert merged.tolist() == [[1, 3, 2, 1]]
    assert dict(zip(ids.tolist(), labels.tolist())) == {1: 0, 2: 1, 3: 2}


def test_merging_classes_leaves_one_segment_for_each_class():
    segment_map = torch.tensor([[1, 2, 0], [3, 300, 4]], dtype=torch.int32)
    merged, class_of = merge_classes(segment_map, {1: 5, 2: 5, 3: 0, 300: 9, 4: 0, 77: 8})
    assert merged.tolist() == [[6, 6, 0], [1, 10, 1]]
    assert class_of == {6: 5, 1: 0, 10: 9, 9: 8}


def test_merged_ids_beyond_255_are_kept():
    segment_map = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    merged, _ = merge_classes(segment_map, {1: 299, 2: 254, 3: 254})
    assert merged.tolist() == [[300, 255, 255]]


def test_nothing_is_merged_where_each_class_has_one_segment():
    segment_map = torch.tensor([[1, 2]], dtype=torch.uint8)
    merged, class_of = merge_classes(segment_map, {1: 299, 2: 254})
    assert merged.tolist() == [[1, 2]]
    assert class_of == {1: 299, 2: 254}
    merged, class_of = merge_classes(torch.zeros(2, 3, dtype=torch.uint8), {})
    assert class_of == {}
    assert not merged.any()


def shape_samples(seed=0, length=7):
    dataset = build_dataset("shapes", split="train", size=(48, 64), length=length)
    return TrainingSamples(dataset, Augmentation([40, 48, 56], 100, (32, 40)), seed=seed)


def test_the_nth_sample_is_a_function_of_seed_and_n():
    samples = shape_samples()
    first = samples[12]
    torch.manual_seed(99)
    np.random.seed(99)
    samples[3]
    state = torch.random.get_rng_state()
    assert same(first, samples[12])
    assert same(first, shape_samples()[12])
    assert torch.equal(state, torch.random.get_rng_state())         # and leaves the generator alone
    assert not torch.equal(first[0], shape_samples(seed=1)[12][0])


def test_every_epoch_holds_every_image_once_in_another_order_and_another_crop():
    samples = shape_samples()
    epochs = [[samples[n] for n in range(start, start + 7)] for start in (0, 7, 14)]
    names = [[sample[-1] for sample in epoch] for epoch in epochs]
    for epoch in names:
        assert sorted(epoch) == [f"{i:05d}" for i in range(7)]
    assert names[0] != names[1] or names[1] != names[2]
    first, second = ({sample[-1]: sample[0] for sample in epoch} for epoch in epochs[:2])
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_processes_and_accumulation_split_the_same_global_batches():
    whole = list(step_batches(2, 5, 12))
    assert [len(batch) for batch in whole] == [12] * 3
    assert whole[0] == range(24, 36)
    for world_size, accumulate in ((2, 1), (1, 3), (2, 3), (3, 2)):
        parts = [list(step_batches(2, 5, 12, rank, world_size, accumulate))
                 for rank in range(world_size)]
        assert all(len(part) == 3 * accumulate for part in parts)
        for step in range(3):
            numbers = []
            for part in parts:
                for batch in part[step * accumulate:(step + 1) * accumulate]:
                    assert len(batch) == 12 // world_size // accumulate
                    numbers += batch
            assert numbers == list(whole[step])


def test_a_resumed_stream_goes_on_where_it_stopped():
    assert list(step_batches(0, 6, 4))[4:] == list(step_batches(4, 6, 4))


def test_workers_send_what_one_process_computes():
    numbers = list(step_batches(0, 3, 4))
    cpu = torch.device("cpu")
    alone = list(data.training_batches(shape_samples(), numbers, 0, cpu))
    shared = list(data.training_batches(shape_samples(), numbers, 1, cpu))
    assert len(alone) == len(shared) == 3
    assert all(same(ours, theirs) for ours, theirs in zip(alone, shared))


class ProcessIds(torch.utils.data.Dataset):
    """Samples whose name is the id of the process that made them."""

    def __getitem__(self, n):
        return *random_sample(6, 9, [1], [2])[:-1], os.getpid()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no such signals")
def test_workers_go_on_after_the_signals_that_stop_a_job():
    numbers = list(step_batches(0, 30, 1))
    loader = data.training_batches(ProcessIds(), numbers, 1, torch.device("cpu"))
    worker = next(loader).names[0]
    assert worker != os.getpid()
    os.kill(worker, signal.SIGTERM)
    os.kill(worker, signal.SIGUSR1)
    assert [batch.names[0] for batch in loader] == [worker] * 29


def random_sample(height, width, ids, labels, dtype=torch.uint8, name="x"):
    ids = torch.tensor(ids, dtype=torch.long)
    values = torch.cat([ids, torch.zeros(1, dtype=torch.long)])
    segment_map = values[torch.randint(len(values), (height, width))].to(dtype)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return image, segment_map, ids, torch.tensor(labels, dtype=torch.long), name


def test_a_batch_holds_images_maps_and_flat_segments():
    samples = [random_sample(6, 9, [4, 7], [1, 1], name="a"),
               random_sample(6, 9, [], [], name="b"),
               random_sample(6, 9, [2, 4, 200], [0, 3, 2], name="c")]
    batch = collate(samples)
    assert batch.images.shape == (3, 3, 6, 9)
    assert batch.images.dtype == batch.segment_maps.dtype == torch.uint8
    assert batch.owner.tolist() == [0, 0, 2, 2, 2]
    assert batch.labels.tolist() == [1, 1, 0, 3, 2]
    assert batch.names == ["a", "b", "c"]

    masks = batch.to("cpu").masks()
    assert masks.shape == (5, 6, 9)
    assert masks.dtype == torch.bool
    for n, (b, i) in enumerate([(0, 4), (0, 7), (2, 2), (2, 4), (2, 200)]):
        assert torch.equal(masks[n], samples[b][1] == i)

    label_map = batch.label_map(255)
    assert label_map.shape == (3, 6, 9)
    assert label_map.dtype == torch.int64
    tables = [{4: 1, 7: 1, 0: 255}, {0: 255}, {2: 0, 4: 3, 200: 2, 0: 255}]
    for b, table in enumerate(tables):
        assert label_map[b].tolist() == [[table[i] for i in row] for row in samples[b][1].tolist()]


def test_segments_that_are_not_listed_are_void_in_the_label_map():
    image, segment_map, ids, labels, name = random_sample(6, 9, [1, 2], [5, 6])
    label_map = collate([(image, segment_map, ids[:1], labels[:1], name)]).label_map(65535)
    assert torch.equal(label_map[0], torch.where(segment_map == 1, 5, 65535))


def test_images_of_different_sizes_are_padded_at_the_right_and_bottom_with_the_mean_and_void():
    samples = [random_sample(6, 9, [1], [2]), random_sample(8, 5, [3], [0])]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 8, 9)
    assert batch.images.dtype == torch.uint8
    assert batch.segment_maps.shape == (2, 8, 9)
    assert batch.masks().shape == (2, 8, 9)
    for b, (image, segment_map, *_) in enumerate(samples):
        height, width = segment_map.shape
        assert torch.equal(batch.images[b, :, :height, :width], image)
        assert torch.equal(batch.segment_maps[b, :height, :width], segment_map)
        padding = torch.ones(8, 9, dtype=torch.bool)
        padding[:height, :width] = False
        assert (batch.segment_maps[b][padding] == 0).all()
        assert (batch.images[b][:, padding] == torch.tensor([[124], [116], [104]])).all()


def test_maps_of_different_integer_types_make_one_batch():
    samples = [random_sample(6, 9, [1], [2]), random_sample(6, 9, [700], [0], dtype=torch.int32)]
    masks = collate(samples).masks()
    assert torch.equal(masks[0], samples[0][1] == 1)
    assert torch.equal(masks[1], samples[1][1] == 700)
