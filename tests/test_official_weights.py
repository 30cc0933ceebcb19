"""The authors' files become our models, array by array; what is not such a file is refused."""
import http.server
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer

import evaluate
from data import DATASETS, UserError
from maskformer import PerPixelBaseline, build_model
from tools import official_weights
from tools.exactness import fill
from tools.official_weights import (ZOO, class_lists, convert, download, find_dataset,
                                    load_official, model_flags, official_checkpoint,
                                    official_to_ours, read_file, translate)


# -------------------------------------------------------------------------------------- their files
# The names and shapes of the released files, written down without tools/official_weights.py.
STEM = {"R101c": [(64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3)]}   # else one 7x7 convolution
BLOCKS = {"R18": [2, 2, 2, 2], "R50": [3, 4, 6, 3], "R101": [3, 4, 23, 3], "R101c": [3, 4, 23, 3]}
SWIN = {                                                             # channels, blocks, window
    "swin_tiny": (96, [2, 2, 6, 2], 7),
    "swin_small": (96, [2, 2, 18, 2], 7),
    "swin_base": (128, [2, 2, 18, 2], 12),
    "swin_large": (192, [2, 2, 18, 2], 12),
}
TIMM = {
    "R50": "resnet50",
    "R101": "resnet101",
    "R101c": "resnet101c",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window12_384",
    "swin_large": "swin_large_patch4_window12_384",
}


def official_shapes(backbone="R50", K=150, encoder_layers=0, kind="maskformer", D=256,
                    decoder_layers=6, ffn_dim=2048):
    """{official name: shape}"""
    if backbone in SWIN:
        shapes, finest = swin(backbone), SWIN[backbone][0]
    else:
        shapes, finest = resnet(backbone), 64 if backbone == "R18" else 256
    channels = [finest, 2 * finest, 4 * finest, 8 * finest]

    fpn, predictor = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    for level, c in enumerate(channels, start=1):
        if level < 4:
            shapes |= conv_norm(f"{fpn}adapter_{level}", D, c, 1, 1)
        c = D if level < 4 or encoder_layers else c
        shapes |= conv_norm(f"{fpn}layer_{level}", D, c, 3, 3)
    shapes |= weight_and_bias(f"{fpn}mask_features", D, D, 3, 3)
    if kind == "per_pixel_baseline":
        return shapes | weight_and_bias("sem_seg_head.predictor", K, D, 1, 1)

    owner = fpn if encoder_layers else predictor
    shapes |= weight_and_bias(f"{owner}input_proj", D, channels[-1], 1, 1)
    for i in range(encoder_layers):
        prefix = f"{fpn}transformer.encoder.layers.{i}."
        shapes |= transformer_layer(prefix, ["self_attn"], D, ffn_dim)
    for i in range(decoder_layers):
        prefix = f"{predictor}transformer.decoder.layers.{i}."
        shapes |= transformer_layer(prefix, ["self_attn", "multihead_attn"], D, ffn_dim)
    shapes |= weight_and_bias(f"{predictor}transformer.decoder.norm", D)
    shapes[f"{predictor}query_embed.weight"] = (K if kind.endswith("plus") else 100, D)
    for i in range(3):
        shapes |= weight_and_bias(f"{predictor}mask_embed.layers.{i}", D, D)
    if kind == "maskformer":
        shapes |= weight_and_bias(f"{predictor}class_embed", K + 1, D)
        shapes["criterion.empty_weight"] = (K + 1,)
    return shapes


def weight_and_bias(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def conv_norm(name, *shape):
    return {f"{name}.weight": shape} | weight_and_bias(f"{name}.norm", shape[0])


def transformer_layer(prefix, attentions, D, ffn_dim):
    shapes = weight_and_bias(prefix + "linear1", ffn_dim, D)
    shapes |= weight_and_bias(prefix + "linear2", D, ffn_dim)
    for attention in attentions:
        shapes[f"{prefix}{attention}.in_proj_weight"] = (3 * D, D)
        shapes[f"{prefix}{attention}.in_proj_bias"] = (3 * D,)
        shapes |= weight_and_bias(f"{prefix}{attention}.out_proj", D, D)
    for i in range(len(attentions) + 1):
        shapes |= weight_and_bias(f"{prefix}norm{i + 1}", D)
    return shapes


def resnet(name):
    shapes = {}
    stem = STEM.get(name, [(64, 3, 7, 7)])
    for i, shape in enumerate(stem, start=1):
        shapes |= conv_batch_norm(f"backbone.stem.conv{i}", *shape)
    before = stem[-1][0]
    for stage, blocks in enumerate(BLOCKS[name]):
        width = 64 * 2 ** stage
        for block in range(blocks):
            prefix = f"backbone.res{stage + 2}.{block}."
            if name == "R18":
                after = width
                shapes |= conv_batch_norm(prefix + "conv1", width, before, 3, 3)
                shapes |= conv_batch_norm(prefix + "conv2", width, width, 3, 3)
            else:
                after = 4 * width
                shapes |= conv_batch_norm(prefix + "conv1", width, before, 1, 1)
                shapes |= conv_batch_norm(prefix + "conv2", width, width, 3, 3)
                shapes |= conv_batch_norm(prefix + "conv3", after, width, 1, 1)
            if before != after:
                shapes |= conv_batch_norm(prefix + "shortcut", after, before, 1, 1)
            before = after
    return shapes


def conv_batch_norm(name, *shape):
    shapes = conv_norm(name, *shape)
    shapes[f"{name}.norm.running_mean"] = shape[:1]
    shapes[f"{name}.norm.running_var"] = shape[:1]
    return shapes


def swin(name):
    width, blocks_of_stages, window = SWIN[name]
    shapes = weight_and_bias("backbone.patch_embed.proj", width, 3, 4, 4)
    shapes |= weight_and_bias("backbone.patch_embed.norm", width)
    for stage, blocks in enumerate(blocks_of_stages):
        c, prefix = width * 2 ** stage, f"backbone.layers.{stage}."
        for i in range(blocks):
            block = f"{prefix}blocks.{i}."
            shapes |= weight_and_bias(block + "norm1", c)
            shapes |= weight_and_bias(block + "attn.qkv", 3 * c, c)
            shapes |= weight_and_bias(block + "attn.proj", c, c)
            shapes |= weight_and_bias(block + "norm2", c)
            shapes |= weight_and_bias(block + "mlp.fc1", 4 * c, c)
            shapes |= weight_and_bias(block + "mlp.fc2", c, 4 * c)
            offsets = (2 * window - 1) ** 2
            shapes[block + "attn.relative_position_bias_table"] = (offsets, c // 32)
            shapes[block + "attn.relative_position_index"] = (window ** 2, window ** 2)
        if stage < 3:
            shapes |= weight_and_bias(prefix + "downsample.norm", 4 * c)
            shapes[prefix + "downsample.reduction.weight"] = (2 * c, 4 * c)
        shapes |= weight_and_bias(f"backbone.norm{stage}", c)
    return shapes


def zeros(shapes):
    """Arrays of these shapes that take no memory."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def small_file(path, K=11, kind="maskformer", **options):
    """Writes a .pkl such as the authors release, of a small model with made-up weights."""
    shapes = official_shapes("R18", K, kind=kind, D=32, decoder_layers=2, ffn_dim=48, **options)
    state = {name: fill(name, shape) for name, shape in shapes.items()}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "nobody"}))
    return path


# -------------------------------------------------------------------------------------- recognition
CLASSES = {
    "semantic-ade20k": ("ade20k", 150),
    "semantic-ade20k-full": ("ade20k-full", 847),
    "semantic-coco-stuff-10k": ("coco-stuff-10k", 171),
    "semantic-cityscapes": ("cityscapes", 19),
    "semantic-mapillary-vistas": ("mapillary", 65),
    "panoptic-coco": ("coco-panoptic", 133),
    "panoptic-ade20k": ("ade20k-panoptic", 150),
}
KINDS = {                                                            # their name: our --model
    "per_pixel_baseline_plus": "per-pixel-plus",
    "per_pixel_baseline": "per-pixel",
    "maskformer": "maskformer",
}


def test_the_zoo_has_thirty_files_of_different_hashes():
    assert len(ZOO) == len({digest for _, digest in ZOO.values()}) == 30
    assert ZOO["maskformer_panoptic_R101_bs16_720k"] == ("panoptic-ade20k", "0b3cc8")


@pytest.mark.parametrize("name", ZOO)
def test_every_released_model_is_recognized(name, monkeypatch):
    kind = next(kind for kind in KINDS if name.startswith(kind))
    backbone = next(backbone for backbone in TIMM if f"_{backbone}_" in name)
    folder, _ = ZOO[name]
    dataset, K = CLASSES[folder]
    encoder_layers = 6 if folder.startswith("panoptic") and backbone.startswith("R") else 0
    state = zeros(official_shapes(backbone, K, encoder_layers, kind))
    # Names and shapes suffice; timm's random weights would take most of the time.
    monkeypatch.setattr(SwinTransformer, "init_weights", lambda *_, **__: None)
    monkeypatch.setattr(official_weights, "download", lambda name: Path("model.pkl"))
    monkeypatch.setattr(official_weights, "read_weights", lambda path: state)

    checkpoint = official_checkpoint(name)                           # raises unless arrays fit
    config = checkpoint["config"]
    assert (config["model"], config["backbone"]) == (KINDS[kind], TIMM[backbone])
    assert (config["dataset"], config["num_classes"]) == (dataset, K)
    assert config["encoder_layers"] == encoder_layers
    assert config["freeze_bn"] is True
    padded = kind == "maskformer" and "coco" not in dataset
    assert config["size_divisibility"] == (32 if padded else 0)
    assert config["task"] == ("panoptic" if "panoptic" in dataset else "semantic")
    assert any(checkpoint["is_thing"]) == ("panoptic" in dataset)
    for values in ("classes", "is_thing", "category_ids", "label_values"):
        assert len(checkpoint[values]) == K


@pytest.mark.parametrize("name, side, longest, threshold", [
    ("maskformer_R50_bs16_160k", 512, 2048, 0.8),
    ("maskformer_swin_small_bs16_160k", 512, 2048, 0.8),
    ("maskformer_swin_base_IN21k_384_bs16_160k_res640", 640, 2560, 0.8),
    ("maskformer_panoptic_R50_bs16_720k", 640, 2560, 0.7),
    ("maskformer_panoptic_swin_base_IN21k_384_bs64_554k", 800, 1333, 0.8),
    ("maskformer_R101_bs16_90k", 1024, 2048, 0.8)])
def test_released_models_are_tested_as_their_dataset_is(name, side, longest, threshold):
    dataset, _ = CLASSES[ZOO[name][0]]
    backbone = next(TIMM[backbone] for backbone in TIMM if f"_{backbone}_" in name)
    assert official_weights.evaluation_flags(dataset, backbone) == {
        "test_short_side": side, "test_max_long_side": longest,
        "object_threshold": threshold, "overlap_threshold": 0.8}


@pytest.mark.parametrize("dataset, names, things, ids, values", [
    ("ade20k", ["wall", "building", "sky"], 0, [1, 2, 150], [1, 2, 150]),
    ("ade20k-panoptic", ["wall", "building", "sky"], 100, [0, 1, 149], [1, 2, 150]),
    ("ade20k-full", ["wall", "building"], 0, [2978, 312], [2978, 312]),
    ("coco-panoptic", ["person", "bicycle", "car"], 80, [1, 2, 200], [1, 2, 200]),
    ("coco-stuff-10k", ["person", "bicycle", "car"], 0, [1, 2, 182], [1, 2, 182]),
    ("cityscapes", ["road", "sidewalk", "building"], 0, [7, 8, 33], [7, 8, 33]),
    ("mapillary", ["Bird", "Ground Animal"], 0, [0, 1, 64], [0, 1, 64])])
def test_classes_have_the_publishers_names_and_numbers(dataset, names, things, ids, values):
    lists = class_lists(dataset)
    assert lists["classes"][:len(names)] == names
    assert sum(lists["is_thing"]) == things
    for name, expected in (("category_ids", ids), ("label_values", values)):
        assert lists[name][:2] == expected[:2]
        assert expected[2:] in ([], [lists[name][-1]])
    assert dataset in DATASETS


def test_the_things_of_ade20k_and_coco_are_the_publishers():
    ade20k = class_lists("ade20k-panoptic")
    things = [name for name, thing in zip(ade20k["classes"], ade20k["is_thing"]) if thing]
    assert things[:3] == ["bed", "window", "cabinet"]
    assert class_lists("coco-panoptic")["is_thing"] == [k < 80 for k in range(133)]


def test_other_numbers_of_classes_are_nobodys_dataset(tmp_path):
    assert find_dataset(150, panoptic=False) == "ade20k"
    assert find_dataset(150, panoptic=True) == "ade20k-panoptic"
    assert find_dataset(11, panoptic=True) == "folder"
    checkpoint = official_checkpoint(small_file(tmp_path / "model.pkl", K=11))
    assert checkpoint["config"]["dataset"] == "folder"
    assert checkpoint["classes"] == [f"class {k}" for k in range(11)]
    assert checkpoint["category_ids"] == list(range(11))


@pytest.mark.parametrize("file, encoder_layers, dataset", [
    ("model.pkl", 0, "ade20k"),
    ("model.pkl", 1, "ade20k-panoptic"),
    ("maskformer_panoptic.pkl", 0, "ade20k-panoptic")])
def test_ade20k_is_panoptic_with_an_encoder_or_that_name(file, encoder_layers, dataset,
                                                         monkeypatch):
    state = zeros(official_shapes("R18", 150, encoder_layers, decoder_layers=1))
    monkeypatch.setattr(official_weights, "read_weights", lambda path: state)
    assert official_checkpoint(file)["config"]["dataset"] == dataset


# -------------------------------------------------------------------------------------------- names
@pytest.fixture(scope="module")
def state():
    return zeros(official_shapes("R50", K=19))


@pytest.fixture(scope="module")
def model(state):
    with torch.device("meta"):
        return build_model(model_flags(translate(state)) | {"size_divisibility": 32})


def test_files_from_before_the_pixel_decoder_had_a_name_load_too(state, model):
    old = {name.replace("pixel_decoder.", ""): array for name, array in state.items()}
    assert old.keys() != state.keys()
    assert official_to_ours(old, model).keys() == official_to_ours(state, model).keys()


def test_the_released_fpn_counts_from_fine_to_coarse():
    for theirs, ours in ((1, 2), (2, 1), (3, 0)):
        names = [f"sem_seg_head.pixel_decoder.{part}_{theirs}.weight"
                 for part in ("adapter", "layer")]
        assert [*translate({name: np.zeros(3) for name in names})] == [
            f"pixel_decoder.project.{ours}.0.weight", f"pixel_decoder.fuse.{ours}.0.weight"]


@pytest.mark.parametrize("name", ["backbone.res3.1.conv2.norm.running_var",
                                  "sem_seg_head.pixel_decoder.adapter_2.weight",
                                  "sem_seg_head.predictor.transformer.decoder.layers.5.norm3.bias"])
def test_missing_and_misshapen_arrays_are_named(name, state, model):
    without = {other: array for other, array in state.items() if other != name}
    ours, = translate({name: state[name]})
    with pytest.raises(UserError, match=f"no {ours}"):
        official_to_ours(without, model)
    with pytest.raises(UserError, match=rf"{name} is \(3, 5\), our {ours} "):
        official_to_ours(state | {name: np.zeros((3, 5), np.float32)}, model)


def test_arrays_without_a_place_and_arrays_for_one_place_are_named(state, model):
    more = {"backbone.res6.weight": np.zeros(3), "sem_seg_head.new.bias": np.zeros(3)}
    with pytest.raises(UserError, match="backbone.res6.weight .*sem_seg_head.new.bias has no "):
        official_to_ours(state | more, model)
    with pytest.raises(UserError, match="both sem_seg_head.pixel_decoder.layer_4.weight and "
                                        "sem_seg_head.layer_4.weight are our pixel_decoder.stem"):
        official_to_ours(state | {"sem_seg_head.layer_4.weight": np.zeros(3)}, model)


def test_an_unknown_backbone_is_named(state):
    short = {name: array for name, array in state.items() if not name.startswith("backbone.res4.5")}
    with pytest.raises(UserError, match=r"unknown backbone, .*\(3, 4, 5, 3\) blocks and 256 "):
        model_flags(translate(short))
    deep = state | {"backbone.stem.conv2.weight": np.zeros(3),       # R50 with R101c's stem
                    "backbone.stem.conv3.weight": np.zeros(3)}
    with pytest.raises(UserError, match="unknown backbone"):
        model_flags(translate(deep))
    with pytest.raises(UserError, match="nothing in them is our pixel_decoder"):
        model_flags(translate({"conv.weight": np.zeros(3)}))


# -------------------------------------------------------------------------------------- checkpoints
@torch.no_grad()
def test_a_converted_file_is_a_checkpoint_like_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = small_file(tmp_path / "theirs.pkl")
    official_weights.main([str(file)])
    assert "theirs.pt" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.pkl", "theirs.pt"]

    image = torch.randint(256, (1, 3, 64, 96))
    expected = load_official(file)(image)
    for source in ("theirs.pkl", "theirs.pt"):
        model, info = evaluate.load(source)
        assert not model.training and info["config"]["backbone"] == "resnet18"
        assert (info["step"], len(info["classes"]), info["config"]["num_classes"]) == (0, 11, 11)
        for x, y in zip(model(image), expected):
            assert torch.equal(x, y)


def test_converting_never_overwrites_a_file(tmp_path):
    output = tmp_path / "last.pt"
    output.write_text("weeks of training")
    with pytest.raises(UserError, match="last.pt exists: choose another --output"):
        convert(small_file(tmp_path / "model.pkl"), output)
    assert output.read_text() == "weeks of training"


# -------------------------------------------------------------------------------------------- files
class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused(tmp_path, protocol):
    trace, file = tmp_path / "trace", tmp_path / "model.pkl"
    for attack in (Attack(os.system, f"touch {trace}"),
                   Attack(eval, f"open({str(trace)!r}, 'w')"),
                   Attack(getattr, np.zeros(3), "tofile"),
                   Attack(np.load, str(trace))):
        content = {"model": {"weight": np.zeros(3), "x": attack}}
        file.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(UserError, match=f"{file} is refused: .* neither a numpy array nor a"):
            load_official(file)
    assert not trace.exists()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    trace = tmp_path / "trace"
    content = {"model": Attack(os.system, f"touch {trace}")}
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match="last.pt"):
        evaluate.load(tmp_path / "last.pt")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin is refused"):
        load_official(tmp_path / "pytorch_model.bin")
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_are_read(tmp_path, protocol):
    file, array = tmp_path / "model.pkl", np.arange(6, dtype=np.float32).reshape(2, 3)
    content = {"model": {"a": array, "b": array.T, "c": array.astype(np.float16)},
               "__author__": "x", "more": [(1., None), np.int64(3)]}
    file.write_bytes(pickle.dumps(content, protocol))
    read = read_file(file)
    assert read["a"].tolist() == read["c"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read["b"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert read["c"].dtype == torch.float32


def test_files_of_numpy_1_and_2_are_read(tmp_path):
    file = tmp_path / "model.pkl"
    content = pickle.dumps({"a": np.ones(2)}, 2).replace(b"numpy._core.", b"numpy.core.")
    for new in (b"numpy.core.", b"numpy._core."):
        file.write_bytes(content.replace(b"numpy.core.", new))
        assert read_file(file)["a"].tolist() == [1, 1]


def test_a_file_that_is_something_else_is_refused(tmp_path):
    file = tmp_path / "model.pkl"
    broken = pickle.dumps({"a": np.ones(9)})[:-9]
    for content in (b"", b"<html>", broken, pickle.dumps([1]), pickle.dumps({"a": 1}),
                    pickle.dumps({"a": np.array([{}])})):
        file.write_bytes(content)
        with pytest.raises(UserError, match="model.pkl is refused"):
            load_official(file)
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"not one")
        with pytest.raises(UserError, match=f"{name} is refused"):
            load_official(tmp_path / name)


def test_what_is_neither_file_nor_name_is_refused_with_the_names(tmp_path):
    with pytest.raises(UserError, match="neither a file .* maskformer_R50_bs16_160k"):
        load_official("maskformer_R50")
    with pytest.raises(UserError, match="holds no weights"):
        load_official(tmp_path)


# ----------------------------------------------------------------------------------------- download
NAME = "per_pixel_baseline_R50_bs16_160k"


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A server on this machine -> (file it gives out, paths asked for, bytes it keeps back)."""
    file, asked, kept_back = tmp_path / "served.pkl", [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            missing = kept_back.pop() if kept_back else 0
            self.wfile.write(content[:len(content) - missing])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(official_weights, "ZOO_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield file, asked, kept_back
    server.shutdown()
    server.server_close()


def test_a_model_is_downloaded_once_and_its_license_told(zoo, capsys):
    file, asked, _ = zoo
    small_file(file, kind="per_pixel_baseline")
    for _ in range(2):
        assert isinstance(load_official(NAME), PerPixelBaseline)
        assert "CC BY-NC 4.0" in capsys.readouterr().out
    assert asked == [f"/semantic-ade20k/{NAME}/model_final_1043f3.pkl"]


def test_a_download_that_breaks_off_leaves_nothing_behind_and_can_be_repeated(zoo, tmp_path):
    file, asked, kept_back = zoo
    file.write_bytes(pickle.dumps({"model": {"a": np.ones(1000)}}))
    kept_back.append(99)
    with pytest.raises(ConnectionError):
        download(NAME)
    assert list((tmp_path / "hub/checkpoints").iterdir()) == []
    assert read_file(download(NAME))["a"].sum() == 1000 and len(asked) == 2


def test_offline_the_error_names_the_address_and_the_place(tmp_path, monkeypatch):
    monkeypatch.setattr(official_weights, "ZOO_URL", "http://127.0.0.1:9/maskformer")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConnectionError) as error:
        load_official(NAME)
    url = f"http://127.0.0.1:9/maskformer/semantic-ade20k/{NAME}/model_final_1043f3.pkl"
    assert url in str(error.value)
    assert str(tmp_path / "checkpoints" / f"{NAME}_1043f3.pkl") in str(error.value)
