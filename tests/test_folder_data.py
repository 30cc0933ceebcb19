"""What people bring: folders of their own label images, as their tools write them.

Whatever is wrong is told in one line that names it, before training starts.
"""
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import UserError, build_dataset

H, W = 10, 14


def write_image(path, size=(H, W), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def write_png(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


def blocks(*values, dtype=np.uint8):
    """A map [H, W] of equally wide columns with these values."""
    row = np.array(values, dtype)[np.arange(W) * len(values) // W]
    return np.repeat(row[None], H, 0)


def warnings_in(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    return lines


def labels_of(item):
    """The class of each column of an item's map, None for void."""
    _, segment_map, class_of, _, _ = item
    assert (segment_map == segment_map[:1]).all()
    changes = [0] + [x for x in range(1, W) if segment_map[0, x] != segment_map[0, x - 1]]
    return [class_of.get(segment_map[0, x].item()) for x in changes]


# ----------------------------------------------------------------------------------------- warnings

def test_a_warning_is_one_line_of_process_0(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    data.warn("the sky is missing")
    assert capsys.readouterr().err == "warning: the sky is missing\n"
    monkeypatch.setenv("RANK", "1")
    data.warn("the sky is missing")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------- folders of label maps

CLASSES = ("road", "car thing", "sky stuff")


def make_folder(root, classes=CLASSES, values=(0, 2, 1, 255), suffix=".jpg"):
    """One image of each split, b."""
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    for seed, split in enumerate(("train", "val")):
        write_image(root / f"images/{split}/b{suffix}", seed=seed)
        write_png(root / f"annotations/{split}/b.png", blocks(*values))
    return root


def test_a_folder_of_images_and_index_pngs_is_a_dataset(tmp_path, capsys):
    dataset = build_dataset("folder", make_folder(tmp_path), "val")
    assert dataset.classes == ["road", "car", "sky"]
    assert dataset.is_thing == [False, True, False]
    assert dataset.category_ids == dataset.label_values == [0, 1, 2]
    assert len(dataset) == 1
    image, segment_map, class_of, crowd, name = dataset[0]
    assert image.shape == (3, H, W)
    assert image.dtype == torch.uint8
    assert (name, crowd) == ("b", [])
    assert class_of == {1: 0, 2: 1, 3: 2}
    assert segment_map.tolist() == blocks(1, 3, 2, 0).tolist()       # 255 is void
    assert warnings_in(capsys) == []


def test_images_behind_links_count_and_hidden_ones_do_not(tmp_path):
    own = make_folder(tmp_path / "data")
    elsewhere = make_folder(tmp_path / "elsewhere")
    for kind in ("images", "annotations"):
        (own / kind / "val" / "town").symlink_to(elsewhere / kind / "val")
        (own / kind / "val" / ".cache").symlink_to(elsewhere / kind / "val")
    pairs = build_dataset("folder", own, "val").pairs
    names = [path.relative_to(own).as_posix() for path, _ in pairs]
    assert sorted(names) == ["images/val/b.jpg", "images/val/town/b.jpg"]


def test_a_folder_image_is_read_as_it_is(tmp_path):
    make_folder(tmp_path, suffix=".png")
    pixels = write_image(tmp_path / "images/val/b.png", seed=5)
    image = build_dataset("folder", tmp_path, "val")[0][0]
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


GREY = Image.fromarray(np.full((H, W, 3), 77, np.uint8))


@pytest.mark.parametrize("photo", [GREY.convert("L"), GREY.quantize(), GREY.convert("RGBA"),
                                   GREY.convert("LA")], ids=["L", "P", "RGBA", "LA"])
def test_gray_palette_and_transparent_photos_become_rgb(photo, tmp_path):
    make_folder(tmp_path, suffix=".png")
    photo.save(tmp_path / "images/val/b.png")
    image = build_dataset("folder", tmp_path, "val")[0][0]
    assert image.shape == (3, H, W)
    assert (image == 77).all()


def test_a_photo_is_turned_as_its_exif_entry_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                 # to be turned clockwise
    pixels = write_image(tmp_path / "turned.png", size=(4, 6), exif=exif)
    assert np.array_equal(data.read_image(tmp_path / "turned.png"), np.rot90(pixels, -1))


def tiff(bands, extra):
    """The bytes of an uncompressed little-endian TIFF, 2x1 pixels of 0, 1, 2, ..; `extra` are the
    entries of ExtraSamples."""
    pixels = bytes(range(2 * bands))
    entries = [(256, 3, [2]), (257, 3, [1]), (258, 3, [8] * bands), (259, 3, [1]), (262, 3, [2]),
               (273, 4, [8]), (277, 3, [bands]), (278, 4, [1]), (279, 4, [len(pixels)])]
    if extra:
        entries.append((338, 3, extra))
    directory, later = b"", b""
    start = 8 + len(pixels)
    for tag, kind, values in entries:
        width = 2 if kind == 3 else 4
        content = b"".join(value.to_bytes(width, "little") for value in values)
        if len(content) > 4:
            offset = start + 2 + 12 * len(entries) + 4 + len(later)
            later += content
            content = offset.to_bytes(4, "little")
        directory += tag.to_bytes(2, "little") + kind.to_bytes(2, "little")
        directory += len(values).to_bytes(4, "little") + content.ljust(4, b"\0")
    header = b"II*\0" + start.to_bytes(4, "little")
    return header + pixels + len(entries).to_bytes(2, "little") + directory + bytes(4) + later


@pytest.mark.parametrize("bands, extra", [(3, []), (4, [2])])
def test_tiffs_of_three_bands_and_of_colors_with_transparency_are_photos(bands, extra, tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(bands, extra))
    pixels = np.arange(2 * bands).reshape(1, 2, bands)[..., :3]
    assert data.read_image(tmp_path / "x.tif").tolist() == pixels.tolist()


@pytest.mark.parametrize("bands, extra", [(4, [0]), (4, []), (5, [0, 0])])
def test_tiffs_of_more_bands_are_refused(bands, extra, tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(bands, extra))
    with pytest.raises(UserError, match="x.tif has more bands"):
        data.read_image(tmp_path / "x.tif")


def test_a_label_out_of_range_names_file_value_and_remedy(tmp_path):
    make_folder(tmp_path, values=(1, 2, 3))
    with pytest.raises(UserError) as error:
        build_dataset("folder", tmp_path, "train")
    message = str(error.value)
    assert "annotations/train/b.png holds [3]; classes are 0..2, void is 255" in message
    assert "subtract 1" in message and "complete it" in message


def palette(values):
    png = Image.fromarray(values).convert("P")
    png.putpalette([0, 0, 0, 200, 10, 90])
    return png


BINARY = blocks(0, 1, 0)
CODINGS = {
    "palette": palette(BINARY),
    "16 bits": Image.fromarray(BINARY.astype(np.uint16)),
    "1 bit": Image.fromarray(BINARY > 0),
    "three equal channels": Image.fromarray(np.stack([BINARY] * 3, -1)),
    "RGBA": Image.fromarray(np.stack([BINARY] * 3 + [np.full_like(BINARY, 200)], -1)),
    "gray with transparency": Image.fromarray(BINARY).convert("LA"),
}


@pytest.mark.parametrize("png", CODINGS.values(), ids=CODINGS)
def test_indices_are_read_from_whatever_png_holds_them(png, tmp_path):
    make_folder(tmp_path)
    png.save(tmp_path / "annotations/val/b.png")
    segment_map = build_dataset("folder", tmp_path, "val")[0][1]
    assert segment_map.tolist() == blocks(1, 2, 1).tolist()


@pytest.mark.parametrize("ending", [".PNG", "_L.png"])
def test_annotations_may_end_as_cameras_and_camvid_write_them(ending, tmp_path):
    make_folder(tmp_path)
    path = tmp_path / "annotations/val/b.png"
    path.rename(path.with_name(f"b{ending}"))
    assert labels_of(build_dataset("folder", tmp_path, "val")[0]) == [0, 2, 1, None]


def many(count):
    return [f"class {k}" for k in range(count)]


def test_more_than_255_classes_use_16_bit_pngs_with_void_65535(tmp_path):
    make_folder(tmp_path, classes=many(300))
    path = tmp_path / "annotations/val/b.png"
    write_png(path, blocks(299, 255, 0, 65535, dtype=np.uint16))
    _, segment_map, class_of, _, _ = build_dataset("folder", tmp_path, "val")[0]
    assert segment_map.tolist() == blocks(3, 2, 1, 0).tolist()
    assert class_of == {1: 0, 2: 255, 3: 299}


def test_with_more_than_255_classes_an_8_bit_png_is_read_too(tmp_path):
    make_folder(tmp_path, classes=many(300), values=(7, 254, 0))
    _, segment_map, class_of, _, _ = build_dataset("folder", tmp_path, "val")[0]
    assert class_of == {1: 0, 2: 7, 3: 254}
    assert segment_map.tolist() == blocks(2, 3, 1).tolist()


def test_255_classes_still_fit_with_255_as_void(tmp_path):
    make_folder(tmp_path, classes=many(255), values=(254, 0, 255))
    _, segment_map, class_of, _, _ = build_dataset("folder", tmp_path, "val")[0]
    assert class_of == {1: 0, 2: 254}
    assert segment_map.tolist() == blocks(2, 1, 0).tolist()


# --------------------------------------------------------------------- void and colors of one's own

def test_an_index_may_be_declared_void(tmp_path, capsys):
    classes = ("road", "unlabeled void", "sky", "car thing")
    make_folder(tmp_path, classes, values=(0, 1, 2, 3, 255))
    dataset = build_dataset("folder", tmp_path, "val")
    assert dataset.classes == ["road", "sky", "car"]
    assert dataset.is_thing == [False, False, True]
    assert dataset.category_ids == dataset.label_values == [0, 2, 3]     # indices in the file
    assert labels_of(dataset[0]) == [0, None, 1, 2, None]                # both kinds of void
    assert warnings_in(capsys) == []


RGB = {"road": (128, 64, 128), "sky": (0, 0, 0), "car": (255, 0, 1), "other": (9, 9, 9)}
COLORED = ("road 128 64 128", "sky 0 0 0 stuff", "other 9 9 9 void", "car 255 0 1 thing")
COMMAS = ("road, 128, 64, 128", "sky,0,0,0,stuff", "other 9,9,9 void", "car 255 0 1, thing")
COLOR_FIRST = ("128 64 128\troad", "0 0 0\t\tsky stuff", "9 9 9 other void", "255 0 1 car thing")


def colored(*names, channels=3):
    rgb = np.stack([blocks(*[RGB[name][c] for name in names]) for c in range(3)], -1)
    alpha = np.full((H, W, channels - 3), 255, np.uint8)
    return np.concatenate([rgb, alpha], -1)


@pytest.mark.parametrize("lines, channels", [(COLORED, 3), (COLORED, 4), (COLOR_FIRST, 3),
                                             (COMMAS, 3)])
def test_masks_may_hold_the_colors_that_classes_txt_lists(lines, channels, tmp_path, capsys):
    make_folder(tmp_path, lines)
    write_png(tmp_path / "annotations/val/b.png",
              colored("car", "road", "other", "sky", channels=channels))
    dataset = build_dataset("folder", tmp_path, "val")
    assert dataset.classes == ["road", "sky", "car"]
    assert dataset.is_thing == [False, False, True]
    assert dataset.category_ids == [0, 1, 3]
    assert labels_of(dataset[0]) == [2, 0, None, 1]
    assert warnings_in(capsys) == []


def test_a_palette_mask_may_hold_listed_colors(tmp_path):
    make_folder(tmp_path, COLORED)
    mask = Image.fromarray(colored("car", "road", "other", "sky"))
    mask.quantize(4).save(tmp_path / "annotations/val/b.png")
    assert labels_of(build_dataset("folder", tmp_path, "val")[0]) == [2, 0, None, 1]


def test_black_and_white_masks_train_with_listed_colors(tmp_path):
    make_folder(tmp_path, ("background 0 0 0", "road 255 255 255"), values=(0, 255))
    assert labels_of(build_dataset("folder", tmp_path, "val")[0]) == [0, 1]


def test_colors_that_are_not_listed_are_named_with_their_file(tmp_path):
    make_folder(tmp_path, COLORED)
    mask = colored("car", "road", "sky")
    mask[0, 3] = 7, 8, 9
    write_png(tmp_path / "annotations/val/b.png", mask)
    with pytest.raises(UserError, match=r"val/b.png holds the colors \(7, 8, 9\), which classes"):
        build_dataset("folder", tmp_path, "val")


def test_a_colored_mask_is_refused_with_its_colors_if_none_are_listed(tmp_path):
    make_folder(tmp_path)
    write_png(tmp_path / "annotations/val/b.png", colored("sky", "road", "road"))
    colors = r"val/b.png holds the colors \(128, 64, 128\), \(0, 0, 0\), not class indices"
    with pytest.raises(UserError, match=colors + r".*classes.txt \(road 128 64 128\)"):
        build_dataset("folder", tmp_path, "val")


@pytest.mark.parametrize("lines, words", [
    ([], "lists no class"),
    (["unlabeled void"], "lists no class"),
    (["road", "sky", "road thing"], "'road' more than once"),
    (["road 1 2 3", "sky"], "no color for 'sky'"),
    (["road 1 2 3", "sky 1 2 3"], r"\(1, 2, 3\) more than once"),
    (["", "road"], "line 1 is empty"),
    (["road 1 2 256"], "'road 1 2 256'.*255")])
def test_a_list_of_classes_that_contradicts_itself_is_refused(lines, words, tmp_path):
    make_folder(tmp_path, lines)
    with pytest.raises(UserError, match=f"classes.txt.*{words}"):
        build_dataset("folder", tmp_path, "val")


def test_names_may_hold_spaces_and_numbers(tmp_path):
    lines = ["thing", "void", "lane 2", "traffic light  0 1 2"]
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(lines[:3]))
    assert [line.name for line in data.read_class_list(path)] == ["thing", "void", "lane 2"]
    path.write_text(lines[3])
    [line] = data.read_class_list(path)
    assert (line.name, line.color, line.kind) == ("traffic light", (0, 1, 2), "stuff")


# --------------------------------------------------------- what would silently go wrong in training

def test_masks_of_0_and_255_are_refused_with_the_remedy(tmp_path):
    make_folder(tmp_path, ("background", "road"), values=(0, 255, 0))
    with pytest.raises(UserError, match="annotations/train.*0 and 255.*write 0 and 1, or"):
        build_dataset("folder", tmp_path, "train")


def test_0_1_and_255_are_two_classes_and_void(tmp_path, capsys):
    make_folder(tmp_path, ("background", "road"), values=(0, 255, 1))
    assert labels_of(build_dataset("folder", tmp_path, "train")[0]) == [0, None, 1]
    assert warnings_in(capsys) == []


def test_a_class_that_never_occurs_is_named(tmp_path, capsys):
    make_folder(tmp_path, values=(0, 2))
    build_dataset("folder", tmp_path, "train")
    [line] = warnings_in(capsys)
    assert line.endswith("annotations/train: no 'car' in any label map")
    make_folder(tmp_path, values=(0, 255))
    build_dataset("folder", tmp_path, "train")
    [line] = warnings_in(capsys)
    assert "no 'car', 'sky' in any label map; 255 is void: if it stands for a class" in line


def test_of_many_label_maps_50_are_looked_at(tmp_path, capsys):
    make_folder(tmp_path)
    for n in range(119):
        write_image(tmp_path / f"images/train/{n:03d}.jpg")
        values = (0, 1, 2) if n % 2 else (0, 1)
        write_png(tmp_path / f"annotations/train/{n:03d}.png", blocks(*values))
    build_dataset("folder", tmp_path, "train")                       # of 120, every third
    assert warnings_in(capsys) == []
    for n in range(0, 119, 3):
        write_png(tmp_path / f"annotations/train/{n:03d}.png", blocks(0, 1))
    build_dataset("folder", tmp_path, "train")
    [line] = warnings_in(capsys)
    assert line.endswith("no 'sky' in any of the 40 label maps looked at")


def test_all_label_maps_are_looked_at_before_masks_of_0_and_255_are_refused(tmp_path, capsys):
    make_folder(tmp_path, ("background", "road"), values=(0, 255))
    for n in range(59):
        write_image(tmp_path / f"images/train/{n:03d}.jpg")
        write_png(tmp_path / f"annotations/train/{n:03d}.png", blocks(0, 255))
    with pytest.raises(UserError, match="0 and 255"):
        build_dataset("folder", tmp_path, "train")
    write_png(tmp_path / "annotations/train/001.png", blocks(0, 255, 1))     # not every second
    build_dataset("folder", tmp_path, "train")
    assert warnings_in(capsys) == []


def test_nothing_but_void_is_refused(tmp_path):
    make_folder(tmp_path, values=(255,))
    with pytest.raises(UserError, match="annotations/train holds nothing but void"):
        build_dataset("folder", tmp_path, "train")


def test_a_single_class_is_told(tmp_path, capsys):
    make_folder(tmp_path, ("road",), values=(0, 255))
    build_dataset("folder", tmp_path, "train")
    [only, meaning] = warnings_in(capsys)
    assert "annotations/train: 'road' is the only class" in only
    assert "annotations/train: 0 is 'road'; 255 is void" in meaning


def test_a_class_called_void_is_void(tmp_path, capsys):
    make_folder(tmp_path, ("Void", "road", "sky VOID", "car"), values=(0, 1, 2, 3))
    dataset = build_dataset("folder", tmp_path, "train")
    assert dataset.classes == ["road", "car"]
    assert labels_of(dataset[0]) == [None, 0, None, 1]
    assert warnings_in(capsys) == []


# ---------------------------------------------------------------------------- files that do not fit

def test_an_image_without_annotation_is_named(tmp_path):
    make_folder(tmp_path)
    write_image(tmp_path / "images/val/lonely.jpg")
    with pytest.raises(UserError, match=r"lonely.png: no such file \(1 missing for 2 images\)"):
        build_dataset("folder", tmp_path, "val")


def test_annotations_without_image_are_told(tmp_path, capsys):
    make_folder(tmp_path)
    for name in ("x", "y"):
        write_png(tmp_path / f"annotations/val/{name}.png", blocks(0))
    assert len(build_dataset("folder", tmp_path, "val")) == 1
    [line] = warnings_in(capsys)
    assert line.endswith("annotations/val: PNGs that belong to no image (2): x.png, y.png")


def test_two_images_that_share_an_annotation_are_named(tmp_path):
    make_folder(tmp_path)
    write_image(tmp_path / "images/val/b.png")
    with pytest.raises(UserError, match="annotations/val/b.png belongs to b.jpg and b.png"):
        build_dataset("folder", tmp_path, "val")


def test_image_and_annotation_of_different_sizes_are_named(tmp_path):
    make_folder(tmp_path)
    write_image(tmp_path / "images/val/b.jpg", size=(H, W + 1))
    dataset = build_dataset("folder", tmp_path, "val")
    with pytest.raises(UserError, match=r"images/val/b.jpg .*\(10, 15\).*annotations/val/b.png "
                                        r"\(10, 14\)"):
        dataset[0]


def test_a_file_instead_of_the_folder_is_named_with_the_layout(tmp_path):
    make_folder(tmp_path)
    with pytest.raises(UserError, match="classes.txt/classes.txt: Not a directory.*Expected"):
        build_dataset("folder", tmp_path / "classes.txt", "val")


def test_an_empty_split_is_named_with_its_folder(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "images/val/b.jpg").unlink()
    with pytest.raises(UserError, match="images/val has no images"):
        build_dataset("folder", tmp_path, "val")


@pytest.mark.parametrize("name, expected", [("folder", "classes.txt"),
                                            ("panoptic", "panoptic_{train,val}.json")])
def test_a_wrong_folder_says_what_was_expected_and_what_was_found(name, expected, tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(UserError) as error:
        build_dataset(name, tmp_path, "val")
    found, layout = str(error.value).split("Expected below")
    assert found.endswith(f"Found in {tmp_path}: holiday. ")
    assert expected in layout and "images/{train,val}/X.jpg" in layout
    with pytest.raises(UserError, match=f"Found in {tmp_path}: holiday"):
        build_dataset(name, tmp_path / "not" / "there", "val")


def test_unknown_names_and_splits_are_refused():
    with pytest.raises(UserError, match="shapez.*shapes"):
        build_dataset("shapez")
    with pytest.raises(UserError, match="shapes.*'test'.*train or val"):
        build_dataset("shapes", split="test")


def test_an_empty_line_among_the_classes_is_refused_as_it_would_renumber_the_rest(tmp_path):
    (tmp_path / "classes.txt").write_text("background\n\nroad\n")
    with pytest.raises(UserError, match="line 2 is empty"):
        build_dataset("folder", tmp_path)
