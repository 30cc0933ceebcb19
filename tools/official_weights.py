"""The authors' released weights, and Hugging Face's files, as checkpoints of ours.

    python tools/official_weights.py maskformer_R50_bs16_160k         # writes that name with .pt
    python tools/official_weights.py model_final_d8dbeb.pkl --output r50.pt

    model = load_official("maskformer_R50_bs16_160k")    # downloaded once, into torch.hub's folder
    model = load_official("model_final_d8dbeb.pkl")      # from a file; no code in the file is run
    model = load_official("folder")                      # as save_pretrained of transformers writes
    class_logits, mask_logits = model(torch.randint(256, (1, 3, 512, 512)))

The model is inferred from names and shapes, and from config.json where there is one. The authors'
weights are under CC BY-NC 4.0: no commercial use.
"""
import argparse
import json
import pickle
import re
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file                              # comes with timm
from torchvision.datasets import Cityscapes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import UserError, listing, published_classes
from maskformer import build_model

ZOO_URL = "https://dl.fbaipublicfiles.com/maskformer"
ZOO = {                                                              # config: (folder, hash)
    "per_pixel_baseline_R50_bs16_160k": ("semantic-ade20k", "1043f3"),
    "per_pixel_baseline_plus_R50_bs16_160k": ("semantic-ade20k", "833630"),
    "maskformer_R50_bs16_160k": ("semantic-ade20k", "d8dbeb"),
    "maskformer_R101_bs16_160k": ("semantic-ade20k", "1aeb94"),
    "maskformer_R101c_bs16_160k": ("semantic-ade20k", "b432ea"),
    "maskformer_swin_tiny_bs16_160k": ("semantic-ade20k", "8657a5"),
    "maskformer_swin_small_bs16_160k": ("semantic-ade20k", "528157"),
    "maskformer_swin_base_IN21k_384_bs16_160k_res640": ("semantic-ade20k", "45388b"),
    "maskformer_swin_large_IN21k_384_bs16_160k_res640": ("semantic-ade20k", "aefa3b"),
    "per_pixel_baseline_R50_bs32_60k": ("semantic-coco-stuff-10k", "275ab0"),
    "per_pixel_baseline_plus_R50_bs32_60k": ("semantic-coco-stuff-10k", "1fa920"),
    "maskformer_R50_bs32_60k": ("semantic-coco-stuff-10k", "cb03eb"),
    "maskformer_R101_bs32_60k": ("semantic-coco-stuff-10k", "eb19bb"),
    "maskformer_R101c_bs32_60k": ("semantic-coco-stuff-10k", "bffd25"),
    "per_pixel_baseline_R50_bs16_200k": ("semantic-ade20k-full", "9f66a9"),
    "per_pixel_baseline_plus_R50_bs16_200k": ("semantic-ade20k-full", "4d31f2"),
    "maskformer_R50_bs16_200k": ("semantic-ade20k-full", "f4e3f6"),
    "maskformer_R101_bs16_200k": ("semantic-ade20k-full", "88df33"),
    "maskformer_R101c_bs16_200k": ("semantic-ade20k-full", "75d34e"),
    "maskformer_R101_bs16_90k": ("semantic-cityscapes", "38c00c"),
    "maskformer_R101c_bs16_90k": ("semantic-cityscapes", "4f8ff9"),
    "maskformer_R50_bs16_300k": ("semantic-mapillary-vistas", "f3fc73"),
    "maskformer_panoptic_R50_bs64_554k": ("panoptic-coco", "6f60dc"),
    "maskformer_panoptic_R101_bs64_554k": ("panoptic-coco", "57b049"),
    "maskformer_panoptic_swin_tiny_bs64_554k": ("panoptic-coco", "539394"),
    "maskformer_panoptic_swin_small_bs64_554k": ("panoptic-coco", "5bf6b1"),
    "maskformer_panoptic_swin_base_IN21k_384_bs64_554k": ("panoptic-coco", "4b7f49"),
    "maskformer_panoptic_swin_large_IN21k_384_bs64_554k": ("panoptic-coco", "7505c4"),
    "maskformer_panoptic_R50_bs16_720k": ("panoptic-ade20k", "7aa977"),
    "maskformer_panoptic_R101_bs16_720k": ("panoptic-ade20k", "0b3cc8"),
}

BACKBONES = {                         # (blocks of the stages, channels at stride 4): timm's name
    ((2, 2, 2, 2), 64): "resnet18",
    ((2, 2, 2, 2), 256): "resnet26",
    ((3, 4, 6, 3), 64): "resnet34",
    ((3, 4, 6, 3), 256): "resnet50",
    ((3, 4, 23, 3), 256): "resnet101",
    ((3, 8, 36, 3), 256): "resnet152",
    ((2, 2, 6, 2), 96): "swin_tiny_patch4_window7_224",
    ((2, 2, 18, 2), 96): "swin_small_patch4_window7_224",
    ((2, 2, 18, 2), 128): "swin_base_patch4_window12_384",
    ((2, 2, 18, 2), 192): "swin_large_patch4_window12_384",
}

DATASET_OF = {                        # number of classes: a dataset of train.py
    19: "cityscapes",
    65: "mapillary",
    133: "coco-panoptic",
    150: "ade20k",
    171: "coco-stuff-10k",
    847: "ade20k-full",
}


# -------------------------------------------------------------------------------------------- names
# A row is a pattern and its replacement, for re.sub. Every name passes all rows, top to bottom.
# The names on the right are those of timm's backbones ("backbone.body.") and of maskformer.py.
OFFICIAL = [
    # ResNet: its stages res2 to res5 are timm's layer1 to layer4.
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.body.bn1."),
    (r"^backbone\.stem\.conv1\.", "backbone.body.conv1."),
    (r"^backbone\.res2\.", "backbone.body.layer1."),
    (r"^backbone\.res3\.", "backbone.body.layer2."),
    (r"^backbone\.res4\.", "backbone.body.layer3."),
    (r"^backbone\.res5\.", "backbone.body.layer4."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),

    # Swin: a stage there ends with downsampling; in timm the next one starts with it.
    (r"^backbone\.patch_embed\.", "backbone.body.patch_embed."),
    (r"^backbone\.layers\.0\.downsample\.", "backbone.body.layers_1.downsample."),
    (r"^backbone\.layers\.1\.downsample\.", "backbone.body.layers_2.downsample."),
    (r"^backbone\.layers\.2\.downsample\.", "backbone.body.layers_3.downsample."),
    (r"^backbone\.layers\.(\d)\.", r"backbone.body.layers_\1."),
    (r"^backbone\.norm(\d)\.", r"backbone.norms.\1."),

    # Pixel decoder: levels count from fine to coarse there, and in the order of computation here.
    # The oldest files do not have its name.
    (r"^sem_seg_head\.pixel_decoder\.", "sem_seg_head."),
    (r"^sem_seg_head\.layer_4\.", "pixel_decoder.stem."),
    (r"^sem_seg_head\.layer_3\.", "pixel_decoder.fuse.0."),
    (r"^sem_seg_head\.layer_2\.", "pixel_decoder.fuse.1."),
    (r"^sem_seg_head\.layer_1\.", "pixel_decoder.fuse.2."),
    (r"^sem_seg_head\.adapter_3\.", "pixel_decoder.project.0."),
    (r"^sem_seg_head\.adapter_2\.", "pixel_decoder.project.1."),
    (r"^sem_seg_head\.adapter_1\.", "pixel_decoder.project.2."),
    (r"^(pixel_decoder\..*)\.norm\.", r"\1.1."),
    (r"^(pixel_decoder\.(?:stem|fuse\.\d|project\.\d))\.weight", r"\1.0.weight"),
    (r"^sem_seg_head\.mask_features\.", "pixel_decoder.to_pixel_embed."),

    # Transformer and heads. The last row is the classifier of the per-pixel baseline.
    (r"^sem_seg_head\.(predictor\.)?input_proj\.", "project."),
    (r"^sem_seg_head\.transformer\.encoder\.", "encoder."),
    (r"^sem_seg_head\.predictor\.transformer\.decoder\.", "decoder."),
    (r"^sem_seg_head\.predictor\.query_embed\.", "query_pos."),
    (r"^sem_seg_head\.predictor\.class_embed\.", "to_class."),
    (r"^sem_seg_head\.predictor\.mask_embed\.layers\.0\.", "to_mask.0."),
    (r"^sem_seg_head\.predictor\.mask_embed\.layers\.1\.", "to_mask.2."),
    (r"^sem_seg_head\.predictor\.mask_embed\.layers\.2\.", "to_mask.4."),
    (r"^sem_seg_head\.predictor\.(weight|bias)$", r"to_class.\1"),
]

# R101c's stem of three convolutions, before OFFICIAL: timm counts the norms and ReLUs between them.
DEEP_STEM = [
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.body.conv1.1."),
    (r"^backbone\.stem\.conv1\.", "backbone.body.conv1.0."),
    (r"^backbone\.stem\.conv2\.norm\.", "backbone.body.conv1.4."),
    (r"^backbone\.stem\.conv2\.", "backbone.body.conv1.3."),
    (r"^backbone\.stem\.conv3\.norm\.", "backbone.body.bn1."),
    (r"^backbone\.stem\.conv3\.", "backbone.body.conv1.6."),
]

HUGGING_FACE = [
    (r"^model\.pixel_level_module\.encoder\.", "backbone.body."),
    (r"^model\.pixel_level_module\.decoder\.", "pixel_decoder."),
    (r"^model\.transformer_module\.", ""),

    # ResNet.
    (r"^backbone\.body\.embedder\.embedder\.convolution\.", "backbone.body.conv1."),
    (r"^backbone\.body\.embedder\.embedder\.normalization\.", "backbone.body.bn1."),
    (r"^backbone\.body\.encoder\.stages\.0\.layers\.", "backbone.body.layer1."),
    (r"^backbone\.body\.encoder\.stages\.1\.layers\.", "backbone.body.layer2."),
    (r"^backbone\.body\.encoder\.stages\.2\.layers\.", "backbone.body.layer3."),
    (r"^backbone\.body\.encoder\.stages\.3\.layers\.", "backbone.body.layer4."),
    (r"\.layer\.0\.convolution\.", ".conv1."),
    (r"\.layer\.1\.convolution\.", ".conv2."),
    (r"\.layer\.2\.convolution\.", ".conv3."),
    (r"\.layer\.0\.normalization\.", ".bn1."),
    (r"\.layer\.1\.normalization\.", ".bn2."),
    (r"\.layer\.2\.normalization\.", ".bn3."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),

    # Swin.
    (r"^backbone\.body\.hidden_states_norms\.", "backbone.norms."),
    (r"^backbone\.body\.model\.embeddings\.norm\.", "backbone.body.patch_embed.norm."),
    (r"\.model\.embeddings\.patch_embeddings\.projection\.", ".patch_embed.proj."),
    (r"\.model\.encoder\.layers\.0\.downsample\.", ".layers_1.downsample."),
    (r"\.model\.encoder\.layers\.1\.downsample\.", ".layers_2.downsample."),
    (r"\.model\.encoder\.layers\.2\.downsample\.", ".layers_3.downsample."),
    (r"\.model\.encoder\.layers\.(\d)\.", r".layers_\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),

    # Pixel decoder.
    (r"^pixel_decoder\.fpn\.stem\.", "pixel_decoder.stem."),
    (r"^pixel_decoder\.fpn\.layers\.(\d)\.proj\.", r"pixel_decoder.project.\1."),
    (r"^pixel_decoder\.fpn\.layers\.(\d)\.block\.", r"pixel_decoder.fuse.\1."),
    (r"^pixel_decoder\.mask_projection\.", "pixel_decoder.to_pixel_embed."),

    # Transformer and heads.
    (r"^input_projection\.", "project."),
    (r"^queries_embedder\.", "query_pos."),
    (r"^decoder\.layernorm\.", "decoder.norm."),
    (r"\.encoder_attn\.", ".multihead_attn."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"\.final_layer_norm\.", ".norm3."),
    (r"^(decoder\.layers\.\d+)\.(?:mlp\.)?fc(\d)\.", r"\1.linear\2."),
    (r"^class_predictor\.", "to_class."),
    (r"^mask_embedder\.0\.0\.", "to_mask.0."),
    (r"^mask_embedder\.1\.0\.", "to_mask.2."),
    (r"^mask_embedder\.2\.0\.", "to_mask.4."),
]

# What the model does not need: weights of the loss, constants, counters, and the last norm of
# Hugging Face's Swin, which their MaskFormer does not use either.
NOT_NEEDED = re.compile(
    r"criterion\.empty_weight|pixel_mean|pixel_std"
    r"|.*\.relative_position_index|.*\.num_batches_tracked"
    r"|model\.pixel_level_module\.encoder\.model\.layernorm\.(weight|bias)")


def translate(state):
    """{their name: array} -> {our name: (their name, tensor)}, without those NOT_NEEDED.

    Raises UserError if two of their names become the same one of ours.
    """
    if is_hugging_face(state):
        state = join_attention(state)
        rows = HUGGING_FACE
    elif "backbone.stem.conv2.weight" in state:
        rows = DEEP_STEM + OFFICIAL
    else:
        rows = OFFICIAL

    found = {}
    for theirs, array in state.items():
        if NOT_NEEDED.fullmatch(theirs):
            continue
        name = theirs
        for pattern, replacement in rows:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise UserError(f"both {found[name][0]} and {theirs} are our {name}")
        found[name] = theirs, torch.as_tensor(array)
    return found


def is_hugging_face(state):
    return "class_predictor.weight" in state


ATTENTION = [                         # Hugging Face's query, key and value; the three in one array
    (".q_proj.", ".k_proj.", ".v_proj.", ".in_proj_"),               # as torch has it
    (".query.", ".key.", ".value.", ".qkv."),                        # as timm's Swin has it
]


def join_attention(state):
    """Joins what Hugging Face keeps apart. UserError if a part is missing."""
    joined = dict(state)
    for name in state:
        for query, key, value, together in ATTENTION:
            if query not in name:
                continue
            parts = [name, name.replace(query, key), name.replace(query, value)]
            for part in parts:
                if part not in state:
                    raise UserError(f"these weights do not fit the model: no {part}")
            arrays = [torch.as_tensor(joined.pop(part)) for part in parts]
            joined[name.replace(query, together)] = torch.cat(arrays)
    return joined


def official_to_ours(state, model):
    """{official name: array} -> state_dict of `model`. Hugging Face's names will do as well.

    Every array is used once, but for those NOT_NEEDED, and every entry of `model` is filled.
    Raises UserError with the names of those that do not fit.
    """
    found = translate(state)
    ours = model.state_dict()
    wrong = []
    for name, (theirs, tensor) in found.items():
        if name not in ours:
            wrong.append(f"{theirs} has no place in the model")
        elif tensor.shape != ours[name].shape:
            wrong.append(f"{theirs} is {tuple(tensor.shape)}, our {name} {tuple(ours[name].shape)}")

    filled = {}
    for name in ours:
        if name in found:
            filled[name] = found[name][1]
        elif name.endswith(".num_batches_tracked"):                  # a counter that nothing reads
            filled[name] = torch.tensor(0)
        else:
            wrong.append(f"no {name}")
    if wrong:
        raise UserError(f"these weights do not fit the model: {listing(wrong)}")
    return filled


# ---------------------------------------------------------------------------------------- the model
def model_flags(found):
    """What `translate` returns -> the flags of train.py that describe this model.

    No array shows the number of heads and the dropout: 8 and 0.1, as in all released models.
    Raises UserError if the backbone is not one of BACKBONES, or if this is no MaskFormer.
    """
    flags = {
        "model": "maskformer",
        "backbone": backbone_of(found),
        "freeze_bn": True,
        "dim": size_of(found, "pixel_decoder.to_pixel_embed.bias"),
        "queries": 100,
        "encoder_layers": count(found, "encoder.layers."),
        "decoder_layers": count(found, "decoder.layers."),
        "heads": 8,
        "ffn_dim": 2048,
        "dropout": 0.1,
    }
    if "query_pos.weight" not in found:
        return flags | {"model": "per-pixel", "num_classes": size_of(found, "to_class.bias")}

    flags["queries"] = size_of(found, "query_pos.weight")
    flags["ffn_dim"] = size_of(found, "decoder.layers.0.linear1.bias")
    if "to_class.bias" not in found:
        return flags | {"model": "per-pixel-plus", "num_classes": flags["queries"]}
    return flags | {"num_classes": size_of(found, "to_class.bias") - 1}      # without "no object"


def backbone_of(found):
    """The timm name of the backbone, by its stages."""
    if "backbone.body.patch_embed.proj.weight" in found:
        blocks = tuple(count(found, f"backbone.body.layers_{i}.blocks.") for i in (0, 1, 2, 3))
    else:
        blocks = tuple(count(found, f"backbone.body.layer{i}.") for i in (1, 2, 3, 4))
    channels = size_of(found, "pixel_decoder.project.2.0.weight", axis=1)
    backbone = BACKBONES.get((blocks, channels))

    if "backbone.body.conv1.6.weight" in found:                      # a stem of three convolutions
        backbone = "resnet101c" if backbone == "resnet101" else None
    if backbone is None:
        known = ", ".join([*BACKBONES.values(), "resnet101c"])
        raise UserError(f"unknown backbone, with stages of {blocks} blocks and {channels} channels "
                        f"at stride 4; known are {known}")
    return backbone


def size_of(found, name, axis=0):
    if name not in found:
        raise UserError(f"these weights are no MaskFormer's: nothing in them is our {name}")
    return found[name][1].shape[axis]


def count(found, prefix):
    """How many numbers follow the prefix: "decoder.layers." -> number of decoder layers."""
    return len({name.removeprefix(prefix).split(".")[0]
                for name in found if name.startswith(prefix)})


# -------------------------------------------------------------------------------------- config.json
# Options of Hugging Face's backbones and decoder that change the output but no shape, with what our
# model computes. They are also the defaults of transformers.
COMPUTED = {
    "resnet": {"hidden_act": "relu",
               "downsample_in_first_stage": False,
               "downsample_in_bottleneck": False},
    "swin": {"hidden_act": "gelu",
             "layer_norm_eps": 1e-5},
    "detr": {"activation_function": "relu",
             "auxiliary_loss": False},                               # True: norms between layers
}


def hugging_face_config(path):
    """A folder or a file -> the content of config.json in it or beside it, and its path.

    The content is {} if there is no such file.
    """
    config_path = (path if path.is_dir() else path.parent) / "config.json"
    if config_path.is_file():
        return read_json(config_path), config_path
    print(f"{path}: no config.json beside it, so 8 heads and transformers' default options are "
          "assumed")
    return {}, config_path


def flags_of_config(config, path):
    """Hugging Face's config.json, read from `path` -> the flags that no array shows.

    Raises UserError, with name and value, for options with which their model computes something
    else than ours.
    """
    backbone = config.get("backbone_config") or {}
    decoder = config.get("decoder_config") or {}
    kind = backbone.get("model_type", "swin").removeprefix("maskformer-")
    expect(path, "model_type", config.get("model_type", "maskformer"), "maskformer")
    expect(path, "backbone_config.model_type", kind, "resnet", "swin")
    expect(path, "decoder_config.model_type", decoder.get("model_type", "detr"), "detr")

    for option, value in COMPUTED[kind].items():
        if option == "downsample_in_bottleneck" and backbone.get("layer_type") == "basic":
            continue                                                 # there are no bottlenecks
        expect(path, f"backbone_config.{option}", backbone.get(option, value), value)
    for option, value in COMPUTED["detr"].items():
        expect(path, f"decoder_config.{option}", decoder.get(option, value), value)
    return {"heads": decoder.get("decoder_attention_heads", 8),
            "dropout": float(decoder.get("dropout", 0.1))}


def expect(path, option, found, *computed):
    if found not in computed:
        wanted = " or ".join(repr(value) for value in computed)
        raise UserError(f"{path}: {option} is {found!r}; our model computes only {wanted}")


def labels_of_config(config, num_classes, path):
    """The class names in config.json, in the order of the classes; None if it has none."""
    if not config.get("id2label"):
        return None
    by_class = {int(k): str(label) for k, label in config["id2label"].items()}
    if sorted(by_class) != list(range(num_classes)):
        raise UserError(f"{path}: id2label does not name the {num_classes} classes of the weights")
    return [by_class[k] for k in range(num_classes)]


# ------------------------------------------------------------------------------------------ classes
def find_dataset(num_classes, panoptic, labels=None):
    """The dataset of the weights, by its number of classes; "folder" (one's own) if none is known.

    panoptic: whether the model was trained on objects
    labels: class names, where the file has some; at least half of them must be the dataset's
    """
    dataset = DATASET_OF.get(num_classes, "folder")
    if dataset == "ade20k" and panoptic:
        dataset = "ade20k-panoptic"
    if labels is not None and dataset != "folder":
        names = class_lists(dataset)["classes"]
        equal = sum(first_name(a) == first_name(b) for a, b in zip(labels, names))
        if equal < num_classes / 2:
            return "folder"
    return dataset


def first_name(label):                                               # "Door, double door" -> "door"
    return label.split(",")[0].strip().lower()


def class_lists(dataset):
    """What the publisher of the dataset says of its K classes, as in a checkpoint of train.py."""
    if dataset == "cityscapes":
        labels = [label for label in Cityscapes.classes if not label.ignore_in_eval]
        classes = [{"name": label.name, "id": label.id} for label in labels]
    else:
        classes = published_classes("ade20k" if dataset == "ade20k-panoptic" else dataset)

    values = [c["id"] for c in classes]
    lists = {"classes": [c["name"] for c in classes],
             "is_thing": [False] * len(classes),
             "category_ids": values,
             "label_values": values}
    if dataset.endswith("-panoptic"):
        lists["is_thing"] = [bool(c["isthing"]) for c in classes]
    if dataset == "ade20k-panoptic":                                 # its categories are 0 to 149
        lists["category_ids"] = list(range(len(classes)))
    return lists


# ------------------------------------------------------------------------------------------ loading
def official_checkpoint(source):
    """Released weights as a checkpoint of train.py: {"model", "config", "classes", "is_thing",
    "category_ids", "label_values", "step": 0}.

    source: a name in ZOO, which is downloaded once; a detectron2 .pkl; a .safetensors or .bin of
        Hugging Face, or a folder that transformers' save_pretrained has written
    Raises UserError for anything else, and ConnectionError if a download fails.
    """
    path = download(source) if source in ZOO else Path(source)
    state = read_weights(path)
    config = model_flags(translate(state))
    K = config["num_classes"]

    theirs, labels = {}, None
    if is_hugging_face(state):
        theirs, config_path = hugging_face_config(path)
        config |= flags_of_config(theirs, config_path)
        labels = labels_of_config(theirs, K, config_path)

    panoptic = config["encoder_layers"] > 0 or "panoptic" in Path(source).name
    dataset = find_dataset(K, panoptic, labels)
    if dataset == "folder":
        lists = {"classes": labels or [f"class {k}" for k in range(K)],
                 "is_thing": [False] * K,
                 "category_ids": list(range(K)),
                 "label_values": list(range(K))}
        if panoptic:
            print(f"{path} does not say which of its {K} classes are things: it is taken for a "
                  "model for semantic segmentation")
    else:
        lists = class_lists(dataset)

    config |= {"dataset": dataset,
               "data_root": None,
               "task": "panoptic" if any(lists["is_thing"]) else "semantic",
               "size_divisibility": 32}
    if dataset.startswith("coco-") or config["model"] != "maskformer":
        config["size_divisibility"] = 0                              # as in the released configs
    config |= evaluation_flags(dataset, config["backbone"])

    with torch.device("meta"):                                       # names and shapes suffice
        model = build_model(config)
    weights = official_to_ours(state, model)

    if is_the_authors(path, theirs):
        print(f"{path}: weights of MaskFormer's authors under CC BY-NC 4.0, "
              "not for commercial use")
    return {"model": weights, "config": config, "step": 0} | lists


def evaluation_flags(dataset, backbone):
    """train.py's flags for evaluation, from the recipe for the dataset and the backbone."""
    # Not at the top: train imports evaluate, and evaluate's `load` imports this file.
    from train import recipe
    settings = {"object_threshold": 0.8, "overlap_threshold": 0.8}   # Sec. 3.4
    settings |= recipe(dataset, backbone)
    names = ("test_short_side", "test_max_long_side", "object_threshold", "overlap_threshold")
    return {name: settings[name] for name in names}


def is_the_authors(path, config):
    """Whether weights are the authors' or were trained further from theirs: every .pkl, and on
    Hugging Face facebook/maskformer-*. config: the content of config.json"""
    origin = f"{path.absolute()} {config.get('_name_or_path')}"
    return path.suffix == ".pkl" or re.search("facebook(/|--)maskformer", origin) is not None


def load_official(source):
    """A model with released weights, in eval mode, on the CPU.

    For `source` and errors see `official_checkpoint`.
    """
    checkpoint = official_checkpoint(source)
    model = build_model(checkpoint["config"])
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def convert(source, output=None):
    """Writes released weights as a checkpoint of ours -> its path.

    output: default: the name of `source` with .pt, in the current folder
    Raises UserError if there is such a file already; for `source` see `official_checkpoint`.
    """
    if output is None:
        path = Path(source).absolute()
        output = f"{path.name if path.is_dir() else path.stem}.pt"
    output = Path(output)
    if output.exists():
        raise UserError(f"{output} exists: choose another --output")

    checkpoint = official_checkpoint(source)
    part = output.with_name(output.name + ".part")                   # never half a file
    torch.save(checkpoint, part)
    part.replace(output)
    return output


# -------------------------------------------------------------------------------------------- files
def download(config):
    """-> path of a released file, in torch.hub's folder. A broken file is never kept there.

    Raises ConnectionError, with the address and the path, if it cannot be had.
    """
    folder, digest = ZOO[config]
    url = f"{ZOO_URL}/{folder}/{config}/model_final_{digest}.pkl"
    path = Path(torch.hub.get_dir(), "checkpoints", f"{config}_{digest}.pkl")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        part = Path(scratch, path.name)
        try:
            torch.hub.download_url_to_file(url, str(part))
            read_file(part)                                          # torch.hub keeps half a file
        except Exception as error:
            message = f"no {url} ({error}): get it elsewhere and save it as {path}"
            raise ConnectionError(message) from error
        part.replace(path)
    return path


def read_weights(path):
    """A file, or a folder that save_pretrained has written -> {name: float32 tensor}."""
    if path.is_file():
        return read_file(path)
    if not path.is_dir():
        raise UserError(f"{path} is neither a file nor a folder nor a released model; these are "
                        f"{', '.join(ZOO)}")

    for kind in ("model.safetensors", "pytorch_model.bin"):
        if (path / kind).is_file():
            return read_file(path / kind)
        index = path / f"{kind}.index.json"                          # large models: several files
        if index.is_file():
            file_of = read_json(index).get("weight_map", {})
            state = {}
            for file in sorted(set(file_of.values())):
                state |= read_file(path / file)
            return state
    raise UserError(f"{path} holds no weights: there is neither model.safetensors nor "
                    "pytorch_model.bin, nor an .index.json of one of them")


def read_file(path):
    """.safetensors, PyTorch's .bin or .pth, else a pickle -> {name: float32 tensor}.

    No code in the file is run. Raises UserError for a broken file, and for any content but arrays
    by name.
    """
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        elif path.suffix in (".bin", ".pth"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with open(path, "rb") as file:
                content = ArrayUnpickler(file, encoding="latin1").load()
        state = content.get("model", content) if isinstance(content, dict) else None
        if not isinstance(state, dict):
            raise ValueError("it does not hold arrays by name")
        return {name: as_float(name, array) for name, array in state.items()}
    except Exception as error:                                       # a broken pickle can raise any
        message = " ".join(str(error).split())
        raise UserError(f"{path} is refused: {message[:200]}") from error


def as_float(name, array):
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array.astype(np.float32))
    if isinstance(array, torch.Tensor):
        return array.float()
    raise ValueError(f"{name} is no array")


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold an object {{...}}")
    return content


class ArrayUnpickler(pickle.Unpickler):
    """A pickle may call any function. This one may call only those that make numpy arrays and plain
    containers."""

    ADMITTED = {
        "collections.OrderedDict": OrderedDict,
        "_codecs.encode": str.encode,
        "numpy.dtype": np.dtype,
        "numpy.ndarray": np.ndarray,
        # What numpy's own pickles call; taken from them, since its modules have moved.
        "numpy.core.multiarray._reconstruct": np.zeros(1).__reduce__()[0],
        "numpy.core.multiarray.scalar": np.float32(1).__reduce__()[0],
        "numpy.core.numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
    }

    def find_class(self, module, name):
        place = f"{module}.{name}".replace("numpy._core.", "numpy.core.")    # numpy 2 renamed it
        if place not in self.ADMITTED:
            raise pickle.UnpicklingError(f"{place} is neither a numpy array nor a plain container")
        return self.ADMITTED[place]


# ------------------------------------------------------------------------------------------ command
def main(argv=None):
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a released model's name, a file, or a folder")
    parser.add_argument("--output", metavar="FILE",
                        help="the checkpoint to write (default: the source's name with .pt, here)")
    args = parser.parse_args(argv)
    output = convert(args.source, args.output)
    print(f"saved {output}; try python evaluate.py --checkpoint {output} --images photo.jpg")


if __name__ == "__main__":
    from evaluate import run_command
    run_command(main)
