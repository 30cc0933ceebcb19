"""What is guaranteed of maskformer.py (Fig. 2, Sec. 3.3, 3.4, 4)."""
import copy
import math
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

import maskformer
from maskformer import (Backbone, DecoderLayer, EncoderLayer, MaskFormer, PerPixelBaseline,
                        PerPixelBaselinePlus, PixelDecoder, instance_inference, panoptic_inference,
                        semantic_inference, sine_position)

L, B, Q, K, D = 3, 2, 7, 11, 32
H, W, h, w = 64, 96, 16, 24


def small(kind=MaskFormer, classes=K, **options):
    torch.manual_seed(0)
    options = dict(backbone="resnet18", pretrained=False, freeze_bn=True, dim=D) | options
    if kind is not PerPixelBaseline:
        options = dict(decoder_layers=L, heads=4, ffn_dim=48, dropout=0.) | options
    if kind is MaskFormer:
        options = dict(num_queries=Q) | options
    return kind(classes, **options)


def pictures(*shape, seed=0):
    return torch.randint(256, shape or (B, 3, H, W), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ shapes

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
    assert class_logits.shape == (L, B, Q, K + 1) and mask_logits.shape == (L, B, Q, h, w)
    class_logits, mask_logits = model.eval()(pictures())
    assert class_logits.shape == (1, B, Q, K + 1) and mask_logits.shape == (1, B, Q, h, w)


def test_the_last_layers_answer_is_the_same_in_training_and_evaluation():
    model = small(encoder_layers=2)
    in_training, in_evaluation = model.train()(pictures()), model.eval()(pictures())
    for ours, theirs in zip(in_training, in_evaluation):
        torch.testing.assert_close(ours[-1], theirs[0], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours[0], theirs[0], atol=1e-3)


@pytest.mark.parametrize("backbone, size", [
    ("resnet18", (75, 109)), ("resnet18", (33, 201)), ("swin_tiny_patch4_window7_224", (64, 96)),
    ("swin_tiny_patch4_window7_224", (75, 109)), ("swin_tiny_patch4_window7_224", (33, 201)),
    ("convnext_atto", (64, 96))])
def test_masks_have_a_quarter_of_any_image_size_rounded_up(backbone, size, made={}):
    model = made.setdefault(backbone, small(backbone=backbone).eval())
    with torch.no_grad():
        class_logits, mask_logits = model(pictures(1, 3, *size))
        features = model.backbone(pictures(1, 3, *size))
    assert class_logits.shape == (1, 1, Q, K + 1)
    assert mask_logits.shape == (1, 1, Q, math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    assert [f.shape[1] for f in features] == model.backbone.channels
    for feature, stride in zip(features, (4, 8, 16, 32)):
        assert [math.ceil(side / stride) for side in size] == list(feature.shape[2:])
    assert class_logits.isfinite().all() and mask_logits.isfinite().all()


def test_each_swin_map_is_normalised_and_no_resnet_map_is():
    swin = Backbone("swin_tiny_patch4_window7_224", pretrained=False)
    with torch.no_grad():
        for feature in swin.eval()(pictures()):
            assert feature.mean(1).abs().max() < 1e-4
            assert (feature.var(1, correction=0) - 1).abs().max() < 1e-2
    assert [norm.eps for norm in swin.norms] == [1e-5] * 4 and len(small().backbone.norms) == 0
    rates = [module.drop_prob for module in swin.modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)


def test_swin_maps_are_padded_to_whole_windows_and_then_shifted():
    body = maskformer.create_body("swin_tiny_patch4_window7_224", False)
    block = [m for m in body.modules() if isinstance(m, SwinTransformerBlock)][1]
    assert block.shift_size == (3, 3)
    x = torch.randn(B, 10, 13, 96)
    padded = F.pad(x, (0, 0, 0, 1, 0, 4))                                # [B, 14, 14, 96]: timm pads no more
    torch.testing.assert_close(block._attn(x), SwinTransformerBlock._attn(block, padded)[:, :10, :13])


def test_images_may_be_uint8_or_float():
    model = small().eval()
    for ours, theirs in zip(model(pictures()), model(pictures().float())):
        assert torch.equal(ours, theirs)


def test_logits_are_float32_under_autocast():
    for model in (small().eval(), small(PerPixelBaseline).eval(), small(PerPixelBaselinePlus).eval()):
        expected = model(pictures())
        with torch.autocast("cpu", torch.bfloat16):
            output = model(pictures())
        for ours, theirs in zip(*[x if isinstance(x, tuple) else (x,) for x in (output, expected)]):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1 * theirs.std().item() + 0.05)


def test_an_image_is_answered_alone_as_in_a_batch():
    model, images = small(encoder_layers=1).eval(), pictures(3, 3, H, W)
    for together, alone in zip(model(images), model(images[1:2])):
        torch.testing.assert_close(together[:, 1:2], alone, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ backbone

def test_backbones_normalise_with_their_own_mean_and_std():
    for name, mean, std in (("resnet18", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
                            ("tf_efficientnetv2_s", (127.5,) * 3, (127.5,) * 3)):
        backbone = Backbone(name, pretrained=False)
        seen = []
        backbone.body.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        images = pictures(1, 3, 64, 64)
        backbone(images)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
        torch.testing.assert_close(seen[0], (images - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, weights", [
    ("resnet50", "resnet50.tv_in1k"), ("resnet50.a1_in1k", "resnet50.a1_in1k"), ("resnet18", "resnet18.a1_in1k"),
    ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224.ms_in1k"),
    ("swin_base_patch4_window12_384", "swin_base_patch4_window12_384.ms_in22k")])
def test_pretrained_backbones_start_from_the_papers_weights(monkeypatch, name, weights):
    asked = []

    def published(place, *_, **__):                                      # instead of a download; with its head
        asked.append(place)
        state = timm.create_model(weights).state_dict()
        return {key: torch.full_like(value, 0.25) for key, value in state.items()}
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", published)
    backbone = Backbone(name, pretrained=True)
    assert asked == [f"timm/{weights}"]
    read = [value for key, value in backbone.body.state_dict().items() if "num_batches" not in key]
    assert all((value == 0.25).all() for value in read if value.is_floating_point())


def test_released_r101c_is_wider_than_timms_so_that_no_imagenet_weights_fit():
    with pytest.raises(ValueError, match="--no-pretrained"):
        Backbone("resnet101c", pretrained=True)


def test_in_released_r101c_the_blocks_of_the_last_stage_have_dilations_1_2_4():
    with torch.device("meta"):
        convs = [block.conv2 for block in maskformer.create_body("resnet101c", False).layer4]
    assert [conv.dilation for conv in convs] == [conv.padding for conv in convs] == [(1, 1), (2, 2), (4, 4)]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224"])
def test_a_backbone_without_strides_4_to_32_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name + ".*stride"):
        Backbone(name, pretrained=False)


@pytest.mark.parametrize("backbone", ["resnet18", "test_efficientnet"])  # plain norms, norms with activation
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


@pytest.mark.parametrize("backbone", ["resnet18", "test_efficientnet"])
def test_frozen_batch_norms_are_the_same_with_and_without_gradients(backbone):
    images, model = pictures(), Backbone(backbone, pretrained=False, freeze_bn=True)
    for name, x in model.body.named_buffers():
        if "bn" in name and x.dim() == 1:
            x.copy_(0.5 + torch.rand_like(x))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))              # its norms are its own
    expected = model(images)
    for x in model.body.buffers():
        x.zero_()
    with torch.no_grad():
        for x, y in zip(twin(images), expected, strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_frozen_batch_norms_stay_frozen_in_training():
    model = small(freeze_bn=True).train()
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sum(x.pow(2).mean() for x in model(pictures())).backward()
    optimizer.step()
    norm_names = [n for n in state if n.startswith("backbone") and re.search(r"bn\d|downsample\.1", n)]
    assert len(norm_names) >= 4 * 20
    assert all(torch.equal(state[n], model.state_dict()[n]) for n in norm_names)
    assert not any("bn" in n for n, _ in model.named_parameters())
    images = pictures()
    assert torch.equal(model.backbone(images)[0], model.eval().backbone(images)[0])


def test_batch_norms_learn_where_nothing_is_pretrained():
    model = small(freeze_bn=None).train()
    before = model.backbone.body.bn1.running_mean.clone()
    model(pictures())
    assert not torch.equal(before, model.backbone.body.bn1.running_mean)
    assert model.backbone.body.bn1.weight.requires_grad


# ------------------------------------------------------------------ pixel decoder

def test_pixel_decoder_is_the_fpn_of_the_paper():
    torch.manual_seed(0)
    decoder = PixelDecoder([24, 40, 56, 72], D)
    sizes = (24, 16, 23), (40, 8, 12), (56, 4, 6), (72, 2, 3)
    maps = [torch.randn(B, *size) for size in sizes]

    def conv_norm(x, block, activation):
        x = F.conv2d(x, block[0].weight, None, padding=block[0].weight.shape[-1] // 2)
        x = F.group_norm(x, 32, block[1].weight, block[1].bias, 1e-5)
        return x.relu() if activation else x
    x = conv_norm(maps[3], decoder.stem, True)
    for i, finer in enumerate(maps[2::-1]):
        pairs = zip(finer.shape[2:], x.shape[2:])
        rows, columns = ([i * few // many for i in range(many)] for many, few in pairs)
        x = conv_norm(finer, decoder.project[i], False) + x[:, :, rows][..., columns]            # nearest
        x = conv_norm(x, decoder.fuse[i], True)
    expected = F.conv2d(x, decoder.to_pixel_embed.weight, decoder.to_pixel_embed.bias, padding=1)
    torch.testing.assert_close(decoder(maps), expected, rtol=1e-4, atol=1e-4)
    assert [m.kernel_size for m in decoder.project.modules() if isinstance(m, nn.Conv2d)] == [(1, 1)] * 3
    assert [m.kernel_size for m in decoder.fuse.modules() if isinstance(m, nn.Conv2d)] == [(3, 3)] * 3


def test_convolutions_start_kaiming_uniform_with_a_1_and_zero_biases():
    model = small()
    for conv in [m for part in (model.pixel_decoder, model.project)
                 for m in part.modules() if isinstance(m, nn.Conv2d)]:
        bound = math.sqrt(3 / conv.weight[0].numel())
        assert 0.98 * bound < conv.weight.abs().max() <= bound
        assert conv.bias is None or (conv.bias == 0).all()


def test_transformer_matrices_start_xavier_uniform():
    model = small(encoder_layers=1)
    for name, p in [*model.decoder.named_parameters(), *model.encoder.named_parameters()]:
        if p.dim() == 2:
            assert 0.9 * math.sqrt(6 / sum(p.shape)) < p.abs().max() <= math.sqrt(6 / sum(p.shape)), name


# ------------------------------------------------------------------ transformer

@pytest.mark.parametrize("height, width, dim", [(3, 5, 16), (1, 1, 8), (7, 2, 256)])
def test_sine_positions_equal_a_slow_loop(height, width, dim):
    half = dim // 2
    expected = torch.zeros(height * width, dim)
    for y in range(height):
        for x in range(width):
            for start, place, n in ((0, y + 1, height), (half, x + 1, width)):               # y first, then x
                for i in range(half):
                    angle = place / (n + 1e-6) * 2 * math.pi / 10000 ** (2 * (i // 2) / half)
                    expected[y * width + x, start + i] = math.cos(angle) if i % 2 else math.sin(angle)
    torch.testing.assert_close(sine_position(height, width, dim), expected, rtol=1e-4, atol=2e-5)


def slow_attention(module, query, key, value, heads):
    """softmax(q k / sqrt(d)) v, head by head; query [n, D], key and value [m, D]."""
    (wq, wk, wv), (bq, bk, bv) = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = query @ wq.T + bq, key @ wk.T + bk, value @ wv.T + bv
    d = query.shape[-1] // heads
    parts = [(q[:, s] @ k[:, s].T / math.sqrt(d)).softmax(-1) @ v[:, s]
             for s in (slice(i * d, i * d + d) for i in range(heads))]
    return torch.cat(parts, -1) @ module.out_proj.weight.T + module.out_proj.bias


def slow_feed_forward(layer, x):
    x = (x @ layer.linear1.weight.T + layer.linear1.bias).clamp(min=0)
    return x @ layer.linear2.weight.T + layer.linear2.bias


def randomised(layer):
    torch.manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.2)
    return layer.double()


def test_a_decoder_layer_is_self_attention_cross_attention_and_feed_forward_each_then_normalised():
    heads, pixels = 4, 13
    layer = randomised(DecoderLayer(D, heads, 48, 0., batch_first=True))
    x, query_pos = torch.randn(B, Q, D).double(), torch.randn(Q, D).double()
    memory, memory_pos = torch.randn(B, pixels, D).double(), torch.randn(pixels, D).double()
    for b in range(B):
        y = x[b]
        y = layer.norm1(y + slow_attention(layer.self_attn, y + query_pos, y + query_pos, y, heads))
        y = layer.norm2(y + slow_attention(layer.multihead_attn, y + query_pos, memory[b] + memory_pos,
                                           memory[b], heads))
        y = layer.norm3(y + slow_feed_forward(layer, y))
        torch.testing.assert_close(layer(x, query_pos, memory, memory_pos)[b], y)


def test_an_encoder_layer_is_self_attention_and_feed_forward_each_then_normalised():
    heads, pixels = 4, 13
    layer = randomised(EncoderLayer(D, heads, 48, 0., batch_first=True))
    x, pos = torch.randn(B, pixels, D).double(), torch.randn(pixels, D).double()
    for b in range(B):
        y = layer.norm1(x[b] + slow_attention(layer.self_attn, x[b] + pos, x[b] + pos, x[b], heads))
        y = layer.norm2(y + slow_feed_forward(layer, y))
        torch.testing.assert_close(layer(x, pos)[b], y)


def test_dropout_acts_at_every_place_of_detr_in_training_only():
    for kind, lengths in ((DecoderLayer, (Q, 5)), (EncoderLayer, (Q,))):
        layer = kind(D, 4, 48, 0.1, batch_first=True)
        inputs = [x for n in lengths for x in (torch.randn(1, n, D), torch.randn(n, D))]
        dropouts = [m for m in layer.modules() if isinstance(m, nn.Dropout)]
        used = []
        for m in dropouts:
            m.register_forward_hook(lambda module, args, output: used.append(module))
        assert not torch.equal(layer.train()(*inputs), layer(*inputs))
        assert set(used) == set(dropouts) and {m.p for m in dropouts} == {0.1}
        assert {m.dropout for m in layer.modules() if isinstance(m, nn.MultiheadAttention)} == {0.1}
        assert torch.equal(layer.eval()(*inputs), layer(*inputs))


def test_query_contents_start_at_zero_and_every_layers_answer_passes_the_one_shared_norm():
    model, entered, left = small().train(), [], []
    nn.init.normal_(model.decoder.norm.weight), nn.init.normal_(model.decoder.norm.bias)
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        layer.register_forward_hook(lambda module, args, output: left.append(output))
    segment_embed, pixel_embed = model.embed(pictures())
    assert len(left) == L and (entered[0] == 0).all()
    assert all(torch.equal(entered[i + 1], left[i]) for i in range(L - 1))  # the norm is beside the path
    for ours, x in zip(segment_embed, left):
        torch.testing.assert_close(ours,
                                   F.layer_norm(x, (D,), model.decoder.norm.weight, model.decoder.norm.bias))
    assert pixel_embed.shape == (B, D, h, w)


def test_mask_logits_are_mask_embeddings_times_pixel_embeddings():
    model = small().train()
    segment_embed, pixel_embed = model.embed(pictures())
    class_logits, mask_logits = model(pictures())
    mask_embed = model.to_mask(segment_embed)
    for l, b, q in ((0, 1, 3), (2, 0, 6)):
        mask = (mask_embed[l, b, q][:, None, None] * pixel_embed[b]).sum(0)
        torch.testing.assert_close(mask_logits[l, b, q], mask, rtol=1e-4, atol=1e-4)
        classes = model.to_class(segment_embed[l, b, q])
        torch.testing.assert_close(class_logits[l, b, q], classes, rtol=1e-4, atol=1e-4)
    assert [type(m) for m in model.to_mask] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]


def test_what_the_encoder_saw_feeds_both_pixel_decoder_and_queries():
    model = small(encoder_layers=2)
    assert [l.self_attn.embed_dim for l in model.encoder.layers] == [D, D]
    assert model.pixel_decoder.stem[0].weight.shape == (D, D, 3, 3)
    seen = {}
    model.encoder.layers[1].register_forward_hook(lambda m, args, output: seen.update(encoded=output))
    model.pixel_decoder.register_forward_pre_hook(lambda m, args: seen.update(coarsest=args[0][-1]))
    model.decoder.layers[0].register_forward_pre_hook(lambda m, args: seen.update(memory=args[2]))
    model(pictures())
    assert torch.equal(seen["memory"], seen["encoded"])
    assert torch.equal(seen["coarsest"].flatten(2).transpose(1, 2), seen["encoded"])
    assert seen["coarsest"].shape == (B, D, H // 32, W // 32)


@pytest.mark.parametrize("kind, options", [
    (MaskFormer, dict(freeze_bn=False, encoder_layers=1)), (MaskFormer, dict(backbone="convnext_atto")),
    (PerPixelBaseline, dict(freeze_bn=False)), (PerPixelBaselinePlus, dict(freeze_bn=False))])
def test_every_trainable_parameter_gets_a_gradient_that_is_not_zero(kind, options):
    model = small(kind, **options).train()
    for p in model.parameters():  # leave the zeros that some of them start at
        p.data += 0.02 * torch.randn_like(p)
    output = model(pictures())
    sum((x * torch.randn_like(x)).sum()
        for x in (output if isinstance(output, tuple) else (output,))).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # In the first decoder layer all contents are zero: the self-attention's matrices have nothing to act on.
    assert without <= {"decoder.layers.0.self_attn.in_proj_weight"}
    assert all(p.grad is not None for p in model.parameters())


# ------------------------------------------------------------------ sizes of the published models

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
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == count


# ------------------------------------------------------------------ per-pixel baselines

def test_per_pixel_baselines_answer_with_class_scores_per_pixel():
    assert small(PerPixelBaseline).train()(pictures()).shape == (1, B, K, h, w)
    assert small(PerPixelBaselinePlus).train()(pictures()).shape == (L, B, K, h, w)
    assert small(PerPixelBaselinePlus).eval()(pictures()).shape == (1, B, K, h, w)
    assert small(PerPixelBaseline).size_divisibility == small(PerPixelBaselinePlus).size_divisibility == 0
    assert small().size_divisibility == 32


def test_in_per_pixel_baseline_plus_the_kth_querys_mask_is_the_score_of_class_k():
    model = small(PerPixelBaselinePlus).eval()
    scores = model(pictures())
    order = torch.randperm(K)
    model.query_pos.weight.data = model.query_pos.weight.data[order]
    torch.testing.assert_close(model(pictures()), scores[:, :, order], rtol=1e-4, atol=1e-4)
    assert not hasattr(model, "to_class")


# ------------------------------------------------------------------ semantic inference

def test_semantic_inference_equals_plain_loops():
    class_logits, mask_logits = torch.randn(B, Q, K + 1), torch.randn(B, Q, 3, 4)
    scores = semantic_inference(class_logits, mask_logits)
    assert scores.shape == (B, K, 3, 4)
    for b in range(B):
        for c in range(K):
            for y, x in ((0, 0), (2, 1), (1, 3)):
                expected = 0.
                for q in range(Q):
                    prob = math.exp(class_logits[b, q, c]) / sum(map(math.exp, class_logits[b, q].tolist()))
                    expected += prob / (1 + math.exp(-mask_logits[b, q, y, x]))
                assert scores[b, c, y, x].item() == pytest.approx(expected, rel=1e-4)


def test_semantic_inference_never_answers_no_object():
    class_logits = torch.zeros(B, Q, K + 1)
    class_logits[..., K] = 50.
    class_logits[:, 2, 5] = 3.
    scores = semantic_inference(class_logits, torch.randn(B, Q, 3, 4))
    assert scores.shape[1] == K and (scores.argmax(1) == 5).all()


# ------------------------------------------------------------------ panoptic inference

IS_THING = [k >= 6 for k in range(K)]                                    # 0..5 stuff, 6..10 things


def sure_of(*answers, prob=0.95):
    """answers: a class or (class, probability) for each query -> class_logits [Q, K+1]."""
    logits = torch.full((len(answers), K + 1), 0.)
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
    assert (segment_map == 1).all() and [s["category_id"] for s in segments] == [7]


def test_the_area_test_is_on_masks_not_weighted_by_the_score():
    # Query 0 owns 8 of its 10 columns; weighted by its score (0.9 * 0.55) its mask would have no area.
    class_logits, mask_logits = sure_of((7, 0.9), (8, 0.95)), stripes((0, 10), (8, 12))
    mask_logits[0, :, :10] = 0.2                                         # probability 0.55
    segment_map, segments = panoptic_inference(class_logits, mask_logits, IS_THING, overlap_threshold=0.8)
    assert [s["category_id"] for s in segments] == [7, 8]
    assert (segment_map == 1).sum() == 32 and (segment_map == 2).sum() == 16


def test_a_segment_survives_if_its_visible_share_is_not_below_the_threshold():
    class_logits, mask_logits = sure_of((7, 0.9), (8, 0.95)), stripes((0, 10), (8, 12))
    for threshold, kept in ((0.79, [7, 8]), (0.8, [7, 8]), (0.81, [8])):  # 8 of 10 columns are visible
        segment_map, segments = panoptic_inference(class_logits, mask_logits, IS_THING, 0.5, threshold)
        assert [s["category_id"] for s in segments] == kept
        assert (segment_map == 0).sum() == (0 if len(kept) == 2 else 32)
        assert [s["id"] for s in segments] == list(range(1, len(kept) + 1))


def test_masks_are_resized_before_they_become_probabilities():
    torch.manual_seed(0)
    class_logits, mask_logits = sure_of(7, 2, 8, 2), 4 * torch.randn(4, 5, 6)
    resized = F.interpolate(mask_logits[None], size=(19, 23), mode="bilinear", align_corners=False)[0]
    segment_map, segments = panoptic_inference(class_logits, mask_logits, IS_THING, 0.8, 0.1, size=(19, 23))
    expected = panoptic_inference(class_logits, resized, IS_THING, 0.8, 0.1)
    assert torch.equal(segment_map, expected[0]) and segments == expected[1] and len(segments) == 3


def test_all_is_void_where_no_query_is_sure():
    for class_logits in (torch.zeros(Q, K + 1), sure_of(*[K] * Q), sure_of(*[(3, 0.79)] * Q),
                         torch.zeros(0, K + 1)):
        segment_map, segments = panoptic_inference(class_logits, torch.randn(len(class_logits), 4, 6),
                                                   IS_THING)
        assert segments == [] and segment_map.shape == (4, 6) and (segment_map == 0).all()
    segment_map, segments = panoptic_inference(sure_of((3, 0.79)), stripes((0, 12)), IS_THING,
                                               object_threshold=0.78)
    assert len(segments) == 1 and (segment_map == 1).all()


def test_a_class_must_be_surer_than_its_threshold_and_a_mask_of_one_half_has_an_area():
    class_logits = torch.full((1, K + 1), -torch.inf)
    class_logits[0, [7, K]] = 0.                                         # exactly 1/2
    for threshold, kept in ((0.5, []), (0.49, [7])):
        segment_map, segments = panoptic_inference(class_logits, torch.zeros(1, 4, 6), IS_THING, threshold)
        assert [s["category_id"] for s in segments] == kept and (segment_map == len(kept)).all()


def test_a_mask_below_one_half_everywhere_is_no_segment():
    segment_map, segments = panoptic_inference(sure_of(7), torch.full((1, 4, 6), -0.1), IS_THING)
    assert segments == [] and (segment_map == 0).all()


def test_dropped_stuff_gives_no_entry_and_every_entry_has_pixels():
    torch.manual_seed(0)
    for _ in range(50):
        class_logits = 6 * torch.randn(Q, K + 1)
        segment_map, segments = panoptic_inference(class_logits, 4 * torch.randn(Q, 6, 7),
                                                   torch.tensor(IS_THING), 0.3, 0.2)
        ids = [s["id"] for s in segments]
        assert len(set(ids)) == len(ids) and set(segment_map.unique().tolist()) - {0} == set(ids)
        stuff = [s["category_id"] for s in segments if not s["isthing"]]
        assert len(set(stuff)) == len(stuff)
        assert all(s["isthing"] == IS_THING[s["category_id"]] for s in segments)
        assert all(0.3 < s["score"] <= 1 for s in segments)


# ------------------------------------------------------------------ instance inference

def test_instance_masks_may_overlap_and_come_with_falling_scores():
    class_logits = sure_of((7, 0.9), (8, 0.95), (2, 0.99), (K, 0.99))
    masks, labels, scores = instance_inference(class_logits, stripes((0, 10), (4, 12), (0, 12), (0, 12)),
                                               IS_THING, top_k=2)
    assert masks.dtype == torch.bool and masks.shape == (2, 4, 12) and labels.tolist() == [8, 7]
    # times the mask probability inside, nearly 1
    assert scores.tolist() == pytest.approx([0.95, 0.9], abs=2e-3)
    assert (masks[0] & masks[1]).sum() == 4 * 6
    assert masks[1, 0].tolist() == [True] * 10 + [False] * 2


def test_instance_scores_are_class_probability_times_mean_mask_probability_inside():
    class_logits, mask_logits = torch.randn(Q, K + 1), torch.randn(Q, 5, 6)
    masks, labels, scores = instance_inference(class_logits, mask_logits, IS_THING, top_k=10_000)
    assert len(masks) == Q * sum(IS_THING) and (scores[:-1] >= scores[1:]).all()
    prob, expected = class_logits.softmax(-1), []
    for q in range(Q):
        inside = mask_logits[q].sigmoid()[mask_logits[q].sigmoid() > 0.5].mean()
        expected += [(prob[q, c] * inside).item() for c in range(6, K)]
    assert scores.tolist() == pytest.approx(sorted(expected, reverse=True), rel=1e-4)
    assert set(labels.tolist()) == set(range(6, K))


def test_instances_leave_out_empty_masks_and_stuff():
    masks, labels, scores = instance_inference(sure_of(7, 8), stripes((0, 0), (2, 5)), IS_THING)
    assert set(labels.tolist()) == set(range(6, K)) and labels[0] == 8 and masks.flatten(1).any(1).all()
    masks, labels, scores = instance_inference(sure_of(7, 8), stripes((0, 3), (2, 5)), [False] * K)
    assert masks.shape == (0, 4, 12) and labels.shape == scores.shape == (0,)
