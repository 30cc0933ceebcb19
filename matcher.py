"""Which query is responsible for which segment (MaskFormer, Sec. 3.2).

Letters   B images · L decoder layers · Q queries · K classes · N true segments in the batch, n in an image
          H W image size · h w = H/4 W/4 · P pixels of a mask, here h w · M matched pairs
Paper     its N is our Q · its N^gt, over all images, is our N · sigma is the list of matched pairs

    layer, image, query, segment = hungarian_match(class_logits, mask_logits, labels, masks, owner)

In layer[i], for image[i], query[i] is responsible for segment[i].
"""
import warnings

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment


@torch.no_grad()
def hungarian_match(class_logits, mask_logits, labels, masks, owner,
                    class_weight=1., focal_weight=20., dice_weight=1.):
    """The cheapest assignment of segments to queries, in each layer and image on its own.

    class_logits [L, B, Q, K+1], mask_logits [L, B, Q, h, w], labels [N] in [0, K), masks [N, H, W] bool,
    owner [N], the image of each segment, such as [0, 0, 1] -> layer, image, query, segment, each [M] int64 on
    the logits' device. If an image has more segments than queries, it matches Q of them, the cheapest in sum,
    and warns. Costs are float32; beyond the inputs it needs about 6 L Q P + N P floats, or N H W bytes if
    more. If `owner` is on the CPU, there is one device-to-host copy. Raises FloatingPointError on a cost that
    is not finite, IndexError (on a GPU it is CUDA's assertion) on a label that is not below K.
    """
    L, B, Q = class_logits.shape[:3]
    class_prob = class_logits.float().softmax(-1)
    # NOTE 4: matching compares masks at the predicted size, shrinking the true ones; the loss at full size.
    small = F.interpolate(masks[:, None].to(torch.uint8), size=mask_logits.shape[-2:], mode="nearest")
    small = small.flatten(1).float()                                     # [N, P]
    mine = [(owner == b).nonzero().squeeze(1) for b in range(B)]         # each image's segments
    costs = []
    for b, segments in enumerate(mine):
        segments = segments.to(small.device, non_blocking=True)
        x, t = mask_logits[:, b].flatten(2).float(), small[segments]     # [L, Q, P], [n, P]
        prob = class_prob[:, b, :, :-1][..., labels[segments].long()]    # [L, Q, n]
        with torch.autocast(x.device.type, enabled=False):
            cost = (focal_weight * pairwise_focal(x, t) + dice_weight * pairwise_dice(x, t)
                    - class_weight * prob)                               # [L, Q, n]
        costs.append(cost.flatten())
    costs = torch.cat(costs).cpu()                                       # the one copy
    if not costs.isfinite().all():
        raise FloatingPointError("a matching cost is not finite")
    pairs = []
    for b, cost in enumerate(costs.split([L * Q * len(segments) for segments in mine])):
        segments = mine[b].cpu().numpy()
        if len(segments) > Q:
            warnings.warn(f"image {b} of the batch has {len(segments)} segments but {Q} queries")
        for l, layer_cost in enumerate(cost.view(L, Q, len(segments)).numpy()):
            q, s = linear_sum_assignment(layer_cost)
            pairs += [(l, b, i, j) for i, j in zip(q.tolist(), segments[s].tolist())]
    pairs = torch.tensor(pairs, dtype=torch.long).reshape(-1, 4)
    return pairs.to(class_logits.device, non_blocking=True).unbind(1)


def fixed_match(class_logits, mask_logits, labels, masks, owner,
                class_weight=None, focal_weight=None, dice_weight=None):
    """Table 4's ablation: with Q = K queries, query k is responsible for the segment of class k.

    Takes and returns what `hungarian_match` does; the weights are not used. Raises ValueError if Q is not K
    or if two segments of an image share a class.
    """
    L, B, Q = class_logits.shape[:3]
    K, N, device = class_logits.shape[-1] - 1, len(labels), class_logits.device
    if Q != K:
        raise ValueError(f"fixed matching needs as many queries as classes, not {Q} queries and {K} classes")
    owner, labels = (x.to(device, torch.long, non_blocking=True) for x in (owner, labels))
    if len((owner * K + labels).unique()) < N:
        raise ValueError("fixed matching: two segments of an image have the same class")
    layer = torch.arange(L, device=device).repeat_interleave(N)
    return layer, owner.repeat(L), labels.repeat(L), torch.arange(N, device=device).repeat(L)


def pairwise_focal(mask_logits, masks, alpha=0.25, gamma=2):             # [..., Q, P], [n, P] -> [..., Q, n]
    """Mean focal loss over pixels between every query and every segment."""
    prob, surprise = mask_logits.sigmoid(), F.softplus(mask_logits)      # surprise: -log(1 - p)
    if_outside = prob ** gamma * surprise                                # loss of a pixel outside the segment
    if_inside = (1 - prob) ** gamma * (surprise - mask_logits)           # and of one inside: -log p
    total = alpha * (if_inside @ masks.T) + (1 - alpha) * (if_outside @ (1 - masks).T)
    return total / masks.shape[-1]


def pairwise_dice(mask_logits, masks):                                   # [..., Q, P], [n, P] -> [..., Q, n]
    """Dice loss between every query and every segment; the + 1 keeps empty masks finite."""
    prob = mask_logits.sigmoid()
    area = prob.sum(-1, keepdim=True) + masks.sum(-1)
    return 1 - (2 * prob @ masks.T + 1) / (area + 1)
