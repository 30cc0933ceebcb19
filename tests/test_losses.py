"""What is guaranteed of losses.py (Eq. 1, Sec. 3.1 to 3.3)."""
import itertools
import math
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (dice_loss, focal_loss, mask_classification_loss, mask_terms, per_pixel_loss,
                    upsample)
from maskformer import MaskFormer
from matcher import hungarian_match

L, B, Q, K = 3, 2, 7, 11
h, w, H, W = 5, 6, 18, 26


def problem(owner=(0, 1, 0, 0, 1), queries=Q, images=B, size=(H, W), scale=2.):
    """Random logits and overlapping masks -> the five arguments of `hungarian_match`.

    owner: the image of each segment; not sorted
    scale: standard deviation of the logits
    """
    generator = torch.Generator().manual_seed(0)
    N = len(owner)
    class_logits = scale * torch.randn(L, images, queries, K + 1, generator=generator)
    mask_logits = scale * torch.randn(L, images, queries, h, w, generator=generator)
    labels = torch.randint(K, (N,), generator=generator)
    masks = torch.rand(N, *size, generator=generator) > 0.6
    return class_logits, mask_logits, labels, masks, torch.tensor(owner, dtype=torch.long)


def as_set(matches):
    return set(zip(*(vector.tolist() for vector in matches)))


def total_loss(outputs, labels, masks, owner, num_segments=None):
    matches = hungarian_match(*outputs, labels, masks, owner)
    ce, focal, dice = mask_classification_loss(*outputs, labels, masks, matches, num_segments)
    return ce + 20 * focal + dice


# ------------------------------------------------------------ the method in float64, as plain loops
def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def slow_focal(logits, mask):
    """Mean over pixels of -alpha_t (1 - p_t)^2 log p_t, alpha 0.25."""
    total = 0.
    for x, inside in zip(logits, mask):
        p = sigmoid(x)
        p_t, alpha_t = (p, 0.25) if inside else (1 - p, 0.75)
        total -= alpha_t * (1 - p_t) ** 2 * math.log(p_t)
    return total / len(logits)


def slow_dice(logits, mask):
    overlap = sum(sigmoid(x) for x, inside in zip(logits, mask) if inside)
    return 1 - (2 * overlap + 1) / (sum(map(sigmoid, logits)) + sum(map(float, mask)) + 1)


def slow_log_softmax(logits):
    most = max(logits)
    total = sum(math.exp(x - most) for x in logits)
    return [x - most - math.log(total) for x in logits]


def slow_bilinear(x, height, width):
    """align_corners=False: pixel centers at half-integers, clamped at the border."""
    def taps(i, small, large):
        at = max((i + 0.5) * small / large - 0.5, 0.)
        low = min(int(at), small - 1)
        return low, min(low + 1, small - 1), at - low

    out = []
    for i in range(height):
        top, bottom, down = taps(i, len(x), height)
        for j in range(width):
            left, right, across = taps(j, len(x[0]), width)
            above = (1 - across) * x[top][left] + across * x[top][right]
            below = (1 - across) * x[bottom][left] + across * x[bottom][right]
            out.append((1 - down) * above + down * below)
    return out


def slow_losses(class_logits, mask_logits, labels, masks, matches, num_segments):
    """Eq. (1) layer by layer: weighted mean of CE; focal and dice of pairs over segments."""
    label_of = {match[:3]: int(labels[match[3]]) for match in as_set(matches)}
    num_layers, num_images, num_queries = class_logits.shape[:3]
    ce = focal = dice = 0.
    for l in range(num_layers):
        total = weights = 0.
        for b, q in itertools.product(range(num_images), range(num_queries)):
            label = label_of.get((l, b, q), K)
            weight = 0.1 if label == K else 1.
            total -= weight * slow_log_softmax(class_logits[l, b, q].tolist())[label]
            weights += weight
        ce += total / weights
    for l, b, q, s in as_set(matches):
        x = slow_bilinear(mask_logits[l, b, q].tolist(), *masks.shape[1:])
        t = masks[s].flatten().tolist()
        focal += slow_focal(x, t) / max(num_segments, 1)
        dice += slow_dice(x, t) / max(num_segments, 1)
    return ce, focal, dice


# ------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("owner", [(0, 1, 0, 0, 1), (1,), ()])
@pytest.mark.parametrize("size", [(H, W), (20, 24)])
def test_losses_equal_plain_loops_in_float64(owner, size):
    targets = problem(owner, size=size)
    matches = hungarian_match(*targets)
    ours = mask_classification_loss(*targets[:4], matches)
    for mine, slow in zip(ours, slow_losses(*targets[:4], matches, len(owner))):
        assert mine.item() == pytest.approx(slow, rel=2e-5, abs=1e-7)


def test_focal_and_dice_loss_equal_plain_loops_in_float64():
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(6, 50, generator=generator)
    t = (torch.rand(6, 50, generator=generator) > 0.5).float()
    focal, dice = focal_loss(x, t), dice_loss(x, t)
    assert focal.shape == dice.shape == (6,)
    for i in range(6):
        assert focal[i].item() == pytest.approx(slow_focal(x[i].tolist(), t[i].tolist()), rel=1e-5)
        assert dice[i].item() == pytest.approx(slow_dice(x[i].tolist(), t[i].tolist()), rel=1e-5)


def test_losses_of_all_layers_are_the_sum_of_single_layers():
    class_logits, mask_logits, labels, masks, owner = targets = problem()
    layer, *rest = matches = hungarian_match(*targets)
    at_once = mask_classification_loss(class_logits, mask_logits, labels, masks, matches)
    singles = torch.zeros(3)
    for l in range(L):
        mine = layer == l
        of_layer = layer[mine] * 0, *(vector[mine] for vector in rest)
        singles += torch.stack(mask_classification_loss(
            class_logits[l:l + 1], mask_logits[l:l + 1], labels, masks, of_layer))
    torch.testing.assert_close(torch.stack(at_once), singles)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_losses_stay_finite_at_huge_logits(size):
    class_logits, mask_logits, *targets = problem()
    class_logits, mask_logits = class_logits.sign() * size, mask_logits.sign() * size
    matches = hungarian_match(class_logits, mask_logits, *targets)
    terms = mask_classification_loss(class_logits, mask_logits, *targets[:2], matches)
    assert all(term.isfinite() for term in terms)


def tiny_model(**options):
    torch.manual_seed(0)
    defaults = {"backbone": "test_resnet", "pretrained": False, "freeze_bn": True,
                "num_queries": Q, "dim": 32, "decoder_layers": L, "heads": 4, "ffn_dim": 48,
                "dropout": 0.}
    return MaskFormer(K, **defaults | options).train()


def pictures(number=B):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (number, 3, 64, 96), dtype=torch.uint8, generator=generator)


def test_classification_loss_starts_at_about_ln_of_k_plus_one_per_layer():
    class_logits, mask_logits = tiny_model()(pictures())
    _, _, labels, masks, owner = problem(size=(64, 96))
    for logits, tolerance in ((class_logits, 0.5), (torch.zeros_like(class_logits), 1e-5)):
        matches = hungarian_match(logits, mask_logits, labels, masks, owner)
        ce, _, _ = mask_classification_loss(logits, mask_logits, labels, masks, matches)
        assert ce.item() / L == pytest.approx(math.log(K + 1), abs=tolerance)


def test_no_object_weight_is_the_weight_of_unmatched_queries():
    targets = problem()
    matches = hungarian_match(*targets)
    wanted = torch.full((L, B, Q), K)
    wanted[matches[:3]] = targets[2][matches[3]]
    for weight in (0.1, 0.7):
        ce, _, _ = mask_classification_loss(*targets[:4], matches, no_object_weight=weight)
        weights = torch.tensor([1.] * K + [weight])
        means = [F.cross_entropy(logits.flatten(0, 1), target.flatten(), weights)
                 for logits, target in zip(targets[0], wanted)]
        torch.testing.assert_close(ce, sum(means))


def test_no_weight_at_all_is_no_loss_and_not_nan():
    targets = problem(owner=())
    matches = hungarian_match(*targets)
    assert mask_classification_loss(*targets[:4], matches, no_object_weight=0) == (0, 0, 0)


def test_fewer_than_one_segment_per_process_counts_as_one():
    targets = problem(owner=(1,))
    matches = hungarian_match(*targets)
    few = mask_classification_loss(*targets[:4], matches, num_segments=torch.tensor(0.5))
    one = mask_classification_loss(*targets[:4], matches)
    assert few[1:] == one[1:]


def test_pixels_of_no_segment_are_background_of_every_mask():
    _, mask_logits, labels, masks, owner = problem(size=(4 * h, 4 * w))
    masks[..., :8] = False                                           # void, or padding
    class_logits = torch.zeros(L, B, Q, K + 1)
    matches = hungarian_match(class_logits, mask_logits, labels, masks, owner)
    mask_logits.requires_grad_()
    _, focal, dice = mask_classification_loss(class_logits, mask_logits, labels, masks, matches)
    layer, image, query, _ = matches
    for term in (focal, dice):                                       # each pushes masks away
        gradient, = torch.autograd.grad(term, mask_logits, retain_graph=True)
        assert (gradient[layer, image, query][..., 0] > 0).all()


def test_labels_may_have_any_integer_type():
    class_logits, mask_logits, labels, masks, owner = targets = problem()
    matches = hungarian_match(*targets)
    expected = mask_classification_loss(class_logits, mask_logits, labels, masks, matches)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        terms = mask_classification_loss(class_logits, mask_logits, labels.to(dtype), masks,
                                         matches)
        assert terms == expected


@pytest.mark.parametrize("label", [-1, K + 1])
def test_a_label_out_of_range_raises(label):
    targets = problem()
    matches = hungarian_match(*targets)
    targets[2][2] = label
    with pytest.raises(IndexError):
        mask_classification_loss(*targets[:4], matches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_coarsen_losses(dtype):
    targets = problem(scale=0.001)                   # close values, which half precision merges
    matches = hungarian_match(*targets)
    pixel_logits, label_map = targets[1].repeat(1, 1, 2, 1, 1), torch.randint(K, (B, 4 * h, 4 * w))
    expected = mask_classification_loss(*targets[:4], matches)
    expected_ce = per_pixel_loss(pixel_logits, label_map)
    with torch.autocast("cpu", dtype):
        assert mask_classification_loss(*targets[:4], matches) == expected
        assert per_pixel_loss(pixel_logits, label_map) == expected_ce


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_logits_are_those_of_the_same_numbers_in_float32(dtype):
    class_logits, mask_logits, *targets = problem()
    class_logits, mask_logits = class_logits.to(dtype), mask_logits.to(dtype)
    matches = hungarian_match(class_logits, mask_logits, *targets)
    half = mask_classification_loss(class_logits, mask_logits, *targets[:2], matches)
    single = mask_classification_loss(class_logits.float(), mask_logits.float(), *targets[:2],
                                      matches)
    assert half == single and all(term.dtype == torch.float32 for term in half)


def test_the_mask_terms_may_come_from_another_function():
    targets = problem()
    matches = hungarian_match(*targets)
    asked = []

    def compiled(mask_logits, masks, segment):
        asked.append(segment)
        return 2 * mask_terms(mask_logits, masks, segment)

    ce, focal, dice = mask_classification_loss(*targets[:4], matches)
    doubled = mask_classification_loss(*targets[:4], matches, terms_function=compiled)
    assert doubled == (ce, 2 * focal, 2 * dice)
    assert torch.equal(torch.cat(asked), matches[3])


# --------------------------------------------------------------------------------------- upsampling
@pytest.mark.parametrize("size", [(4 * h, 4 * w), (H, W), (h, w), (3, 2)])
def test_masks_are_upsampled_bilinearly_to_any_size(size):
    x = torch.randn(4, h, w, requires_grad=True)
    expected = F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]
    ours = upsample(x, size)
    torch.testing.assert_close(ours, expected)
    weights = torch.randn(4, *size)
    torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), x),
                               torch.autograd.grad((expected * weights).sum(), x))
    torch.testing.assert_close(upsample(x[None], size)[0], expected)


# ---------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("owner", [(), (1, 0, 1)])
def test_every_parameter_gets_a_finite_gradient_even_without_segments(owner):
    model = tiny_model(freeze_bn=False, encoder_layers=1)
    _, _, labels, masks, owner = problem(owner, size=(64, 96))
    loss = total_loss(model(pictures()), labels, masks, owner)
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_gradients_do_not_depend_on_how_a_batch_is_split_over_processes():
    model, images = tiny_model(), pictures(4)
    # 5 and 0 segments in the first two images, 1 and 2 in the others
    _, _, labels, masks, owner = problem((3, 0, 0, 3, 0, 2, 0, 0), size=(64, 96), images=4)

    def gradients(first, last, num_segments):
        mine = (owner >= first) & (owner < last)
        model.zero_grad()
        total_loss(model(images[first:last]), labels[mine], masks[mine], owner[mine] - first,
                   num_segments).backward()
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.cat([parameter.grad.flatten() for parameter in learned])

    one_process = gradients(0, 4, None)
    average = torch.tensor(4.)
    two_processes = (gradients(0, 2, average) + gradients(2, 4, average)) / 2
    assert (one_process - two_processes).norm() < 1e-5 * one_process.norm()
    own_counts = (gradients(0, 2, None) + gradients(2, 4, None)) / 2
    assert (one_process - own_counts).norm() > 1e-2 * one_process.norm()


def test_only_matched_queries_get_a_mask_gradient():
    class_logits, mask_logits, labels, masks, owner = targets = problem()
    matches = hungarian_match(*targets)
    mask_logits.requires_grad_()
    _, focal, dice = mask_classification_loss(class_logits, mask_logits, labels, masks, matches)
    (focal + dice).backward()
    touched = mask_logits.grad.abs().sum((-2, -1)).nonzero()         # layer, image, query
    assert {tuple(index) for index in touched.tolist()} == {m[:3] for m in as_set(matches)}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("at_once", [1, 2 ** 21])                    # many parts, and one
def test_losses_need_no_gradient_mode(mode, at_once, monkeypatch):
    monkeypatch.setattr(losses, "AT_ONCE_CPU", at_once)
    targets = problem()
    matches = hungarian_match(*targets)
    targets[1].requires_grad_()
    expected = mask_classification_loss(*targets[:4], matches)
    label_map = torch.randint(K, (B, 4 * h, 4 * w))
    pixel_logits = torch.randn(L, B, K, h, w, requires_grad=True)
    expected_ce = per_pixel_loss(pixel_logits, label_map)
    with mode():
        assert mask_classification_loss(*targets[:4], matches) == expected
        assert per_pixel_loss(pixel_logits, label_map) == expected_ce


def test_gradients_of_the_mask_terms_are_those_through_all_masks_at_once():
    _, mask_logits, _, masks, _ = targets = problem()
    layer, image, query, segment = hungarian_match(*targets)
    matched = mask_logits[layer, image, query].requires_grad_()      # [M, h, w]
    x = F.interpolate(matched[None], size=(H, W), mode="bilinear")[0].flatten(1)
    t = masks[segment].flatten(1).float()
    direct = torch.stack([focal_loss(x, t).sum(), dice_loss(x, t).sum()])
    ours = mask_terms(matched, masks, segment)
    torch.testing.assert_close(ours, direct)
    for weights in ((1, 0), (0, 1), (20, 3)):
        weights = torch.tensor(weights)
        gradients = [torch.autograd.grad((terms * weights).sum(), matched, retain_graph=True)
                     for terms in (ours, direct)]
        torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------------------------ parts, memory
def loss_and_gradients(at_once, monkeypatch):
    monkeypatch.setattr(losses, "AT_ONCE_CPU", at_once)
    class_logits, mask_logits, *targets = problem()
    class_logits.requires_grad_(), mask_logits.requires_grad_()
    loss = total_loss((class_logits, mask_logits), *targets)
    loss.backward()
    return loss.detach(), class_logits.grad, mask_logits.grad


@pytest.mark.parametrize("at_once", [1, 4 * H * W])                  # one mask a part, and four
def test_losses_and_gradients_of_parts_equal_those_of_one_part(at_once, monkeypatch):
    whole = loss_and_gradients(2 ** 24, monkeypatch)
    torch.testing.assert_close(loss_and_gradients(at_once, monkeypatch), whole)
    assert whole[2].abs().sum() > 0


def test_parts_are_no_larger_than_they_may_be_and_one_part_is_computed_once(monkeypatch):
    _, mask_logits, labels, masks, _ = targets = problem()
    matches = hungarian_match(*targets)
    mask_logits.requires_grad_()
    sizes = []

    def watched(mask_logits, masks, segment):
        sizes.append(len(segment))
        return mask_terms(mask_logits, masks, segment)

    for at_once, forward, again in ((4 * H * W, [4, 4, 4, 3], 4), (15 * H * W, [15], 0)):
        monkeypatch.setattr(losses, "AT_ONCE_CPU", at_once)
        sizes.clear()
        _, focal, dice = mask_classification_loss(*targets[:4], matches, terms_function=watched)
        assert sizes == forward
        (focal + dice).backward()
        assert len(sizes) == len(forward) + again                    # in the backward pass


class Kept:
    """A tensor that autograd saved, for as long as autograd keeps it."""
    alive = weakref.WeakSet()

    def __init__(self, x):
        self.tensor = x.detach()                                     # no circle with its own node
        Kept.alive.add(self)


def bytes_kept_for_backward(loss, *arguments):
    """What autograd keeps when a loss is computed; what is freed on the way does not count."""
    Kept.alive.clear()
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        result = loss(*arguments)
    storages = [kept.tensor.untyped_storage() for kept in Kept.alive]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert result.requires_grad and sizes
    return sum(sizes.values())


def mask_loss_bytes(queries):
    _, mask_logits, labels, masks, _ = problem(queries=queries, size=(64, 64))
    class_logits = torch.zeros(L, B, queries, K + 1)
    matches = (torch.arange(5) * 0, torch.arange(5) * 0, torch.arange(5), torch.arange(5))
    mask_logits.requires_grad_()

    def mask_loss():
        _, focal, dice = mask_classification_loss(class_logits, mask_logits, labels, masks,
                                                  matches)
        return focal + dice
    return bytes_kept_for_backward(mask_loss)


def test_memory_kept_for_the_backward_pass_does_not_grow_with_queries(monkeypatch):
    for at_once in (1, 2 ** 21):                                     # five parts, and one
        monkeypatch.setattr(losses, "AT_ONCE_CPU", at_once)
        assert mask_loss_bytes(Q) == mask_loss_bytes(40 * Q)


def test_with_several_parts_no_upsampled_mask_is_kept_for_the_backward_pass(monkeypatch):
    upsampled_mask = 64 * 64 * 4                                     # bytes
    assert mask_loss_bytes(Q) > 5 * upsampled_mask                   # five masks in one part
    monkeypatch.setattr(losses, "AT_ONCE_CPU", 1)
    assert mask_loss_bytes(Q) < upsampled_mask


# -------------------------------------------------------------------- the per-pixel baselines' loss
def test_per_pixel_loss_equals_plain_loops():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(L, B, K, h, w, generator=generator)
    height, width = 4 * h - 3, 4 * w - 1
    label_map = torch.randint(K, (B, height, width), generator=generator)
    label_map[torch.rand(label_map.shape, generator=generator) < 0.3] = 255
    expected = 0.
    for l in range(L):
        total, pixels = 0., 0
        for b in range(B):
            large = np.array([slow_bilinear(x, 4 * h, 4 * w) for x in logits[l, b].tolist()])
            large = large.reshape(K, 4 * h, 4 * w)
            for y, x in (label_map[b] != 255).nonzero().tolist():
                total -= slow_log_softmax(large[:, y, x].tolist())[label_map[b, y, x]]
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
    halves = [per_pixel_loss(logits[:, b:b + 1], label_map[b:b + 1], num_pixels=pixels)
              for b in range(2)]
    torch.testing.assert_close(sum(halves) / 2, per_pixel_loss(logits, label_map))


@pytest.mark.parametrize("label", [K, 254, -1])
def test_per_pixel_loss_raises_on_a_label_out_of_range(label):
    label_map = torch.zeros(B, 4 * h, 4 * w, dtype=torch.long)
    label_map[1, 3, 2] = label
    with pytest.raises((IndexError, ValueError)):
        per_pixel_loss(torch.randn(L, B, K, h, w), label_map)


@pytest.mark.parametrize("at_once", [1, 4 * K * 20 * 24, 2 ** 24])   # one image a part, four, all
def test_gradients_of_the_per_pixel_loss_are_those_through_full_size_scores(at_once, monkeypatch):
    monkeypatch.setattr(losses, "AT_ONCE_CPU", at_once)
    logits = torch.randn(L, B, K, h, w, requires_grad=True)
    label_map = torch.randint(K, (B, 4 * h - 1, 4 * w - 2))
    label_map[0, :5] = 255
    scores = F.interpolate(logits.flatten(0, 1), scale_factor=4, mode="bilinear")[..., :-1, :-2]
    direct = L * F.cross_entropy(scores, label_map.repeat(L, 1, 1), ignore_index=255)
    ours = per_pixel_loss(logits, label_map)
    torch.testing.assert_close(ours, direct)
    torch.testing.assert_close(torch.autograd.grad(ours, logits),
                               torch.autograd.grad(direct, logits))


def test_with_several_parts_no_upsampled_scores_are_kept_for_the_backward_pass(monkeypatch):
    logits = torch.randn(L, B, K, 16, 16, requires_grad=True)
    label_map = torch.randint(K, (B, 64, 64))
    monkeypatch.setattr(losses, "AT_ONCE_CPU", 1)
    upsampled_scores = B * K * 64 * 64 * 4                           # bytes, of a single layer
    assert bytes_kept_for_backward(per_pixel_loss, logits, label_map) < upsampled_scores / 2


def test_per_pixel_loss_takes_another_void():
    logits, label_map = torch.randn(1, B, K, h, w), torch.randint(K, (B, 4 * h, 4 * w))
    label_map[:, :5] = 65535
    usual = torch.where(label_map == 65535, 255, label_map)
    torch.testing.assert_close(per_pixel_loss(logits, label_map, void=65535),
                               per_pixel_loss(logits, usual))


def test_the_call_in_the_docstring_runs():
    class_logits, mask_logits, labels, masks, owner = targets = problem()
    names = vars(losses) | {"class_logits": class_logits, "mask_logits": mask_logits,
                            "labels": labels, "masks": masks, "matches": hungarian_match(*targets)}
    lines = [line for line in losses.__doc__.split("\n") if re.match(r" {4}\S", line)]
    exec("\n".join(line.strip() for line in lines), names)
    assert names["loss"].isfinite()
