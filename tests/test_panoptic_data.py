"""What people bring: their own data in COCO's panoptic format, as their tools write it, and
checkpoints that were trained on other class lists.

Whatever is wrong is told in one line that names it, before training starts.
"""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import SegmentationDataset, TrainingSamples, UserError, align_classes, build_dataset
from test_folder_data import H, W, blocks, labels_of, warnings_in, write_image, write_png


# --------------------------------------------------------------------------------- what can be read

IDS = [70_000, 3, 16_000_001, 256]      # of segments; more than two bytes, not sorted
CATEGORIES = [{"id": 200, "name": "grass", "isthing": 0}, {"id": 1, "name": "person", "isthing": 1},
              {"id": 90, "name": "brush", "isthing": 1}]


def rgb_of(ids):
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)


def segments_of(ids):
    categories = [200, 1, 1, 90]
    return [{"id": i, "category_id": category, "iscrowd": int(category == 90)}
            for i, category in zip(ids, categories)]


def make_panoptic(root, change=None, ids=IDS, split="val"):
    """An image of one split. change: edits the content of the json."""
    write_image(root / f"images/{split}/photo.jpg")
    write_png(root / f"panoptic_{split}/photo.png",
              rgb_of(blocks(ids[0], ids[1], 0, ids[2], ids[3], dtype=np.int64)))
    content = {"images": [{"id": 5, "file_name": "photo.jpg"}],
               "categories": [dict(category) for category in CATEGORIES],
               "annotations": [{"image_id": 5, "file_name": "photo.png",
                                "segments_info": segments_of(IDS)}]}
    if change:
        change(content)
    (root / f"panoptic_{split}.json").write_text(json.dumps(content))
    return root


def edited(part, **values):
    """A change of the first entry of a part of the json."""
    return lambda content: content[part][0].update(values)


def edited_segment(**values):
    return lambda content: content["annotations"][0]["segments_info"][1].update(values)


def panoptic_val(root, change=None, **options):
    return build_dataset("panoptic", make_panoptic(root, change, **options), "val")


def test_coco_panoptic_ids_and_categories_need_not_be_contiguous(tmp_path, capsys):
    dataset = panoptic_val(tmp_path)
    assert dataset.classes == ["person", "brush", "grass"]
    assert dataset.is_thing == [True, True, False]
    assert dataset.category_ids == [1, 90, 200]
    assert dataset.panoptic
    assert dataset.image_ids == {"photo": 5}
    _, segment_map, class_of, crowd, name = dataset[0]
    assert labels_of(dataset[0]) == [2, 0, None, 0, 1]
    assert len(class_of) == 4
    assert [class_of[i] for i in crowd] == [1]
    assert name == "photo"
    assert warnings_in(capsys) == []


def test_ids_that_the_json_does_not_list_are_named(tmp_path):
    make_panoptic(tmp_path, ids=[70_000, 4, 16_000_001, 999])
    with pytest.raises(UserError, match=r"photo.png holds the ids \[4, 999\]"):
        build_dataset("panoptic", tmp_path, "val")


def test_pngs_of_nothing_but_void_are_refused(tmp_path):
    make_panoptic(tmp_path, ids=[0, 0, 0, 0])
    with pytest.raises(UserError, match="panoptic_val holds nothing but void"):
        build_dataset("panoptic", tmp_path, "val")


def test_listed_segments_without_pixels_are_never_trained_on(tmp_path):
    dataset = panoptic_val(tmp_path, ids=[70_000, 0, 16_000_001, 0])
    samples = TrainingSamples(dataset, lambda image, segment_map: (image, segment_map))
    _, segment_map, ids, labels, _ = samples[0]
    assert sorted(labels.tolist()) == [0, 2]
    assert set(ids.tolist()) == set(segment_map.unique().tolist()) - {0}


@pytest.mark.parametrize("image_id, annotation_id", [("5", 5), (5, "5"), ("aachen_5", "aachen_5")])
def test_image_ids_may_be_text_or_numbers(image_id, annotation_id, tmp_path):
    def change(content):
        content["images"][0]["id"] = image_id
        content["annotations"][0]["image_id"] = annotation_id

    dataset = panoptic_val(tmp_path, change)
    assert labels_of(dataset[0]) == [2, 0, None, 0, 1]
    assert dataset.image_ids == {"photo": annotation_id}


@pytest.mark.parametrize("file_name", ["photo.jpg", "photo", "panoptic/photo.png",
                                       "C:\\export\\photo.png"])
def test_the_png_is_found_whatever_ending_or_folder_the_json_gives_it(file_name, tmp_path):
    dataset = panoptic_val(tmp_path, edited("annotations", file_name=file_name))
    assert labels_of(dataset[0]) == [2, 0, None, 0, 1]


def test_the_image_is_found_if_the_json_gives_it_a_folder(tmp_path):
    dataset = panoptic_val(tmp_path, edited("images", file_name="val2017/photo.jpg"))
    assert dataset[0][-1] == "photo"


@pytest.mark.parametrize("flag, crowd", [("0", False), ("1", True), ("false", False),
                                         ("True", True), (False, False), (True, True), (1, True),
                                         (None, False)])
def test_iscrowd_may_be_text(flag, crowd, tmp_path):
    dataset = panoptic_val(tmp_path, edited_segment(iscrowd=flag))
    _, _, class_of, crowd_ids, _ = dataset[0]
    persons = [i in crowd_ids for i, label in class_of.items() if label == 0]
    assert persons == [crowd, False]


def test_categories_without_isthing_are_things_and_told(tmp_path, capsys):
    dataset = panoptic_val(tmp_path, lambda content: content["categories"][0].pop("isthing"))
    assert dataset.is_thing == [True, True, True]
    [line] = warnings_in(capsys)
    assert "panoptic_val.json: no \"isthing\" in the categories 'grass'" in line


SMALL_IDS = [4, 3, 250, 7]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pngs_of_one_channel_hold_the_ids(dtype, tmp_path):
    def change(content):
        content["annotations"][0]["segments_info"] = segments_of(SMALL_IDS)

    make_panoptic(tmp_path, change)
    write_png(tmp_path / "panoptic_val/photo.png", blocks(4, 3, 0, 250, 7, dtype=dtype))
    dataset = build_dataset("panoptic", tmp_path, "val")
    assert labels_of(dataset[0]) == [2, 0, None, 0, 1]


def test_palette_pngs_hold_the_ids_as_indices(tmp_path):
    def change(content):
        content["annotations"][0]["segments_info"] = segments_of(SMALL_IDS)

    make_panoptic(tmp_path, change)
    png = Image.fromarray(blocks(4, 3, 0, 250, 7)).convert("P")
    png.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    png.save(tmp_path / "panoptic_val/photo.png")
    dataset = build_dataset("panoptic", tmp_path, "val")
    assert labels_of(dataset[0]) == [2, 0, None, 0, 1]


def test_palette_pngs_may_merely_compress_the_colors(tmp_path):
    dataset = panoptic_val(tmp_path)
    path = tmp_path / "panoptic_val/photo.png"
    with Image.open(path) as png:
        compressed = png.quantize(5)
    compressed.save(path)
    assert labels_of(dataset[0]) == [2, 0, None, 0, 1]


NEW_IMAGE = {"id": 6, "file_name": "other.jpg"}


def test_images_that_no_annotation_names_are_told(tmp_path, capsys):
    dataset = panoptic_val(tmp_path, lambda content: content["images"].append(NEW_IMAGE))
    assert len(dataset) == 1
    [line] = warnings_in(capsys)
    assert line.endswith("images without an annotation are ignored (1): other.jpg")


def add_annotations(content):
    for image_id in ("x", 7, "08"):
        content["annotations"].append({"image_id": image_id, "file_name": "photo.png",
                                       "segments_info": []})


def twice(part, **values):
    return lambda content: content[part].append(content[part][0] | values)


def crowd_alone(content):
    for segment in content["annotations"][0]["segments_info"]:
        segment["iscrowd"] = 1


REFUSED = {
    "annotations of no image": (add_annotations, "images 'x', 7, '08', which are not in its list"),
    "two images of one id": (twice("images", file_name="z.jpg"), "photo.jpg, z.jpg .* same id 5"),
    "two annotations of an image": (twice("annotations"), "several annotations of the images 5"),
    "segment id 0": (edited_segment(id=0), "annotation photo.png: a segment has the id 0"),
    "a negative segment id": (edited_segment(id=-3), "has the id -3"),
    "a segment id that is no integer": (edited_segment(id=3.5), "has the id 3.5"),
    "a segment id as text": (edited_segment(id="3"), "has the id '3'"),
    "two segments of one id": (edited_segment(id=256), "two segments have the same id"),
    "an unknown category": (edited_segment(category_id=8), "category 8, which is not in the list"),
    "a category as text": (edited_segment(category_id="1"), "category '1', which is not in"),
    "a crowd flag that is none": (edited_segment(iscrowd="maybe"), "'iscrowd' is 'maybe'"),
    "a negative category": (edited("categories", id=-1), r"from 0 to 65535, not \[-1, 1, 90\]"),
    "a category that is no integer": (edited("categories", id=1.5), r"not \[1.5, 1, 90\]"),
    "a category beyond 16 bits": (edited("categories", id=70_000), r"not \[70000, 1, 90\]"),
    "two categories of one id": (edited("categories", id=1), r"different ids.* \[1, 1, 90\]"),
    "two categories of one name": (edited("categories", name="brush"), "'brush' more than once"),
    "no category": (lambda content: content["categories"].clear(), r"not \[\]"),
    "no list of images": (lambda content: content.pop("images"), "lacks the list 'images'"),
    "no segments": (lambda content: content["annotations"][0].pop("segments_info"),
                    "'annotations' lacks 'segments_info'"),
    "nothing listed": (lambda content: content["annotations"].clear(), "lists no segment"),
    "crowd alone": (crowd_alone, "nothing but crowd regions: there is nothing to learn"),
    "an image id that is none": (edited("images", id=None), "integers or text, not None"),
}


@pytest.mark.parametrize("change, words", REFUSED.values(), ids=REFUSED)
def test_a_json_that_contradicts_itself_is_refused(change, words, tmp_path):
    with pytest.raises(UserError, match=f"panoptic_val.json.*{words}"):
        panoptic_val(tmp_path, change)


@pytest.mark.parametrize("text", ["{\"images\": [", "[]", "3"])
def test_a_json_of_something_else_is_refused(text, tmp_path):
    make_panoptic(tmp_path)
    (tmp_path / "panoptic_val.json").write_text(text)
    with pytest.raises(UserError, match="panoptic_val.json is not"):
        build_dataset("panoptic", tmp_path, "val")


@pytest.mark.parametrize("gone, named", [("images/val/{}.jpg", "images/val/0.jpg"),
                                         ("panoptic_val/{}.png", "panoptic_val/0.png")])
def test_all_missing_files_are_found_when_the_dataset_is_built(gone, named, tmp_path):
    def change(content):
        content["images"], content["annotations"] = [], []
        for n in range(5):
            content["images"].append({"id": n, "file_name": f"{n}.jpg"})
            content["annotations"].append({"image_id": n, "file_name": f"{n}.png",
                                           "segments_info": segments_of(IDS)})

    make_panoptic(tmp_path, change)
    for n in range(5):
        write_image(tmp_path / f"images/val/{n}.jpg")
        write_png(tmp_path / f"panoptic_val/{n}.png", rgb_of(blocks(*IDS, dtype=np.int64)))
    assert len(build_dataset("panoptic", tmp_path, "val")) == 5
    for n in (0, 2, 3, 4):
        (tmp_path / gone.format(n)).unlink()
    with pytest.raises(UserError, match=rf"{named}: no such file \(4 missing: 0.* and 1 more\)"):
        build_dataset("panoptic", tmp_path, "val")


def test_two_entries_of_one_file_are_refused(tmp_path):
    def change(content):
        content["images"].append(NEW_IMAGE)
        content["annotations"].append({"image_id": 6, "file_name": "photo.png",
                                       "segments_info": []})

    write_image(tmp_path / "images/val/other.jpg")
    with pytest.raises(UserError, match="panoptic_val/photo.png belongs to two entries"):
        panoptic_val(tmp_path, change)


def test_a_png_of_another_size_is_named_with_its_image(tmp_path):
    dataset = panoptic_val(tmp_path)
    write_image(tmp_path / "images/val/photo.jpg", (9, W))
    with pytest.raises(UserError, match=r"val/photo.jpg .*\(9, 14\).*panoptic_val/photo.png \(10"):
        dataset[0]


def test_categories_without_a_segment_are_told(tmp_path, capsys):
    def change(content):
        content["categories"] += [{"id": 4, "name": "cat", "isthing": 1},
                                  {"id": 5, "name": "dog", "isthing": 1}]

    panoptic_val(tmp_path, change)
    [line] = warnings_in(capsys)
    assert line.endswith("panoptic_val.json: no segment of the category 'cat', 'dog'")


def test_a_single_category_is_told(tmp_path, capsys):
    def change(content):
        content["categories"] = [CATEGORIES[1]]
        content["annotations"][0]["segments_info"] = segments_of(IDS)[1:3]

    panoptic_val(tmp_path, change, ids=[0, *IDS[1:3], 0])
    [line] = warnings_in(capsys)
    assert "panoptic_val.json: 'person' is the only class" in line


# ------------------------------------------------------------ class lists of splits and checkpoints

def test_a_split_that_lacks_categories_is_numbered_like_the_other(tmp_path):
    make_panoptic(tmp_path, lambda content: content["categories"].append(
        {"id": 50, "name": "cat", "isthing": 1}), split="train")
    train_set = build_dataset("panoptic", tmp_path, "train")
    assert train_set.category_ids == [1, 50, 90, 200]
    val_set = panoptic_val(tmp_path)
    for dataset in (build_dataset("panoptic", tmp_path, "train"), val_set):
        assert dataset.classes == ["person", "cat", "brush", "grass"]
        assert dataset.is_thing == [True, True, True, False]
        assert dataset.category_ids == [1, 50, 90, 200]
        assert labels_of(dataset[0]) == [3, 0, None, 0, 2]


@pytest.mark.parametrize("change, words", [
    (edited("categories", name="lawn"), "200: 'lawn' against 'grass'"),
    (edited("categories", isthing=1), "200: 'grass', a thing against stuff")])
def test_splits_that_call_a_category_otherwise_are_refused(change, words, tmp_path):
    make_panoptic(tmp_path, split="train")
    with pytest.raises(UserError, match=f"val.json and .*train.json differ .*{words}"):
        panoptic_val(tmp_path, change)


def info_of(dataset, **changes):
    """What a checkpoint that was trained on a dataset tells of its classes."""
    return {"classes": list(dataset.classes), "is_thing": list(dataset.is_thing),
            "category_ids": list(dataset.category_ids)} | changes


def test_a_dataset_of_the_checkpoints_classes_is_taken_as_it_is(tmp_path):
    dataset = panoptic_val(tmp_path)
    assert align_classes(dataset, info_of(dataset)) is dataset
    old = info_of(dataset)
    del old["category_ids"]                                          # written by an older version
    assert align_classes(dataset, old) is dataset


def test_a_dataset_that_lacks_classes_is_numbered_like_the_checkpoint(tmp_path):
    dataset = panoptic_val(tmp_path)
    info = {"classes": ["person", "cat", "brush", "moss", "grass"],
            "is_thing": [True, True, True, False, False], "category_ids": [1, 50, 90, 91, 200]}
    aligned = align_classes(dataset, info)
    assert aligned.classes == info["classes"]
    assert aligned.is_thing == info["is_thing"]
    assert aligned.category_ids == aligned.label_values == info["category_ids"]
    assert labels_of(aligned[0]) == [4, 0, None, 0, 2]
    assert len(aligned[0][3]) == 1                                   # the brush is still crowd
    assert labels_of(dataset[0]) == [2, 0, None, 0, 1]               # and the original unchanged


@pytest.mark.parametrize("changes, words", [
    ({"category_ids": [1, 90, 201]}, "200: 'grass', which the checkpoint lacks"),
    ({"classes": ["person", "brush", "lawn"]}, "200: 'grass' against 'lawn'"),
    ({"is_thing": [True, False, False]}, "90: 'brush', a thing against stuff"),
    ({"classes": ["person", "brush"], "is_thing": [True, True], "category_ids": [1, 90]},
     "3 classes in the dataset, 2 in the checkpoint.*200: 'grass', which the checkpoint lacks")])
def test_a_dataset_of_other_classes_is_refused(changes, words, tmp_path):
    dataset = panoptic_val(tmp_path)
    info = info_of(dataset) | changes
    if changes.keys() == {"category_ids"}:
        info["classes"] = ["person", "brush", "moss"]
    with pytest.raises(UserError, match=f"{words}.*--data-root"):
        align_classes(dataset, info)


def test_thing_flags_of_a_model_for_semantic_segmentation_do_not_matter(tmp_path):
    dataset = panoptic_val(tmp_path)
    info = {"classes": ["person", "brush", "grass", "moss"], "is_thing": [False] * 4,
            "category_ids": [1, 90, 200, 201], "config": {"task": "semantic"}}
    assert align_classes(dataset, info).classes == info["classes"]


def test_old_checkpoints_with_other_thing_flags_are_told(tmp_path, capsys):
    dataset = panoptic_val(tmp_path)
    info = {"classes": dataset.classes, "is_thing": [True, True, True]}
    assert align_classes(dataset, info) is dataset
    [line] = warnings_in(capsys)
    assert "differ in which classes are things" in line


def test_old_checkpoints_without_ids_are_compared_by_number_and_name(tmp_path, capsys):
    dataset = panoptic_val(tmp_path)
    info = {"classes": ["person", "brush", "lawn"], "is_thing": [True, True, False]}
    assert align_classes(dataset, info) is dataset
    [line] = warnings_in(capsys)
    assert "'grass' is 'lawn'" in line
    with pytest.raises(UserError, match="3 classes in the dataset, 2 in the checkpoint"):
        align_classes(dataset, {"classes": ["a", "b"], "is_thing": [True, True]})


def test_photos_are_a_dataset_in_the_classes_of_a_checkpoint(tmp_path):
    pixels = write_image(tmp_path / "photo.png")
    info = {"classes": ["wall", "sky"], "is_thing": [False, True], "category_ids": [0, 1],
            "label_values": [1, 2], "config": {"dataset": "folder"}}
    dataset = data.without_truth([tmp_path / "photo.png"], info)
    assert (dataset.classes, dataset.is_thing) == (info["classes"], info["is_thing"])
    assert (dataset.category_ids, dataset.label_values) == ([0, 1], [1, 2])
    assert not dataset.has_truth
    image, segment_map, class_of, crowd, name = dataset[0]
    assert np.array_equal(image.permute(1, 2, 0), pixels)
    assert segment_map.shape == (H, W)
    assert not segment_map.any()
    assert (class_of, crowd, name) == ({}, [], "photo")
    del info["category_ids"], info["label_values"]                   # of an old checkpoint
    assert data.without_truth([], info).label_values == [0, 1]


@pytest.mark.parametrize("dataset, name, image_id", [
    ("cityscapes-panoptic", "bern_000000_000019_leftImg8bit", "bern_000000_000019"),
    ("coco-panoptic", "000000142238", 142238),
    ("coco-panoptic", "my_photo", "my_photo"),
    ("panoptic", "000000142238", "000000142238")])
def test_photos_have_the_ids_by_which_the_publishers_evaluator_knows_them(dataset, name, image_id):
    info = {"classes": ["car"], "is_thing": [True], "config": {"dataset": dataset}}
    photos = data.without_truth([Path(f"{name}.png")], info)
    assert photos.image_ids.get(name, name) == image_id


def test_label_values_are_the_category_ids_unless_given():
    dataset = SegmentationDataset([], ["a", "b"], [False, False], None, [7, 9])
    assert dataset.label_values == [7, 9]
