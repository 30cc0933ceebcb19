"""What is guaranteed of the way from images to predictions, files and pictures (evaluate.py)."""
import colorsys
import io
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import draw_segmentation_masks

import evaluate
from data import SegmentationDataset, UserError, build_dataset, without_truth
from maskformer import MaskFormer, build_model

K = 11
IS_THING = [k >= 6 for k in range(K)]
NAMES = [f"class {k}" for k in range(K)]


class StripesModel(nn.Module):
    """Answers the same for every image: query q sees columns 8 q to 8 q + 7 and says class q."""

    def __init__(self, size_divisibility=0):
        super().__init__()
        self.num_classes = K
        self.size_divisibility = size_divisibility
        self.backbone = nn.Module()
        self.backbone.mean = torch.tensor([124., 116., 104.]).view(3, 1, 1)
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        h, w = (math.ceil(side / 4) for side in images.shape[-2:])
        class_logits = torch.full((1, 1, K, K + 1), -9.)
        class_logits[0, 0].diagonal().fill_(9.)
        mask_logits = torch.full((1, 1, K, h, w), -20.)
        for q in range(K):
            mask_logits[..., q, :, 2 * q:2 * q + 2] = 20.
        return class_logits, mask_logits


class ColorsModel(StripesModel):
    """Query q sees where channel q is bright and says class q; in large images, it confuses them,
    but is less sure."""

    def forward(self, images):
        class_logits, _ = super().forward(images)
        bright = F.interpolate(images, scale_factor=0.25)[None] > 128    # [1, 1, 3, h, w]
        if images.shape[-2] >= 60:
            return class_logits[:, :, :3], torch.where(bright.flip(2), 0.4, -9.)
        return class_logits[:, :, :3], torch.where(bright, 9., -9.)


def noise(height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def stripes(height, width, each=8):
    """-> the class of each pixel that StripesModel finds [height, width]."""
    return (torch.arange(width) // each).expand(height, width).int()


def predict(model, image, short_side=40, max_long_side=400, *thresholds, **options):
    return evaluate.predict(model, image, [True] * K, short_side, max_long_side, *thresholds,
                            **options)


# --------------------------------------------------------------------------------------- prediction
@pytest.mark.parametrize("size_divisibility", [0, 32])
def test_padding_is_cropped_before_masks_return_to_the_original_size(size_divisibility):
    model, image = StripesModel(size_divisibility), noise(40, 72)
    label, segment_map, segments = predict(model, image)
    assert torch.equal(label, stripes(40, 72))
    assert torch.equal(segment_map, stripes(40, 72) + 1)             # none lies in the padding
    assert label.dtype == segment_map.dtype == torch.int32
    assert [segment["category_id"] for segment in segments] == list(range(9))
    canvas, = model.seen[0]
    assert canvas.shape == ((3, 64, 96) if size_divisibility else (3, 40, 72))
    assert torch.equal(canvas[:, :40, :72], image.float())
    mean = model.backbone.mean                                       # zero once it is normalized
    assert (canvas[:, 40:] == mean).all() and (canvas[:, :, 72:] == mean).all()


def test_predictions_have_the_size_of_the_original():
    label, segment_map, _ = predict(StripesModel(32), noise(80, 144))    # twice the test size
    assert torch.equal(label, stripes(80, 144, each=16))
    assert torch.equal(segment_map, stripes(80, 144, each=16) + 1)


def test_flip_mirrors_the_input_and_the_answer_back():
    model, image = StripesModel(32), noise(40, 72)
    label, _, _ = predict(model, image, flip=True)
    assert torch.equal(model.seen[1][0, :, :40, :72], image.flip(-1).float())
    # The fifth of nine stripes is its own mirror image; others tie with theirs.
    assert torch.equal(label[:, 32:40], torch.full((40, 8), 4, dtype=torch.int32))
    for x in range(72):
        assert label[0, x].item() in (x // 8, 8 - x // 8)


def test_scores_of_all_scales_and_mirror_images_are_added_up_where_they_belong():
    model, truth = ColorsModel(), (torch.arange(160) // 40).clamp(max=2).expand(80, 160)
    image = 255 * F.one_hot(truth, 3).permute(2, 0, 1).to(torch.uint8)
    label, _, _ = predict(model, image, 40, 60, scales=(0.5, 1., 2.), flip=True)
    assert label[:, 20::40].tolist() == [[0, 1, 2, 2]] * 80          # far from the borders
    # Scale 1 for the segments, then every scale and its mirror image; the limit of the long side
    # is scaled, too.
    assert [tuple(x.shape[2:]) for x in model.seen] == [
        (30, 60), (15, 30), (15, 30), (30, 60), (60, 120), (60, 120)]


def test_inference_panoptic_takes_classes_from_the_segments():
    label, _, segments = predict(StripesModel(), noise(40, 72), 40, 400, 0.5, 1.,
                                 inference="panoptic")
    assert len(segments) == 9
    assert torch.equal(label, stripes(40, 72))


def test_inference_panoptic_leaves_void_where_no_query_is_sure():
    label, segment_map, segments = predict(StripesModel(), noise(40, 72), 40, 400, 1., 0.,
                                           inference="panoptic")
    assert segments == []
    assert (label == 255).all() and (segment_map == 0).all()


def test_without_panoptic_there_are_no_segments():
    label, segment_map, segments = predict(StripesModel(), noise(40, 72), panoptic=False)
    assert segment_map is segments is None
    assert torch.equal(label, stripes(40, 72))


def test_images_are_shrunk_as_pillow_shrinks_them():
    model, image = StripesModel(), noise(120, 216)
    predict(model, image)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((72, 40), Image.BILINEAR)
    difference = model.seen[0][0].permute(1, 2, 0) - torch.from_numpy(np.array(expected))
    assert difference.abs().max() <= 1


def test_network_output_has_the_size_at_which_the_model_saw_the_image():
    class_logits, mask_logits = evaluate.network_output(StripesModel(32), noise(80, 144), (40, 72))
    assert class_logits.shape == (K, K + 1) and mask_logits.shape == (K, 40, 72)
    assert torch.equal(mask_logits.argmax(0).int(), stripes(40, 72))


def test_scores_of_the_baselines_are_upsampled_four_times_and_cropped_as_in_their_loss():
    logits = torch.randn(1, 1, K, 10, 18)
    model = StripesModel()
    model.forward = lambda images: logits
    class_logits, scores = evaluate.network_output(model, noise(38, 71), (38, 71))
    expected = F.interpolate(logits[0], scale_factor=4, mode="bilinear", align_corners=False)
    assert class_logits is None
    torch.testing.assert_close(scores, expected[0, :, :38, :71])
    label, segment_map, segments = predict(model, noise(38, 71), 38)
    assert torch.equal(label, expected[0, :, :38, :71].argmax(0).int())
    assert segment_map is segments is None


@pytest.mark.parametrize("amp, dtype", [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_amp_is_the_precision_of_the_network(amp, dtype):
    model, used = StripesModel(), []
    layer = nn.Linear(2, 2)
    forward = model.forward

    def watched(images):
        used.append(layer(torch.zeros(1, 2)).dtype)
        return forward(images)

    model.forward = watched
    predict(model, noise(40, 72), amp=amp, flip=True, scales=(0.5, 1.))
    assert len(used) == 4 and set(used) == {dtype}


def test_classes_are_the_best_of_all_scores_resized_and_added_up():
    torch.manual_seed(0)
    scores = [torch.rand(20, 7, 9), torch.rand(20, 13, 17)]          # 20 is no multiple of eight
    resized = [F.interpolate(x[None], size=(19, 23), mode="bilinear")[0] for x in scores]
    assert torch.equal(evaluate.best_class(scores, (19, 23)), sum(resized).argmax(0).int())


def memory_of_best_class():
    """KiB by which the peak of this process grows."""
    from resource import RUSAGE_SELF, getrusage
    scores = torch.rand(75, 375, 500)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    evaluate.best_class([scores], (1500, 2000))
    return getrusage(RUSAGE_SELF).ru_maxrss - before


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_classes_of_a_large_photo_need_little_memory():
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        grown = pool.submit(memory_of_best_class).result()
    assert 20_000 < grown < 450_000                                  # all scores: 900,000


# --------------------------------------------------------------------------------------- evaluation
def sample_of_two_segments(index=0):
    """-> image, segment map of a thing and a crowd of its class, classes, crowd ids, name."""
    image = torch.full((3, 1, 4), index, dtype=torch.uint8)
    return image, torch.tensor([[1, 1, 2, 2]]), {1: 7, 2: 7}, [2], f"x{index}"


class FewImages(SegmentationDataset):
    def __init__(self, count, panoptic=True, names=None):
        names = names or [f"x{i}.png" for i in range(count)]
        super().__init__([(name, None) for name in names], NAMES, IS_THING, None, list(range(K)),
                         panoptic)

    def __getitem__(self, index):
        return sample_of_two_segments(index)


def found_a_thing(*_, **__):
    """Stands in for `predict`: the thing, and void in place of the crowd."""
    segments = [{"id": 1, "category_id": 7, "isthing": True, "score": 0.9}]
    return torch.full((1, 4), 7), torch.tensor([[1, 1, 0, 0]]), segments


def test_a_crowd_that_is_not_found_costs_nothing(monkeypatch):
    monkeypatch.setattr(evaluate, "MaskFormer", StripesModel)
    monkeypatch.setattr(evaluate, "predict", found_a_thing)
    metrics = evaluate.evaluate(StripesModel(), FewImages(1))
    assert metrics["PQ"] == metrics["PQ_th"] == metrics["mIoU"] == 100


@pytest.mark.parametrize("kind, panoptic, task", [
    (nn.Module, True, "panoptic"),                                   # a per-pixel baseline
    (StripesModel, False, "panoptic"),                               # data without instances
    (StripesModel, True, "semantic"),                                # a model trained without
])
def test_without_instances_every_class_region_is_a_segment_of_stuff(
        monkeypatch, kind, panoptic, task):
    asked = []

    def half_right(*_, panoptic, **__):
        asked.append(panoptic)
        return torch.tensor([[7, 7, 7, 8]]), None, None

    monkeypatch.setattr(evaluate, "MaskFormer", kind)
    monkeypatch.setattr(evaluate, "predict", half_right)
    metrics = evaluate.evaluate(StripesModel(), FewImages(1, panoptic), task=task)
    assert asked == [False]
    # Of class 7, three of four pixels are found; the region of class 8 is a false positive.
    assert metrics["PQ_st"] == pytest.approx((75 + 0) / 2)
    assert [name for name in metrics if name.startswith(("PQ", "SQ", "RQ"))] == ["PQ_st"]


def test_processes_share_the_images_of_an_evaluation(monkeypatch):
    seen = [], []
    monkeypatch.setattr(evaluate, "world_size", lambda: 2)
    monkeypatch.setattr(evaluate, "sum_over_processes", lambda value: value)
    for process in range(2):
        def noted(model, image, *_, process=process, **__):
            seen[process].append(int(image.max()))
            return torch.zeros(1, 4, dtype=torch.long), None, None

        monkeypatch.setattr(evaluate, "rank", lambda process=process: process)
        monkeypatch.setattr(evaluate, "predict", noted)
        evaluate.evaluate(StripesModel(), FewImages(5))
    assert seen == ([0, 2, 4], [1, 3])


def test_a_baseline_has_no_panoptic_inference():
    with pytest.raises(UserError, match="--inference panoptic"):
        evaluate.evaluate(tiny_model(model="per-pixel-plus"), FewImages(1), inference="panoptic",
                          **TEST_OPTIONS)


def test_images_whose_results_would_overwrite_each_other_are_refused(tmp_path):
    dataset = FewImages(2, names=["a/x.png", "b/x.jpg"])
    with pytest.raises(UserError, match="same name"):
        evaluate.evaluate(StripesModel(), dataset, save=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_images_without_truth_are_predicted_saved_and_told(tmp_path, monkeypatch, capsys):
    photo = tmp_path / "photo.png"
    Image.fromarray(noise(40, 72).permute(1, 2, 0).numpy()).save(photo)
    info = {"classes": NAMES, "is_thing": IS_THING, "category_ids": list(range(20, 20 + K)),
            "config": {"dataset": "folder"}}
    dataset = without_truth([photo], info)
    dataset.panoptic = True
    monkeypatch.setattr(evaluate, "MaskFormer", StripesModel)
    metrics = evaluate.evaluate(StripesModel(), dataset, save=tmp_path / "out",
                                test_short_side=40, test_max_long_side=400)
    assert metrics is None
    assert capsys.readouterr().out == f"photo: {', '.join(NAMES[:9])}\n"
    with Image.open(tmp_path / "out/semantic/photo.png") as png:
        assert np.array_equal(np.array(png), stripes(40, 72) + 20)
    content = json.loads((tmp_path / "out/panoptic.json").read_text())
    annotation, = content["annotations"]
    assert [s["category_id"] for s in annotation["segments_info"]] == list(range(20, 29))


# ------------------------------------------------------------------------------------ saved results
def three_classes(**options):
    return SegmentationDataset([], ["a", "b", "c"], [True, True, False], None, [7, 8, 33], True,
                               **options)


def values_saved(folder, dataset, label):
    label = torch.tensor([label])
    evaluate.save_label_map(folder, "x", dataset, label)
    with Image.open(folder / "semantic/x.png") as png:
        return np.array(png).tolist()[0]


def test_saved_segments_are_in_cocos_format_with_the_publishers_numbers(tmp_path):
    segment_map = torch.tensor([[1, 300, 300, 0]], dtype=torch.int32)
    segments = [{"id": 1, "category_id": 0, "isthing": True, "score": 0.9},
                {"id": 300, "category_id": 2, "isthing": False, "score": 0.8}]
    dataset = three_classes(image_ids={"x": 42})
    annotation = evaluate.save_segments(tmp_path, "x", dataset, segment_map, segments)
    with Image.open(tmp_path / "panoptic/x.png") as png:             # 300 = 44 + 256
        assert np.array(png).tolist() == [[[1, 0, 0], [44, 1, 0], [44, 1, 0], [0, 0, 0]]]
    assert (annotation["image_id"], annotation["file_name"]) == (42, "x.png")
    found = [(s["id"], s["category_id"], s["area"]) for s in annotation["segments_info"]]
    assert found == [(1, 7, 1), (300, 33, 2)]


def test_saved_label_maps_hold_the_publishers_values_and_a_void_that_is_none_of_them(tmp_path):
    label = [0, 2, 1, 255]
    assert values_saved(tmp_path, three_classes(), label) == [7, 33, 8, 0]
    for values, void in (([0, 1, 2], 255), ([0, 1, 300], 65535), ([0, 1, 255], 65535),
                         ([1, 2, 255], 0)):
        dataset = three_classes(label_values=values)
        assert values_saved(tmp_path, dataset, label) == [values[0], values[2], values[1], void]


def test_the_json_of_segments_has_the_images_categories_and_annotations_of_all_processes(
        tmp_path, monkeypatch):
    def entry(i):
        return {"image_id": i, "file_name": f"{i}.png", "segments_info": [], "height": 40 + i,
                "width": 72}

    def gather(parts, mine):
        parts[:] = [mine, [entry(2)]]

    monkeypatch.setattr(evaluate, "world_size", lambda: 2)
    monkeypatch.setattr(evaluate.dist, "all_gather_object", gather)
    evaluate.save_coco_json(tmp_path, three_classes(), [entry(1)])
    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert content["annotations"] == [
        {"image_id": i, "file_name": f"{i}.png", "segments_info": []} for i in (1, 2)]
    assert content["images"] == [
        {"id": i, "file_name": f"{i}.png", "height": 40 + i, "width": 72} for i in (1, 2)]

    categories = content["categories"]
    assert [(c["id"], c["name"], c["isthing"]) for c in categories] == [
        (7, "a", 1), (8, "b", 1), (33, "c", 0)]
    assert all(category["supercategory"] for category in categories)
    colors = [tuple(category["color"]) for category in categories]
    assert len(set(colors)) == 3
    assert all(len(color) == 3 and 0 <= min(color) <= max(color) <= 255 for color in colors)


# ----------------------------------------------------------------------------------------- pictures
def as_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def test_an_overlay_is_torchvisions_one_segment_at_a_time():
    image = noise(40, 60)
    segment_map = torch.zeros(40, 60, dtype=torch.int32)
    segment_map[:20], segment_map[25:, 30:] = 1, 2
    segments = [{"id": 1, "category_id": 1, "isthing": False},
                {"id": 2, "category_id": 0, "isthing": True},
                {"id": 3, "category_id": 0, "isthing": True}]        # has no pixel
    found = as_tensor(evaluate.overlay(image, segment_map, segments, ["", ""]))
    colors = []
    for number in (1, 2.5):                                          # of the class; of the thing
        color = colorsys.hsv_to_rgb(0.618 * number % 1, 0.75, 0.9)
        colors.append(tuple(int(255 * part) for part in color))
    masks = torch.stack([segment_map == 1, segment_map == 2])
    expected = draw_segmentation_masks(image, masks, 0.6, colors)
    assert (found.int() - expected.int()).abs().max() <= 1
    void = segment_map == 0
    assert torch.equal(found[:, void], image[:, void]) and not torch.equal(found, image)


def test_names_stand_on_large_segments_and_those_of_small_ones_in_a_legend_at_the_right():
    image = torch.zeros(3, 120, 160, dtype=torch.uint8)
    segment_map = torch.ones(120, 160, dtype=torch.int32)
    segment_map[:4, :4] = 2
    segments = [{"id": 1, "category_id": 0, "isthing": False},
                {"id": 2, "category_id": 1, "isthing": False}]

    large_alone = evaluate.overlay(image, segment_map, segments[:1], ["sky", "bird"])
    assert large_alone.size == (160, 120)
    nameless = evaluate.overlay(image, segment_map, segments[:1], ["", ""])
    named = (as_tensor(large_alone) != as_tensor(nameless)).any(0).nonzero()     # y, x
    assert len(named) > 0
    assert (named.float().mean(0) - torch.tensor([60., 80.])).abs().max() < 4

    both = evaluate.overlay(image, segment_map, segments, ["sky", "bird"])
    assert both.size[0] > 160 and both.size[1] == 120
    legend = as_tensor(both)[:, :, 160:].flatten(1).T.tolist()
    assert evaluate.color_of(1) in legend and evaluate.color_of(0) not in legend


def test_a_legend_lists_each_class_once_and_goes_no_further_than_the_picture():
    image = torch.zeros(3, 60, 200, dtype=torch.uint8)
    segment_map = torch.arange(200).div(4, rounding_mode="floor").expand(60, 200) + 1
    segments = [{"id": i, "category_id": (i - 1) % 40, "isthing": False} for i in range(1, 51)]
    classes = [f"a class with a name that is long {k}" for k in range(40)]
    picture = as_tensor(evaluate.overlay(image, segment_map, segments, classes))
    assert picture.shape[1] == 60 and picture.shape[2] > 200
    colors = {tuple(color) for color in picture[:, :, 200:].flatten(1).T.tolist()}
    samples = [k for k in range(40) if tuple(evaluate.color_of(k)) in colors]
    assert samples == list(range(len(samples))) and 2 <= len(samples) < 10


@pytest.mark.parametrize("height, width", [(120, 160), (30, 300), (300, 30)])
def test_in_a_box_a_picture_has_the_size_of_the_box(height, width):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    segment_map = torch.ones(height, width, dtype=torch.int32)
    segment_map[:2, :2] = 2
    segments = [{"id": i, "category_id": 0, "isthing": True} for i in (1, 2)]
    picture = evaluate.overlay(image, segment_map, segments, ["bird"], "caption", box=(320, 240))
    assert picture.size == (320, 240)


def test_neighboring_colors_differ():
    colors = torch.tensor([evaluate.color_of(k) for k in range(20)])
    assert (colors[1:] - colors[:-1]).abs().max(1).values.min() > 80


FLAGS = {"model": "maskformer", "backbone": "test_resnet", "dim": 32, "freeze_bn": True,
         "queries": 9, "decoder_layers": 3, "encoder_layers": 0, "heads": 4, "ffn_dim": 48,
         "dropout": 0.5, "size_divisibility": 32}
TEST_OPTIONS = {"test_short_side": 64, "test_max_long_side": 96, "object_threshold": 0.,
                "overlap_threshold": 0.}


def tiny_model(**flags):
    torch.manual_seed(0)
    return build_model(FLAGS | {"num_classes": K} | flags).eval()


def watched_captions(monkeypatch):
    """Notes the caption of every picture that is drawn."""
    captions = []
    draw = evaluate.overlay

    def noted(image, segment_map, segments, classes, caption="", box=None):
        captions.append(caption)
        return draw(image, segment_map, segments, classes, caption, box)

    monkeypatch.setattr(evaluate, "overlay", noted)
    return captions


@pytest.mark.parametrize("model, columns", [("maskformer", 4), ("per-pixel", 3)])
def test_predictions_png_shows_image_truth_and_results_of_four_images(
        tmp_path, monkeypatch, model, columns):
    captions = watched_captions(monkeypatch)
    dataset = build_dataset("shapes", split="val", num_classes=K)
    path = tmp_path / "predictions.png"
    evaluate.draw_predictions(tiny_model(model=model), dataset, path, **TEST_OPTIONS)
    with Image.open(path) as picture:
        assert picture.size == (columns * 320, 4 * 240)
    assert captions[::columns] == ["00000", "00033", "00066", "00099"]
    assert captions[1::columns] == ["truth"] * 4 and captions[2::columns] == ["semantic"] * 4
    assert all(text.startswith("panoptic, ") for text in captions[3::4]) or columns == 3


def test_queries_png_shows_the_surest_queries_and_one_of_them_after_each_decoder_layer(
        tmp_path, monkeypatch):
    captions = watched_captions(monkeypatch)
    model, dataset = tiny_model(), build_dataset("shapes", split="val", num_classes=K)
    path = tmp_path / "queries.png"
    evaluate.draw_queries(model, dataset, path, 64, 96)
    with Image.open(path) as picture:
        assert picture.size == (8 * 240, 4 * 180)

    assert len(captions) == 3 * 8 + 1 + 3
    assert captions[:17:8] == ["00000", "00049", "00099"]
    prob = [float(caption.split()[-1]) for caption in captions[17:24]]
    assert prob == sorted(prob, reverse=True)
    surest = captions[17].split(":")[0]
    assert captions[24] == f"query {surest} after each layer"
    assert [caption.split(":")[0] for caption in captions[25:]] == ["layer 1", "layer 2", "layer 3"]
    # The last layer's answer is the query's own.
    assert captions[27].split(": ")[1] == captions[17].split(": ")[1]


def test_outputs_of_layers_are_those_of_training_without_dropout():
    model, image = tiny_model(), noise(64, 96)
    with torch.no_grad():
        layers = list(evaluate.outputs_of_layers(model, image, (64, 96)))
        last_class_logits, last_mask_logits = model(image[None])
        without_dropout = tiny_model(dropout=0.).train()
        class_logits, mask_logits = without_dropout(image[None])
    assert not any(module.training for module in model.modules())
    assert len(layers) == 3
    for l in range(3):
        torch.testing.assert_close(layers[l][0], class_logits[l, 0])
        masks = evaluate.upsample(mask_logits[l, 0], (64, 96))
        torch.testing.assert_close(layers[l][1], masks)
    torch.testing.assert_close(layers[2][0], last_class_logits[0, 0])
    torch.testing.assert_close(layers[2][1], evaluate.upsample(last_mask_logits[0, 0], (64, 96)))


# ------------------------------------------------------------------------------------------ loading
def checkpoint(**flags):
    config = FLAGS | TEST_OPTIONS | {"task": "panoptic", "dataset": "shapes"} | flags
    return {"model": tiny_model(**flags).state_dict(), "config": config, "classes": NAMES,
            "is_thing": IS_THING, "category_ids": list(range(1, K + 1)), "step": 7}


@pytest.fixture
def saved(tmp_path):
    torch.save(checkpoint(), tmp_path / "last.pt")
    return tmp_path / "last.pt"


def test_a_checkpoint_gives_its_model_in_eval_mode_and_what_is_known_of_its_classes(saved):
    model, info = evaluate.load(saved)
    assert not any(module.training for module in model.modules())
    for name, tensor in tiny_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert info["classes"] == NAMES and info["is_thing"] == IS_THING
    assert info["category_ids"] == list(range(1, K + 1)) and info["step"] == 7
    assert info["config"].items() >= (FLAGS | TEST_OPTIONS | {"num_classes": K}).items()


@pytest.mark.parametrize("content, words", [
    (b"", "last.pt is not a whole checkpoint"),
    (b"PK\x03\x04 cut off", "last.pt is not a whole checkpoint"),
    ([1, 2], "last.pt is not a whole checkpoint"),
    ({"model": {}}, "last.pt is not a checkpoint of train.py: it lacks"),
])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, words):
    path = tmp_path / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=words):
        evaluate.load(path)


def test_a_checkpoint_of_another_model_than_it_describes_is_named(tmp_path):
    path = tmp_path / "last.pt"
    for flags, words in (({"dim": 64}, "size mismatch"), ({"backbone": "nonsense"}, "nonsense")):
        state = checkpoint()
        state["config"] |= flags
        torch.save(state, path)
        with pytest.raises(UserError, match=rf"(?s){path}.*{words}"):
            evaluate.load(path)


def test_a_missing_checkpoint_is_an_os_error_with_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.pt"):
        evaluate.load(tmp_path / "missing.pt")


class Trap:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    torch.save(checkpoint() | {"optimizer": Trap(tmp_path / "trapped")}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="last.pt"):
        evaluate.load(tmp_path / "last.pt")
    assert not (tmp_path / "trapped").exists()


# ------------------------------------------------------------------------------------- one's photos
@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(noise(70, 50).permute(1, 2, 0).numpy()).save(path)
    return path


def test_a_photo_gives_labels_and_named_segments(saved, photo):
    model, info = evaluate.load(saved)
    result = evaluate.predict_file(model, info, photo)
    expected = evaluate.predict(model, noise(70, 50), IS_THING, **TEST_OPTIONS)
    assert torch.equal(result["image"], noise(70, 50))
    assert torch.equal(result["label_map"], expected[0])
    assert torch.equal(result["segment_map"], expected[1])
    assert len(result["segments"]) == len(expected[2]) > 0
    for ours, segment in zip(result["segments"], expected[2]):
        assert ours == segment | {"name": f"class {segment['category_id']}"}


def test_options_of_predict_file_come_before_those_of_the_training(saved, photo):
    model, info = evaluate.load(saved)
    result = evaluate.predict_file(model, info, photo, object_threshold=1., test_short_side=32,
                                   inference="panoptic")
    assert result["segments"] == [] and (result["label_map"] == 255).all()


@pytest.mark.parametrize("flags", [{"task": "semantic"}, {"model": "per-pixel"}])
def test_without_instances_a_photo_has_a_segment_for_each_class(tmp_path, photo, flags):
    torch.save(checkpoint(**flags), tmp_path / "last.pt")
    result = evaluate.predict_file(*evaluate.load(tmp_path / "last.pt"), photo)
    present = result["label_map"].unique().tolist()
    assert [segment["name"] for segment in result["segments"]] == [NAMES[k] for k in present]
    assert torch.equal(result["segment_map"], result["label_map"] + 1)


def test_photos_are_files_and_the_images_in_folders(tmp_path):
    (tmp_path / "folder" / "inner.png").mkdir(parents=True)
    for name in ("b.JPG", "a.png", ".hidden.png", "notes.txt"):
        (tmp_path / "folder" / name).touch()
    (tmp_path / "one.webp").touch()
    given = [str(tmp_path / "one.webp"), str(tmp_path / "folder")]
    dataset = evaluate.photos(given, checkpoint())
    paths = [tmp_path / "one.webp", tmp_path / "folder/a.png", tmp_path / "folder/b.JPG"]
    assert [path for path, _ in dataset.pairs] == paths
    assert dataset.classes == NAMES and dataset.category_ids == list(range(1, K + 1))
    assert not dataset.has_truth


def test_a_photo_that_is_not_there_is_named_before_any_is_predicted(tmp_path):
    with pytest.raises(UserError, match="two.jpg: no such file"):
        evaluate.photos([str(tmp_path), str(tmp_path / "two.jpg")], checkpoint())


def test_output_that_is_not_finite_is_refused_and_not_scored():
    model = tiny_model().eval()
    torch.nn.init.constant_(model.to_mask[-1].bias, torch.nan)
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    with pytest.raises(UserError, match="not finite"):
        evaluate.predict(model, image, [False] * K, 32, 64)


def test_panoptic_inference_of_several_scales_is_refused_and_not_ignored():
    model = tiny_model().eval()
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    for options in ({"scales": (0.5, 1.)}, {"flip": True}):
        with pytest.raises(UserError, match="scale 1"):
            evaluate.predict(model, image, [False] * K, 32, 64, inference="panoptic", **options)


def test_a_folder_without_photos_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}.*no images"):
        evaluate.photos([str(tmp_path)], checkpoint())


# ----------------------------------------------------------------------------------------- commands
def ending(main, capsys):
    """-> exit code of a command, what it printed as errors."""
    with pytest.raises(SystemExit) as ended:
        evaluate.run_command(main)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error, code, told", [
    (UserError("photo.jpg is gray:\n paint it"), 2, "error: photo.jpg is gray: paint it\n"),
    (FileNotFoundError(2, "No such file", "a.png"), 2, "error: [Errno 2] No such file: 'a.png'\n"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2, "error: CUDA out of memory.\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_what_the_user_can_mend_is_told_in_one_line(capsys, error, code, told):
    def main():
        raise error
    assert ending(main, capsys) == (code, told)


def test_a_bug_keeps_its_traceback(capsys):
    code, told = ending(lambda: {}["missing"], capsys)
    assert code == 1
    assert told.startswith("Traceback") and told.endswith("KeyError: 'missing'\n")


def test_a_command_exits_with_its_own_code(capsys):
    assert ending(lambda: None, capsys)[0] in (None, 0)
    assert ending(lambda: 75, capsys)[0] == 75


class Broken(Dataset):
    """Each item raises the error of its number."""
    errors = [UserError("photo.jpg is gray:\n paint it"),
              FileNotFoundError(2, "No such file", "a.png")]

    def __getitem__(self, index):
        raise self.errors[index]


@pytest.mark.parametrize("index, told", [
    (0, "error: photo.jpg is gray: paint it\n"),
    (1, "error: [Errno 2] No such file: 'a.png'\n"),
])
def test_of_an_error_in_a_loader_worker_its_message_alone_is_told(capsys, index, told):
    loader = DataLoader(Broken(), batch_size=None, sampler=[index], num_workers=1,
                        multiprocessing_context="fork")
    assert ending(lambda: list(loader), capsys) == (2, told)


def test_a_console_that_lacks_a_character_ends_no_command(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit) as ended:
        evaluate.run_command(lambda: print("straße"))
    console.flush()
    assert ended.value.code in (None, 0) and console.buffer.getvalue() == b"stra?e\n"
