"""The authors' files become our models, array by array; what is not such a file is refused."""
import http.server
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from exactness import LIMITS, measure

import evaluate
import pretrained
from data import UserError
from maskformer import MaskFormer, PerPixelBaseline, PerPixelBaselinePlus
from pretrained import ZOO, build, download, load_official, official_to_ours, read_arrays, translate

GOLDEN = sorted(path.parent for path in Path(os.environ.get("GOLDEN_ROOT", "none")).glob("*/summary.json"))


@pytest.mark.parametrize("folder", GOLDEN or [None], ids=lambda folder: folder.name if folder else "none")
def test_outputs_losses_and_gradients_are_the_authors(folder):
    if folder is None:
        pytest.skip("GOLDEN_ROOT, outputs of the authors' code, is not set")
    found = measure(folder)
    assert {"features", "pixel embeddings", "mask logits", "class scores", "class map, pixels"} <= set(found)
    assert not {name: (value, LIMITS[name]) for name, value in found.items() if not value <= LIMITS[name]}


# ---------------------------------------------------------------------------------------- names

def official_state(backbone="R50", K=150, encoder=0, kind="maskformer"):
    """{official name: zeros}, written down without `pretrained.py`."""
    state = (swin if backbone in SWIN else resnet)(backbone)
    channels = [(SWIN[backbone][0] if backbone in SWIN else 256) * 2 ** i for i in range(4)]
    head = {"pixel_decoder.mask_features": (256, 256, 3, 3)}
    for i, c in enumerate(channels, 1):
        head[f"pixel_decoder.layer_{i}"] = (256, 256 if i < 4 or encoder else c, 3, 3)
        if i < 4:
            head[f"pixel_decoder.adapter_{i}"] = (256, c, 1, 1)
    norms = [name + ".norm" for name in head if "mask_features" not in name]
    shapes = {name + ".weight": shape for name, shape in head.items()}
    shapes |= {"pixel_decoder.mask_features.bias": (256,)}
    shapes |= {f"{norm}.{x}": (256,) for norm in norms for x in ("weight", "bias")}
    if kind == "per_pixel_baseline":
        shapes |= {"predictor.weight": (K, 256, 1, 1), "predictor.bias": (K,)}
    else:
        Q = K if kind == "per_pixel_baseline_plus" else 100
        owner = "pixel_decoder" if encoder else "predictor"
        shapes |= linear(f"{owner}.input_proj", 256, channels[-1], 1, 1)
        for i in range(encoder):
            shapes |= transformer_layer(f"pixel_decoder.transformer.encoder.layers.{i}.", ("self_attn",))
        for i in range(6):
            prefix = f"predictor.transformer.decoder.layers.{i}."
            shapes |= transformer_layer(prefix, ("self_attn", "multihead_attn"))
        shapes |= linear("predictor.transformer.decoder.norm", 256)
        shapes["predictor.query_embed.weight"] = (Q, 256)
        for i in range(3):
            shapes |= linear(f"predictor.mask_embed.layers.{i}", 256, 256)
    if kind == "maskformer":
        shapes |= linear("predictor.class_embed", K + 1, 256)
        state["criterion.empty_weight"] = (K + 1,)
    state |= {f"sem_seg_head.{name}": shape for name, shape in shapes.items()}
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in state.items()}


def linear(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def transformer_layer(prefix, attentions):
    shapes = linear(prefix + "linear1", 2048, 256) | linear(prefix + "linear2", 256, 2048)
    for attention in attentions:
        name = prefix + attention
        shapes |= {f"{name}.in_proj_weight": (768, 256), f"{name}.in_proj_bias": (768,)}
        shapes |= linear(f"{name}.out_proj", 256, 256)
    for i in range(len(attentions) + 1):
        shapes |= linear(f"{prefix}norm{i + 1}", 256)
    return shapes


def resnet(name):
    shapes = {}
    def conv(name, *shape):
        shapes[name + ".weight"] = shape
        for x in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{x}"] = shape[:1]
    stem = [(64, 3, 3, 3), (64, 64, 3, 3), (128, 64, 3, 3)] if name == "R101c" else [(64, 3, 7, 7)]
    for i, shape in enumerate(stem, 1):
        conv(f"backbone.stem.conv{i}", *shape)
    before = stem[-1][0]
    for stage, blocks in enumerate([3, 4, 6 if name == "R50" else 23, 3]):
        width = 64 * 2 ** stage
        for block in range(blocks):
            prefix = f"backbone.res{stage + 2}.{block}."
            if block == 0:
                conv(prefix + "shortcut", 4 * width, before, 1, 1)
            conv(prefix + "conv1", width, before, 1, 1)
            conv(prefix + "conv2", width, width, 3, 3)
            conv(prefix + "conv3", 4 * width, width, 1, 1)
            before = 4 * width
    return shapes


SWIN = {                              # channels, blocks of the third stage, window
    "swin_tiny": (96, 6, 7), "swin_small": (96, 18, 7),
    "swin_base": (128, 18, 12), "swin_large": (192, 18, 12),
}


def swin(name):
    width, third, window = SWIN[name]
    shapes = linear("backbone.patch_embed.proj", width, 3, 4, 4) | linear("backbone.patch_embed.norm", width)
    for stage, blocks in enumerate([2, 2, third, 2]):
        c, prefix = width * 2 ** stage, f"backbone.layers.{stage}."
        for block in (f"{prefix}blocks.{i}." for i in range(blocks)):
            shapes |= linear(block + "norm1", c) | linear(block + "norm2", c)
            shapes |= linear(block + "attn.qkv", 3 * c, c) | linear(block + "attn.proj", c, c)
            shapes |= linear(block + "mlp.fc1", 4 * c, c) | linear(block + "mlp.fc2", c, 4 * c)
            shapes[block + "attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, c // 32)
            shapes[block + "attn.relative_position_index"] = (window ** 2, window ** 2)
        if stage < 3:
            shapes |= linear(prefix + "downsample.norm", 4 * c)
            shapes[prefix + "downsample.reduction.weight"] = (2 * c, 4 * c)
        shapes |= linear(f"backbone.norm{stage}", c)
    return shapes


CLASSES = {"semantic-ade20k": 150, "semantic-ade20k-full": 847, "semantic-coco-stuff-10k": 171,
           "semantic-cityscapes": 19, "semantic-mapillary-vistas": 65,
           "panoptic-coco": 133, "panoptic-ade20k": 150}
TIMM = {"R50": "resnet50", "R101": "resnet101", "R101c": "resnet101c",
        "swin_tiny": "swin_tiny_patch4_window7_224", "swin_small": "swin_small_patch4_window7_224",
        "swin_base": "swin_base_patch4_window12_384", "swin_large": "swin_large_patch4_window12_384"}
KINDS = ("per_pixel_baseline_plus", "per_pixel_baseline", "maskformer")


@pytest.mark.parametrize("config", ZOO)
def test_every_released_config_is_recognised(config, monkeypatch):
    kind = next(kind for kind in KINDS if config.startswith(kind))
    backbone = next(name for name in TIMM if f"_{name}_" in config)
    folder, K = ZOO[config][0], CLASSES[ZOO[config][0]]
    encoder = 6 if folder.startswith("panoptic") and backbone.startswith("R") else 0
    state = official_state(backbone, K, encoder, kind)

    asked = {}
    def note(cls):
        def make(num_classes, **options):
            asked.update(options, num_classes=num_classes)
            with torch.device("meta"):
                return cls(num_classes, **options)
        return make
    for cls in (MaskFormer, PerPixelBaseline, PerPixelBaselinePlus):
        monkeypatch.setattr(pretrained, cls.__name__, note(cls))
    model = build(translate(state))
    official_to_ours(state, model)                                       # raises unless every array fits

    assert (asked["backbone"], asked["num_classes"]) == (TIMM[backbone], K)
    assert asked["freeze_bn"] is True and asked["pretrained"] is False
    assert asked.get("encoder_layers", 0) == encoder
    assert type(model).__name__.lower() == kind.replace("_", "")
    padded = kind == "maskformer" and "coco" not in folder
    assert model.size_divisibility == (32 if padded else 0)


def test_zoo_has_thirty_files_of_different_hashes():
    assert len(ZOO) == len({digest for _, digest in ZOO.values()}) == 30
    assert ZOO["maskformer_panoptic_R101_bs16_720k"] == ("panoptic-ade20k", "0b3cc8")


@pytest.fixture(scope="module")
def state():
    return official_state("R50", 19)


@pytest.fixture(scope="module")
def model(state):
    with torch.device("meta"):
        return MaskFormer(19, "resnet50", pretrained=False, freeze_bn=True)


def test_files_from_before_the_pixel_decoder_had_a_name_load_too(state, model):
    old = {name.replace("pixel_decoder.", ""): array for name, array in state.items()}
    assert official_to_ours(old, model).keys() == official_to_ours(state, model).keys()


def test_the_released_fpn_counts_from_fine_to_coarse():
    for theirs, ours in ((1, 2), (2, 1), (3, 0)):
        names = [f"sem_seg_head.pixel_decoder.{part}_{theirs}.weight" for part in ("adapter", "layer")]
        assert [*translate({name: np.zeros(3) for name in names})] == [
            f"pixel_decoder.{part}.{ours}.0.weight" for part in ("project", "fuse")]


@pytest.mark.parametrize("name", ["backbone.res3.1.conv2.norm.running_var",
                                  "sem_seg_head.pixel_decoder.adapter_2.weight",
                                  "sem_seg_head.predictor.transformer.decoder.layers.5.norm3.bias"])
def test_missing_extra_and_misshapen_arrays_are_named(name, state, model):
    without = {key: array for key, array in state.items() if key != name}
    ours = next(iter(translate({name: state[name]})))
    with pytest.raises(ValueError, match=f"no {ours}"):
        official_to_ours(without, model)
    with pytest.raises(ValueError, match=f"{name} is .*our {ours}"):
        official_to_ours(state | {name: np.zeros((3, 5), np.float32)}, model)
    with pytest.raises(ValueError, match="backbone.res6.weight .*sem_seg_head.new.bias has no place"):
        more = {"backbone.res6.weight": np.zeros(3), "sem_seg_head.new.bias": np.zeros(3)}
        official_to_ours(state | more, model)
    with pytest.raises(ValueError, match="both"):
        official_to_ours(state | {"sem_seg_head.layer_4.weight": np.zeros(3)}, model)


def test_an_unknown_backbone_is_named(state):
    tiny = {name: array for name, array in state.items() if not name.startswith("backbone.res4.5")}
    with pytest.raises(ValueError, match="unknown backbone: .*5"):
        build(translate(tiny))
    with pytest.raises(ValueError, match="nothing in them is our pixel_decoder"):
        build(translate({"conv.weight": np.zeros(3)}))


# ---------------------------------------------------------------------------------------- files

class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused(tmp_path, protocol):
    trace, file = tmp_path / "trace", tmp_path / "model.pkl"
    for attack in (Attack(os.system, f"touch {trace}"), Attack(eval, f"open({str(trace)!r}, 'w')"),
                   Attack(getattr, np.zeros(3), "tofile"), Attack(np.load, str(trace))):
        file.write_bytes(pickle.dumps({"model": {"weight": np.zeros(3), "x": attack}}, protocol))
        with pytest.raises(ValueError, match=f"{file} is refused: .* neither a numpy array nor a plain"):
            load_official(file)
    assert not trace.exists()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    trace, file = tmp_path / "trace", tmp_path / "last.pt"
    torch.save({"model": Attack(os.system, f"touch {trace}")}, file)
    with pytest.raises(UserError, match="no whole checkpoint"):
        evaluate.load(file)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_containers_are_read(tmp_path, protocol):
    file, array = tmp_path / "model.pkl", np.arange(6, dtype=np.float32).reshape(2, 3)
    content = {"model": {"a": array, "b": array.T}, "__author__": "x", "more": [(1., None), np.int64(3)]}
    file.write_bytes(pickle.dumps(content, protocol))
    read = read_arrays(file)
    assert (read["a"] == array).all() and (read["b"] == array.T).all()


def test_numpy_1_files_are_read(tmp_path):
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps({"a": np.ones(2)}, 2).replace(b"numpy._core.", b"numpy.core."))
    assert (read_arrays(file)["a"] == 1).all()


def test_a_file_that_is_something_else_is_refused(tmp_path):
    file = tmp_path / "model.pkl"
    broken = pickle.dumps({"a": np.ones(9)})[:-9]
    for content in (b"", b"<html>", broken, pickle.dumps([1]), pickle.dumps({"a": 1})):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="model.pkl"):
            load_official(file)
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="model.safetensors is refused"):
        load_official(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="neither a file nor .* maskformer_R50_bs16_160k"):
        load_official("maskformer_R50")


# ---------------------------------------------------------------------------------------- download

CONFIG = "per_pixel_baseline_R50_bs16_160k"


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
            self.wfile.write(content[:len(content) - (kept_back.pop() if kept_back else 0)])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(pretrained, "ZOO_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    yield file, asked, kept_back
    server.shutdown()
    server.server_close()


def test_a_config_is_downloaded_once_and_its_licence_told(zoo, capsys):
    file, asked, _ = zoo
    file.write_bytes(pickle.dumps({"model": official_state(kind="per_pixel_baseline")}))
    for _ in range(2):
        assert isinstance(load_official(CONFIG), PerPixelBaseline)
        assert "CC BY-NC 4.0" in capsys.readouterr().out
    assert asked == [f"/semantic-ade20k/{CONFIG}/model_final_1043f3.pkl"]


def test_a_download_that_breaks_off_leaves_nothing_behind_and_can_be_repeated(zoo, tmp_path):
    file, asked, kept_back = zoo
    file.write_bytes(pickle.dumps({"model": {"a": np.ones(1000)}}))
    kept_back.append(99)
    with pytest.raises(ConnectionError):
        download(CONFIG)
    assert list((tmp_path / "hub/checkpoints").iterdir()) == []
    assert read_arrays(download(CONFIG))["a"].sum() == 1000 and len(asked) == 2


def test_offline_the_error_names_the_address_and_the_place(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "ZOO_URL", "http://127.0.0.1:9/maskformer")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConnectionError) as error:
        load_official(CONFIG)
    assert f"{pretrained.ZOO_URL}/semantic-ade20k/{CONFIG}/model_final_1043f3.pkl" in str(error.value)
    assert str(tmp_path / "checkpoints" / f"{CONFIG}_1043f3.pkl") in str(error.value)


@pytest.mark.parametrize("classes, options, dataset, side, threshold", [
    (150, {}, "ade20k", 512, 0.8), (150, {"encoder_layers": 1}, "ade20k-panoptic", 640, 0.7),
    (133, {}, "coco-panoptic", 800, 0.8), (19, {}, "cityscapes", 1024, 0.8)])
def test_released_weights_are_tested_as_their_dataset_is_whatever_the_files_name(monkeypatch, classes, options, dataset,
                                                                                 side, threshold):
    small = dict(backbone="test_resnet", pretrained=False, num_queries=2, dim=32, decoder_layers=1)
    monkeypatch.setattr(evaluate, "load_official", lambda source: MaskFormer(classes, **small, **options))
    config = evaluate.load("model_final_123456.pkl")[1]["config"]
    assert (config["dataset"], config["test_short_side"], config["object_threshold"]) == (dataset, side, threshold)
    assert (config["task"] == "panoptic") == ("panoptic" in dataset)


@pytest.mark.parametrize("classes, encoder_layers, width, side, things", [
    (150, 0, 96, 512, 0), (150, 0, 128, 640, 0), (150, 1, 64, 640, 100), (133, 0, 128, 800, 80), (133, 1, 64, 800, 80)])
def test_large_swins_see_larger_images_of_ade20k_and_panoptic_weights_know_their_things(monkeypatch, classes, encoder_layers,
                                                                                       width, side, things):
    model = MaskFormer(classes, "test_resnet", False, 2, dim=32, decoder_layers=1, encoder_layers=encoder_layers)
    model.backbone.nhwc, model.backbone.channels = width > 64, [width]
    monkeypatch.setattr(evaluate, "load_official", lambda source: model)
    state = evaluate.load("model_final_123456.pkl")[1]
    assert (state["config"]["test_short_side"], sum(state["is_thing"])) == (side, things)
    if classes == 150 and things:
        assert state["is_thing"][:10] == [False] * 7 + [True, True, False]       # .. road, bed, windowpane, grass
    if classes == 133:
        assert state["is_thing"] == [k < 80 for k in range(133)]


def test_results_of_images_with_the_same_name_would_overwrite_each_other():
    model = PerPixelBaseline(3, backbone="test_resnet", pretrained=False, dim=32)
    evaluate.check(model, None, None, ["a/1.jpg", "b/1.jpg"])
    evaluate.check(model, None, "out", ["a/1.jpg", "b/2.jpg"])
    with pytest.raises(UserError, match="same name"):
        evaluate.check(model, None, "out", ["a/1.jpg", "b/1.jpg"])
