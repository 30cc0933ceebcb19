"""The authors' released weights in this model: their parameter names translated to ours.

    model = load_official("maskformer_R50_bs16_160k")        # downloaded once, into torch.hub's folder
    model = load_official("model_final_d8dbeb.pkl")          # from a file; no code in the file can run
    model = load_official("model.safetensors")               # Hugging Face's copies, facebook/maskformer-*
    class_logits, mask_logits = model(torch.randint(256, (1, 3, 512, 512)))

The model is inferred from names and shapes. The weights are under CC BY-NC 4.0: no commercial use.
"""
import pickle
import re
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from maskformer import MaskFormer, PerPixelBaseline, PerPixelBaselinePlus

ZOO_URL = "https://dl.fbaipublicfiles.com/maskformer"
RELEASED = """
semantic-ade20k bs16_160k per_pixel_baseline_R50 1043f3 per_pixel_baseline_plus_R50 833630
semantic-ade20k bs16_160k maskformer_R50 d8dbeb maskformer_R101 1aeb94 maskformer_R101c b432ea
semantic-ade20k bs16_160k maskformer_swin_tiny 8657a5 maskformer_swin_small 528157
semantic-ade20k bs16_160k_res640 maskformer_swin_base_IN21k_384 45388b maskformer_swin_large_IN21k_384 aefa3b
semantic-coco-stuff-10k bs32_60k per_pixel_baseline_R50 275ab0 per_pixel_baseline_plus_R50 1fa920
semantic-coco-stuff-10k bs32_60k maskformer_R50 cb03eb maskformer_R101 eb19bb maskformer_R101c bffd25
semantic-ade20k-full bs16_200k per_pixel_baseline_R50 9f66a9 per_pixel_baseline_plus_R50 4d31f2
semantic-ade20k-full bs16_200k maskformer_R50 f4e3f6 maskformer_R101 88df33 maskformer_R101c 75d34e
semantic-cityscapes bs16_90k maskformer_R101 38c00c maskformer_R101c 4f8ff9
semantic-mapillary-vistas bs16_300k maskformer_R50 f3fc73
panoptic-coco bs64_554k maskformer_panoptic_R50 6f60dc maskformer_panoptic_R101 57b049
panoptic-coco bs64_554k maskformer_panoptic_swin_tiny 539394 maskformer_panoptic_swin_base_IN21k_384 4b7f49
panoptic-coco bs64_554k maskformer_panoptic_swin_small 5bf6b1 maskformer_panoptic_swin_large_IN21k_384 7505c4
panoptic-ade20k bs16_720k maskformer_panoptic_R50 7aa977 maskformer_panoptic_R101 0b3cc8"""
ZOO = {}                                                                 # config: (folder, hash)
for folder, schedule, *files in map(str.split, RELEASED.split("\n")[1:]):
    ZOO |= {f"{name}_{schedule}": (folder, digest) for name, digest in zip(files[::2], files[1::2])}
BACKBONES = {                         # channels of the finest map, a deep stem, blocks of stage 3
    (256, False, 6): "resnet50", (256, False, 23): "resnet101", (256, True, 23): "resnet101c",
    (96, False, 6): "swin_tiny_patch4_window7_224", (96, False, 18): "swin_small_patch4_window7_224",
    (128, False, 18): "swin_base_patch4_window12_384", (192, False, 18): "swin_large_patch4_window12_384"}


# ---------------------------------------------------------------------------------------- names

# Pairs for re.sub; each changes all names it fits, from top to bottom.
OFFICIAL = [
    (r"\.stem\.conv1\.norm", ".body.bn1"), (r"\.stem\.conv1\.", ".body.conv1."),
    (r"^backbone\.(res|patch_embed|layers)", r"backbone.body.\1"),
    (r"\.res(\d)", lambda match: f".layer{int(match[1]) - 1}"), (r"\.conv(\d)\.norm", r".bn\1"),
    (r"\.shortcut\.norm", ".downsample.1"), (r"\.shortcut", ".downsample.0"),
    (r"body\.layers\.(\d)\.downsample", lambda match: f"body.layers_{int(match[1]) + 1}.downsample"),
    (r"body\.layers\.", "body.layers_"), (r"^backbone\.norm(\d)", r"backbone.norms.\1"),
    (r"^sem_seg_head\.predictor\.(weight|bias)", r"to_class.\1"),        # the per-pixel baseline's classifier
    (r"^sem_seg_head\.(predictor\.|pixel_decoder\.)?(transformer\.)?", ""),
    (r"^input_proj", "project"), (r"^query_embed", "query_pos"), (r"^class_embed", "to_class"),
    (r"^mask_embed\.layers\.(\d)", lambda match: f"to_mask.{2 * int(match[1])}"),
    (r"^(layer|adapter)_(\d)\.norm", r"\1_\2.1"), (r"^(layer|adapter)_(\d)\.weight", r"\1_\2.0.weight"),
    (r"^mask_features", "pixel_decoder.to_pixel_embed"), (r"^layer_4", "pixel_decoder.stem"),
    (r"^layer_(\d)", lambda match: f"pixel_decoder.fuse.{3 - int(match[1])}"),       # fine to coarse there
    (r"^adapter_(\d)", lambda match: f"pixel_decoder.project.{3 - int(match[1])}"),
]
DEEP_STEM = [                         # R101c's, before OFFICIAL
    (r"\.stem\.conv1\.norm", ".body.conv1.1"), (r"\.stem\.conv1", ".body.conv1.0"),
    (r"\.stem\.conv2\.norm", ".body.conv1.4"), (r"\.stem\.conv2", ".body.conv1.3"),
    (r"\.stem\.conv3\.norm", ".body.bn1"), (r"\.stem\.conv3", ".body.conv1.6"),
]
HUGGING_FACE = [                      # before OFFICIAL; a final " q", " k" or " v" marks a third of an array
    (r"^model\.(pixel_level|transformer)_module\.", ""), (r"\.embeddings\.norm", ".patch_embed.norm"),
    (r"^encoder\.hidden_states_norms\.", "backbone.norm"),
    (r"^encoder\.(model\.)?(encoder\.|embedder\.|embeddings\.)?", "backbone."), (r"\.convolution", ""),
    (r"\.embedder\.", ".stem.conv1."), (r"\.normalization", ".norm"), (r"\.(\d+)\.fc(\d)", r".\1.linear\2"),
    (r"\.stages\.(\d)\.layers", lambda match: f".res{int(match[1]) + 2}"),
    (r"\.layer\.(\d)", lambda match: f".conv{int(match[1]) + 1}"), (r"\.layernorm_before", ".norm1"),
    (r"\.patch_embeddings\.projection", ".patch_embed.proj"), (r"\.layernorm_after", ".norm2"),
    (r"\.attention\.self\.([qkv])(uery|ey|alue)\.(\w+)", r".attn.qkv.\3 \1"),
    (r"\.attention\.self", ".attn"), (r"\.attention\.output\.dense", ".attn.proj"),
    (r"\.intermediate\.dense", ".mlp.fc1"), (r"\.output\.dense", ".mlp.fc2"),
    (r"^decoder\.fpn", "pixel_decoder"), (r"\.layers\.(\d)\.proj\.", r".project.\1."),
    (r"\.layers\.(\d)\.block\.", r".fuse.\1."), (r"^decoder\.mask_projection", "mask_features"),
    (r"^mask_embedder\.(\d)\.0", r"mask_embed.layers.\1"), (r"^decoder\.layernorm", "decoder.norm"),
    (r"^input_projection", "project"), (r"^queries_embedder", "query_pos"), (r"^class_predictor", "to_class"),
    (r"self_attn_layer_norm", "norm1"), (r"encoder_attn_layer_norm", "norm2"), (r"final_layer_norm", "norm3"),
    (r"\.encoder_attn\.", ".multihead_attn."), (r"attn\.([qkv])_proj\.(\w+)", r"attn.in_proj_\2 \1"),
]
# The loss's weights, constants, counters, and a norm that Hugging Face's Swin has but does not use.
DROPPED = (r"criterion\.empty_weight|pixel_mean|pixel_std|.*\.relative_position_index|.*\.num_batches_tracked"
           r"|model\.pixel_level_module\.encoder\.model\.layernorm\.(weight|bias)")


def translate(state):
    """{their name: array} -> {our name: (their names, array)}, without DROPPED. ValueError for duplicates."""
    rules = HUGGING_FACE if "class_predictor.weight" in state else []
    rules = (DEEP_STEM if "backbone.stem.conv2.weight" in state else rules) + OFFICIAL
    found = {}
    for theirs in state:
        name = theirs
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        name, _, part = name.partition(" ")
        if part in found.get(name, {}):
            raise ValueError(f"both {found[name][part]} and {theirs} are our {name}")
        if not re.fullmatch(DROPPED, theirs):
            found.setdefault(name, {})[part] = theirs
    for name, parts in found.items():
        theirs = [parts[part] for part in sorted(parts, key="qkv".find)]
        found[name] = theirs, np.concatenate([np.atleast_1d(state[source]) for source in theirs])
    return found


def official_to_ours(state, model):
    """{official name: array} -> state_dict of `model`. Hugging Face's names will do as well.

    Every array but DROPPED is used once, and every entry of `model` filled: ValueError names what is not.
    """
    found, ours = translate(state), model.state_dict()
    wrong = [f"{' '.join(found[name][0])} has no place in the model" for name in found if name not in ours]
    wrong += [f"no {name}" for name in ours if name not in found and not re.fullmatch(DROPPED, name)]
    wrong += [f"{' '.join(found[name][0])} is {found[name][1].shape}, our {name} {tuple(ours[name].shape)}"
              for name in found if name in ours and found[name][1].shape != ours[name].shape]
    if wrong:
        raise ValueError("these weights do not fit the model: " + "; ".join(wrong))
    return ours | {name: torch.from_numpy(array) for name, (_, array) in found.items()}


# ---------------------------------------------------------------------------------------- loading

def load_official(source):
    """A model with released weights, in eval mode, on the CPU, batch norms frozen.

    source: a config name of ZOO, or a path to a detectron2 .pkl or a Hugging Face .safetensors file.
    Raises ValueError for anything else, and ConnectionError where a download fails.
    """
    path = download(source) if source in ZOO else Path(source)
    if not path.is_file():
        raise ValueError(f"{source} is neither a file nor one of the released configs {', '.join(ZOO)}")
    state = read_arrays(path)
    model = build(translate(state))
    model.load_state_dict(official_to_ours(state, model))
    print(f"{path}: weights of MaskFormer's authors under CC BY-NC 4.0, not for commercial use")
    return model.eval()


def build(found):
    """What `translate` returns -> the model that has these names and shapes (and 8 heads, as all have).

    Its `size_divisibility` is 0 for COCO (133 or 171 classes) and the per-pixel baselines, else 32.
    """
    def size(name, axis=0):
        if name not in found:
            raise ValueError(f"these weights are no MaskFormer's: nothing in them is our {name}")
        return found[name][1].shape[axis]
    def count(pattern):
        return len({match[1] for match in map(re.compile(pattern).match, found) if match})

    key = (size("pixel_decoder.project.2.0.weight", 1), "backbone.body.conv1.6.weight" in found,
           count(r"backbone\.body\.(?:layer3|layers_2\.blocks)\.(\d+)"))
    if key not in BACKBONES:
        raise ValueError(f"unknown backbone: {key} is none of {BACKBONES}")
    options = dict(backbone=BACKBONES[key], pretrained=False, freeze_bn=True,
                   dim=size("pixel_decoder.to_pixel_embed.bias"))
    if "query_pos.weight" not in found:
        return PerPixelBaseline(size("to_class.bias"), **options)
    options |= {f"{part}_layers": count(rf"{part}\.layers\.(\d+)") for part in ("encoder", "decoder")}
    Q, options["ffn_dim"] = size("query_pos.weight"), size("decoder.layers.0.linear1.bias")
    if "to_class.bias" not in found:
        return PerPixelBaselinePlus(Q, **options)
    K = size("to_class.bias") - 1
    return MaskFormer(K, num_queries=Q, size_divisibility=0 if K in (133, 171) else 32, **options)


def download(config):
    """-> path of a released file in torch.hub's folder, where a file that cannot be read is never kept."""
    folder, digest = ZOO[config]
    url = f"{ZOO_URL}/{folder}/{config}/model_final_{digest}.pkl"
    path = Path(torch.hub.get_dir(), "checkpoints", f"{config}_{digest}.pkl")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            part = Path(scratch, path.name)
            try:
                torch.hub.download_url_to_file(url, str(part))
                read_arrays(part)                                        # torch.hub accepts truncated files
            except Exception as error:
                raise ConnectionError(f"no {url} ({error}): get it elsewhere, save it as {path}") from error
            part.replace(path)
    return path


class ArrayUnpickler(pickle.Unpickler):
    """A pickle may call any function; this one only those that make numpy arrays and plain containers."""

    admitted = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype, "collections.OrderedDict": OrderedDict,
                "numpy.core.multiarray.scalar": np.float32(1).__reduce__()[0], "_codecs.encode": str.encode,
                "numpy.core.multiarray._reconstruct": np.zeros(1).__reduce__()[0],
                "numpy.core.numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0]}

    def find_class(self, module, name):
        place = f"{module}.{name}".replace("numpy._core.", "numpy.core.")        # numpy 2 renamed it
        if place not in self.admitted:
            raise pickle.UnpicklingError(f"{place} is neither a numpy array nor a plain container")
        return self.admitted[place]


def read_arrays(path):
    """.pkl or .safetensors -> {name: array}. Raises ValueError for a broken file or any other content."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file                      # comes with timm
            return load_file(path)
        with open(path, "rb") as file:
            content = ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:                                           # a broken pickle can raise anything
        raise ValueError(f"{path} is refused: {error}") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(array, np.ndarray) for array in state.values()):
        raise ValueError(f"{path} does not hold arrays by name")
    return state
