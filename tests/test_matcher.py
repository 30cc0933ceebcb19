"""What is guaranteed of matcher.py (Sec. 3.2)."""
import itertools
import math
import re
import warnings

import pytest
import torch

import matcher
from losses import dice_loss, focal_loss
from matcher import fixed_match, hungarian_match, matching_cost, pairwise_dice, pairwise_focal

L, B, Q, K = 3, 2, 7, 11
h, w, H, W = 5, 6, 18, 26


def problem(owner=(0, 1, 0, 0, 1), queries=Q, scale=2.):
    """Random logits and overlapping masks -> the five arguments of `hungarian_match`.

    owner: the image of each segment; not sorted
    scale: standard deviation of the logits
    """
    generator = torch.Generator().manual_seed(0)
    N = len(owner)
    class_logits = scale * torch.randn(L, B, queries, K + 1, generator=generator)
    mask_logits = scale * torch.randn(L, B, queries, h, w, generator=generator)
    labels = torch.randint(K, (N,), generator=generator)
    masks = torch.rand(N, H, W, generator=generator) > 0.6
    return class_logits, mask_logits, labels, masks, torch.tensor(owner, dtype=torch.long)


def as_set(matches):
    return set(zip(*(vector.tolist() for vector in matches)))


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


def slow_softmax(logits):
    most = max(logits)
    total = sum(math.exp(x - most) for x in logits)
    return [math.exp(x - most) / total for x in logits]


def slow_nearest(mask, height, width):
    H, W = len(mask), len(mask[0])
    return [mask[y * H // height][x * W // width] for y in range(height) for x in range(width)]


def slow_cost(class_logits, mask_logits, label, mask,
              class_weight=1., focal_weight=20., dice_weight=1.):
    """One query [K+1], [h, w] against one segment [H, W]."""
    prob = slow_softmax(class_logits.tolist())[label]
    logits = mask_logits.flatten().tolist()
    small_mask = slow_nearest(mask.tolist(), *mask_logits.shape)
    return (-class_weight * prob
            + focal_weight * slow_focal(logits, small_mask)
            + dice_weight * slow_dice(logits, small_mask))


# -------------------------------------------------------------------------------------------- costs
@pytest.mark.parametrize("weights", [{}, {"class_weight": 30., "focal_weight": 3.}])
def test_costs_of_all_images_at_once_equal_plain_loops_in_float64(weights):
    class_logits, mask_logits, labels, masks, owner = problem()
    cost = matching_cost(class_logits, mask_logits, labels, masks, owner, **weights)
    assert cost.shape == (5, L, Q) and cost.dtype == torch.float32   # [N, L, Q]
    for s, l, q in itertools.product(range(5), range(L), range(Q)):
        b = owner[s]                                                 # the segment's own image
        slow = slow_cost(class_logits[l, b, q], mask_logits[l, b, q], labels[s], masks[s],
                         **weights)
        assert cost[s, l, q].item() == pytest.approx(slow, rel=1e-4)


def test_pairwise_costs_equal_plain_loops_in_float64():
    _, mask_logits, _, masks, _ = problem()
    x, t = mask_logits[1].flatten(2), masks[:, :h, :w].flatten(1)    # [B, Q, P], [N, P]
    focal, dice = pairwise_focal(x, t.float()), pairwise_dice(x, t.float())
    assert focal.shape == dice.shape == (B, Q, 5)
    for b, q, s in itertools.product(range(B), range(Q), range(5)):
        pair = x[b, q].tolist(), t[s].tolist()
        assert focal[b, q, s].item() == pytest.approx(slow_focal(*pair), rel=1e-4)
        assert dice[b, q, s].item() == pytest.approx(slow_dice(*pair), rel=1e-4)


def test_pairwise_costs_agree_with_losses_on_the_diagonal():
    x, t = 3 * torch.randn(6, 50), (torch.rand(6, 50) > 0.5).float()
    torch.testing.assert_close(pairwise_focal(x, t).diagonal(), focal_loss(x, t))
    torch.testing.assert_close(pairwise_dice(x, t).diagonal(), dice_loss(x, t))


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_costs_stay_finite_at_huge_logits(size):
    class_logits, mask_logits, *targets = problem()
    huge = class_logits.sign() * size, mask_logits.sign() * size
    assert matching_cost(*huge, *targets).isfinite().all()
    assert len(hungarian_match(*huge, *targets)[0]) == L * 5


def test_the_costs_may_come_from_another_function():
    asked = []

    def compiled(*arguments):
        asked.append(arguments)
        return matching_cost(*arguments).flip(2)                     # queries in the other order

    targets = problem()
    matches = hungarian_match(*targets, 2., 3., 4., cost_function=compiled)
    assert len(asked) == 1 and asked[0][5:] == (2., 3., 4.)
    plain = as_set(hungarian_match(*targets, 2., 3., 4.))
    assert as_set(matches) == {(l, b, Q - 1 - q, s) for l, b, q, s in plain}


# ----------------------------------------------------------------------------------------- matching
@pytest.mark.parametrize("weights", [
    {},
    {"class_weight": 30., "focal_weight": 3., "dice_weight": 0.5},
    {"focal_weight": 0., "dice_weight": 9.},
])
def test_matching_is_the_cheapest_of_all_assignments(weights):
    class_logits, mask_logits, labels, masks, owner = targets = problem()
    matches = as_set(hungarian_match(*targets, **weights))
    for l, b in itertools.product(range(L), range(B)):
        segments = [s for s in range(5) if owner[s] == b]
        cost = {(q, s): slow_cost(class_logits[l, b, q], mask_logits[l, b, q], labels[s], masks[s],
                                  **weights)
                for q in range(Q) for s in segments}
        best = min(itertools.permutations(range(Q), len(segments)),
                   key=lambda queries: sum(cost[pair] for pair in zip(queries, segments)))
        found = {match[2:] for match in matches if match[:2] == (l, b)}
        assert set(zip(best, segments)) == found
    assert len(matches) == L * 5


def test_matches_are_four_int64_vectors():
    matches = hungarian_match(*problem())
    assert [vector.dtype for vector in matches] == [torch.int64] * 4
    assert [vector.shape for vector in matches] == [(L * 5,)] * 4


def test_permuting_queries_permutes_matches():
    class_logits, mask_logits, *targets = problem()
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])                      # query i was order[i]
    before = as_set(hungarian_match(class_logits, mask_logits, *targets))
    after = hungarian_match(class_logits[:, :, order], mask_logits[:, :, order], *targets)
    assert {(l, b, int(order[q]), s) for l, b, q, s in as_set(after)} == before


def test_permuting_segments_permutes_matches():
    class_logits, mask_logits, labels, masks, owner = problem()
    order = torch.tensor([3, 1, 4, 0, 2])
    before = as_set(hungarian_match(class_logits, mask_logits, labels, masks, owner))
    after = hungarian_match(class_logits, mask_logits, labels[order], masks[order], owner[order])
    assert {(l, b, q, int(order[s])) for l, b, q, s in as_set(after)} == before


def test_permuting_images_permutes_matches():
    class_logits, mask_logits, labels, masks, owner = problem()
    before = as_set(hungarian_match(class_logits, mask_logits, labels, masks, owner))
    after = hungarian_match(class_logits.flip(1), mask_logits.flip(1), labels, masks, 1 - owner)
    assert {(l, 1 - b, q, s) for l, b, q, s in as_set(after)} == before


def test_all_layers_at_once_equals_layer_by_layer():
    class_logits, mask_logits, *targets = problem()
    one_by_one = set()
    for l in range(L):
        matches = hungarian_match(class_logits[l:l + 1], mask_logits[l:l + 1], *targets)
        one_by_one |= {(l, *match[1:]) for match in as_set(matches)}
    assert as_set(hungarian_match(class_logits, mask_logits, *targets)) == one_by_one


def test_each_segment_is_matched_once_per_layer_and_each_query_at_most_once():
    layer, image, query, segment = hungarian_match(*problem())
    once = list(itertools.product(range(L), range(5)))
    assert sorted(zip(layer.tolist(), segment.tolist())) == once
    assert len(set(zip(layer.tolist(), image.tolist(), query.tolist()))) == L * 5


def test_an_image_without_segments_has_no_matches():
    layer, image, query, segment = hungarian_match(*problem(owner=(1, 1, 1)))
    assert image.tolist() == [1] * (3 * L)


def test_a_batch_without_segments_has_no_matches():
    for matches in (hungarian_match(*problem(owner=())),
                    fixed_match(*problem(owner=(), queries=K))):
        assert [vector.tolist() for vector in matches] == [[]] * 4
        assert [vector.dtype for vector in matches] == [torch.int64] * 4


def test_more_segments_than_queries_are_matched_as_far_as_queries_go_with_a_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        matches = hungarian_match(*problem(owner=(0,) + (1,) * (Q + 2)))
    layer, image, query, segment = matches
    assert len(caught) == 1
    assert "image 1" in str(caught[0].message) and str(Q + 2) in str(caught[0].message)
    for l in range(L):
        mine = (layer == l) & (image == 1)
        assert sorted(query[mine].tolist()) == list(range(Q))
        assert len(set(segment[mine].tolist())) == Q
        assert segment[(layer == l) & (image == 0)].tolist() == [0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_not_finite_raise_floating_point_error(value, which):
    targets = problem()
    targets[which][2, 1, 3].flatten()[0] = value
    with pytest.raises(FloatingPointError):
        hungarian_match(*targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_match_as_the_same_numbers_in_float32_do(dtype):
    class_logits, mask_logits, *targets = problem(scale=0.001)       # close costs
    class_logits, mask_logits = class_logits.to(dtype), mask_logits.to(dtype)
    half = hungarian_match(class_logits, mask_logits, *targets)
    single = hungarian_match(class_logits.float(), mask_logits.float(), *targets)
    assert as_set(half) == as_set(single)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_coarsen_costs(dtype):
    targets = problem(scale=0.001)                                   # close costs
    expected = matching_cost(*targets)
    matches = hungarian_match(*targets)
    with torch.autocast("cpu", dtype):
        assert torch.equal(matching_cost(*targets), expected)
        assert as_set(hungarian_match(*targets)) == as_set(matches)


def test_matching_builds_no_graph():
    class_logits, mask_logits, *targets = problem()
    class_logits.requires_grad_(), mask_logits.requires_grad_()
    matches = hungarian_match(class_logits, mask_logits, *targets)
    assert not any(vector.requires_grad for vector in matches)


def test_the_label_of_no_object_is_not_a_segment_label():
    class_logits, mask_logits, labels, masks, owner = problem()
    labels[2] = K
    with pytest.raises(IndexError):
        hungarian_match(class_logits, mask_logits, labels, masks, owner)


def test_labels_may_have_any_integer_type():
    class_logits, mask_logits, labels, masks, owner = problem()
    expected = hungarian_match(class_logits, mask_logits, labels, masks, owner)
    for dtype in (torch.uint8, torch.int16, torch.int32):            # uint8 would index as a mask
        matches = hungarian_match(class_logits, mask_logits, labels.to(dtype), masks, owner)
        assert all(map(torch.equal, matches, expected))


def test_masks_are_shrunk_by_nearest_neighbor():
    class_logits, mask_logits, labels, masks, owner = problem()
    small_masks = torch.tensor([slow_nearest(mask.tolist(), h, w) for mask in masks])
    small_masks = small_masks.view(-1, h, w)
    large = matching_cost(class_logits, mask_logits, labels, masks, owner)
    small = matching_cost(class_logits, mask_logits, labels, small_masks, owner)
    torch.testing.assert_close(large, small)


# ------------------------------------------------------------------------------------------ Table 4
def test_fixed_matching_gives_query_k_the_segment_of_class_k():
    class_logits, mask_logits, _, masks, owner = problem(queries=K)  # owner 0 1 0 0 1
    labels = torch.tensor([4, 4, 10, 0, 3])
    matches = fixed_match(class_logits, mask_logits, labels, masks, owner,
                          class_weight=2., focal_weight=3.)
    one_layer = [(0, 4, 0), (1, 4, 1), (0, 10, 2), (0, 0, 3), (1, 3, 4)]     # image, query, segment
    assert as_set(matches) == {(l, *match) for l in range(L) for match in one_layer}


def test_fixed_matching_refuses_instances_and_other_query_counts():
    class_logits, mask_logits, _, masks, owner = problem(queries=K)
    with pytest.raises(ValueError, match="same class"):
        fixed_match(class_logits, mask_logits, torch.tensor([4, 1, 2, 4, 3]), masks, owner)
    with pytest.raises(ValueError, match=f"not {Q} for {K}"):
        fixed_match(*problem())


def test_the_call_in_the_docstring_runs():
    arguments = ["class_logits", "mask_logits", "labels", "masks", "owner"]
    names = vars(matcher) | dict(zip(arguments, problem()))
    lines = [line for line in matcher.__doc__.split("\n") if re.match(r" {4}\S", line)]
    exec("\n".join(line.strip() for line in lines), names)
    assert len(names["segment"]) == L * 5
