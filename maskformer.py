"""What is predicted, and how it becomes a segmentation (MaskFormer, Fig. 2, Sec. 3.3, 3.4, 4.1).

MaskFormer answers an image with Q pairs: a class distribution over K + 1 labels, the last of which is "no
object", and a binary mask. Two per-pixel baselines share its parts.

Letters   B images · L decoder layers · Q queries · K classes · D channels of every embedding
          H W image size · h w = H/4 W/4 · T thing classes · n masks returned
Paper     N is our Q · C_E and C_Q are our D · Q (script) is `segment_embed` · E_pixel is `pixel_embed`

    model = MaskFormer(num_classes=150, backbone="resnet50", pretrained=False).eval()
    images = torch.randint(256, (2, 3, 128, 160))
    class_logits, mask_logits = model(images)                          # [1, 2, 100, 151], [1, 2, 100, 32, 40]
    mask_logits = F.interpolate(mask_logits[-1], size=(128, 160), mode="bilinear", align_corners=False)
    scores = semantic_inference(class_logits[-1], mask_logits)         # [2, 150, 128, 160]
"""
from functools import partial

import timm
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn


# ---------------------------------------------------------------------------------------- backbone
class Backbone(nn.Module):
    """Any timm `features_only` backbone with strides 4, 8, 16 and 32; it normalises its images itself.
    freeze_bn: batch norms keep their statistics and affine parameters; None: if `pretrained` (Sec. 4.1)."""

    def __init__(self, name, pretrained=True, freeze_bn=None):
        super().__init__()
        body = create_body(name, pretrained)
        strides, channels = body.feature_info.reduction(), body.feature_info.channels()
        self.kept = [i for i, stride in enumerate(strides) if stride in (4, 8, 16, 32)]
        if [strides[i] for i in self.kept] != [4, 8, 16, 32]:
            raise ValueError(f"backbone {name!r} has strides {strides}; MaskFormer needs 4, 8, 16 and 32")
        self.channels = [channels[i] for i in self.kept]
        self.body = freeze_batch_norm_2d(body) if (pretrained if freeze_bn is None else freeze_bn) else body
        for norm in (module for module in self.body.modules() if "Frozen" in type(module).__name__):
            norm.forward = partial(frozen_norm, norm)
        self.nhwc = getattr(body, "output_fmt", "NCHW") == "NHWC"        # Swin, whose maps each get a norm
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels if self.nhwc)
        data = timm.data.resolve_model_data_config(body)
        self.register_buffer("mean", 255 * torch.tensor(data["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(data["std"]).view(3, 1, 1), persistent=False)

    def forward(self, images):                                           # [B, 3, H, W], RGB 0..255
        features = self.body((images.float() - self.mean) / self.std)
        features = [features[i] for i in self.kept]
        if self.nhwc:                                    # contiguous() makes a step a fifth shorter (CPU)
            features = [norm(x).permute(0, 3, 1, 2).contiguous() for norm, x in zip(self.norms, features)]
        return features                                                  # four of [B, C, H/stride, W/stride]


def frozen_norm(norm, x):      # `type_as`: else autocast stores float32, 2.8 times the memory (R50, bf16)
    if torch.is_grad_enabled() or hasattr(norm, "act"):
        return type(norm).forward(norm, x).type_as(x)    # timm's: slower, but stores no map for backward
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def create_body(name, pretrained):
    """timm's model as the paper uses it; the tags name the ImageNet weights that the paper starts from."""
    tags = {"resnet50": "tv_in1k", "resnet101": "tv_in1k", "swin_small_patch4_window7_224": "ms_in1k",
            "swin_base_patch4_window12_384": "ms_in22k", "swin_large_patch4_window12_384": "ms_in22k"}
    name += f".{tags[name]}" if name in tags else ""                     # for all others timm's choice
    if name.startswith("swin_"):                                         # any input size
        body = timm.create_model(name, pretrained, features_only=True, drop_path_rate=0.3,
                                 strict_img_size=False, always_partition=True)
        body.patch_embed.dynamic_img_pad = True
        for block in (module for module in body.modules() if isinstance(module, SwinTransformerBlock)):
            block.__class__ = PadFirstSwinBlock
        return body
    if name == "resnet101c":     # NOTE 1: wider stem, dilated last stage ("resnet101c.TAG" is timm's own)
        if pretrained:
            raise ValueError("timm has no weights for this stem: use --no-pretrained, or --init WEIGHTS")
        body = timm.create_model(name, features_only=True, stem_width=64)
        for block, dilation in zip(body.layer4, (1, 2, 4)):
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)
        return body
    return timm.create_model(name, pretrained, features_only=True)


class PadFirstSwinBlock(SwinTransformerBlock):
    """NOTE 2: timm shifts, then pads the map to whole windows; the released model pads, then shifts."""

    def _attn(self, x):                                                  # [B, H, W, C]
        H, W = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -W % self.window_size[1], 0, -H % self.window_size[0]))
        return super()._attn(x)[:, :H, :W].contiguous()


# ---------------------------------------------------------------------------------------- pixel decoder
class PixelDecoder(nn.Module):
    """FPN, coarse to fine: four backbone maps -> per-pixel embeddings at stride 4 (Sec. 4.1)."""

    def __init__(self, channels, dim=256):
        super().__init__()
        *finer, coarsest = channels
        self.stem = conv_norm(coarsest, dim, 3, nn.ReLU())
        self.project = nn.ModuleList(conv_norm(c, dim, 1) for c in reversed(finer))
        self.fuse = nn.ModuleList(conv_norm(dim, dim, 3, nn.ReLU()) for _ in finer)
        self.to_pixel_embed = nn.Conv2d(dim, dim, 3, padding=1)          # NOTE 3: 1x1 in Sec. 4.1
        self.apply(init_conv)

    def forward(self, features):
        *finer, coarsest = features
        x = self.stem(coarsest)                                          # [B, D, H/32, W/32]
        for feature, project, fuse in zip(reversed(finer), self.project, self.fuse):
            x = F.interpolate(x, size=feature.shape[-2:], mode="nearest")    # strides 16, 8, 4 in turn
            x = fuse(project(feature) + x)
        return self.to_pixel_embed(x)                                    # [B, D, h, w]


def conv_norm(in_channels, out_channels, kernel, *activation):
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(32, out_channels), *activation)


def init_conv(module):
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, a=1)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ---------------------------------------------------------------------------------------- transformer
def sine_position(h, w, dim, device=None, temperature=10000):
    """-> [h w, dim]: half the channels tell y, half x, as alternating sines and cosines (Sec. 4.1)."""
    frequency = temperature ** -(torch.arange(0, dim // 2, 2, device=device) / (dim // 2))   # [dim/4]
    def encode(n):                                                       # coordinates 1..n -> [n, dim/2]
        angle = (torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * torch.pi)[:, None] * frequency
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
    y, x = encode(h)[:, None].expand(h, w, -1), encode(w)[None].expand(h, w, -1)
    return torch.cat([y, x], -1).flatten(0, 1)


class EncoderLayer(nn.TransformerEncoderLayer):
    """Pixels consult each other, then think alone."""

    def forward(self, x, pos):                                           # [B, HW/32², D], [HW/32², D]
        x = self.norm1(x + self.dropout1(self.self_attn(x + pos, x + pos, x, need_weights=False)[0]))
        return self.norm2(x + self.dropout2(self.linear2(self.dropout(self.linear1(x).relu()))))


class DecoderLayer(nn.TransformerDecoderLayer):
    """Queries consult each other, then the image, then think alone. Positions enter queries and keys only."""

    def forward(self, x, query_pos, memory, memory_pos):                 # x [B, Q, D], memory [B, HW/32², D]
        q, k = x + query_pos, memory + memory_pos
        x = self.norm1(x + self.dropout1(self.self_attn(q, q, x, need_weights=False)[0]))
        q = x + query_pos
        x = self.norm2(x + self.dropout2(self.multihead_attn(q, k, memory, need_weights=False)[0]))
        return self.norm3(x + self.dropout3(self.linear2(self.dropout(self.linear1(x).relu()))))


# ---------------------------------------------------------------------------------------- models
class MaskFormer(nn.Module):
    """Fig. 2: images [B, 3, H, W], RGB 0..255, uint8 or float -> class_logits [L, B, Q, K+1] and mask_logits
    [L, B, Q, h, w], float32. In training mode all decoder layers predict, in eval mode the last (L = 1).
    encoder_layers: 6 in the panoptic ResNet models. size_divisibility: what evaluation pads images to."""

    def __init__(self, num_classes, backbone="resnet50", pretrained=True, num_queries=100, dim=256,
                 decoder_layers=6, encoder_layers=0, heads=8, ffn_dim=2048, dropout=0.1, freeze_bn=None,
                 size_divisibility=32):
        super().__init__()
        self.num_classes, self.size_divisibility = num_classes, size_divisibility
        self.backbone = Backbone(backbone, pretrained, freeze_bn)
        *finer, coarsest = self.backbone.channels
        self.pixel_decoder = PixelDecoder([*finer, dim if encoder_layers else coarsest], dim)
        self.project = nn.Conv2d(coarsest, dim, 1).apply(init_conv)
        layer = EncoderLayer(dim, heads, ffn_dim, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, encoder_layers, enable_nested_tensor=False)
        layer = DecoderLayer(dim, heads, ffn_dim, dropout, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, decoder_layers, norm=nn.LayerNorm(dim))
        for matrix in (p for p in (*self.encoder.parameters(), *self.decoder.parameters()) if p.dim() > 1):
            nn.init.xavier_uniform_(matrix)
        self.query_pos = nn.Embedding(num_queries, dim)
        self.to_class = nn.Linear(dim, num_classes + 1)
        self.to_mask = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(),
                                     nn.Linear(dim, dim))

    def forward(self, images):
        segment_embed, pixel_embed = self.embed(images)                  # [L, B, Q, D], [B, D, h, w]
        with torch.autocast(images.device.type, enabled=False):          # logits are float32, always
            class_logits = self.to_class(segment_embed)                  # [L, B, Q, K+1]
            mask_embed = self.to_mask(segment_embed)                     # [L, B, Q, D]
            mask_logits = torch.einsum("lbqd,bdhw->lbqhw", mask_embed, pixel_embed)
        return class_logits, mask_logits

    def embed(self, images):
        """images -> per-segment embeddings [L, B, Q, D], per-pixel embeddings [B, D, h, w], both float32."""
        features = self.backbone(images)                                 # four maps, strides 4 8 16 32
        image_features = self.project(features[-1])                      # [B, D, H/32, W/32]
        memory = image_features.flatten(2).transpose(1, 2)               # [B, HW/32², D]
        memory_pos = sine_position(*image_features.shape[-2:], memory.shape[-1], memory.device)
        for layer in self.encoder.layers:
            memory = layer(memory, memory_pos)
        if len(self.encoder.layers):                                     # the FPN, too, starts from it
            features[-1] = memory.transpose(1, 2).reshape(image_features.shape)
        pixel_embed = self.pixel_decoder(features)                       # [B, D, h, w]
        with torch.autocast(images.device.type, enabled=False):          # spares 222 casts (six layers)
            return self.decode(memory.float(), memory_pos), pixel_embed.float()

    def decode(self, memory, memory_pos):
        """memory [B, HW/32², D] -> segment_embed [L, B, Q, D]: all layers share the last norm."""
        query_pos = self.query_pos.weight                                # [Q, D]
        x = torch.zeros_like(query_pos).expand(len(memory), -1, -1)      # queries start at zero (Sec. 4.1)
        answers = []
        for layer in self.decoder.layers:
            x = layer(x, query_pos, memory, memory_pos)                  # [B, Q, D]
            answers.append(x)
        return self.decoder.norm(torch.stack(answers if self.training else answers[-1:]))


class PerPixelBaseline(nn.Module):
    """Sec. 4, PerPixelBaseline: images [B, 3, H, W] -> pixel_logits [1, B, K, h, w]."""

    def __init__(self, num_classes, backbone="resnet50", pretrained=True, dim=256, freeze_bn=None):
        super().__init__()
        self.num_classes, self.size_divisibility = num_classes, 0
        self.backbone = Backbone(backbone, pretrained, freeze_bn)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, dim)
        self.to_class = nn.Conv2d(dim, num_classes, 1)

    def forward(self, images):
        pixel_embed = self.pixel_decoder(self.backbone(images))          # [B, D, h, w]
        with torch.autocast(images.device.type, enabled=False):
            return self.to_class(pixel_embed.float())[None]


class PerPixelBaselinePlus(MaskFormer):
    """Sec. 4, PerPixelBaseline+: MaskFormer without class head; mask k holds the scores of class k. images
    [B, 3, H, W] -> pixel_logits [L, B, K, h, w]. MaskFormer's arguments but `num_queries`, which is K."""

    def __init__(self, num_classes, backbone="resnet50", pretrained=True, size_divisibility=0, **options):
        super().__init__(num_classes, backbone, pretrained, num_queries=num_classes,
                         size_divisibility=size_divisibility, **options)
        del self.to_class

    def forward(self, images):
        segment_embed, pixel_embed = self.embed(images)
        with torch.autocast(images.device.type, enabled=False):
            return torch.einsum("lbkd,bdhw->lbkhw", self.to_mask(segment_embed), pixel_embed)


# ---------------------------------------------------------------------------------------- inference
def semantic_inference(class_logits, mask_logits):
    """Sec. 3.4: class_logits [B, Q, K+1], mask_logits [B, Q, H, W] -> class scores [B, K, H, W]."""
    class_prob = class_logits.softmax(-1)[..., :-1]                      # drop "no object"
    return torch.einsum("bqk,bqhw->bkhw", class_prob, mask_logits.sigmoid())


def panoptic_inference(class_logits, mask_logits, is_thing, object_threshold=0.8, overlap_threshold=0.8,
                       size=None):
    """Sec. 3.4, "general inference", of one image: every pixel goes to the query that is most sure of it.

    class_logits [Q, K+1], mask_logits [Q, H, W], is_thing [K] bool -> segment_map [H, W] int32, 0 where void,
    and segments [{"id", "category_id", "isthing", "score"}], ids 1, 2, ... in the order of the queries.
    object_threshold: class probability that a query must exceed; overlap_threshold: minimum visible share of
    its mask; size: H, W to which masks are resized, one by one."""
    score, label = class_logits.softmax(-1).max(-1)                      # [Q]
    keep = (label < len(is_thing)) & (score > object_threshold)
    score, label, mask_logits = score[keep], label[keep], mask_logits[keep].float()
    best = mask_logits.new_zeros(size or mask_logits.shape[-2:])         # [H, W], the highest product so far
    winner = torch.zeros_like(best, dtype=torch.int16)                   # [H, W], and whose it is
    whole = torch.zeros_like(label)                                      # areas, not weighted by the score
    for i, logits in enumerate(mask_logits):
        prob = F.interpolate(logits[None, None], size=best.shape, mode="bilinear")[0, 0].sigmoid()
        whole[i] = (prob >= 0.5).sum()
        prob *= score[i]
        winner.masked_fill_(prob > best, i)
        torch.maximum(best, prob, out=best)
    visible = winner.flatten().bincount(minlength=len(score)).tolist()
    segment_map, segments = torch.zeros_like(winner, dtype=torch.int32), []
    for i, (c, p, area) in enumerate(zip(label.tolist(), score.tolist(), whole.tolist())):
        if visible[i] == 0 or area == 0 or visible[i] / area < overlap_threshold:
            continue
        segment = next((s for s in segments if s["category_id"] == c and not s["isthing"]), None)  # of stuff
        if segment is None:
            segment = {"id": len(segments) + 1, "category_id": c, "isthing": bool(is_thing[c]), "score": p}
            segments.append(segment)
        segment["score"] = max(segment["score"], p)
        segment_map[winner == i] = segment["id"]
    return segment_map, segments


def instance_inference(class_logits, mask_logits, is_thing, top_k=100):
    """The `top_k` best pairs of a query and a thing class in one image; masks may overlap.
    class_logits [Q, K+1], mask_logits [Q, H, W], is_thing [K] bool -> masks [n, H, W] bool, none empty,
    labels [n], falling scores [n]: class probability times mean mask probability inside the mask."""
    things = torch.as_tensor(is_thing, device=class_logits.device).nonzero().squeeze(1)      # [T]
    prob = class_logits.softmax(-1)[:, things]                           # [Q, T]
    score, pair = prob.flatten().topk(min(top_k, prob.numel()))
    query, label = pair // max(len(things), 1), things[pair % max(len(things), 1)]
    masks = mask_logits[query] > 0                                       # [n, H, W]
    area = masks.flatten(1).sum(1)
    score = score * (mask_logits[query].sigmoid() * masks).flatten(1).sum(1) / area.clamp(min=1)
    order = score.masked_fill(area == 0, -1).argsort(descending=True)[:int((area > 0).sum())]
    return masks[order], label[order], score[order]
