"""Against Hugging Face's MaskFormer, where it is installed: equal where it follows the authors."""
import json
import math

import pytest
import torch
import torch.nn.functional as F

import train
from batches import collate
from data import UserError
from losses import mask_classification_loss
from maskformer import semantic_inference
from matcher import hungarian_match
from pretrained import load_official
from test_train import signals_as_before                                 # noqa: F401

transformers = pytest.importorskip("transformers")
from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

import train_transformers

BACKBONES = {
    "resnet": lambda stages: transformers.ResNetConfig(out_features=stages),
    "swin": lambda stages: transformers.SwinConfig(depths=[2, 2, 6, 2], out_features=stages),
}


def test_the_criterion_is_theirs_layer_by_layer():
    L, B, Q, K, n = 3, 2, 7, 5, (4, 3)
    torch.manual_seed(0)
    class_logits, mask_logits = 3 * torch.randn(L, B, Q, K + 1), 3 * torch.randn(L, B, Q, 6, 8)
    labels, masks = torch.randint(K, (sum(n),)), torch.rand(sum(n), 24, 32) > 0.6
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
        expected = torch.stack([expected[f"loss_{name}"] for name in ("cross_entropy", "mask", "dice")])
        torch.testing.assert_close(torch.stack(terms), expected)
        total += expected
    matches = hungarian_match(class_logits, mask_logits, labels, masks, owner)
    ours = mask_classification_loss(class_logits, mask_logits, labels, masks, matches)
    torch.testing.assert_close(torch.stack(ours), total)


@pytest.fixture(scope="module", params=BACKBONES)
def pair(request, tmp_path_factory):
    """-> (their model with random weights, ours loaded from the file that theirs was saved to)."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.MaskFormerConfig(backbone_config=BACKBONES[request.param](stages), num_labels=11)
    theirs = transformers.MaskFormerForInstanceSegmentation(config).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:                                         # biases would be 0, scales 1
            parameter.data += 0.1 * torch.randn_like(parameter)
    for name, statistics in theirs.named_buffers():
        if name.endswith("running_mean"):
            statistics.copy_(0.1 * torch.randn_like(statistics))
        if name.endswith("running_var"):
            statistics.copy_(0.5 + torch.rand_like(statistics))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_official(folder / "model.safetensors")


@torch.no_grad()
def test_their_weights_give_their_logits_and_class_maps(pair):
    their_model, ours = pair
    image = torch.randint(256, (1, 3, 96, 160), generator=torch.Generator().manual_seed(0))
    class_logits, mask_logits = ours(image)
    expected = their_model((image - ours.backbone.mean) / ours.backbone.std)
    theirs = expected.class_queries_logits, expected.masks_queries_logits
    for x, y in zip((class_logits, mask_logits), theirs):
        torch.testing.assert_close(x[0], y, atol=1e-4 * y.abs().max().item(), rtol=0)

    processor = transformers.MaskFormerImageProcessor()
    their_map = processor.post_process_semantic_segmentation(expected, target_sizes=[(96, 160)])[0]
    masks = F.interpolate(mask_logits[0], size=(96, 160), mode="bilinear", align_corners=False)
    scores = semantic_inference(class_logits[0], masks)[0]
    best = scores.topk(2, 0).values
    assert ((scores.argmax(0) == their_map) | (best[0] - best[1] < 1e-4)).all()


def test_train_py_trains_theirs_on_class_regions_only(tmp_path, monkeypatch, signals_as_before):
    monkeypatch.setattr(train, "build_model", train_transformers.build_model)
    monkeypatch.setattr(train, "compute_loss", train.compute_loss)       # build_model replaces it, too
    flags = ("--backbone resnet18 --no-pretrained --queries 5 --decoder-layers 2 --dim 32 --heads 4 --batch-size 2 "
             "--workers 0 --steps 3").split()
    with pytest.raises(UserError, match="semantic"):
        train.main([*flags, "--output", str(tmp_path / "objects")])
    train.main([*flags, "--task", "semantic", "--output", str(tmp_path / "regions")])
    row = json.loads((tmp_path / "regions" / "log.jsonl").read_text().split("\n")[0])
    assert row["step"] == 1 and math.log(7) < row["loss"] < 500          # 3 layers, focal times 20
    assert json.loads((tmp_path / "regions" / "metrics.json").read_text())["mIoU"] > 0


def test_their_loss_is_ours_but_for_the_layer_before_the_first(monkeypatch):
    monkeypatch.setattr(train, "compute_loss", train.compute_loss)
    flags = ("--backbone resnet18 --no-pretrained --queries 5 --decoder-layers 2 --dim 32 --heads 4 --batch-size 3 "
             "--task semantic --steps 1").split()
    args = train.parse(flags)
    samples, _ = train.load_datasets(args)
    model, ours = train_transformers.Theirs(vars(args), args.num_classes), train.compute_loss
    batch = collate([samples[i] for i in range(3)])
    class_logits, mask_logits = model.train()(batch.images)
    assert len(class_logits) == 3
    count = train.target_count([batch], args)
    expected = sum(ours((x[None], y[None]), batch, count, args)["loss"] for x, y in zip(class_logits, mask_logits))
    found = model.loss((class_logits, mask_logits), batch, count, args)["loss"]
    torch.testing.assert_close(found, expected)
