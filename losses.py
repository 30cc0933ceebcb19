"""What "right" means (MaskFormer, Eq. 1, Sec. 3.1 to 3.3, 4.1).

Letters   B images · L decoder layers · Q queries · K classes · N ground-truth segments in the batch
          H W image size · h w = H/4 W/4, rounded up · M matched pairs
          m of them, or of maps, at a time
Paper     L_mask-cls is ce + 20 focal + 1 dice · "no object" is label K

    ce, focal, dice = mask_classification_loss(class_logits, mask_logits, labels, masks, matches)
    loss = ce + 20 * focal + 1 * dice
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# So many upsampled values at a time: this bounds the memory of the loss.
AT_ONCE_CPU = 2 ** 21                                                # 8 MB: fits the cache
AT_ONCE_GPU = 2 ** 26                                                # 256 MB


def focal_loss(mask_logits, truth, alpha=0.25, gamma=2):             # [m, HW], [m, HW] -> [m]
    """-alpha_t (1 - p_t)^gamma log(p_t), averaged over pixels; p_t: probability of the truth."""
    ce = F.binary_cross_entropy_with_logits(mask_logits, truth, reduction="none")    # -log(p_t)
    p_t = torch.exp(-ce)
    alpha_t = alpha * truth + (1 - alpha) * (1 - truth)
    return (alpha_t * (1 - p_t) ** gamma * ce).mean(-1)


def dice_loss(mask_logits, truth):                                   # [m, HW], [m, HW] -> [m]
    """1 - (2 |p t| + 1) / (|p| + |t| + 1), where |x| is the sum over the pixels."""
    prob = mask_logits.sigmoid()
    overlap = (prob * truth).sum(-1)
    return 1 - (2 * overlap + 1) / (prob.sum(-1) + truth.sum(-1) + 1)


def mask_terms(mask_logits, masks, segment):
    """Sums of the focal and the dice loss over pairs: [m, h, w], [N, H, W], [m] -> [2]."""
    upsampled = upsample(mask_logits, masks.shape[-2:]).flatten(1)   # [m, HW]
    truth = masks[segment].flatten(1).float()                        # [m, HW]
    return torch.stack([focal_loss(upsampled, truth).sum(), dice_loss(upsampled, truth).sum()])


def mask_classification_loss(class_logits, mask_logits, labels, masks, matches, num_segments=None,
                             no_object_weight=0.1, terms_function=mask_terms):
    """Eq. (1), unweighted: three scalars (ce, focal, dice), each summed over the decoder layers.

    class_logits [L, B, Q, K+1], mask_logits [L, B, Q, h, w]
    labels [N] in [0, K), masks [N, H, W] bool
    matches: layer, image, query, segment, each [M], from the matcher
    num_segments: N averaged over processes and accumulated passes (default: this N)
    terms_function: `mask_terms`, or its compiled form

    NOTE 5: void and padded pixels are background of every mask, as in the released code.
    Only matched queries are upsampled, and only some at a time: see `sum_over_parts`.
    """
    L, B, Q = class_logits.shape[:3]
    no_object = class_logits.shape[-1] - 1                           # label K
    device = class_logits.device
    layer, image, query, segment = matches
    if num_segments is None:
        num_segments = len(labels)
    num_segments = torch.as_tensor(num_segments, device=device)

    target = torch.full((L, B, Q), no_object, device=device)         # all start as "no object"
    target[layer, image, query] = labels[segment].long()
    weight = torch.ones(no_object + 1, device=device)
    weight[no_object:] = no_object_weight                            # an index would stall a GPU
    ce = F.cross_entropy(class_logits.float().flatten(0, 2), target.flatten(), weight,
                         reduction="sum")

    # All layers have the same sum of weights, so the sum of their L weighted means is one division.
    # NOTE 6: the released code divides by the weights of each process. Ours are averaged over the
    # processes and accumulated passes, so that the gradient does not depend on how a batch is split
    # (unless it has fewer segments than parts). In one pass on one process both agree, unless an
    # image has more segments than queries.
    total_weight = num_segments + no_object_weight * (B * Q - num_segments).clamp(min=0)
    ce = ce / total_weight.clamp(min=1e-9)

    matched = mask_logits[layer, image, query].float()               # [M, h, w]
    pixels = masks.shape[-2] * masks.shape[-1]
    focal, dice = sum_over_parts(lambda logits, segment: terms_function(logits, masks, segment),
                                 matched, segment, pixels)
    return ce, focal / num_segments.clamp(min=1), dice / num_segments.clamp(min=1)


def per_pixel_loss(pixel_logits, label_map, void=255, num_pixels=None):
    """Cross entropy of the baselines (Sec. 3.1): mean over labeled pixels, summed over the layers.

    pixel_logits [L, B, K, h, w], upsampled 4x and cropped; label_map [B, H, W]: classes or `void`
    num_pixels: labeled pixels averaged over processes and accumulated passes (NOTE 6; default:
        those of this batch)
    """
    L, B, K, h, w = pixel_logits.shape
    H, W = label_map.shape[-2:]

    def cross_entropy(logits, image):                                # [m, K, h, w], [m]
        logits = upsample(logits, (4 * h, 4 * w))[..., :H, :W]
        return F.cross_entropy(logits, label_map[image].long(), ignore_index=void, reduction="sum")

    image = torch.arange(B, device=label_map.device).repeat(L)       # layer by layer
    ce = sum_over_parts(cross_entropy, pixel_logits.float().flatten(0, 1), image, K * H * W)
    if num_pixels is None:
        num_pixels = (label_map != void).sum()
    return ce / torch.as_tensor(num_pixels, device=ce.device).clamp(min=1)


def sum_over_parts(loss, logits, index, values):
    """loss(logits [m, ...], index [m]), computed part by part so that memory stays bounded.

    The loss must be a sum over the m maps, each of which it upsamples to `values` values. If all of
    them are too many to hold at once, each part is computed a second time in the backward pass.
    """
    at_once = AT_ONCE_GPU if logits.is_cuda else AT_ONCE_CPU
    part_size = max(1, at_once // values)
    if len(logits) <= part_size:
        return loss(logits, index)
    parts = zip(logits.split(part_size), index.split(part_size))
    return sum(checkpoint(loss, *part, use_reentrant=False) for part in parts)


def upsample(logits, size):
    """[m, ..., h, w] -> [m, ..., *size], float32, bilinear (align_corners=False).

    A matrix product along each axis. F.interpolate gives the same (but for TF32's rounding, where
    that is allowed), but its gradient takes 2.3 times as long on a CPU, and on a GPU it is not
    deterministic.
    """
    with torch.autocast(logits.device.type, enabled=False):
        rows = linear_interpolation(logits.shape[-2], size[0], logits.device)       # [H, h]
        columns = linear_interpolation(logits.shape[-1], size[1], logits.device)    # [W, w]
        return rows @ logits.float() @ columns.T


def linear_interpolation(n, size, device):                           # -> [size, n]
    """The matrix A for which A @ x is x resized linearly; column i is unit vector i, resized."""
    unit_vectors = torch.eye(n, device=device)[None]
    return F.interpolate(unit_vectors, size=size, mode="linear", align_corners=False)[0].T
