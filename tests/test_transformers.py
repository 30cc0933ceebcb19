"""Beside Hugging Face's MaskFormer, where it is installed: their files load, and where they follow
the authors, outputs and losses are equal."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from data import UserError
from losses import mask_classification_loss
from maskformer import semantic_inference
from matcher import hungarian_match
from tools.official_weights import (class_lists, flags_of_config, load_official,
                                    official_checkpoint)

transformers = pytest.importorskip("transformers")
from transformers.models.maskformer.modeling_maskformer import (MaskFormerHungarianMatcher,
                                                                MaskFormerLoss)

BASIC = {"hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"}
BACKBONES = {
    "resnet18": (transformers.ResNetConfig, {"depths": [2, 2, 2, 2]} | BASIC),
    "resnet26": (transformers.ResNetConfig, {"depths": [2, 2, 2, 2]}),
    "resnet34": (transformers.ResNetConfig, {"depths": [3, 4, 6, 3]} | BASIC),
    "resnet50": (transformers.ResNetConfig, {"depths": [3, 4, 6, 3]}),
    "swin_tiny_patch4_window7_224": (transformers.SwinConfig, {"depths": [2, 2, 6, 2]}),
}


def their_model(backbone, num_labels=11, decoder_layers=2, **options):
    """Their model with random weights, four heads (ours has eight by default), and 20 queries.

    options: of the backbone's config
    """
    config_class, settings = BACKBONES[backbone]
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.MaskFormerConfig(
        backbone_config=config_class(**settings | options, out_features=stages),
        decoder_config=transformers.DetrConfig(num_queries=20, decoder_layers=decoder_layers,
                                               decoder_attention_heads=4, dropout=0.25),
        num_labels=num_labels)
    torch.manual_seed(0)
    model = transformers.MaskFormerForInstanceSegmentation(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:                                     # biases would be 0, scales 1
            parameter.data += 0.1 * torch.randn_like(parameter)
    for name, statistics in model.named_buffers():
        if name.endswith("running_mean"):
            statistics.copy_(0.1 * torch.randn_like(statistics))
        if name.endswith("running_var"):
            statistics.copy_(0.5 + torch.rand_like(statistics))
    return model


# ----------------------------------------------------------------------------------------- equality
def test_the_criterion_is_theirs_layer_by_layer():
    L, B, Q, K, n = 3, 2, 7, 5, (4, 3)
    torch.manual_seed(0)
    class_logits = 3 * torch.randn(L, B, Q, K + 1)
    mask_logits = 3 * torch.randn(L, B, Q, 6, 8)
    labels = torch.randint(K, (sum(n),))
    masks = torch.rand(sum(n), 24, 32) > 0.6
    owner = torch.arange(B).repeat_interleave(torch.tensor(n))
    matcher = MaskFormerHungarianMatcher(cost_class=1., cost_dice=1., cost_mask=20.)
    theirs = MaskFormerLoss(K, matcher, {}, eos_coef=0.1)
    targets = list(masks.float().split(n)), list(labels.split(n))

    total = torch.zeros(3)
    for layer in range(L):
        logits = class_logits[layer:layer + 1], mask_logits[layer:layer + 1]
        matches = hungarian_match(*logits, labels, masks, owner)
        terms = mask_classification_loss(*logits, labels, masks, matches)
        expected = theirs(mask_logits[layer], class_logits[layer], *targets)
        names = ("loss_cross_entropy", "loss_mask", "loss_dice")
        expected = torch.stack([expected[name] for name in names])
        torch.testing.assert_close(torch.stack(terms), expected)
        total += expected
    matches = hungarian_match(class_logits, mask_logits, labels, masks, owner)
    ours = mask_classification_loss(class_logits, mask_logits, labels, masks, matches)
    torch.testing.assert_close(torch.stack(ours), total)


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
def test_their_weights_give_their_logits_and_class_maps(backbone, tmp_path):
    theirs = their_model(backbone)
    theirs.save_pretrained(tmp_path)
    ours = load_official(tmp_path)
    image = torch.randint(256, (1, 3, 96, 160), generator=torch.Generator().manual_seed(0))
    class_logits, mask_logits = ours(image)
    expected = theirs((image - ours.backbone.mean) / ours.backbone.std)
    for x, y in ((class_logits[0], expected.class_queries_logits),
                 (mask_logits[0], expected.masks_queries_logits)):
        torch.testing.assert_close(x, y, atol=1e-5 * y.abs().max().item(), rtol=0)

    processor = transformers.MaskFormerImageProcessor()
    their_map = processor.post_process_semantic_segmentation(expected, target_sizes=[(96, 160)])[0]
    masks = F.interpolate(mask_logits[0], size=(96, 160), mode="bilinear", align_corners=False)
    scores = semantic_inference(class_logits[0], masks)[0]
    best = scores.topk(2, 0).values
    tie = best[0] - best[1] < 1e-4
    assert ((scores.argmax(0) == their_map) | tie).all()


# -------------------------------------------------------------------------------------------- files
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that their save_pretrained has written."""
    folder = tmp_path_factory.mktemp("saved")
    their_model("resnet18", decoder_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(saved, tmp_path / "folder")


def change_config(folder, **options):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def same_weights(checkpoint, other):
    return all(torch.equal(checkpoint["model"][name], tensor)
               for name, tensor in other["model"].items())


def test_a_folder_and_its_file_are_one_checkpoint_with_the_flags_of_config_json(saved):
    checkpoint = official_checkpoint(saved)
    assert same_weights(checkpoint, official_checkpoint(saved / "model.safetensors"))
    config = checkpoint["config"]
    assert (config["heads"], config["dropout"], config["queries"]) == (4, 0.25, 20)
    assert (config["decoder_layers"], config["encoder_layers"]) == (1, 0)


def test_without_config_json_a_line_says_what_is_assumed(folder, capsys):
    (folder / "config.json").unlink()
    checkpoint = official_checkpoint(folder / "model.safetensors")
    assert "no config.json beside it, so 8 heads and" in capsys.readouterr().out
    assert checkpoint["config"]["heads"] == 8
    assert checkpoint["classes"][0] == "class 0"


def test_shards_and_pickled_weights_are_the_same_checkpoint(saved, folder):
    expected = official_checkpoint(saved)
    (folder / "model.safetensors").unlink()
    torch.save(load_file(saved / "model.safetensors"), folder / "pytorch_model.bin")
    assert same_weights(official_checkpoint(folder), expected)

    (folder / "pytorch_model.bin").unlink()
    model = transformers.MaskFormerForInstanceSegmentation.from_pretrained(saved)
    model.save_pretrained(folder, max_shard_size="20MB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (folder / "model.safetensors").exists()
    assert same_weights(official_checkpoint(folder), expected)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name} is refused: .*No such file"):
        official_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_become_float32(saved, folder, dtype):
    model = transformers.MaskFormerForInstanceSegmentation.from_pretrained(saved, dtype=dtype)
    model.save_pretrained(folder)
    expected = official_checkpoint(saved)["model"]
    for name, tensor in official_checkpoint(folder)["model"].items():
        if name.endswith("num_batches_tracked"):
            continue
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].to(dtype).float())


def test_arrays_that_do_not_fit_are_named(tmp_path):
    their_model("swin_tiny_patch4_window7_224", window_size=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"relative_position_bias_table is \(225, 3\), our .*169"):
        load_official(tmp_path)


def test_a_missing_part_of_attention_is_named(saved, folder):
    state = load_file(saved / "model.safetensors")
    name = "model.transformer_module.decoder.layers.0.self_attn.k_proj.weight"
    del state[name]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"no {name}"):
        load_official(folder)


# -------------------------------------------------------------------------------------- config.json
@pytest.mark.parametrize("part, kind, option, value", [
    ("backbone_config", "resnet", "hidden_act", "gelu"),
    ("backbone_config", "resnet", "downsample_in_first_stage", True),
    ("backbone_config", "resnet", "downsample_in_bottleneck", True),
    ("backbone_config", "swin", "hidden_act", "gelu_new"),
    ("backbone_config", "swin", "layer_norm_eps", 1e-12),
    ("backbone_config", "timm_backbone", "model_type", "timm_backbone"),
    ("decoder_config", "detr", "activation_function", "gelu"),
    ("decoder_config", "detr", "auxiliary_loss", True),
    ("decoder_config", "other", "model_type", "other")])
def test_options_that_our_model_does_not_compute_are_refused_by_name_and_value(part, kind, option,
                                                                              value):
    usual = {"model_type": kind}
    with pytest.raises(UserError, match=f"config.json: {part}.{option} is {value!r}; .* only "):
        flags_of_config({part: usual | {option: value}}, "config.json")


def test_a_refusal_names_the_file(folder):
    change_config(folder, model_type="mask2former")
    with pytest.raises(UserError, match=rf"{folder}/config.json: model_type is 'mask2former'"):
        load_official(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"{folder}/config.json is not valid JSON"):
        load_official(folder)


def test_blocks_without_a_bottleneck_may_have_any_option_of_bottlenecks():
    resnet18 = {"model_type": "resnet", "layer_type": "basic", "downsample_in_bottleneck": True}
    assert flags_of_config({"backbone_config": resnet18}, "config.json")["heads"] == 8


def test_class_names_are_those_of_the_file(folder):
    names = [f"fruit {k}" for k in range(11)]
    change_config(folder, id2label={str(k): name for k, name in enumerate(names)})
    checkpoint = official_checkpoint(folder)
    assert checkpoint["config"]["dataset"] == "folder"
    assert checkpoint["classes"] == names
    assert not any(checkpoint["is_thing"])
    change_config(folder, id2label={"0": "fruit 0", "1": "fruit 1"})
    with pytest.raises(UserError, match="id2label does not name the 11 classes"):
        official_checkpoint(folder)


def test_150_classes_are_ade20k_only_under_its_names(tmp_path):
    model = their_model("resnet18", num_labels=150, decoder_layers=1)
    model.save_pretrained(tmp_path)                                  # LABEL_0, LABEL_1, ...
    checkpoint = official_checkpoint(tmp_path)
    assert checkpoint["config"]["dataset"] == "folder"
    assert checkpoint["classes"][149] == "LABEL_149"

    names = class_lists("ade20k")["classes"]
    variants = {str(k): f"{name.upper()}, or so" for k, name in enumerate(names)}
    change_config(tmp_path, id2label=variants)
    checkpoint = official_checkpoint(tmp_path)
    assert checkpoint["config"]["dataset"] == "ade20k"
    assert checkpoint["classes"] == names and checkpoint["category_ids"][149] == 150


def test_the_license_is_told_of_the_authors_files_only(folder, capsys):
    official_checkpoint(folder)
    assert "CC BY-NC" not in capsys.readouterr().out
    change_config(folder, _name_or_path="facebook/maskformer-swin-tiny-ade")
    official_checkpoint(folder)
    assert "CC BY-NC 4.0" in capsys.readouterr().out
    download = shutil.copytree(folder, folder / "models--facebook--maskformer-swin-tiny-ade")
    change_config(download, _name_or_path="")
    official_checkpoint(download)
    assert "CC BY-NC 4.0" in capsys.readouterr().out
