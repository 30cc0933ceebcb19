"""How far this model is from the authors' code, on weights that anybody can make from their names.

    GOLDEN_ROOT=... python tests/exactness.py        # a table of the largest differences, for docs/

GOLDEN_ROOT holds outputs of the authors' code, a folder for each configuration. `test_pretrained.py` checks
the same numbers against LIMITS.
"""
import contextlib
import io
import itertools
import json
import os
import pickle
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluate import network_output, predict
from losses import mask_classification_loss, per_pixel_loss
from maskformer import panoptic_inference, semantic_inference
from matcher import hungarian_match, pairwise_dice, pairwise_focal
from pretrained import load_official, translate

# Largest differences allowed. "spread": weights that make queries differ. The plain ones make them so alike
# that rounding decides some pixels: where a panoptic segment differs, the best two queries are within 1e-7.
LIMITS = {
    "features": 1e-3, "pixel embeddings": 1e-4, "class logits": 1e-4, "class logits, spread": 1e-2,
    "mask logits": 5e-4, "mask logits, spread": 5e-3, "class scores": 1e-3, "class scores, spread": 5e-3,
    "class map, pixels": 0, "panoptic, pixels": 200, "panoptic, pixels, spread": 1, "panoptic, segments": 0,
    "matching costs": 1e-3, "matched pairs": 0, "loss terms": 1e-4, "total loss": 5e-4,
    "gradient norms, relative": 1e-2,
}


# ------------------------------------------------------------------------------------------------ weights

def fill(name, shape):
    """The array that belongs to an official name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return (0.5 + rng.random(shape)).astype(np.float32)
    a = rng.standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        return (a.astype(np.float64) / np.sqrt(np.float64(np.prod(shape[1:])))).astype(np.float32)
    return (1 + 0.1 * a if "norm" in name and name.endswith("weight") else 0.1 * a).astype(np.float32)


def spread(name, a):
    """The second set: queries that differ, attention that looks somewhere."""
    if name.endswith("predictor.query_embed.weight"):
        return 16 * a
    if name.endswith("predictor.class_embed.weight"):
        return 8 * a
    if ".transformer.decoder." in name and name.endswith("in_proj_weight"):
        return np.concatenate([2 * a[:512], a[512:]])                    # queries and keys, not values
    if ".transformer.encoder." in name and name.endswith("self_attn.out_proj.weight"):
        return a / 4
    return a


def official_model(folder, change=lambda name, array: array):
    """Writes a file such as the authors release, with made-up weights, and loads it."""
    shapes = json.loads((folder / "state_dict_shapes.json").read_text())
    with tempfile.NamedTemporaryFile(suffix=".pkl") as file:
        pickle.dump({"model": {name: change(name, fill(name, shape)) for name, shape in shapes.items()},
                     "__author__": "nobody"}, file)
        file.flush()
        with contextlib.redirect_stdout(io.StringIO()):                  # the licence is not of these weights
            return load_official(file.name)


def train_mode(model):
    """Every decoder layer answers; without dropout nothing else changes."""
    for module in model.modules():
        for name in ("p", "dropout", "drop_prob"):                       # Dropout, attention, DropPath
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.)
    return model.train()


# ------------------------------------------------------------------------------------------------ differences

class Differences(dict):
    """The largest difference of each quantity."""

    def add(self, quantity, ours, theirs):
        ours = np.asarray(ours.detach() if torch.is_tensor(ours) else ours, np.float64)
        assert ours.shape == np.shape(theirs), f"{quantity}: {ours.shape}, not {np.shape(theirs)}"
        self.most(quantity, np.abs(ours - theirs).max())

    def most(self, quantity, value):
        self[quantity] = max(self.get(quantity, 0), value)


def probe(x, step=97):                                                   # [L, ...] -> [L, n]
    return x.flatten(1)[:, ::step]


@torch.no_grad()
def compare_outputs(model, path, is_thing, found):
    """One eval_*.npz: features, embeddings, every layer's logits, semantic and panoptic results."""
    golden, kind = np.load(path), ", spread" if "spread" in path.name else ""
    H, W = map(int, path.stem.split("_")[-1].split("x"))
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size=(3, H, W), dtype=np.uint8))
    multiple = model.size_divisibility or 1
    canvas = model.backbone.mean.expand(3, H + -H % multiple, W + -W % multiple).clone()
    canvas[:, :H, :W] = image

    output = train_mode(model)(canvas[None])
    class_logits, mask_logits = output if isinstance(output, tuple) else (None, output)
    if not kind:
        features = model.backbone(canvas[None])
        for i, x in enumerate(features, 2):
            found.add("features", x.flatten()[:64], golden[f"res{i}_first64"])
            found.add("features", probe(x)[0, :512], golden[f"res{i}_probe"])
        pixel_embed = pixel_embeddings(model, canvas[None])
        found.add("pixel embeddings", pixel_embed.flatten()[:64], golden["mask_features_first64"])
    if class_logits is not None:
        if "class_logits" in golden:
            found.add("class logits" + kind, class_logits, golden["class_logits"])
        else:
            found.add("class logits" + kind, class_logits[-1], golden["class_logits_last"])
            found.add("class logits" + kind, probe(class_logits), golden["class_logits_probe"])
    name = "mask_logits_probe" if "mask_logits_probe" in golden else "pixel_logits_probe"
    found.add("mask logits" + kind, probe(mask_logits), golden[name])

    classes, masks = network_output(model.eval(), image, [H, W])
    scores = masks if classes is None else semantic_inference(classes[None], masks[None])[0]
    found.add("class scores" + kind, scores.flatten()[::997], golden["sem_seg_probe"])
    label = predict(model, image, is_thing, H, W, panoptic=False)[0].numpy()
    clear = golden["sem_seg_margin_f16"] > 1e-3                          # elsewhere rounding may decide
    found.most("class map, pixels", int(((label != golden["sem_seg_argmax"]) & clear).sum()))
    if "panoptic_zero_seg" in golden:
        for name, (object_threshold, overlap_threshold) in panoptic_thresholds(is_thing).items():
            if f"panoptic_{name}_seg" in golden:
                result = predict(model, image, is_thing, H, W, object_threshold=object_threshold,
                                 overlap_threshold=overlap_threshold)[1:]
                compare_panoptic(result, golden, name, kind, found)


def pixel_embeddings(model, images):
    """images -> per-pixel embeddings [B, D, h, w] of any of the three models."""
    kept = []
    hook = model.pixel_decoder.register_forward_hook(lambda module, inputs, output: kept.append(output))
    model(images)
    hook.remove()
    return kept[0]


def panoptic_thresholds(is_thing):
    """Name in the files -> object threshold, overlap threshold; "config" is 0.7 for ADE20K's 150 classes."""
    config = (0.7 if len(is_thing) == 150 else 0.8, 0.8)
    return {"config": config, "zero": (0., 0.), "mid": (0., 0.3), "strict_overlap": (0.5, 0.9)}


def compare_panoptic(result, golden, name, kind, found):
    segment_map, segments = result
    found.most("panoptic, pixels" + kind, int((segment_map.numpy() != golden[f"panoptic_{name}_seg"]).sum()))
    theirs = json.loads(str(golden[f"panoptic_{name}_info"]))
    ours = [{key: segment[key] for key in ("id", "isthing", "category_id")} for segment in segments]
    found.most("panoptic, segments", sum(a != b for a, b in itertools.zip_longest(ours, theirs)))


def compare_postprocessing(golden, is_thing, found):
    """postprocess_synthetic.npz: both inferences on peaked logits."""
    class_logits, mask_logits = (torch.from_numpy(golden[name]) for name in ("class_logits", "mask_logits"))
    scores = semantic_inference(class_logits[None], mask_logits[None])[0]
    found.add("class scores", scores.flatten()[::97], golden["sem_seg_probe"])
    found.most("class map, pixels", int((scores.argmax(0).numpy() != golden["sem_seg_argmax"]).sum()))
    for name, thresholds in panoptic_thresholds(is_thing).items():
        if f"panoptic_{name}_seg" in golden:
            result = panoptic_inference(class_logits, mask_logits, torch.tensor(is_thing), *thresholds)
            compare_panoptic(result, golden, name, ", spread", found)    # no ties here


# ------------------------------------------------------------------------------------------------ losses

def batch_of(golden, mean):
    """-> images [2, 3, H, W], labels [N], masks [N, H, W], owner [N], label map [2, H, W], all padded."""
    sizes = [golden[f"segment_map_{b}"].shape for b in (0, 1)]
    H, W = np.max(sizes, 0)
    images = mean.expand(2, 3, H, W).clone()
    label_map = torch.full((2, H, W), 255)
    labels, masks, owner = [], [], []
    for b, (h, w) in enumerate(sizes):
        segment_map, classes = torch.from_numpy(golden[f"segment_map_{b}"]).long(), golden[f"labels_{b}"]
        images[b, :, :h, :w] = torch.from_numpy(golden[f"image_{b}"])
        for s, c in enumerate(classes.tolist()):
            mask = torch.zeros(H, W, dtype=torch.bool)
            mask[:h, :w] = segment_map == s
            label_map[b][mask] = c
            labels, masks, owner = labels + [c], masks + [mask], owner + [b]
    return images, torch.tensor(labels), torch.stack(masks), torch.tensor(owner), label_map


def compare_losses(model, folder, case, kind, found):
    """One entry of losses.json: costs, matched pairs, loss terms, total, gradient norms."""
    expected = json.loads((folder / "losses.json").read_text())[case + kind]
    golden = np.load(folder / f"loss_{case}{kind}.npz")
    batch = np.load(folder / f"loss_{case}.npz")
    images, labels, masks, owner, label_map = batch_of(batch, model.backbone.mean)
    model = train_mode(model)
    model.zero_grad()
    output = model(images)
    if isinstance(output, tuple):
        matches = compare_matching(*output, labels, masks, owner, expected["matching"], golden, found)
        total = compare_loss_terms(*output, labels, masks, matches, expected["unweighted"], found)
    else:
        for layer, name in enumerate(layer_names(len(output), "loss_sem_seg")):
            ours = per_pixel_loss(output[layer:layer + 1], label_map)
            found.add("loss terms", ours, expected["weighted"][name])
        total = per_pixel_loss(output, label_map)
    found.add("total loss", total, expected["total"])
    total.backward()
    norm = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    all_norm = np.linalg.norm(list(norm.values()))
    found.most("gradient norms, relative", abs(all_norm / expected["grad_total_l2_norm"] - 1))
    for official, value in expected.get("grad_l2_norm", {}).items():
        name = next(iter(translate({official: np.zeros(1)})))
        error = abs(norm.pop(name) - value) / max(value, 1e-6 * all_norm)        # smaller ones are rounding
        found.most("gradient norms, relative", error)
    assert not norm or "grad_l2_norm" not in expected, f"parameters of ours that theirs lack: {list(norm)}"


def layer_names(L, name):
    """Their names of the decoder layers' terms, first to last."""
    return [f"{name}_{layer}" for layer in range(L - 1)] + [name]


def compare_matching(class_logits, mask_logits, labels, masks, owner, expected, golden, found):
    """-> the recorded matches, which are compared with ours wherever they are not a matter of rounding."""
    L = len(class_logits)
    ours = set(zip(*(x.tolist() for x in hungarian_match(class_logits, mask_logits, labels, masks, owner))))
    small = nn.functional.interpolate(masks[:, None].float(), size=mask_logits.shape[-2:])[:, 0].flatten(1)
    recorded = []
    for layer, name in enumerate([*(f"aux_{layer}" for layer in range(L - 1)), "last"]):
        for b, match in enumerate(expected[name]):
            mine = (owner == b).nonzero().squeeze(1)
            x = mask_logits[layer, b].flatten(1)
            cost = (20 * pairwise_focal(x, small[mine]) + pairwise_dice(x, small[mine])
                    - class_logits[layer, b].softmax(-1)[:, labels[mine]])       # [Q, n]
            found.add("matching costs", cost, golden[f"cost_{name}_{b}"])
            pairs = [(layer, b, q, mine[s].item()) for q, s in zip(match["query"], match["target"])]
            if match["margin"] > 1e-4:
                found.most("matched pairs", sum(pair not in ours for pair in pairs))
            recorded += pairs
    assert len(recorded) == len(ours)
    return torch.tensor(recorded).unbind(1)


def compare_loss_terms(class_logits, mask_logits, labels, masks, matches, expected, found):
    """Layer by layer against the recorded terms -> the total of all layers at once."""
    L = len(class_logits)
    for layer in range(L):
        here = matches[0] == layer
        one = [torch.zeros_like(matches[0][here]), *(index[here] for index in matches[1:])]
        logits = class_logits[layer:layer + 1], mask_logits[layer:layer + 1]
        terms = mask_classification_loss(*logits, labels, masks, one)
        for ours, name, weight in zip(terms, ("loss_ce", "loss_mask", "loss_dice"), (1, 20, 1)):
            found.add("loss terms", weight * ours, weight * expected[layer_names(L, name)[layer]])
    ce, focal, dice = mask_classification_loss(class_logits, mask_logits, labels, masks, matches)
    return ce + 20 * focal + dice


# ------------------------------------------------------------------------------------------------ table

def measure(folder):
    """A folder of GOLDEN_ROOT -> {quantity: largest difference}."""
    summary = json.loads((folder / "summary.json").read_text())
    K = summary["cfg"]["SEM_SEG_HEAD"]["NUM_CLASSES"]
    is_thing = [k in summary.get("thing_contiguous_ids", []) for k in range(K)]
    found = Differences()
    for kind, change in (("", lambda name, array: array), ("_spread", spread)):
        files = sorted(file for file in folder.glob("eval_*.npz") if ("spread" in file.name) == bool(kind))
        if not files:
            continue
        model = official_model(folder, change)
        for file in files:
            compare_outputs(model, file, is_thing, found)
        for case in ("same", "mixed"):
            if (folder / f"loss_{case}{kind}.npz").exists():
                compare_losses(model, folder, case, kind, found)
    if (folder / "postprocess_synthetic.npz").exists():
        compare_postprocessing(np.load(folder / "postprocess_synthetic.npz"), is_thing, found)
    return found


def main():
    folders = sorted(path.parent for path in Path(os.environ["GOLDEN_ROOT"]).glob("*/summary.json"))
    columns = [measure(folder) for folder in folders]
    print("| largest difference | limit |", " | ".join(folder.name for folder in folders), "|")
    print("|---" * (len(folders) + 2) + "|")
    for quantity, limit in LIMITS.items():
        values = [f"{found[quantity]:.2g}" if quantity in found else "" for found in columns]
        print(f"| {quantity} | {limit:g} |", " | ".join(values), "|")


if __name__ == "__main__":
    main()
