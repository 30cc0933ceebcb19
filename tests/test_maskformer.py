"""What is guaranteed of maskformer.py (Fig. 2, Sec. 3.3, 3.4, 4)."""
import copy
import io
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

import maskformer
from maskformer import (Backbone, DecoderLayer, EncoderLayer, MaskFormer, PerPixelBaseline,
                        PerPixelBaselinePlus, PixelDecoder, build_model, instance_inference,
                        panoptic_inference, semantic_inference, sine_position)

L, B, Q, K, D = 3, 2, 7, 11, 32
H, W, h, w = 64, 96, 16, 24
KINDS = [MaskFormer, PerPixelBaseline, PerPixelBaselinePlus]


def small(kind=MaskFormer, classes=K, **options):
    torch.manual_seed(0)
    defaults = {"backbone": "test_resnet", "pretrained": False, "freeze_bn": True, "dim": D}
    if kind is not PerPixelBaseline:
        defaults |= {"decoder_layers": L, "heads": 4, "ffn_dim": 48, "dropout": 0.}
    if kind is MaskFormer:
        defaults |= {"num_queries": Q}
    return kind(classes, **defaults | options)


def pictures(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape or (B, 3, H, W), dtype=torch.uint8, generator=generator)


def as_tuple(output):
    return output if isinstance(output, tuple) else (output,)


# ------------------------------------------------------------------------------------------- shapes
def test_the_example_in_the_docstring_runs_and_has_the_shapes_it_says():
    lines = [line for line in maskformer.__doc__.split("\n") if re.match(r" {4}\S", line)]
    names, shapes = vars(maskformer).copy(), 0
    with torch.no_grad():
        for line in lines:
            code, _, comment = line.strip().partition("#")
            exec(code, names)
            promised = [eval(shape) for shape in re.findall(r"\[[^\]]*\]", comment)]
            for name, shape in zip(code.split("=")[0].split(","), promised):
                assert list(names[name.strip()].shape) == shape
                shapes += 1
    assert shapes >= 3


def test_training_answers_with_every_layer_and_evaluation_with_the_last():
    model = small()
    class_logits, mask_logits = model.train()(pictures())
    assert class_logits.shape == (L, B, Q, K + 1)
    assert mask_logits.shape == (L, B, Q, h, w)
    class_logits, mask_logits = model.eval()(pictures())
    assert class_logits.shape == (1, B, Q, K + 1)
    assert mask_logits.shape == (1, B, Q, h, w)


def test_the_last_layers_answer_is_the_same_in_training_and_evaluation():
    model = small(encoder_layers=2)
    in_training, in_evaluation = model.train()(pictures()), model.eval()(pictures())
    for ours, theirs in zip(in_training, in_evaluation):
        torch.testing.assert_close(ours[-1], theirs[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours[0], theirs[0], atol=1e-3)


@pytest.mark.parametrize("backbone, size", [
    ("resnet18", (75, 109)),
    ("resnet18", (33, 201)),
    ("swin_tiny_patch4_window7_224", (75, 109)),
    ("swin_tiny_patch4_window7_224", (33, 201)),
    ("convnext_atto", (64, 96)),
])
def test_masks_have_a_quarter_of_any_image_size_rounded_up(backbone, size):
    model, images = small(backbone=backbone).eval(), pictures(1, 3, *size)
    with torch.no_grad():
        class_logits, mask_logits = model(images)
        features = model.backbone(images)
    assert class_logits.shape == (1, 1, Q, K + 1)
    assert mask_logits.shape == (1, 1, Q, math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    assert class_logits.isfinite().all() and mask_logits.isfinite().all()
    assert [feature.shape[1] for feature in features] == model.backbone.channels
    for feature, stride in zip(features, (4, 8, 16, 32)):
        assert [math.ceil(side / stride) for side in size] == list(feature.shape[2:])


def test_images_may_be_uint8_or_float():
    model = small().eval()
    for ours, theirs in zip(model(pictures()), model(pictures().float())):
        assert torch.equal(ours, theirs)


def test_an_image_is_answered_alone_as_in_a_batch():
    model, images = small(encoder_layers=1).eval(), pictures(3, 3, H, W)
    for together, alone in zip(model(images), model(images[1:2])):
        torch.testing.assert_close(together[:, 1:2], alone, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------- precision
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_under_autocast(kind, dtype):
    model = small(kind).train()
    expected = as_tuple(model(pictures()))
    with torch.autocast("cpu", dtype):
        output = as_tuple(model(pictures()))
    for ours, theirs in zip(output, expected, strict=True):
        assert ours.dtype == torch.float32
        tolerance = 0.1 * theirs.std().item() + 0.05
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=tolerance)
        # Products in half precision would leave eight or eleven bits.
        assert not torch.equal(ours, ours.to(dtype).float())


# ----------------------------------------------------------------------------------------- backbone
@pytest.mark.parametrize("name, mean, std", [
    ("resnet18", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ("tf_efficientnetv2_s", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
])
def test_backbones_normalize_with_their_own_mean_and_std(name, mean, std):
    backbone = Backbone(name, pretrained=False)
    seen = []
    backbone.body.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = pictures(1, 3, 64, 64)
    backbone(images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    torch.testing.assert_close(seen[0], (images - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, weights", [
    ("resnet50", "resnet50.tv_in1k"),
    ("resnet50.a1_in1k", "resnet50.a1_in1k"),
    ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224.ms_in1k"),
])
def test_pretrained_backbones_are_filled_with_timms_weights(monkeypatch, name, weights):
    asked = []

    def published(place, *_, **__):                                  # instead of a download
        asked.append(place)
        with torch.device("meta"):
            state = timm.create_model(weights).state_dict()
        return {key: torch.full(value.shape, 0.25, dtype=value.dtype)
                for key, value in state.items()}

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", published)
    backbone = Backbone(name, pretrained=True)
    assert asked == [f"timm/{weights}"]
    assert backbone.freeze_bn
    state = backbone.body.state_dict()
    read = [value for key, value in state.items() if "num_batches" not in key]
    assert all((value == 0.25).all() for value in read if value.is_floating_point())


@pytest.mark.parametrize("name, tag", [
    ("resnet50", "tv_in1k"),
    ("resnet101", "tv_in1k"),
    ("swin_small_patch4_window7_224", "ms_in1k"),
    ("swin_base_patch4_window12_384", "ms_in22k"),
    ("swin_large_patch4_window12_384", "ms_in22k"),
])
def test_the_papers_backbones_start_from_the_papers_weights(monkeypatch, name, tag):
    def published(place, *_, **__):                                  # instead of a download
        raise RuntimeError(f"asked for {place}")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", published)
    with torch.device("meta"), pytest.raises(RuntimeError, match=f"asked for timm/{name}.{tag}"):
        maskformer.create_body(name, pretrained=True)


def test_released_r101c_is_wider_than_timms_so_that_no_imagenet_weights_fit():
    with pytest.raises(ValueError, match="--no-pretrained"):
        Backbone("resnet101c", pretrained=True)


def test_in_released_r101c_the_blocks_of_the_last_stage_have_dilations_1_2_4():
    with torch.device("meta"):
        body = maskformer.create_body("resnet101c", False)
    convs = [block.conv2 for block in body.layer4]
    assert [conv.dilation for conv in convs] == [(1, 1), (2, 2), (4, 4)]
    assert [conv.padding for conv in convs] == [(1, 1), (2, 2), (4, 4)]
    assert body.conv1[-1].out_channels == 128


def test_a_backbone_without_strides_4_to_32_is_refused_by_name():
    name = "vit_tiny_patch16_224"
    with pytest.raises(ValueError, match=name + ".*stride"):
        Backbone(name, pretrained=False)


def test_each_swin_map_is_normalized_and_no_resnet_map_is():
    swin = Backbone("swin_tiny_patch4_window7_224", pretrained=False)
    with torch.no_grad():
        for feature in swin.eval()(pictures()):
            assert feature.mean(1).abs().max() < 1e-4
            assert (feature.var(1, correction=0) - 1).abs().max() < 1e-2
    assert [norm.eps for norm in swin.norms] == [1e-5] * 4
    assert len(small().backbone.norms) == 0
    rates = [module.drop_prob for module in swin.modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)


def test_swin_maps_are_padded_to_whole_windows_and_then_shifted():
    body = maskformer.create_body("swin_tiny_patch4_window7_224", False)
    block = [m for m in body.modules() if isinstance(m, SwinTransformerBlock)][1]
    assert block.shift_size == (3, 3)
    x = torch.randn(B, 10, 13, 96)
    padded = F.pad(x, (0, 0, 0, 1, 0, 4))                            # to whole windows of 7x7
    expected = SwinTransformerBlock._attn(block, padded)[:, :10, :13]
    torch.testing.assert_close(block._attn(x), expected)


# -------------------------------------------------------------------------------------- batch norms
FROZEN = ["test_resnet", "test_efficientnet"]        # timm's norms without and with an activation


@pytest.mark.parametrize("backbone", FROZEN)
def test_frozen_batch_norms_are_in_eval_mode_whatever_the_mode_of_the_model(backbone):
    def training_modes(model):
        return {norm.training for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)}

    model = small(backbone=backbone, freeze_bn=True)
    assert model.training and model.backbone.training and model.backbone.body.training
    assert training_modes(model) == {False}                          # as built
    assert training_modes(model.eval()) == {False}
    assert training_modes(model.train()) == {False}
    assert training_modes(small(backbone=backbone, freeze_bn=False)) == {True}


@pytest.mark.parametrize("backbone", FROZEN)
@pytest.mark.parametrize("call_train", [True, False])
def test_a_training_step_leaves_frozen_batch_norms_alone(backbone, call_train):
    model = small(backbone=backbone, freeze_bn=True)
    if call_train:
        model.train()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    state = copy.deepcopy(model.state_dict())
    in_norms = [key for key in state if key.rpartition(".")[0] in names]
    assert len(in_norms) == 5 * len(names) and len(names) >= 4

    # As train.py does: parameters without a gradient are not given to the optimizer.
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.1, weight_decay=0.1)
    sum(x.pow(2).mean() for x in model(pictures())).backward()
    optimizer.step()

    after = model.state_dict()
    assert all(torch.equal(state[key], after[key]) for key in in_norms)
    assert not torch.equal(state["to_class.weight"], after["to_class.weight"])
    images = pictures()
    in_training = model.train().backbone(images)
    for ours, theirs in zip(in_training, model.eval().backbone(images), strict=True):
        assert torch.equal(ours, theirs)


def test_batch_norms_learn_where_nothing_is_pretrained():
    model = small(freeze_bn=None).train()
    before = model.backbone.body.bn1.running_mean.clone()
    model(pictures())
    assert not torch.equal(before, model.backbone.body.bn1.running_mean)
    assert model.backbone.body.bn1.weight.requires_grad


@pytest.mark.parametrize("backbone", FROZEN)
def test_frozen_batch_norms_apply_their_statistics_and_weights(backbone):
    torch.manual_seed(0)
    body = Backbone(backbone, pretrained=False, freeze_bn=True)
    norm = [module for module in body.modules() if isinstance(module, nn.BatchNorm2d)][0]
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.copy_(0.5 + torch.rand_like(tensor))
    x = torch.randn(B, norm.num_features, 5, 6)
    mean, var, weight, bias = (tensor[:, None, None] for tensor in (
        norm.running_mean, norm.running_var, norm.weight, norm.bias))
    expected = (x - mean) / (var + norm.eps).sqrt() * weight + bias
    if hasattr(norm, "act"):
        expected = norm.act(expected)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("backbone", FROZEN)
def test_frozen_batch_norms_do_not_end_autocast(backbone):
    images, model = pictures(), Backbone(backbone, pretrained=False, freeze_bn=True)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        features = model(images)
        with torch.no_grad():
            without_gradients = model(images)
    for x, y, z in zip(features, without_gradients, expected, strict=True):
        assert x.dtype == y.dtype == torch.bfloat16 and z.dtype == torch.float32
        assert max((x - z).norm(), (y - z).norm()) < 0.03 * z.norm()


@pytest.mark.parametrize("backbone", FROZEN)
def test_checkpoints_with_timms_frozen_batch_norms_load(backbone):
    torch.manual_seed(1)
    old = Backbone(backbone, pretrained=False, freeze_bn=False)
    for name, tensor in old.body.state_dict().items():
        if name.endswith(("running_mean", "running_var", "weight", "bias")):
            tensor.add_(0.1 * torch.rand_like(tensor))
    old.body = freeze_batch_norm_2d(old.body)                        # as the version before did
    file = io.BytesIO()
    torch.save({"model": old.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)["model"]
    assert not any("num_batches_tracked" in name for name in state)

    new = Backbone(backbone, pretrained=False, freeze_bn=True)
    new.load_state_dict(state)
    for ours, theirs in zip(new(pictures()), old(pictures()), strict=True):
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


# ------------------------------------------------------------------------------------ pixel decoder
def test_pixel_decoder_is_the_fpn_of_the_paper():
    torch.manual_seed(0)
    decoder = PixelDecoder([24, 40, 56, 72], D)
    sizes = (24, 16, 23), (40, 8, 12), (56, 4, 6), (72, 2, 3)
    maps = [torch.randn(B, *size) for size in sizes]

    def conv_norm(x, block, activation):
        x = F.conv2d(x, block[0].weight, None, padding=block[0].weight.shape[-1] // 2)
        x = F.group_norm(x, 32, block[1].weight, block[1].bias, 1e-5)
        return x.relu() if activation else x

    def nearest(x, height, width):
        rows = [y * x.shape[2] // height for y in range(height)]
        columns = [i * x.shape[3] // width for i in range(width)]
        return x[:, :, rows][..., columns]

    x = conv_norm(maps[3], decoder.stem, True)
    for i, finer in enumerate(maps[2::-1]):
        x = conv_norm(finer, decoder.project[i], False) + nearest(x, *finer.shape[2:])
        x = conv_norm(x, decoder.fuse[i], True)
    expected = F.conv2d(x, decoder.to_pixel_embed.weight, decoder.to_pixel_embed.bias, padding=1)
    torch.testing.assert_close(decoder(maps), expected, rtol=1e-4, atol=1e-4)

    def kernels(part):
        return [module.kernel_size for module in part.modules() if isinstance(module, nn.Conv2d)]
    assert kernels(decoder.project) == [(1, 1)] * 3
    assert kernels(decoder.fuse) == [(3, 3)] * 3


def test_convolutions_start_kaiming_uniform_with_a_1_and_zero_biases():
    model = small()
    convs = [*model.pixel_decoder.modules(), model.project]
    convs = [module for module in convs if isinstance(module, nn.Conv2d)]
    assert len(convs) == 9
    for conv in convs:
        bound = math.sqrt(3 / conv.weight[0].numel())
        assert 0.98 * bound < conv.weight.abs().max() <= bound
        assert conv.bias is None or (conv.bias == 0).all()


def test_transformer_matrices_start_xavier_uniform():
    model = small(encoder_layers=1)
    parameters = [*model.decoder.named_parameters(), *model.encoder.named_parameters()]
    for name, parameter in parameters:
        if parameter.dim() == 2:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.9 * bound < parameter.abs().max() <= bound, name


# -------------------------------------------------------------------------------------- transformer
@pytest.mark.parametrize("height, width, dim", [(3, 5, 16), (1, 1, 8), (7, 2, 256)])
def test_sine_positions_equal_a_slow_loop(height, width, dim):
    half = dim // 2

    def encoded(place, n, i):
        angle = place / (n + 1e-6) * 2 * math.pi / 10000 ** (2 * (i // 2) / half)
        return math.cos(angle) if i % 2 else math.sin(angle)

    expected = torch.zeros(height * width, dim)
    for y in range(height):
        for x in range(width):
            for i in range(half):                                    # y first, then x
                expected[y * width + x, i] = encoded(y + 1, height, i)
                expected[y * width + x, half + i] = encoded(x + 1, width, i)
    torch.testing.assert_close(sine_position(height, width, dim), expected, rtol=1e-4, atol=2e-5)


def slow_attention(module, query, key, value, heads):
    """softmax(q k / sqrt(d)) v, head by head; query [n, D], key and value [m, D]."""
    query_weight, key_weight, value_weight = module.in_proj_weight.chunk(3)
    query_bias, key_bias, value_bias = module.in_proj_bias.chunk(3)
    q = query @ query_weight.T + query_bias
    k = key @ key_weight.T + key_bias
    v = value @ value_weight.T + value_bias
    d = query.shape[-1] // heads
    parts = []
    for head in range(heads):
        part = slice(head * d, head * d + d)
        parts.append((q[:, part] @ k[:, part].T / math.sqrt(d)).softmax(-1) @ v[:, part])
    return torch.cat(parts, -1) @ module.out_proj.weight.T + module.out_proj.bias


def slow_feed_forward(layer, x):
    x = (x @ layer.linear1.weight.T + layer.linear1.bias).clamp(min=0)
    return x @ layer.linear2.weight.T + layer.linear2.bias


def randomised(layer):
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer.double()


def test_a_decoder_layer_is_self_attention_cross_attention_and_feed_forward_each_then_normalized():
    heads, pixels = 4, 13
    layer = randomised(DecoderLayer(D, heads, 48, 0., batch_first=True))
    x, query_pos = torch.randn(B, Q, D).double(), torch.randn(Q, D).double()
    memory, memory_pos = torch.randn(B, pixels, D).double(), torch.randn(pixels, D).double()
    output = layer(x, query_pos, memory, memory_pos)
    for b in range(B):
        y = x[b]
        q = y + query_pos
        y = layer.norm1(y + slow_attention(layer.self_attn, q, q, y, heads))
        q, k = y + query_pos, memory[b] + memory_pos
        y = layer.norm2(y + slow_attention(layer.multihead_attn, q, k, memory[b], heads))
        y = layer.norm3(y + slow_feed_forward(layer, y))
        torch.testing.assert_close(output[b], y)


def test_an_encoder_layer_is_self_attention_and_feed_forward_each_then_normalized():
    heads, pixels = 4, 13
    layer = randomised(EncoderLayer(D, heads, 48, 0., batch_first=True))
    x, pos = torch.randn(B, pixels, D).double(), torch.randn(pixels, D).double()
    output = layer(x, pos)
    for b in range(B):
        q = x[b] + pos
        y = layer.norm1(x[b] + slow_attention(layer.self_attn, q, q, x[b], heads))
        y = layer.norm2(y + slow_feed_forward(layer, y))
        torch.testing.assert_close(output[b], y)


def test_dropout_acts_at_every_place_of_detr_in_training_only():
    for kind, lengths in ((DecoderLayer, (Q, 5)), (EncoderLayer, (Q,))):
        layer = kind(D, 4, 48, 0.1, batch_first=True)
        inputs = [x for n in lengths for x in (torch.randn(1, n, D), torch.randn(n, D))]
        dropouts = [module for module in layer.modules() if isinstance(module, nn.Dropout)]
        attentions = [m for m in layer.modules() if isinstance(m, nn.MultiheadAttention)]
        used = []
        for dropout in dropouts:
            dropout.register_forward_hook(lambda module, args, output: used.append(module))
        assert not torch.equal(layer.train()(*inputs), layer(*inputs))
        assert set(used) == set(dropouts)
        assert {dropout.p for dropout in dropouts} == {0.1}
        assert {attention.dropout for attention in attentions} == {0.1}
        assert torch.equal(layer.eval()(*inputs), layer(*inputs))


def watched(model):
    """Runs a model in training mode -> what its parts took and gave, by name, and its output."""
    seen = {"entered": [], "left": []}
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda module, args: seen["entered"].append(args[0]))
        layer.register_forward_hook(lambda module, args, output: seen["left"].append(output))
    parts = {"segment_embed": model.decoder.norm, "pixel_embed": model.pixel_decoder}
    for name, part in parts.items():
        part.register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output}))
    seen["output"] = model.train()(pictures())
    return seen


def test_query_contents_start_at_zero_and_every_layers_answer_passes_the_one_shared_norm():
    model = small()
    norm = model.decoder.norm
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    seen = watched(model)
    assert len(seen["left"]) == L
    assert seen["entered"][0].shape == (B, Q, D) and (seen["entered"][0] == 0).all()
    for i in range(L - 1):                                           # the norm is beside the path
        assert torch.equal(seen["entered"][i + 1], seen["left"][i])
    for ours, x in zip(seen["segment_embed"], seen["left"], strict=True):
        torch.testing.assert_close(ours, F.layer_norm(x, (D,), norm.weight, norm.bias))


def test_mask_logits_are_mask_embeddings_times_pixel_embeddings():
    model = small()
    seen = watched(model)
    class_logits, mask_logits = seen["output"]
    assert seen["pixel_embed"].shape == (B, D, h, w)
    for l, b, q in ((0, 1, 3), (2, 0, 6)):
        segment_embed = seen["segment_embed"][l, b, q]
        mask_embed = model.to_mask(segment_embed)
        mask = (mask_embed[:, None, None] * seen["pixel_embed"][b]).sum(0)
        torch.testing.assert_close(mask_logits[l, b, q], mask, rtol=1e-4, atol=1e-4)
        classes = model.to_class(segment_embed)
        torch.testing.assert_close(class_logits[l, b, q], classes, rtol=1e-4, atol=1e-4)
    kinds = [type(module) for module in model.to_mask]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_what_the_encoder_saw_feeds_both_pixel_decoder_and_queries():
    model = small(encoder_layers=2)
    assert [layer.self_attn.embed_dim for layer in model.encoder.layers] == [D, D]
    assert model.pixel_decoder.stem[0].weight.shape == (D, D, 3, 3)
    seen = {}
    model.encoder.layers[1].register_forward_hook(
        lambda module, args, output: seen.update(encoded=output))
    model.pixel_decoder.register_forward_pre_hook(
        lambda module, args: seen.update(coarsest=args[0][-1]))
    model.decoder.layers[0].register_forward_pre_hook(
        lambda module, args: seen.update(memory=args[2]))
    model(pictures())
    assert torch.equal(seen["memory"], seen["encoded"])
    assert torch.equal(seen["coarsest"].flatten(2).transpose(1, 2), seen["encoded"])
    assert seen["coarsest"].shape == (B, D, H // 32, W // 32)


@pytest.mark.parametrize("kind, options", [
    (MaskFormer, {"freeze_bn": False, "encoder_layers": 1}),
    (MaskFormer, {"backbone": "convnext_atto"}),
    (PerPixelBaseline, {"freeze_bn": False}),
    (PerPixelBaselinePlus, {"freeze_bn": False}),
])
def test_every_trainable_parameter_gets_a_gradient_that_is_not_zero(kind, options):
    model = small(kind, **options).train()
    for parameter in model.parameters():             # leave the zeros that some of them start at
        parameter.data += 0.02 * torch.randn_like(parameter)
    sum((x * torch.randn_like(x)).sum() for x in as_tuple(model(pictures()))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    zero = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    # In the first decoder layer all contents are zero: self-attention has no values to sum.
    assert zero <= {"decoder.layers.0.self_attn.in_proj_weight"}


# ------------------------------------------------------------------------ sizes of published models
@pytest.mark.parametrize("count, build", [
    (41_254_743, lambda: MaskFormer(150, "resnet50", False, freeze_bn=True)),
    (60_160_980, lambda: MaskFormer(19, "resnet101", False, freeze_bn=True)),
    (60_318_039, lambda: MaskFormer(150, "resnet101c", False, freeze_bn=True)),
    (45_012_038, lambda: MaskFormer(133, "resnet50", False, freeze_bn=True, encoder_layers=6)),
    (45_016_407, lambda: MaskFormer(150, "resnet50", False, freeze_bn=True, encoder_layers=6)),
    (41_757_009, lambda: MaskFormer(150, "swin_tiny_patch4_window7_224", False)),
    (41_752_640, lambda: MaskFormer(133, "swin_tiny_patch4_window7_224", False)),
    (101_829_391, lambda: MaskFormer(150, "swin_base_patch4_window12_384", False)),
    (31_033_942, lambda: PerPixelBaseline(150, "resnet50", False, freeze_bn=True)),
    (41_228_736, lambda: PerPixelBaselinePlus(150, "resnet50", False, freeze_bn=True)),
])
def test_parameter_counts_are_those_of_the_released_models(count, build):
    # The released models count frozen batch norms as buffers.
    with torch.device("meta"):
        model = build()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in learned) == count


# -------------------------------------------------------------------------------------- build_model
FLAGS = {"model": "maskformer", "backbone": "test_resnet", "num_classes": K, "dim": D,
         "freeze_bn": True, "queries": Q, "decoder_layers": L, "encoder_layers": 2, "heads": 4,
         "ffn_dim": 48, "dropout": 0.25, "size_divisibility": 64}


@pytest.mark.parametrize("name, kind", [
    ("maskformer", MaskFormer),
    ("per-pixel", PerPixelBaseline),
    ("per-pixel-plus", PerPixelBaselinePlus),
])
def test_build_model_builds_what_the_flags_say(name, kind):
    model = build_model(FLAGS | {"model": name})
    assert type(model) is kind
    assert model.num_classes == K
    assert model.backbone.freeze_bn
    assert model.pixel_decoder.to_pixel_embed.out_channels == D
    assert model.size_divisibility == (64 if kind is MaskFormer else 0)
    if kind is PerPixelBaseline:
        assert model.to_class.out_channels == K
        return
    assert model.query_pos.weight.shape == (Q if kind is MaskFormer else K, D)
    assert len(model.decoder.layers) == L
    assert len(model.encoder.layers) == 2
    layer = model.decoder.layers[0]
    assert layer.self_attn.num_heads == 4
    assert layer.linear1.out_features == 48
    assert layer.dropout.p == 0.25
    if kind is MaskFormer:
        assert model.to_class.out_features == K + 1


def test_build_model_takes_flags_that_describe_no_model_and_asks_for_weights_only_if_told(
        monkeypatch):
    asked = []

    def backbone(name, pretrained=True, freeze_bn=None):
        asked.append((name, pretrained, freeze_bn))
        return Backbone(name, False, freeze_bn)

    monkeypatch.setattr(maskformer, "Backbone", backbone)
    build_model(FLAGS | {"dataset": "shapes", "pretrained": True})
    build_model(FLAGS | {"freeze_bn": None}, pretrained=True)
    assert asked == [("test_resnet", False, True), ("test_resnet", True, None)]


# ---------------------------------------------------------------------------------------- baselines
def test_per_pixel_baselines_answer_with_class_scores_per_pixel():
    assert small(PerPixelBaseline).train()(pictures()).shape == (1, B, K, h, w)
    assert small(PerPixelBaselinePlus).train()(pictures()).shape == (L, B, K, h, w)
    assert small(PerPixelBaselinePlus).eval()(pictures()).shape == (1, B, K, h, w)


def test_images_are_padded_to_a_multiple_of_32_for_maskformer_and_not_for_the_baselines():
    assert small().size_divisibility == 32
    assert small(PerPixelBaseline).size_divisibility == 0
    assert small(PerPixelBaselinePlus).size_divisibility == 0


def test_in_per_pixel_baseline_plus_the_kth_querys_mask_is_the_score_of_class_k():
    model = small(PerPixelBaselinePlus).eval()
    scores = model(pictures())
    order = torch.randperm(K)
    model.query_pos.weight.data = model.query_pos.weight.data[order]
    torch.testing.assert_close(model(pictures()), scores[:, :, order], rtol=1e-4, atol=1e-4)
    assert not hasattr(model, "to_class")


# ------------------------------------------------------------------------------- semantic inference
def test_semantic_inference_equals_plain_loops():
    class_logits, mask_logits = torch.randn(B, Q, K + 1), torch.randn(B, Q, 3, 4)
    scores = semantic_inference(class_logits, mask_logits)
    assert scores.shape == (B, K, 3, 4)

    def class_prob(b, q, c):
        return math.exp(class_logits[b, q, c]) / sum(map(math.exp, class_logits[b, q].tolist()))

    for b in range(B):
        for c in range(K):
            for y, x in ((0, 0), (2, 1), (1, 3)):
                expected = sum(class_prob(b, q, c) / (1 + math.exp(-mask_logits[b, q, y, x]))
                               for q in range(Q))
                assert scores[b, c, y, x].item() == pytest.approx(expected, rel=1e-4)


def test_semantic_inference_never_answers_no_object():
    class_logits = torch.zeros(B, Q, K + 1)
    class_logits[..., K] = 50.
    class_logits[:, 2, 5] = 3.
    scores = semantic_inference(class_logits, torch.randn(B, Q, 3, 4))
    assert scores.shape[1] == K and (scores.argmax(1) == 5).all()


# ------------------------------------------------------------------------------- panoptic inference
IS_THING = [k >= 6 for k in range(K)]                                # 0..5 stuff, 6..10 things


def sure_of(*answers, prob=0.95):
    """answers: a class or (class, probability) for each query -> class_logits [Q, K+1]."""
    logits = torch.zeros(len(answers), K + 1)
    for q, answer in enumerate(answers):
        label, p = answer if isinstance(answer, tuple) else (answer, prob)
        logits[q, label] = math.log(p * K / (1 - p))
    return logits


def stripes(*columns, height=4, width=12, size=8.):
    """columns: (first, last) of each query's mask -> mask_logits [Q, height, width]."""
    logits = torch.full((len(columns), height, width), -size)
    for q, (first, last) in enumerate(columns):
        logits[q, :, first:last] = size
    return logits


def categories(segments):
    return [segment["category_id"] for segment in segments]


def slow_panoptic(class_logits, mask_logits, object_threshold, overlap_threshold):
    """Sec. 3.4 pixel by pixel -> segment map as nested lists, segments."""
    class_prob, mask_prob = class_logits.softmax(-1).tolist(), mask_logits.sigmoid().tolist()
    height, width = mask_logits.shape[1:]
    pixels = [(y, x) for y in range(height) for x in range(width)]
    label = [prob.index(max(prob)) for prob in class_prob]
    kept = [q for q, prob in enumerate(class_prob)
            if label[q] != K and max(prob) > object_threshold]

    winner = {}
    for y, x in pixels if kept else []:
        winner[y, x] = max(kept, key=lambda q: max(class_prob[q]) * mask_prob[q][y][x])

    segment_map = [[0] * width for _ in range(height)]
    segments = []
    for q in kept:
        visible = [pixel for pixel in pixels if winner[pixel] == q]
        area = sum(mask_prob[q][y][x] >= 0.5 for y, x in pixels)
        if not visible or not area or len(visible) / area < overlap_threshold:
            continue
        merged = [s for s in segments if s["category_id"] == label[q] and not s["isthing"]]
        if not merged:
            segments.append({"id": len(segments) + 1, "category_id": label[q],
                             "isthing": IS_THING[label[q]], "score": 0.})
            merged = segments[-1:]
        merged[0]["score"] = max(merged[0]["score"], max(class_prob[q]))
        for y, x in visible:
            segment_map[y][x] = merged[0]["id"]
    return segment_map, segments


def test_panoptic_inference_equals_the_paper_pixel_by_pixel():
    torch.manual_seed(0)
    found, with_void = 0, 0
    for _ in range(60):
        class_logits, mask_logits = 4 * torch.randn(Q, K + 1), 3 * torch.randn(Q, 5, 6)
        segment_map, segments = panoptic_inference(class_logits, mask_logits, IS_THING, 0.5, 0.3)
        slow_map, slow_segments = slow_panoptic(class_logits, mask_logits, 0.5, 0.3)
        assert segment_map.tolist() == slow_map
        for ours, slow in zip(segments, slow_segments, strict=True):
            assert ours == slow | {"score": pytest.approx(slow["score"])}
        found += len(segments)
        with_void += (segment_map == 0).any().item()
    assert found > 100 and 10 < with_void < 60


def test_panoptic_ids_are_unique_void_is_zero_and_stuff_of_a_class_is_one_segment():
    class_logits = sure_of(7, 2, 7, K, (2, 0.99), (9, 0.5))
    mask_logits = stripes((0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12))
    segment_map, segments = panoptic_inference(class_logits, mask_logits, IS_THING)
    found = [(s["id"], s["category_id"], s["isthing"]) for s in segments]
    assert found == [(1, 7, True), (2, 2, False), (3, 7, True)]
    assert [s["score"] for s in segments] == pytest.approx([0.95, 0.99, 0.95], abs=1e-4)
    assert segment_map.dtype == torch.int32 and segment_map.shape == (4, 12)
    assert segment_map[0, [0, 1, 2, 3, 4, 5, 8, 9]].tolist() == [1, 1, 2, 2, 3, 3, 2, 2]
    assert set(segment_map.unique().tolist()) <= {0, 1, 2, 3}


def test_a_pixel_goes_to_the_query_with_the_highest_product_of_class_and_mask_probability():
    class_logits = sure_of((7, 0.99), (8, 0.85))
    # 0.599 * 0.99 > 0.622 * 0.85
    mask_logits = torch.stack([torch.full((3, 5), 0.4), torch.full((3, 5), 0.5)])
    segment_map, segments = panoptic_inference(class_logits, mask_logits, IS_THING)
    assert (segment_map == 1).all() and categories(segments) == [7]


def test_the_area_test_is_on_masks_not_weighted_by_the_score():
    # Query 0 owns 8 of its 10 columns; weighted by its score (0.9 * 0.55), it would have no area.
    class_logits, mask_logits = sure_of((7, 0.9), (8, 0.95)), stripes((0, 10), (8, 12))
    mask_logits[0, :, :10] = 0.2                                     # probability 0.55
    segment_map, segments = panoptic_inference(class_logits, mask_logits, IS_THING,
                                               overlap_threshold=0.8)
    assert categories(segments) == [7, 8]
    assert (segment_map == 1).sum() == 32 and (segment_map == 2).sum() == 16


def test_a_segment_survives_if_its_visible_share_is_not_below_the_threshold():
    class_logits, mask_logits = sure_of((7, 0.9), (8, 0.95)), stripes((0, 10), (8, 12))
    for threshold, kept in ((0.79, [7, 8]), (0.8, [7, 8]), (0.81, [8])):     # 8 of 10 are visible
        segment_map, segments = panoptic_inference(class_logits, mask_logits, IS_THING, 0.5,
                                                   threshold)
        assert categories(segments) == kept
        assert (segment_map == 0).sum() == (0 if len(kept) == 2 else 32)
        assert [s["id"] for s in segments] == list(range(1, len(kept) + 1))


def test_masks_are_resized_before_they_become_probabilities():
    torch.manual_seed(0)
    class_logits, mask_logits = sure_of(7, 2, 8, 2), 4 * torch.randn(4, 5, 6)
    resized = F.interpolate(mask_logits[None], size=(19, 23), mode="bilinear",
                            align_corners=False)[0]
    segment_map, segments = panoptic_inference(class_logits, mask_logits, IS_THING, 0.8, 0.1,
                                               size=(19, 23))
    expected = panoptic_inference(class_logits, resized, IS_THING, 0.8, 0.1)
    assert torch.equal(segment_map, expected[0])
    assert segments == expected[1] and len(segments) == 3


@pytest.mark.parametrize("class_logits", [
    torch.zeros(Q, K + 1),
    sure_of(*[K] * Q),
    sure_of(*[(3, 0.79)] * Q),
    torch.zeros(0, K + 1),
])
@pytest.mark.parametrize("size", [None, (8, 12)])
def test_all_is_void_where_no_query_is_sure(class_logits, size):
    mask_logits = torch.randn(len(class_logits), 4, 6)
    segment_map, segments = panoptic_inference(class_logits, mask_logits, IS_THING, size=size)
    assert segments == [] and segment_map.shape == (size or (4, 6))
    assert segment_map.dtype == torch.int32 and (segment_map == 0).all()


def test_a_lower_threshold_takes_less_sure_queries():
    segment_map, segments = panoptic_inference(sure_of((3, 0.79)), stripes((0, 12)), IS_THING,
                                               object_threshold=0.78)
    assert len(segments) == 1 and (segment_map == 1).all()


def test_a_class_must_be_surer_than_its_threshold_and_a_mask_of_one_half_has_an_area():
    class_logits = torch.full((1, K + 1), -torch.inf)
    class_logits[0, [7, K]] = 0.                                     # exactly 1/2
    for threshold, kept in ((0.5, []), (0.49, [7])):
        segment_map, segments = panoptic_inference(class_logits, torch.zeros(1, 4, 6), IS_THING,
                                                   threshold)
        assert categories(segments) == kept and (segment_map == len(kept)).all()


def test_a_mask_below_one_half_everywhere_is_no_segment():
    mask_logits = torch.full((1, 4, 6), -0.1)
    segment_map, segments = panoptic_inference(sure_of(7), mask_logits, IS_THING)
    assert segments == [] and (segment_map == 0).all()


def test_dropped_stuff_gives_no_entry_and_every_entry_has_pixels():
    torch.manual_seed(0)
    for _ in range(50):
        class_logits, mask_logits = 6 * torch.randn(Q, K + 1), 4 * torch.randn(Q, 6, 7)
        segment_map, segments = panoptic_inference(class_logits, mask_logits,
                                                   torch.tensor(IS_THING), 0.3, 0.2)
        ids = [s["id"] for s in segments]
        assert len(set(ids)) == len(ids) and set(segment_map.unique().tolist()) - {0} == set(ids)
        stuff = [s["category_id"] for s in segments if not s["isthing"]]
        assert len(set(stuff)) == len(stuff)
        assert all(s["isthing"] == IS_THING[s["category_id"]] for s in segments)
        assert all(0.3 < s["score"] <= 1 for s in segments)


# ------------------------------------------------------------------------------- instance inference
def test_instance_masks_may_overlap_and_come_with_falling_scores():
    class_logits = sure_of((7, 0.9), (8, 0.95), (2, 0.99), (K, 0.99))
    mask_logits = stripes((0, 10), (4, 12), (0, 12), (0, 12))
    masks, labels, scores = instance_inference(class_logits, mask_logits, IS_THING, top_k=2)
    assert masks.dtype == torch.bool and masks.shape == (2, 4, 12)
    assert labels.tolist() == [8, 7]
    # times the mask probability inside, nearly 1
    assert scores.tolist() == pytest.approx([0.95, 0.9], abs=2e-3)
    assert (masks[0] & masks[1]).sum() == 4 * 6
    assert masks[1, 0].tolist() == [True] * 10 + [False] * 2


def test_instance_scores_are_class_probability_times_mean_mask_probability_inside():
    class_logits, mask_logits = torch.randn(Q, K + 1), torch.randn(Q, 5, 6)
    masks, labels, scores = instance_inference(class_logits, mask_logits, IS_THING, top_k=10_000)
    assert len(masks) == Q * sum(IS_THING) and (scores[:-1] >= scores[1:]).all()
    class_prob, mask_prob, expected = class_logits.softmax(-1), mask_logits.sigmoid(), []
    for q in range(Q):
        inside = mask_prob[q][mask_prob[q] > 0.5].mean()
        expected += [(class_prob[q, c] * inside).item() for c in range(6, K)]
    assert scores.tolist() == pytest.approx(sorted(expected, reverse=True), rel=1e-4)
    assert set(labels.tolist()) == set(range(6, K))


def test_instances_leave_out_empty_masks_and_stuff():
    class_logits = sure_of(7, 8)
    masks, labels, _ = instance_inference(class_logits, stripes((0, 0), (2, 5)), IS_THING)
    assert set(labels.tolist()) == set(range(6, K)) and labels[0] == 8
    assert masks.flatten(1).any(1).all()
    masks, labels, scores = instance_inference(class_logits, stripes((0, 3), (2, 5)), [False] * K)
    assert masks.shape == (0, 4, 12) and labels.shape == scores.shape == (0,)
