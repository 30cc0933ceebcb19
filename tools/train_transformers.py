"""Trains Hugging Face's MaskFormer in place of ours: same images, optimizer, schedule and tests.

    python tools/train_transformers.py --dataset folder --data-root DIR --steps 900

Takes train.py's flags, for a MaskFormer with ResNet-18 or ResNet-50 that starts from scratch and
learns semantic segmentation. A run can be resumed here; evaluate.py cannot read its checkpoints.

Model, initialization and loss are as transformers has them. They differ from ours: weights are
drawn from N(0, 0.02), not by Xavier's rule; attention and feed-forward networks have no dropout
inside; only the last layer's output passes the final norm; and the queries before the first decoder
layer are supervised like a layer's output.
"""
import sys
from pathlib import Path

import torch
import transformers
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from data import UserError
from evaluate import run_command

RESNETS = {
    "resnet18": {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512],
                 "layer_type": "basic"},
    "resnet50": {},                                      # their default
}
DEFAULTS = ["--no-pretrained", "--task", "semantic", "--no-compile"]

# What their model and loss have no counterpart for.
REQUIRED = {"model": "maskformer",
            "task": "semantic",
            "matching": "hungarian",
            "encoder_layers": 0,
            "pretrained": False,
            "freeze_bn": False,
            "backbone_lr_factor": 1.,
            "accumulate": 1,
            "compile": False}


class TheirModel(nn.Module):
    """Their model with the interface of ours: uint8 images in, logits of all layers out.

    L is one more than the number of decoder layers, in both modes; the last layer counts.
    """

    def __init__(self, config):
        super().__init__()
        resnet = transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"],
                                           **RESNETS[config["backbone"]])
        decoder = transformers.DetrConfig(num_queries=config["queries"],
                                          d_model=config["dim"],
                                          decoder_layers=config["decoder_layers"],
                                          decoder_attention_heads=config["heads"],
                                          decoder_ffn_dim=config["ffn_dim"],
                                          dropout=config["dropout"])
        self.model = transformers.MaskFormerForInstanceSegmentation(transformers.MaskFormerConfig(
            backbone_config=resnet,
            decoder_config=decoder,
            num_labels=config["num_classes"],
            fpn_feature_size=config["dim"],
            mask_feature_size=config["dim"],
            use_auxiliary_loss=True,
            no_object_weight=config["no_object_weight"],
            cross_entropy_weight=config["class_weight"],
            mask_weight=config["focal_weight"],
            dice_weight=config["dice_weight"]))

        # evaluate.py looks for these.
        self.num_classes = config["num_classes"]
        self.size_divisibility = config["size_divisibility"]
        self.backbone = nn.Module()
        mean = 255 * torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
        std = 255 * torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
        self.backbone.register_buffer("mean", mean)
        self.backbone.register_buffer("std", std)

    def forward(self, images):
        """images [B, 3, H, W] -> class_logits [L, B, Q, K+1], mask_logits [L, B, Q, h, w]."""
        output = self.model((images.float() - self.backbone.mean) / self.backbone.std,
                            output_hidden_states=True, output_auxiliary_logits=True)
        layers = [*output.auxiliary_logits, output]
        class_logits = torch.stack([layer["class_queries_logits"] for layer in layers])
        mask_logits = torch.stack([layer["masks_queries_logits"] for layer in layers])
        return class_logits.float(), mask_logits.float()

    def compute_loss(self, output, batch, count, args):
        """In place of train.compute_loss: what their own forward does when it is given targets.

        `count` and the weights in `args` are not used: their loss counts segments by itself, and
        the weights are in the model's config.
        """
        class_logits, mask_logits = output
        counts = batch.owner.bincount(minlength=len(batch.images)).tolist()
        masks = list(batch.masks().float().split(counts))
        labels = list(batch.labels.split(counts))
        other_layers = [{"class_queries_logits": classes, "masks_queries_logits": layer_masks}
                        for classes, layer_masks in zip(class_logits[:-1], mask_logits[:-1])]
        terms = self.model.get_loss_dict(mask_logits[-1], class_logits[-1], masks, labels,
                                         other_layers)
        return {"loss": self.model.get_loss(terms)}


def build_model(config, pretrained=False):
    """In place of maskformer.build_model. From here on, train.py uses the new model's loss."""
    model = TheirModel(config)
    train.compute_loss = model.compute_loss
    return model


def main(argv=None):
    """The command: see the top of this file."""
    argv = DEFAULTS + (sys.argv[1:] if argv is None else argv)
    args = train.parse_args(argv)
    wrong = [name for name, value in REQUIRED.items() if getattr(args, name) != value]
    if wrong:
        name, value = wrong[0].replace("_", "-"), REQUIRED[wrong[0]]
        flag = f"--no-{name}" if value is False else f"--{name} {value}"
        raise UserError(f"transformers' model needs {flag}")
    if args.backbone not in RESNETS:
        raise UserError(f"--backbone {args.backbone}: choose {' or '.join(RESNETS)}")
    train.build_model = build_model
    return train.main(argv)


if __name__ == "__main__":
    run_command(main)
