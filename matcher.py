"""Which query is responsible for which segment (MaskFormer, Sec. 3.2).

Letters   B images · L decoder layers · Q queries · K classes · N ground-truth segments in the batch
          H W image size · h w = H/4 W/4, rounded up · P = h w pixels of a flattened mask
          M matched pairs · n segments of one image
Paper     its N is our Q · its N^gt, summed over the images, is our N · sigma is the list of pairs

    layer, image, query, segment = hungarian_match(class_logits, mask_logits, labels, masks, owner)

Read pair i aloud: in layer[i], for image[i], query[i] is responsible for segment[i].
"""
import warnings

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment


def matching_cost(class_logits, mask_logits, labels, masks, owner,
                  class_weight=1., focal_weight=20., dice_weight=1.):
    """The cost of every query for every segment, in every layer: [N, L, Q].

    Computed for all images at once, [L, B, Q, N], in three matrix products; then each segment keeps
    only the costs in its own image.
    """
    class_prob = class_logits.float().softmax(-1)[..., :-1]          # without "no object"
    class_cost = -class_prob[..., labels]                            # [L, B, Q, N]

    # NOTE 4: as in the released code, matching compares masks at the predicted size, and the loss
    # at the size of the image; the paper does not say.
    small_masks = F.interpolate(masks[:, None].float(), size=mask_logits.shape[-2:], mode="nearest")
    truth = small_masks.flatten(1)                                   # [N, P]
    mask_logits = mask_logits.float().flatten(3)                     # [L, B, Q, P]

    with torch.autocast(mask_logits.device.type, enabled=False):
        cost = (class_weight * class_cost
                + focal_weight * pairwise_focal(mask_logits, truth)
                + dice_weight * pairwise_dice(mask_logits, truth))   # [L, B, Q, N]

    segment = torch.arange(len(labels), device=cost.device)
    return cost[:, owner, :, segment]                                # [N, L, Q]: indexed axes first


def pairwise_focal(mask_logits, truth, alpha=0.25, gamma=2):
    """Mean focal loss between every query and segment: [..., Q, P], [N, P] -> [..., Q, N]."""
    prob = mask_logits.sigmoid()
    pos = alpha * (1 - prob) ** gamma * F.softplus(-mask_logits)     # cost of a pixel inside
    neg = (1 - alpha) * prob ** gamma * F.softplus(mask_logits)      # and of one outside
    return (pos @ truth.T + neg @ (1 - truth).T) / truth.shape[1]


def pairwise_dice(mask_logits, truth):
    """Dice loss between every query and segment: [..., Q, P], [N, P] -> [..., Q, N]."""
    prob = mask_logits.sigmoid()
    area = prob.sum(-1, keepdim=True) + truth.sum(-1)
    return 1 - (2 * (prob @ truth.T) + 1) / (area + 1)               # + 1: finite for empty masks


@torch.no_grad()
def hungarian_match(class_logits, mask_logits, labels, masks, owner,
                    class_weight=1., focal_weight=20., dice_weight=1.,
                    cost_function=matching_cost):
    """The cheapest assignment of segments to queries, for each layer and each image on its own.

    class_logits [L, B, Q, K+1], mask_logits [L, B, Q, h, w]
    labels [N] in [0, K), masks [N, H, W] bool
    owner [N]: the image of each segment, such as [0, 0, 1]; best on the CPU, which saves a copy
    cost_function: the function above, or its compiled form

    -> layer, image, query, segment, each [M] int64, on the device of the logits.

    An image with more segments than queries gets Q pairs, the cheapest in sum, and a warning.
    Raises FloatingPointError if a cost is not finite, IndexError (on a GPU CUDA's device-side
    assertion) if a label is not below K; negative ones are not noticed here.
    """
    L, B, Q = class_logits.shape[:3]
    device = class_logits.device
    cost = cost_function(class_logits, mask_logits, labels.long(), masks,
                         owner.to(device, non_blocking=True),
                         class_weight, focal_weight, dice_weight)    # [N, L, Q]
    cost = cost.cpu()                                                # the one copy
    if not cost.isfinite().all():
        raise FloatingPointError("a matching cost is not finite")

    pairs = []
    owner = owner.cpu()
    for b in range(B):
        segments = (owner == b).nonzero().squeeze(1)                 # those of this image
        if len(segments) > Q:
            warnings.warn(f"image {b} of the batch has {len(segments)} segments but {Q} queries")
        for l in range(L):
            chosen, query = linear_sum_assignment(cost[segments, l])             # [n, Q]
            pairs += [(l, b, q, s) for q, s in zip(query.tolist(), segments[chosen].tolist())]

    pairs = torch.tensor(pairs, dtype=torch.long).reshape(-1, 4)
    return pairs.to(device, non_blocking=True).unbind(1)


def fixed_match(class_logits, mask_logits, labels, masks, owner,
                class_weight=None, focal_weight=None, dice_weight=None):
    """Table 4's ablation: with Q = K queries, query k is responsible for the segment of class k.

    Takes and returns what `hungarian_match` does; masks and weights do not matter. Raises
    ValueError if Q is not K, or if two segments of an image have the same class.
    """
    L, B, Q = class_logits.shape[:3]
    K = class_logits.shape[-1] - 1
    N, device = len(labels), class_logits.device
    if Q != K:
        raise ValueError(f"fixed matching needs as many queries as classes, not {Q} for {K}")

    labels = labels.to(device, torch.long, non_blocking=True)
    owner = owner.to(device, torch.long, non_blocking=True)
    if len((owner * K + labels).unique()) < N:
        raise ValueError("fixed matching: two segments of an image have the same class")

    layer = torch.arange(L, device=device).repeat_interleave(N)
    segment = torch.arange(N, device=device).repeat(L)
    return layer, owner.repeat(L), labels.repeat(L), segment
