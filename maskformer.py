"""What is predicted, and how it becomes a segmentation (MaskFormer, Fig. 2, Sec. 3.3, 3.4, 4.1).

MaskFormer answers an image with Q pairs: a class distribution over K + 1 labels, the last of which
is "no object", and a binary mask. Two per-pixel baselines share its parts.

Letters   B images · L decoder layers · Q queries · K classes · D channels of every embedding
          H W image size · h w = H/4 W/4, rounded up · n queries or masks that are kept
Paper     its N is our Q · its C_E and C_Q are our D
          its calligraphic Q is `segment_embed` · its E_pixel is `pixel_embed`

    model = MaskFormer(num_classes=150, backbone="resnet50", pretrained=False).eval()
    images = torch.randint(256, (2, 3, 128, 160))
    class_logits, mask_logits = model(images)          # [1, 2, 100, 151], [1, 2, 100, 32, 40]
    mask_logits = F.interpolate(mask_logits[-1], size=(128, 160), mode="bilinear")
    scores = semantic_inference(class_logits[-1], mask_logits)       # [2, 150, 128, 160]
"""
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage
from torch import nn


# ----------------------------------------------------------------------------------------- backbone
class Backbone(nn.Module):
    """A timm backbone: images [B, 3, H, W] -> four maps, at strides 4, 8, 16 and 32.

    name: any timm model whose `features_only` maps include strides 4, 8, 16 and 32
    freeze_bn: keep statistics and weights of batch norms (Sec. 4.1); None: as `pretrained`
    """

    def __init__(self, name, pretrained=True, freeze_bn=None):
        super().__init__()
        self.body = create_body(name, pretrained)
        strides = self.body.feature_info.reduction()
        channels = self.body.feature_info.channels()
        self.kept = [i for i, stride in enumerate(strides) if stride in (4, 8, 16, 32)]
        if [strides[i] for i in self.kept] != [4, 8, 16, 32]:
            raise ValueError(f"{name!r} has strides {strides}; MaskFormer needs 4, 8, 16 and 32")
        self.channels = [channels[i] for i in self.kept]

        # Swin's maps are channels-last, and each of the four gets a LayerNorm of its own.
        self.channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        normed = self.channels if self.channels_last else []
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in normed)

        self.freeze_bn = pretrained if freeze_bn is None else freeze_bn
        if self.freeze_bn:
            for norm in self.batch_norms():
                norm.requires_grad_(False)
        self.train()                                                 # frozen norms: in eval mode

        data = timm.data.resolve_model_data_config(self.body)
        mean = 255 * torch.tensor(data["mean"]).view(3, 1, 1)
        std = 255 * torch.tensor(data["std"]).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images):                                       # [B, 3, H, W], RGB 0..255
        features = self.body((images.to(self.mean.dtype) - self.mean) / self.std)
        features = [features[i] for i in self.kept]
        if self.channels_last:
            features = [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, features)]
            features = [x.contiguous() for x in features]            # a CPU step: a fifth faster
        return features                                              # [B, C, H/stride, W/stride]

    def train(self, mode=True):
        """As in every module, but frozen batch norms stay in eval mode."""
        super().train(mode)
        if self.freeze_bn:
            for norm in self.batch_norms():
                norm.eval()
        return self

    def batch_norms(self):
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]


def create_body(name, pretrained):
    """timm's model, with the architecture and the ImageNet weights that the paper starts from."""
    tags = {"resnet50": "tv_in1k",
            "resnet101": "tv_in1k",
            "swin_small_patch4_window7_224": "ms_in1k",
            "swin_base_patch4_window12_384": "ms_in22k",
            "swin_large_patch4_window12_384": "ms_in22k"}
    if name in tags:                                                 # others: timm's choice
        name = f"{name}.{tags[name]}"

    if name.startswith("swin_"):
        body = timm.create_model(name, pretrained, features_only=True, drop_path_rate=0.3,
                                 strict_img_size=False, always_partition=True)
        body.patch_embed.dynamic_img_pad = True                      # any height and width
        for module in body.modules():
            if isinstance(module, SwinTransformerStage):
                module.blocks = nn.Sequential(*map(PadFirstSwinBlock, module.blocks))
        return body

    if name == "resnet101c":
        # NOTE 1: the released R101c has a wider stem than timm's and a dilated last stage.
        if pretrained:
            raise ValueError("timm has no weights for it: use --init or --init-backbone WEIGHTS, "
                             "or --no-pretrained")
        body = timm.create_model(name, features_only=True, stem_width=64)
        for block, dilation in zip(body.layer4, (1, 2, 4)):
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)
        return body

    return timm.create_model(name, pretrained, features_only=True)


class PadFirstSwinBlock(SwinTransformerBlock):
    """NOTE 2: the released Swin pads its maps to whole windows and then shifts; timm shifts first.

    timm has no option for this, so each of its blocks is replaced by one of these. The map is
    padded before timm's own attention, which then finds nothing to pad, and is cropped afterwards.
    """

    def __init__(self, block):
        nn.Module.__init__(self)
        vars(self).update(vars(block))                               # settings, parts, weights

    def _attn(self, x):                                              # [B, H, W, C]
        H, W = x.shape[1:3]
        bottom = -H % self.window_size[0]
        right = -W % self.window_size[1]
        x = super()._attn(F.pad(x, (0, 0, 0, right, 0, bottom)))
        return x[:, :H, :W].contiguous()


# ------------------------------------------------------------------------------------ pixel decoder
class PixelDecoder(nn.Module):
    """FPN: four maps, strides 4 to 32 -> per-pixel embeddings [B, D, h, w] (Sec. 4.1)."""

    def __init__(self, channels, dim=256):
        super().__init__()
        *finer, coarsest = channels
        self.stem = conv_norm(coarsest, dim, 3, nn.ReLU())
        self.project = nn.ModuleList(conv_norm(c, dim, 1) for c in reversed(finer))
        self.fuse = nn.ModuleList(conv_norm(dim, dim, 3, nn.ReLU()) for _ in finer)
        self.to_pixel_embed = nn.Conv2d(dim, dim, 3, padding=1)      # NOTE 3: Sec. 4.1 has 1x1
        self.apply(init_conv)

    def forward(self, features):
        *finer, coarsest = features
        x = self.stem(coarsest)                                      # [B, D, H/32, W/32]
        for feature, project, fuse in zip(reversed(finer), self.project, self.fuse):
            x = F.interpolate(x, size=feature.shape[-2:], mode="nearest")    # stride 16, 8, 4
            x = fuse(project(feature) + x)
        return self.to_pixel_embed(x)                                # [B, D, h, w]


def conv_norm(in_channels, out_channels, kernel, *activation):
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(32, out_channels), *activation)


def init_conv(module):
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, a=1)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# -------------------------------------------------------------------------------------- transformer
def sine_position(height, width, dim, device=None, temperature=10000):
    """-> [height * width, dim]: the first half of the channels for y, the second for x; sines and
    cosines alternate."""
    frequency = temperature ** -(torch.arange(0, dim // 2, 2, device=device) / (dim // 2))

    def encode_axis(length):                                         # -> [length, dim/2]
        coordinate = torch.arange(1, length + 1, device=device) / (length + 1e-6) * 2 * torch.pi
        angle = coordinate[:, None] * frequency                      # [length, dim/4]
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    y = encode_axis(height)[:, None].expand(-1, width, -1)           # [height, width, dim/2]
    x = encode_axis(width)[None, :].expand(height, -1, -1)
    return torch.cat([y, x], -1).flatten(0, 1)


class EncoderLayer(nn.TransformerEncoderLayer):
    """Self-attention over pixels, then a feed-forward network. Positions steer attention only."""

    def forward(self, x, pos):                                       # [B, HW/32², D], [HW/32², D]
        q = k = x + pos
        x = self.norm1(x + self.dropout1(self.self_attn(q, k, x, need_weights=False)[0]))
        hidden = self.dropout(self.linear1(x).relu())
        return self.norm2(x + self.dropout2(self.linear2(hidden)))


class DecoderLayer(nn.TransformerDecoderLayer):
    """Self-attention over queries, cross-attention to pixels, then a feed-forward network.

    Positions are added to what attention compares (queries, keys), never to what it sums (values).
    """

    def forward(self, x, query_pos, memory, memory_pos):             # x [B, Q, D]
        q = k = x + query_pos
        x = self.norm1(x + self.dropout1(self.self_attn(q, k, x, need_weights=False)[0]))
        q, k = x + query_pos, memory + memory_pos
        x = self.norm2(x + self.dropout2(self.multihead_attn(q, k, memory, need_weights=False)[0]))
        hidden = self.dropout(self.linear1(x).relu())
        return self.norm3(x + self.dropout3(self.linear2(hidden)))


# ------------------------------------------------------------------------------------------- models
class MaskFormer(nn.Module):
    """Fig. 2: images -> Q pairs of a class distribution and a binary mask.

    encoder_layers: of a transformer encoder on the stride-32 map (6 in the panoptic ResNet models)
    size_divisibility: evaluation pads images to a multiple of this
    """

    def __init__(self, num_classes, backbone="resnet50", pretrained=True, num_queries=100, dim=256,
                 decoder_layers=6, encoder_layers=0, heads=8, ffn_dim=2048, dropout=0.1,
                 freeze_bn=None, size_divisibility=32):
        super().__init__()
        self.num_classes = num_classes
        self.size_divisibility = size_divisibility

        self.backbone = Backbone(backbone, pretrained, freeze_bn)
        *finer, coarsest = self.backbone.channels

        self.pixel_decoder = PixelDecoder([*finer, dim if encoder_layers else coarsest], dim)

        self.project = nn.Conv2d(coarsest, dim, 1).apply(init_conv)
        layer = EncoderLayer(dim, heads, ffn_dim, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, encoder_layers, enable_nested_tensor=False)
        layer = DecoderLayer(dim, heads, ffn_dim, dropout, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, decoder_layers, norm=nn.LayerNorm(dim))
        for parameter in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.query_pos = nn.Embedding(num_queries, dim)

        self.to_class = nn.Linear(dim, num_classes + 1)
        self.to_mask = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(),
                                     nn.Linear(dim, dim), nn.ReLU(),
                                     nn.Linear(dim, dim))

    def forward(self, images):
        """images [B, 3, H, W], RGB 0..255, uint8 or float
        -> class_logits [L, B, Q, K+1], mask_logits [L, B, Q, h, w], float32

        In training mode all decoder layers predict, in eval mode only the last (L = 1).
        """
        features = self.backbone(images)                             # strides 4, 8, 16, 32
        features, memory, memory_pos = self.encode(features)         # memory [B, HW/32², D]
        pixel_embed = self.pixel_decoder(features)                   # [B, D, h, w]
        segment_embed = self.decode(memory, memory_pos)              # [L, B, Q, D]

        with torch.autocast(images.device.type, enabled=False):      # float32 logits, always
            class_logits = self.to_class(segment_embed)              # [L, B, Q, K+1]
            mask_embed = self.to_mask(segment_embed)                 # [L, B, Q, D]
            pixel_embed = pixel_embed.to(mask_embed.dtype)
            mask_logits = torch.einsum("lbqd,bdhw->lbqhw", mask_embed, pixel_embed)
        return class_logits.float(), mask_logits.float()

    def encode(self, features):
        """Four maps -> maps for the pixel decoder, memory [B, HW/32², D], and its positions.

        The memory is the stride-32 map, projected to D channels. With a transformer encoder, it is
        the encoder's output, which also replaces that map for the pixel decoder.
        """
        x = self.project(features[-1])                               # [B, D, H/32, W/32]
        memory = x.flatten(2).transpose(1, 2)                        # [B, HW/32², D]
        memory_pos = sine_position(*x.shape[-2:], x.shape[1], x.device)  # [HW/32², D]
        memory_pos = memory_pos.to(self.query_pos.weight.dtype)
        for layer in self.encoder.layers:
            memory = layer(memory, memory_pos)
        if len(self.encoder.layers) > 0:
            encoded = memory.transpose(1, 2).reshape(x.shape)
            features = [*features[:-1], encoded]
        return features, memory, memory_pos

    def decode(self, memory, memory_pos):
        """memory [B, HW/32², D] -> segment_embed [L, B, Q, D]; the layers share the final norm."""
        query_pos = self.query_pos.weight                            # [Q, D]
        x = torch.zeros_like(query_pos)                              # queries start at zero
        x = x.expand(memory.shape[0], -1, -1)                        # [B, Q, D]
        outputs = []
        for layer in self.decoder.layers:
            x = layer(x, query_pos, memory, memory_pos)              # [B, Q, D]
            outputs.append(x)
        if not self.training:
            outputs = outputs[-1:]
        return self.decoder.norm(torch.stack(outputs))               # [L, B, Q, D]


class PerPixelBaseline(nn.Module):
    """Sec. 4, PerPixelBaseline: the pixel decoder and a linear classifier of its pixels."""

    def __init__(self, num_classes, backbone="resnet50", pretrained=True, dim=256, freeze_bn=None):
        super().__init__()
        self.num_classes = num_classes
        self.size_divisibility = 0                                   # images are not padded
        self.backbone = Backbone(backbone, pretrained, freeze_bn)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, dim)
        self.to_class = nn.Conv2d(dim, num_classes, 1)

    def forward(self, images):
        """images [B, 3, H, W], RGB 0..255 -> pixel_logits [1, B, K, h, w], float32."""
        pixel_embed = self.pixel_decoder(self.backbone(images))      # [B, D, h, w]
        with torch.autocast(images.device.type, enabled=False):
            pixel_logits = self.to_class(pixel_embed.to(self.to_class.weight.dtype))
        return pixel_logits[None].float()


class PerPixelBaselinePlus(MaskFormer):
    """Sec. 4, PerPixelBaseline+: MaskFormer without its class head; query k's mask scores class k.

    Takes all arguments of MaskFormer except `num_queries`, which is K. By default, images are not
    padded.
    """

    def __init__(self, num_classes, backbone="resnet50", pretrained=True, size_divisibility=0,
                 **options):
        super().__init__(num_classes, backbone, pretrained, num_queries=num_classes,
                         size_divisibility=size_divisibility, **options)
        del self.to_class

    def forward(self, images):
        """images [B, 3, H, W], RGB 0..255 -> pixel_logits [L, B, K, h, w], float32."""
        features = self.backbone(images)                             # strides 4, 8, 16, 32
        features, memory, memory_pos = self.encode(features)         # memory [B, HW/32², D]
        pixel_embed = self.pixel_decoder(features)                   # [B, D, h, w]
        segment_embed = self.decode(memory, memory_pos)              # [L, B, K, D]

        with torch.autocast(images.device.type, enabled=False):
            mask_embed = self.to_mask(segment_embed)                 # [L, B, K, D]
            pixel_embed = pixel_embed.to(mask_embed.dtype)
            pixel_logits = torch.einsum("lbkd,bdhw->lbkhw", mask_embed, pixel_embed)
        return pixel_logits.float()


def build_model(config, pretrained=False):
    """The model that a dict of train.py's flags describes. ValueError, OSError or RuntimeError
    (of timm) if the backbone does not exist or its weights cannot be had."""
    options = {"backbone": config["backbone"],
               "pretrained": pretrained,
               "dim": config["dim"],
               "freeze_bn": config["freeze_bn"]}
    if config["model"] == "per-pixel":
        return PerPixelBaseline(config["num_classes"], **options)

    for name in ("decoder_layers", "encoder_layers", "heads", "ffn_dim", "dropout"):
        options[name] = config[name]
    if config["model"] == "per-pixel-plus":
        return PerPixelBaselinePlus(config["num_classes"], **options)

    return MaskFormer(config["num_classes"], num_queries=config["queries"],
                      size_divisibility=config["size_divisibility"], **options)


# ---------------------------------------------------------------------------------------- inference
def semantic_inference(class_logits, mask_logits):
    """Sec. 3.4: class_logits [B, Q, K+1], mask_logits [B, Q, H, W] -> class scores [B, K, H, W]."""
    class_prob = class_logits.softmax(-1)[..., :-1]                  # drop "no object"
    mask_prob = mask_logits.sigmoid()
    return torch.einsum("bqk,bqhw->bkhw", class_prob, mask_prob)


def panoptic_inference(class_logits, mask_logits, is_thing, object_threshold=0.8,
                       overlap_threshold=0.8, size=None):
    """Sec. 3.4, "general inference": every pixel goes to the query with the best p_i(c_i) m_i.

    class_logits [Q, K+1], mask_logits [Q, H, W] of one image, is_thing [K] bool
    object_threshold: a query takes part if its likeliest label is a class, more probable than this
    overlap_threshold: a segment survives if it keeps at least this share of its mask
    size: (H, W) to which the masks of the queries that take part are resized first

    -> segment_map [H, W] int32, 0 where void,
       segments [{"id", "category_id", "isthing", "score"}], with the ids 1, 2, ... of the map
    """
    score, label = class_logits.softmax(-1).max(-1)                  # [Q]: p_i(c_i) and c_i
    no_object = class_logits.shape[-1] - 1
    keep = (label != no_object) & (score > object_threshold)
    score, label, mask_logits = score[keep], label[keep], mask_logits[keep]

    if size is not None:
        mask_logits = F.interpolate(mask_logits[:, None], size=size, mode="bilinear")[:, 0]
    mask_prob = mask_logits.sigmoid()                                # [n, H, W]: m_i
    segment_map = torch.zeros(mask_prob.shape[1:], dtype=torch.int32, device=mask_prob.device)
    if len(score) == 0:
        return segment_map, []

    winner = (score[:, None, None] * mask_prob).argmax(0)            # argmax_i p_i(c_i) m_i
    mask_area = (mask_prob >= 0.5).flatten(1).sum(1)                 # [n], not weighted by p_i
    visible_area = winner.flatten().bincount(minlength=len(score))   # [n]
    survives = (visible_area > 0) & (mask_area > 0)
    survives &= visible_area / mask_area >= overlap_threshold

    scores, labels = score.tolist(), label.tolist()
    segments = []
    stuff = {}                                                       # class -> its only segment
    for i in survives.nonzero().flatten().tolist():
        k = labels[i]
        segment = stuff.get(k)
        if segment is None:
            segment = {"id": len(segments) + 1, "category_id": k, "isthing": bool(is_thing[k]),
                       "score": scores[i]}
            segments.append(segment)
            if not segment["isthing"]:
                stuff[k] = segment                                   # regions of k join it
        segment["score"] = max(segment["score"], scores[i])
        segment_map[winner == i] = segment["id"]
    return segment_map, segments


def instance_inference(class_logits, mask_logits, is_thing, top_k=100):
    """The best `top_k` pairs of a query and a thing class in one image; their masks may overlap.

    class_logits [Q, K+1], mask_logits [Q, H, W], is_thing [K] bool
    -> masks [n, H, W] bool, none of them empty, labels [n], scores [n], highest first: the class
       probability times the mean mask probability inside the mask
    """
    things = torch.as_tensor(is_thing, device=class_logits.device).nonzero().flatten()
    prob = class_logits.softmax(-1)[:, things]                       # [Q, number of things]
    class_score, pair = prob.flatten().topk(min(top_k, prob.numel()))
    columns = max(1, len(things))                                    # without things, pair is empty
    query, label = pair // columns, things[pair % columns]

    masks = mask_logits[query] > 0                                   # [n, H, W]
    area = masks.flatten(1).sum(1)
    inside = (mask_logits[query].sigmoid() * masks).flatten(1).sum(1)
    score = class_score * inside / area.clamp(min=1)

    order = score.argsort(descending=True)
    order = order[area[order] > 0]
    return masks[order], label[order], score[order]
