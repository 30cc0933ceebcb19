"""Hugging Face's MaskFormer and loss, trained by train.py in place of ours: same images, optimizer and tests.

    python tests/train_transformers.py --dataset folder --data-root DIR --no-pretrained --steps 900

Takes train.py's flags, for a MaskFormer with ResNet-18 or 50 from scratch whose segments are class regions. A run
can be resumed here, but not tested by evaluate.py. Model, initialisation and loss are as they ship them: N(0, 0.02)
where ours is Xavier, no dropout within attention and feed-forward blocks, the final norm on the last layer alone,
all of it under autocast; the queries before the first decoder layer are supervised, too.
"""
import sys
from pathlib import Path

import torch
import transformers
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from run import UserError, command

RESNETS = {"resnet18": dict(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic"),
           "resnet50": {}}                                               # their default
FIXED = dict(model="maskformer", task="semantic", matching="hungarian", encoder_layers=0, pretrained=False,
             freeze_bn=False, backbone_lr_factor=1., accumulate=1)
LOGITS = "class_queries_logits", "masks_queries_logits"


class Theirs(nn.Module):
    """Their model with our model's interface; in both modes L + 1 layers predict, of which the last counts."""

    def __init__(self, config, num_classes, pretrained=False):
        super().__init__()
        if config["backbone"] not in RESNETS or any(config[name] != value for name, value in FIXED.items()):
            raise UserError(f"flags must amount to {FIXED} and a backbone of {list(RESNETS)}")
        resnet = transformers.ResNetConfig(**RESNETS[config["backbone"]],
                                           out_features=["stage1", "stage2", "stage3", "stage4"])
        decoder = transformers.DetrConfig(
            num_queries=config["queries"], d_model=config["dim"], decoder_layers=config["decoder_layers"],
            decoder_attention_heads=config["heads"], decoder_ffn_dim=config["ffn_dim"], dropout=config["dropout"])
        self.model = transformers.MaskFormerForInstanceSegmentation(transformers.MaskFormerConfig(
            backbone_config=resnet, decoder_config=decoder, num_labels=num_classes, use_auxiliary_loss=True,
            fpn_feature_size=config["dim"], mask_feature_size=config["dim"],
            no_object_weight=config["no_object_weight"], cross_entropy_weight=config["class_weight"],
            mask_weight=config["focal_weight"], dice_weight=config["dice_weight"]))
        self.size_divisibility, self.backbone = config["size_divisibility"], nn.Module()
        for name, values in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.backbone.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1))

    def forward(self, images):
        output = self.model((images.float() - self.backbone.mean) / self.backbone.std,
                            output_hidden_states=True, output_auxiliary_logits=True)
        layers = *output.auxiliary_logits, output
        return tuple(torch.stack([layer[name] for layer in layers]).float() for name in LOGITS)

    def loss(self, output, batch, count, args):
        """What their own forward does if it is given targets; in the place of train.compute_loss."""
        *others, last = (dict(zip(LOGITS, logits)) for logits in zip(*output))
        each = batch.owner.bincount(minlength=len(batch.images)).tolist()        # segments of each image
        targets = batch.masks().float().split(each), batch.labels.split(each)
        class_logits, mask_logits = last.values()
        return {"loss": self.model.get_loss(self.model.get_loss_dict(mask_logits, class_logits, *targets, others))}


def build_model(*arguments):
    model = Theirs(*arguments)
    train.compute_loss = model.loss
    return model


if __name__ == "__main__":
    train.build_model = build_model
    command(train.main)
