"""What is guaranteed of matcher.py and losses.py (Sec. 3.2, Eq. 1)."""
import itertools
import math
import re
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
import matcher
from losses import dice_loss, focal_loss, mask_classification_loss, per_pixel_loss
from maskformer import MaskFormer
from matcher import fixed_match, hungarian_match, pairwise_dice, pairwise_focal

L, B, Q, K = 3, 2, 7, 11
h, w, H, W = 5, 6, 18, 26


def problem(owner=(0, 1, 0, 0, 1), seed=0, queries=Q, images=B, size=(H, W), scale=2.):
    """Random logits and overlapping masks, with `owner` not sorted -> the matcher's five arguments."""
    g = torch.Generator().manual_seed(seed)
    N = len(owner)
    class_logits = scale * torch.randn(L, images, queries, K + 1, generator=g)
    mask_logits = scale * torch.randn(L, images, queries, h, w, generator=g)
    labels = torch.randint(K, (N,), generator=g)
    masks = torch.rand(N, *size, generator=g) > 0.6
    return class_logits, mask_logits, labels, masks, torch.tensor(owner, dtype=torch.long)


def as_set(matches):
    return set(zip(*(v.tolist() for v in matches)))


# ------------------------------------------------------------------ METHOD in float64, as plain loops

def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def slow_focal(logits, mask):
    """Mean over pixels of -alpha_t (1 - p_t)^2 log p_t, alpha 0.25."""
    total = 0.
    for x, t in zip(logits, mask):
        p = sigmoid(x)
        p_t, alpha_t = (p, 0.25) if t else (1 - p, 0.75)
        total -= alpha_t * (1 - p_t) ** 2 * math.log(p_t)
    return total / len(logits)


def slow_dice(logits, mask):
    both = sum(sigmoid(x) for x, t in zip(logits, mask) if t)
    return 1 - (2 * both + 1) / (sum(map(sigmoid, logits)) + sum(map(float, mask)) + 1)


def slow_log_softmax(logits):
    most = max(logits)
    return [x - most - math.log(sum(math.exp(y - most) for y in logits)) for x in logits]


def slow_nearest(mask, height, width):
    big_h, big_w = len(mask), len(mask[0])
    return [mask[y * big_h // height][x * big_w // width] for y in range(height) for x in range(width)]


def slow_bilinear(x, height, width):
    """align_corners=False: pixel centres at half-integers, clamped at the border."""
    def taps(i, small, big):
        at = max((i + 0.5) * small / big - 0.5, 0.)
        low = min(int(at), small - 1)
        return low, min(low + 1, small - 1), at - low
    out = []
    for i in range(height):
        y0, y1, fy = taps(i, len(x), height)
        for j in range(width):
            x0, x1, fx = taps(j, len(x[0]), width)
            out.append((1 - fy) * ((1 - fx) * x[y0][x0] + fx * x[y0][x1])
                       + fy * ((1 - fx) * x[y1][x0] + fx * x[y1][x1]))
    return out


def slow_cost(class_logits, mask_logits, label, mask, class_weight=1., focal_weight=20., dice_weight=1.):
    """One query [K+1], [h, w] against one segment [H, W]."""
    prob = math.exp(slow_log_softmax(class_logits.tolist())[label])
    x, t = mask_logits.flatten().tolist(), slow_nearest(mask.tolist(), *mask_logits.shape)
    return -class_weight * prob + focal_weight * slow_focal(x, t) + dice_weight * slow_dice(x, t)


def slow_costs(class_logits, mask_logits, labels, masks, owner, layer, image, **weights):
    """-> {(query, segment): cost} of one layer and image."""
    return {(q, s): slow_cost(class_logits[layer, image, q], mask_logits[layer, image, q], int(labels[s]),
                              masks[s], **weights)
            for q in range(class_logits.shape[2]) for s in range(len(labels)) if owner[s] == image}


# ------------------------------------------------------------------ matching

@pytest.mark.parametrize("weights", [{}, dict(class_weight=30., focal_weight=3., dice_weight=0.5),
                                     dict(focal_weight=0., dice_weight=9.)])
def test_matching_is_the_cheapest_of_all_assignments(weights):
    targets = problem()
    matches = as_set(hungarian_match(*targets, **weights))
    for layer, image in itertools.product(range(L), range(B)):
        cost = slow_costs(*targets, layer, image, **weights)
        segments = [s for s in range(5) if targets[-1][s] == image]
        best = min(itertools.permutations(range(Q), len(segments)),
                   key=lambda queries: sum(cost[q, s] for q, s in zip(queries, segments)))
        assert set(zip(best, segments)) == {match[2:] for match in matches if match[:2] == (layer, image)}
    assert len(matches) == L * 5


def test_pairwise_costs_equal_plain_loops_in_float64():
    _, mask_logits, _, masks, _ = problem()
    x, t = mask_logits[1].flatten(2), masks[:, :h, :w].flatten(1)        # [B, Q, P], [N, P]
    focal, dice = pairwise_focal(x, t.float()), pairwise_dice(x, t.float())
    assert focal.shape == dice.shape == (B, Q, 5)
    for b, q, s in itertools.product(range(B), range(Q), range(5)):
        assert focal[b, q, s].item() == pytest.approx(slow_focal(x[b, q].tolist(), t[s].tolist()), rel=1e-4)
        assert dice[b, q, s].item() == pytest.approx(slow_dice(x[b, q].tolist(), t[s].tolist()), rel=1e-4)


def test_pairwise_costs_agree_with_losses_on_the_diagonal():
    x, t = 3 * torch.randn(6, 50), (torch.rand(6, 50) > 0.5).float()
    torch.testing.assert_close(pairwise_focal(x, t).diagonal(), focal_loss(x, t))
    torch.testing.assert_close(pairwise_dice(x, t).diagonal(), dice_loss(x, t))


def test_matches_are_four_int64_vectors():
    matches = hungarian_match(*problem())
    assert [v.dtype for v in matches] == [torch.int64] * 4
    assert [v.shape for v in matches] == [(L * 5,)] * 4


def test_permuting_queries_permutes_matches():
    class_logits, mask_logits, *targets = problem()
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])                          # new query i is old query order[i]
    before = as_set(hungarian_match(class_logits, mask_logits, *targets))
    after = as_set(hungarian_match(class_logits[:, :, order], mask_logits[:, :, order], *targets))
    assert {(l, b, int(order[q]), s) for l, b, q, s in after} == before


def test_permuting_segments_permutes_matches():
    class_logits, mask_logits, labels, masks, owner = problem()
    order = torch.tensor([3, 1, 4, 0, 2])
    before = as_set(hungarian_match(class_logits, mask_logits, labels, masks, owner))
    after = as_set(hungarian_match(class_logits, mask_logits, labels[order], masks[order], owner[order]))
    assert {(l, b, q, int(order[s])) for l, b, q, s in after} == before


def test_permuting_images_permutes_matches():
    class_logits, mask_logits, labels, masks, owner = problem()
    before = as_set(hungarian_match(class_logits, mask_logits, labels, masks, owner))
    after = as_set(hungarian_match(class_logits.flip(1), mask_logits.flip(1), labels, masks, 1 - owner))
    assert {(l, 1 - b, q, s) for l, b, q, s in after} == before


def test_all_layers_at_once_equals_layer_by_layer():
    class_logits, mask_logits, *targets = problem()
    one_by_one = {(l, *match[1:]) for l in range(L)
                  for match in as_set(hungarian_match(class_logits[l:l + 1], mask_logits[l:l + 1], *targets))}
    assert as_set(hungarian_match(class_logits, mask_logits, *targets)) == one_by_one


def test_each_segment_is_matched_once_per_layer_and_each_query_at_most_once():
    layer, image, query, segment = hungarian_match(*problem())
    assert sorted(zip(layer.tolist(), segment.tolist())) == list(itertools.product(range(L), range(5)))
    assert len(set(zip(layer.tolist(), image.tolist(), query.tolist()))) == L * 5


def test_an_image_without_segments_has_no_matches():
    layer, image, query, segment = hungarian_match(*problem(owner=(1, 1, 1)))
    assert image.tolist() == [1] * (3 * L)


def test_a_batch_without_segments_has_no_matches():
    assert [v.tolist() for v in hungarian_match(*problem(owner=()))] == [[]] * 4
    assert [v.tolist() for v in fixed_match(*problem(owner=(), queries=K))] == [[]] * 4


def test_more_segments_than_queries_are_matched_as_far_as_queries_go_with_one_warning_naming_the_image():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer, image, query, segment = hungarian_match(*problem(owner=(0,) + (1,) * (Q + 2)))
    assert len(caught) == 1 and "image 1" in str(caught[0].message) and str(Q + 2) in str(caught[0].message)
    for l in range(L):
        mine = (layer == l) & (image == 1)
        assert sorted(query[mine].tolist()) == list(range(Q))
        assert len(set(segment[mine].tolist())) == Q
        assert segment[(layer == l) & (image == 0)].tolist() == [0]


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_costs_stay_finite_at_huge_logits(size):
    class_logits, mask_logits, labels, masks, owner = problem()
    class_logits, mask_logits = class_logits.sign() * size, mask_logits.sign() * size
    # raises if a cost is not finite
    matches = hungarian_match(class_logits, mask_logits, labels, masks, owner)
    assert len(matches[0]) == L * 5
    assert all(term.isfinite()
               for term in mask_classification_loss(class_logits, mask_logits, labels, masks, matches))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_not_finite_raise_floating_point_error(value, which):
    targets = problem()
    targets[which][2, 1, 3].flatten()[0] = value
    with pytest.raises(FloatingPointError):
        hungarian_match(*targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_match_as_the_same_numbers_in_float32_do(dtype):
    class_logits, mask_logits, *targets = problem(scale=0.001)           # close costs, whose order halves lose
    class_logits, mask_logits = class_logits.to(dtype), mask_logits.to(dtype)
    half = hungarian_match(class_logits, mask_logits, *targets)
    assert as_set(half) == as_set(hungarian_match(class_logits.float(), mask_logits.float(), *targets))


def test_autocast_coarsens_neither_costs_nor_losses():
    targets = problem(scale=0.001)  # close costs, whose order bfloat16 loses
    matches = hungarian_match(*targets)
    expected = mask_classification_loss(*targets[:4], matches)
    with torch.autocast("cpu", torch.bfloat16):
        assert as_set(hungarian_match(*targets)) == as_set(matches)
        assert mask_classification_loss(*targets[:4], matches) == expected


def test_matching_builds_no_graph():
    class_logits, mask_logits, *targets = problem()
    matches = hungarian_match(class_logits.requires_grad_(), mask_logits.requires_grad_(), *targets)
    assert not any(v.requires_grad for v in matches)


def test_the_label_of_no_object_is_not_a_segment_label():
    class_logits, mask_logits, labels, masks, owner = problem()
    labels[2] = K
    with pytest.raises((IndexError, ValueError)):
        mask_classification_loss(class_logits, mask_logits, labels, masks,
                                 hungarian_match(class_logits, mask_logits, labels, masks, owner))


def test_fixed_matching_gives_query_k_the_segment_of_class_k():
    class_logits, mask_logits, _, masks, owner = problem(queries=K)      # owner 0 1 0 0 1
    labels = torch.tensor([4, 4, 10, 0, 3])
    matches = fixed_match(class_logits, mask_logits, labels, masks, owner, class_weight=2., focal_weight=3.)
    one_layer = [(0, 4, 0), (1, 4, 1), (0, 10, 2), (0, 0, 3), (1, 3, 4)]             # image, query, segment
    assert as_set(matches) == {(l, *match) for l in range(L) for match in one_layer}


def test_fixed_matching_refuses_instances_and_other_query_counts():
    class_logits, mask_logits, _, masks, owner = problem(queries=K)
    with pytest.raises(ValueError, match="same class"):
        fixed_match(class_logits, mask_logits, torch.tensor([4, 1, 2, 4, 3]), masks, owner)
    with pytest.raises(ValueError, match="7 queries and 11 classes"):
        fixed_match(*problem())


# ------------------------------------------------------------------ losses

def slow_losses(class_logits, mask_logits, labels, masks, matches, num_segments):
    """Eq. (1) layer by layer: weighted mean of CE; focal and dice of pairs over the number of segments."""
    label_of = {match[:3]: int(labels[match[3]]) for match in as_set(matches)}
    ce = focal = dice = 0.
    for l in range(len(class_logits)):
        total = weights = 0.
        for b, q in itertools.product(range(class_logits.shape[1]), range(class_logits.shape[2])):
            label = label_of.get((l, b, q), K)
            weight = 0.1 if label == K else 1.
            total -= weight * slow_log_softmax(class_logits[l, b, q].tolist())[label]
            weights += weight
        ce += total / weights
    for l, b, q, s in as_set(matches):
        x, t = slow_bilinear(mask_logits[l, b, q].tolist(), *masks.shape[1:]), masks[s].flatten().tolist()
        focal += slow_focal(x, t) / max(num_segments, 1)
        dice += slow_dice(x, t) / max(num_segments, 1)
    return ce, focal, dice


@pytest.mark.parametrize("owner", [(0, 1, 0, 0, 1), (1,), ()])
@pytest.mark.parametrize("size", [(H, W), (20, 24)])
def test_losses_equal_plain_loops_in_float64(owner, size):
    targets = problem(owner, size=size)
    matches = hungarian_match(*targets)
    ours = mask_classification_loss(*targets[:4], matches)
    for mine, slow in zip(ours, slow_losses(*targets[:4], matches, len(owner))):
        assert mine.item() == pytest.approx(slow, rel=2e-5, abs=1e-7)


def test_losses_of_all_layers_are_the_sum_of_single_layers():
    class_logits, mask_logits, labels, masks, owner = problem()
    layer, *rest = matches = hungarian_match(class_logits, mask_logits, labels, masks, owner)
    at_once = torch.stack(mask_classification_loss(class_logits, mask_logits, labels, masks, matches))
    singles = 0
    for l in range(L):
        mine = layer == l
        part = (layer[mine] * 0, *(v[mine] for v in rest))
        singles = singles + torch.stack(mask_classification_loss(
            class_logits[l:l + 1], mask_logits[l:l + 1], labels, masks, part))
    torch.testing.assert_close(at_once, singles)


def tiny_model(**options):
    torch.manual_seed(0)
    options = dict(backbone="resnet18", pretrained=False, freeze_bn=True, num_queries=Q, dim=32,
                   decoder_layers=L, heads=4, ffn_dim=48, dropout=0.) | options
    return MaskFormer(K, **options)


def test_classification_loss_starts_at_about_ln_of_k_plus_one_per_layer():
    outputs = tiny_model()(torch.randint(256, (B, 3, 64, 96), dtype=torch.uint8))
    _, _, labels, masks, owner = problem(size=(64, 96))
    ce, _, _ = mask_classification_loss(*outputs, labels, masks,
                                        hungarian_match(*outputs, labels, masks, owner))
    assert ce.item() / L == pytest.approx(math.log(K + 1), abs=0.5)
    equal = torch.zeros_like(outputs[0])
    ce, _, _ = mask_classification_loss(equal, outputs[1], labels, masks,
                                        hungarian_match(equal, outputs[1], labels, masks, owner))
    assert ce.item() == pytest.approx(L * math.log(K + 1), rel=1e-5)


def total_loss(outputs, labels, masks, owner, num_segments=None):
    matches = hungarian_match(*outputs, labels, masks, owner)
    ce, focal, dice = mask_classification_loss(*outputs, labels, masks, matches, num_segments)
    return ce + 20 * focal + dice


@pytest.mark.parametrize("owner", [(), (1, 0, 1)])
def test_every_parameter_gets_a_finite_gradient_even_without_segments(owner):
    model = tiny_model(freeze_bn=False, encoder_layers=1).train()
    _, _, labels, masks, owner = problem(owner, size=(64, 96))
    loss = total_loss(model(torch.randint(256, (B, 3, 64, 96), dtype=torch.uint8)), labels, masks, owner)
    loss.backward()
    assert loss.isfinite()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_gradients_do_not_depend_on_how_a_batch_is_split_over_processes():
    model = tiny_model().train()
    images = torch.randint(256, (4, 3, 64, 96), dtype=torch.uint8)
    # 5, 0 | 1, 2 segments
    _, _, labels, masks, owner = problem((3, 0, 0, 3, 0, 2, 0, 0), size=(64, 96), images=4)

    def gradients(first, last, num_segments):
        mine = (owner >= first) & (owner < last)
        model.zero_grad()
        total_loss(model(images[first:last]), labels[mine], masks[mine], owner[mine] - first,
                   num_segments).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    one_process = gradients(0, 4, None)
    two_processes = (gradients(0, 2, torch.tensor(4.)) + gradients(2, 4, torch.tensor(4.))) / 2
    assert (one_process - two_processes).norm() < 1e-5 * one_process.norm()
    own_counts = (gradients(0, 2, None) + gradients(2, 4, None)) / 2
    assert (one_process - own_counts).norm() > 1e-2 * one_process.norm()  # the averaged count is what does it


def test_fewer_than_one_segment_per_process_counts_as_one():
    targets = problem(owner=(1,))
    matches = hungarian_match(*targets)
    _, focal, dice = mask_classification_loss(*targets[:4], matches, num_segments=torch.tensor(0.5))
    _, focal_of_one, dice_of_one = mask_classification_loss(*targets[:4], matches)
    assert (focal, dice) == (focal_of_one, dice_of_one)


def loss_and_gradients(pixels_at_once, monkeypatch):
    monkeypatch.setattr(losses, "ELEMENTS_AT_ONCE", (pixels_at_once, None))
    class_logits, mask_logits, *targets = problem()
    class_logits.requires_grad_(), mask_logits.requires_grad_()
    loss = total_loss((class_logits, mask_logits), *targets)
    loss.backward()
    return loss.detach(), class_logits.grad, mask_logits.grad


@pytest.mark.parametrize("pixels_at_once", [1, 4 * H * W])
def test_chunked_losses_and_gradients_equal_direct_ones(pixels_at_once, monkeypatch):
    direct = loss_and_gradients(2 ** 24, monkeypatch)
    torch.testing.assert_close(loss_and_gradients(pixels_at_once, monkeypatch), direct)
    assert direct[2].abs().sum() > 0


def test_only_matched_queries_get_a_mask_gradient():
    class_logits, mask_logits, labels, masks, owner = problem()
    matches = hungarian_match(class_logits, mask_logits, labels, masks, owner)
    _, focal, dice = mask_classification_loss(class_logits, mask_logits.requires_grad_(), labels, masks,
                                              matches)
    (focal + dice).backward()
    touched = mask_logits.grad.abs().sum((-2, -1)) > 0                   # [L, B, Q]
    assert {tuple(i) for i in touched.nonzero().tolist()} == {match[:3] for match in as_set(matches)}


class Kept:
    """A tensor that autograd saved, for as long as autograd keeps it."""
    alive = weakref.WeakSet()

    def __init__(self, x):
        self.tensor = x.detach()                                         # no circle with its own node
        Kept.alive.add(self)


def bytes_kept_for_backward(queries):
    """Of the mask terms; what is freed before they are returned does not count."""
    _, mask_logits, labels, masks, _ = problem(queries=queries, size=(64, 64))
    matches = tuple(torch.arange(5) * 0 for _ in range(2)) + (torch.arange(5), torch.arange(5))
    mask_logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        result = losses.mask_terms(mask_logits, masks, matches)
    assert all(x.requires_grad for x in result)
    kept = {x.tensor.data_ptr(): x.tensor.untyped_storage().nbytes() for x in Kept.alive}
    assert kept
    return sum(kept.values())


def test_memory_kept_for_the_backward_pass_grows_neither_with_queries_nor_with_upsampled_masks():
    few, many = bytes_kept_for_backward(Q), bytes_kept_for_backward(40 * Q)
    assert many == few
    assert few < 64 * 64 * 4  # five upsampled masks would be five times this many bytes


@pytest.mark.parametrize("size", [(4 * h, 4 * w), (H, W), (h, w), (3, 2)])
def test_masks_are_upsampled_bilinearly_to_any_size(size):
    x = torch.randn(4, h, w)
    rows, columns = (losses.linear_upsampling(n, to, "cpu") for n, to in zip((h, w), size))
    expected = F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(rows @ x @ columns.T, expected)


def test_gradients_of_the_mask_terms_are_those_of_autograd_through_all_masks_at_once():
    _, mask_logits, _, masks, _ = targets = problem()
    layer, image, query, segment = matches = hungarian_match(*targets)
    mask_logits.requires_grad_()
    x = F.interpolate(mask_logits[layer, image, query][None], size=(H, W), mode="bilinear")[0].flatten(1)
    t = masks[segment].flatten(1).float()
    for weights in ((1, 0), (0, 1), (20, 3)):
        ours = sum(c * term for c, term in zip(weights, losses.mask_terms(mask_logits, masks, matches)))
        direct = weights[0] * focal_loss(x, t).sum() + weights[1] * dice_loss(x, t).sum()
        torch.testing.assert_close(ours, direct)
        torch.testing.assert_close(torch.autograd.grad(ours, mask_logits),
                                   torch.autograd.grad(direct, mask_logits, retain_graph=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_need_no_gradient_mode(mode):
    class_logits, mask_logits, *targets = problem()
    matches = hungarian_match(class_logits, mask_logits, *targets)
    expected = mask_classification_loss(class_logits, mask_logits.requires_grad_(), *targets[:2], matches)
    pixel_logits, label_map = torch.randn(L, B, K, h, w), torch.randint(K, (B, 4 * h, 4 * w))
    pixel_logits.requires_grad_()
    expected_ce = per_pixel_loss(pixel_logits, label_map)
    with mode():
        assert mask_classification_loss(class_logits, mask_logits, *targets[:2], matches) == expected
        assert per_pixel_loss(pixel_logits, label_map) == expected_ce


def test_labels_may_have_any_integer_type():
    *logits, labels, masks, owner = problem()
    matches = hungarian_match(*logits, labels, masks, owner)
    expected = mask_classification_loss(*logits, labels, masks, matches)
    for dtype in (torch.uint8, torch.int16, torch.int32):                # uint8 as an index would be a mask
        assert all(map(torch.equal, hungarian_match(*logits, labels.to(dtype), masks, owner), matches))
        assert mask_classification_loss(*logits, labels.to(dtype), masks, matches) == expected


def test_no_weight_at_all_is_no_loss_and_not_nan():
    class_logits, mask_logits, *targets = problem(owner=())
    matches = hungarian_match(class_logits, mask_logits, *targets)
    losses = mask_classification_loss(class_logits, mask_logits, *targets[:2], matches, no_object_weight=0)
    assert losses == (0, 0, 0)


def test_pixels_of_no_segment_are_background_of_every_mask():
    _, mask_logits, labels, masks, owner = problem(size=(4 * h, 4 * w))
    masks[..., :8] = False                                               # void or padding: in no segment
    class_logits = torch.zeros(L, B, Q, K + 1)
    matches = hungarian_match(class_logits, mask_logits, labels, masks, owner)
    _, focal, dice = mask_classification_loss(class_logits, mask_logits.requires_grad_(), labels, masks,
                                              matches)
    layer, image, query, _ = matches
    focal_gradient, = torch.autograd.grad(focal, mask_logits, retain_graph=True)
    dice_gradient, = torch.autograd.grad(dice, mask_logits)
    for gradient in (focal_gradient, dice_gradient):                     # pushes masks away from there
        assert (gradient[layer, image, query][..., 0] > 0).all()


def test_no_object_weight_is_the_weight_of_unmatched_queries():
    targets = problem()
    matches = hungarian_match(*targets)
    wanted = torch.full((L, B, Q), K)
    wanted[matches[:3]] = targets[2][matches[3]]
    for weight in (0.1, 0.7):
        ce, _, _ = mask_classification_loss(*targets[:4], matches, no_object_weight=weight)
        weights = torch.tensor([1.] * K + [weight])
        mean = sum(F.cross_entropy(x.flatten(0, 1), y.flatten(), weights) for x, y in zip(targets[0], wanted))
        torch.testing.assert_close(ce, mean)


# ------------------------------------------------------------------ the per-pixel baselines' loss

def test_per_pixel_loss_equals_plain_loops():
    g = torch.Generator().manual_seed(0)
    logits, height, width = torch.randn(L, B, K, h, w, generator=g), 4 * h - 3, 4 * w - 1
    label_map = torch.randint(K, (B, height, width), generator=g)
    label_map[torch.rand(label_map.shape, generator=g) < 0.3] = 255
    expected = 0.
    for l in range(L):
        total, pixels = 0., 0
        for b in range(B):
            big = np.array([slow_bilinear(x, 4 * h, 4 * w) for x in logits[l, b].tolist()])
            big = big.reshape(K, 4 * h, 4 * w)
            for y, x in itertools.product(range(height), range(width)):
                if label_map[b, y, x] != 255:
                    total -= slow_log_softmax(big[:, y, x].tolist())[label_map[b, y, x]]
                    pixels += 1
        expected += total / pixels
    assert per_pixel_loss(logits, label_map).item() == pytest.approx(expected, rel=1e-5)


def test_per_pixel_loss_of_void_alone_is_zero_with_zero_gradients():
    logits = torch.randn(L, B, K, h, w, requires_grad=True)
    loss = per_pixel_loss(logits, torch.full((B, 4 * h, 4 * w), 255))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_per_pixel_loss_of_a_split_batch_averages_to_that_of_the_whole():
    logits, label_map = torch.randn(L, B, K, h, w), torch.randint(K, (B, 4 * h, 4 * w))
    label_map[0, :13] = 255
    pixels = (label_map != 255).sum() / 2
    halves = [per_pixel_loss(logits[:, b:b + 1], label_map[b:b + 1], num_pixels=pixels) for b in range(2)]
    torch.testing.assert_close(sum(halves) / 2, per_pixel_loss(logits, label_map))


@pytest.mark.parametrize("label", [K, 254, -1])
def test_per_pixel_loss_raises_on_a_label_out_of_range(label):
    label_map = torch.zeros(B, 4 * h, 4 * w, dtype=torch.long)
    label_map[1, 3, 2] = label
    with pytest.raises((IndexError, ValueError)):
        per_pixel_loss(torch.randn(L, B, K, h, w), label_map)


@pytest.mark.parametrize("elements_at_once", [1, 2 * K * H * W, 2 ** 24])
def test_gradients_of_the_per_pixel_loss_are_those_of_autograd_through_full_size_scores(elements_at_once,
                                                                                       monkeypatch):
    monkeypatch.setattr(losses, "ELEMENTS_AT_ONCE", (elements_at_once, None))
    logits, label_map = torch.randn(L, B, K, h, w, requires_grad=True), torch.randint(K, (B, 4 * h - 1, 4 * w - 2))
    label_map[0, :5] = 255
    scores = F.interpolate(logits.flatten(0, 1), scale_factor=4, mode="bilinear")[..., :-1, :-2]
    direct = L * F.cross_entropy(scores, label_map.repeat(L, 1, 1), ignore_index=255)
    ours = per_pixel_loss(logits, label_map)
    torch.testing.assert_close(ours, direct)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(direct, logits))


def test_the_per_pixel_loss_keeps_no_upsampled_scores_for_the_backward_pass():
    logits, label_map = torch.randn(L, B, K, 16, 16, requires_grad=True), torch.randint(K, (B, 64, 64))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        loss = per_pixel_loss(logits, label_map)
    kept = {x.tensor.data_ptr(): x.tensor.untyped_storage().nbytes() for x in Kept.alive}
    assert loss.requires_grad and 0 < sum(kept.values()) < B * K * 64 * 64 * 4 / 2


def test_per_pixel_loss_takes_another_void():
    logits, label_map = torch.randn(1, B, K, h, w), torch.randint(K, (B, 4 * h, 4 * w))
    label_map[:, :5] = 65535
    torch.testing.assert_close(per_pixel_loss(logits, label_map, void=65535),
                               per_pixel_loss(logits, torch.where(label_map == 65535, 255, label_map)))


def test_the_calls_in_the_docstrings_run():
    inputs = zip(["class_logits", "mask_logits", "labels", "masks", "owner"], problem())
    names = vars(matcher) | vars(losses) | dict(inputs)
    for module in (matcher, losses):
        example = "\n".join(line.strip() for line in module.__doc__.split("\n") if re.match(r" {4}\S", line))
        exec(example, names)
        names["matches"] = tuple(names[name] for name in ("layer", "image", "query", "segment"))
    assert len(names["segment"]) == L * 5 and names["loss"].isfinite()
