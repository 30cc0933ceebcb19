"""What "right" means (MaskFormer, Eq. 1, Sec. 3.1 to 3.3, 4.1).

Letters   B images · L decoder layers · Q queries · K classes · N ground-truth segments in the batch
          H W image size · h w = H/4 W/4 · P = H W pixels · M matched pairs
Paper     L_mask-cls = ce + 20 focal + 1 dice; "no object" is label K

    ce, focal, dice = mask_classification_loss(class_logits, mask_logits, labels, masks, matches)
    loss = ce + 20 * focal + 1 * dice
"""
import torch
import torch.nn.functional as F

PIXELS_AT_ONCE = 2 ** 21, 2 ** 24     # upsampled pixels per chunk: CPU (fits its cache), GPU; bounds memory


def mask_classification_loss(class_logits, mask_logits, labels, masks, matches, num_segments=None,
                             no_object_weight=0.1):
    """Eq. (1), unweighted, as three scalars (ce, focal, dice), each summed over the decoder layers.

    class_logits [L, B, Q, K+1], mask_logits [L, B, Q, h, w], labels [N], masks [N, H, W] bool, matches: the
    matcher's four vectors [M]. num_segments: N averaged over processes (default: this N).
    NOTE 5: void and padded pixels are background of every mask, as in the released code.
    Only matched queries are upsampled to full size, and only PIXELS_AT_ONCE pixels at a time.
    """
    L, B, Q = class_logits.shape[:3]
    no_object = class_logits.shape[-1] - 1
    n = torch.as_tensor(len(labels) if num_segments is None else num_segments, device=class_logits.device)
    layer, image, query, segment = matches                               # each [M]

    wanted = torch.full((L, B, Q), no_object, device=class_logits.device)
    wanted[layer, image, query] = labels[segment]
    weight = torch.ones(no_object + 1, device=class_logits.device)
    weight[no_object:] = no_object_weight
    # The weights of each layer add up to n + 0.1 (B Q - n), so L weighted means are one sum over one divisor.
    # NOTE 6: the released code divides by each process's own sum of weights; with n averaged over processes
    # the gradient does not depend on how a batch is split over them. On one process there is no difference,
    # unless an image has more segments than queries.
    ce = F.cross_entropy(class_logits.float().flatten(0, 2), wanted.flatten(), weight, reduction="sum")
    ce = ce / (n + no_object_weight * (B * Q - n))

    focal, dice = mask_terms(mask_logits, masks, matches)
    return ce, focal / n.clamp(min=1), dice / n.clamp(min=1)


def mask_terms(mask_logits, masks, matches):
    """Focal and dice loss, each summed over the M pairs.

    A few pairs at a time: their gradients are computed right away and kept at the logits' size, so that no
    full-size tensor is stored for the backward pass or recomputed in it.
    """
    layer, image, query, segment = matches
    matched = mask_logits[layer, image, query].float()                   # [M, h, w]
    rows, columns = (linear_upsampling(n, size, masks.device)            # [H, h], [W, w]
                     for n, size in zip(matched.shape[1:], masks.shape[1:]))
    pairs_at_once = max(1, PIXELS_AT_ONCE[masks.is_cuda] // masks.shape[1:].numel())
    terms, gradients = matched.new_zeros(2), matched.new_empty(2, *matched.shape)
    by_pair = (matched.detach(), segment, *gradients)
    for logits, s, *gradient in zip(*(x.split(pairs_at_once) for x in by_pair)):     # m pairs
        with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
            x = (rows @ logits.requires_grad_() @ columns.T).flatten(1)  # [m, P]
            t = masks[s].flatten(1).float()                              # [m, P]
            for i, loss in enumerate((focal_loss, dice_loss)):
                term = loss(x, t).sum()
                gradient[i].copy_(torch.autograd.grad(term, logits, retain_graph=True)[0])
                terms[i] += term.detach()
    return terms + (gradients * (matched - matched.detach())).sum((1, 2, 3))         # adds 0 with a gradient


def linear_upsampling(n, size, device):                                  # -> [size, n]
    """The matrix that stretches n values to `size`; bilinear upsampling is such a product along each axis.

    (The gradient of F.interpolate is five times slower on CPUs and not deterministic on GPUs.)
    """
    unit_vectors = torch.eye(n, device=device)[None]
    return F.interpolate(unit_vectors, size=size, mode="linear", align_corners=False)[0].T


def focal_loss(mask_logits, masks, alpha=0.25, gamma=2):                 # [M, P], [M, P] -> [M]
    """-alpha_t (1 - p_t)^gamma log p_t, averaged over pixels; p_t is the probability of the right answer."""
    wrong = mask_logits * (1 - 2 * masks)                                # logit of the wrong answer
    alpha_t = (1 - alpha) + (2 * alpha - 1) * masks                      # alpha inside, 1 - alpha outside
    return (alpha_t * wrong.sigmoid() ** gamma * F.softplus(wrong)).sum(-1) / masks.shape[-1]


def dice_loss(mask_logits, masks):                                       # [M, P], [M, P] -> [M]
    """1 - (2 |p t| + 1) / (|p| + |t| + 1)."""
    prob = mask_logits.sigmoid()
    return 1 - (2 * (prob * masks).sum(-1) + 1) / (prob.sum(-1) + masks.sum(-1) + 1)


def per_pixel_loss(pixel_logits, label_map, void=255, num_pixels=None):
    """Cross entropy of the per-pixel baselines (Sec. 3.1), mean over labelled pixels, summed over the layers.

    pixel_logits [L, B, K, h, w], upsampled 4x and cropped; label_map [B, H, W] of classes or `void` -> ce.
    num_pixels: labelled pixels averaged over processes (default: this batch's).
    """
    H, W = label_map.shape[-2:]
    n = (label_map != void).sum() if num_pixels is None else num_pixels
    ce = 0
    for logits in pixel_logits.float():                                  # one layer at a time: [B, K, h, w]
        logits = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)[..., :H, :W]
        ce = ce + F.cross_entropy(logits, label_map.long(), ignore_index=void, reduction="sum")
    return ce / torch.as_tensor(n, device=label_map.device).clamp(min=1)
