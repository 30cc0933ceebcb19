"""What "right" means (MaskFormer, Eq. 1, Sec. 3.1 to 3.3, 4.1).

Letters   B images · L decoder layers · Q queries · K classes · N ground-truth segments in the batch
          H W image size · h w = H/4 W/4 · P pixels of a mask, here H W · M matched pairs
Paper     L_mask-cls = ce + 20 focal + 1 dice; "no object" is label K

    ce, focal, dice = mask_classification_loss(class_logits, mask_logits, labels, masks, matches)
    loss = ce + 20 * focal + 1 * dice
"""
import torch
import torch.nn.functional as F

ELEMENTS_AT_ONCE = 2 ** 21, 2 ** 24   # upsampled logits at a time: CPU (fits its cache), GPU; bounds memory


def mask_classification_loss(class_logits, mask_logits, labels, masks, matches, num_segments=None,
                             no_object_weight=0.1):
    """Eq. (1), unweighted, as three scalars (ce, focal, dice), each summed over the decoder layers.

    class_logits [L, B, Q, K+1], mask_logits [L, B, Q, h, w], labels [N] in [0, K), masks [N, H, W] bool,
    matches: the matcher's four vectors [M]. num_segments: N averaged over processes (default: this N).
    NOTE 5: void and padded pixels are background of every mask, as in the released code.
    Only matched queries are upsampled to full size, and only ELEMENTS_AT_ONCE values at a time.
    """
    L, B, Q = class_logits.shape[:3]
    no_object = class_logits.shape[-1] - 1
    count = torch.as_tensor(len(labels) if num_segments is None else num_segments, device=class_logits.device)
    layer, image, query, segment = matches                               # each [M]

    wanted = torch.full((L, B, Q), no_object, device=class_logits.device)
    wanted[layer, image, query] = labels[segment].long()
    weight = torch.ones(no_object + 1, device=class_logits.device)
    weight[no_object:] = no_object_weight                                # weight[-1] would wait for a GPU
    # Each layer's weights add up to `total_weight`, so L weighted means are one sum over one divisor.
    # NOTE 6: the released code divides by each process's own sum of weights; with a count averaged over
    # processes the gradient does not depend on how a batch is split over them. On one process there is no
    # difference, unless an image has more segments than queries.
    total_weight = count + no_object_weight * (B * Q - count)
    ce = F.cross_entropy(class_logits.float().flatten(0, 2), wanted.flatten(), weight, reduction="sum")

    focal, dice = mask_terms(mask_logits, masks, matches)
    return ce / total_weight.clamp(min=1e-9), focal / count.clamp(min=1), dice / count.clamp(min=1)


def mask_terms(mask_logits, masks, matches):
    """Focal and dice loss, each summed over the M pairs."""
    layer, image, query, segment = matches
    matched = mask_logits[layer, image, query].float()                   # [M, h, w]
    def terms_of(x, segment):                                            # of m pairs: [m, H, W], [m]
        t = masks[segment].flatten(1).float()                            # [m, P]
        yield focal_loss(x.flatten(1), t).sum()
        yield dice_loss(x.flatten(1), t).sum()
    rows, columns = (linear_upsampling(n, size, masks.device)            # [H, h], [W, w]
                     for n, size in zip(matched.shape[1:], masks.shape[1:]))
    return sum_of_parts(terms_of, 2, matched, segment, rows, columns)


def sum_of_parts(terms_of, num_terms, logits, index, rows, columns):
    """What terms_of(x, index) yields, sums over the first axis, as a vector [num_terms]; x are the logits,
    upsampled by the matrices [H, h] and [W, w], a few at a time. The gradients of a part are computed at once
    and kept at the logits' size: nothing upsampled waits for the backward pass; no second derivatives."""
    full_size = logits.shape[1:-2].numel() * len(rows) * len(columns)
    at_once = max(1, ELEMENTS_AT_ONCE[logits.is_cuda] // full_size)
    terms, gradients = logits.new_zeros(num_terms), logits.new_zeros(num_terms, *logits.shape)
    for part, some, *gradient in zip(*(x.split(at_once) for x in (logits.detach(), index, *gradients))):
        with torch.autocast(logits.device.type, enabled=False):
            x = (rows @ part @ columns.T).requires_grad_(logits.requires_grad and torch.is_grad_enabled())
            for k, term in enumerate(terms_of(x, some)):                 # `gradient`: views into `gradients`
                terms[k] += term.detach()
                if x.requires_grad:                                      # not when validating
                    gradient[k].copy_(rows.T @ torch.autograd.grad(term, x)[0] @ columns)
    # The product is 0, so the value stays; its derivative by `logits` is `gradients`: autograd goes on there.
    return terms + (gradients * (logits - logits.detach())).flatten(1).sum(1)


def linear_upsampling(n, size, device):                                  # -> [size, n]
    """The matrix that stretches n values to `size`; bilinear upsampling is such a product along each axis.
    (The gradient of F.interpolate is five times slower on CPUs and not deterministic on GPUs.)"""
    unit_vectors = torch.eye(n, device=device, dtype=torch.float32)[None]
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
    num_pixels: labelled pixels averaged over processes (NOTE 6; default: this batch's).
    """
    (L, B, _, h, w), (H, W) = pixel_logits.shape, label_map.shape[1:]
    rows, columns = (linear_upsampling(n, 4 * n, label_map.device)[:size] for n, size in ((h, H), (w, W)))
    def ce_of(x, image):                                                 # of m maps: [m, K, H, W], [m]
        yield F.cross_entropy(x, label_map[image].long(), ignore_index=void, reduction="sum")
    image = torch.arange(B, device=label_map.device).repeat(L)
    ce = sum_of_parts(ce_of, 1, pixel_logits.float().flatten(0, 1), image, rows, columns)[0]
    n = (label_map != void).sum() if num_pixels is None else num_pixels
    return ce / torch.as_tensor(n, device=ce.device).clamp(min=1)
