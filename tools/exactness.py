"""How far this model is from the authors' code, on weights that anybody can make from their names.

    GOLDEN_ROOT=... python tools/exactness.py        # a table of the largest differences, for docs/

GOLDEN_ROOT holds outputs of the authors' code, one folder for each of their configurations; neither
they nor the script that recorded them are in this repository. tests/test_exactness.py compares the
same differences with LIMITS.

Letters   B images · L decoder layers · Q queries · K classes · n segments of an image
          N segments in the batch · H W image size
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
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import class_scores, network_output, predict
from losses import mask_classification_loss, per_pixel_loss
from maskformer import panoptic_inference, semantic_inference
from matcher import hungarian_match, pairwise_dice, pairwise_focal
from tools.official_weights import load_official, official_to_ours, translate

# The largest differences allowed. The plain weights make queries so alike that rounding decides
# some pixels. (Where panoptic segments differ, the best two queries are within 1e-7; checked once,
# by hand.) "spread": weights that make queries differ.
LIMITS = {
    "features": 1e-3,
    "pixel embeddings": 1e-4,
    "class logits": 1e-4,
    "class logits, spread": 1e-2,
    "mask logits": 5e-4,
    "mask logits, spread": 5e-3,
    "class scores": 1e-3,
    "class scores, spread": 5e-3,
    "class map, pixels": 0,
    "panoptic, pixels": 200,
    "panoptic, pixels, spread": 1,
    "panoptic, segments": 0,
    "matching costs": 1e-3,
    "matched pairs": 0,
    "loss terms": 1e-4,
    "total loss": 5e-4,
    "gradient norms, relative": 1e-2,
}


class Differences(dict):
    """{quantity: the largest difference so far}"""

    def add(self, quantity, ours, theirs):
        """The largest difference of two arrays, or numbers.

        AssertionError if their shapes differ or a value is not finite.
        """
        if isinstance(ours, torch.Tensor):
            ours = ours.detach().numpy()
        ours = np.asarray(ours, np.float64)
        assert ours.shape == np.shape(theirs), f"{quantity}: {ours.shape}, not {np.shape(theirs)}"
        assert np.isfinite(ours).all(), f"{quantity}: not finite"    # max(0, nan) would be 0
        self.add_number(quantity, np.abs(ours - theirs).max())

    def add_number(self, quantity, value):
        self[quantity] = max(self.get(quantity, 0), value)


# ------------------------------------------------------------------------------------------ weights
def fill(name, shape):
    """The array that belongs to an official name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return (0.5 + rng.random(shape)).astype(np.float32)
    array = rng.standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:                              # the same in every NumPy: rounded at the end
        fan_in = np.prod(shape[1:])
        return (array.astype(np.float64) / np.sqrt(np.float64(fan_in))).astype(np.float32)
    if "norm" in name and name.endswith("weight"):
        return (1 + 0.1 * array).astype(np.float32)
    return (0.1 * array).astype(np.float32)


def spread(name, array):
    """The second set of weights: queries that differ, attention that looks somewhere."""
    if name.endswith("predictor.query_embed.weight"):
        return 16 * array
    if name.endswith("predictor.class_embed.weight"):
        return 8 * array
    if ".transformer.decoder." in name and name.endswith("in_proj_weight"):
        return np.concatenate([2 * array[:512], array[512:]])        # queries and keys, not values
    if ".transformer.encoder." in name and name.endswith("self_attn.out_proj.weight"):
        return array / 4
    return array


def made_up_weights(folder):
    """{official name: array}, for the names in a folder of GOLDEN_ROOT."""
    shapes = json.loads((folder / "state_dict_shapes.json").read_text())
    return {name: fill(name, shape) for name, shape in shapes.items()}


def load_from_file(state):
    """Writes a file such as the authors release, and loads it."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "model.pkl")
        file.write_bytes(pickle.dumps({"model": state, "__author__": "nobody"}))
        with contextlib.redirect_stdout(io.StringIO()):              # the license is not of these
            return load_official(file)


def train_mode(model):
    """Every decoder layer predicts. Without dropout nothing else changes."""
    for module in model.modules():
        for name in ("p", "dropout", "drop_prob"):                   # Dropout, attention, DropPath
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.)
    return model.train()


# ------------------------------------------------------------------------------------------ outputs
@torch.no_grad()
def compare_outputs(model, file, is_thing, found):
    """An eval_*.npz: features, embeddings, every layer's logits, semantic and panoptic results."""
    golden = np.load(file)
    kind = ", spread" if "spread" in file.name else ""
    H, W = (int(side) for side in file.stem.split("_")[-1].split("x"))
    image = np.random.default_rng(0).integers(0, 256, size=(3, H, W), dtype=np.uint8)
    image = torch.from_numpy(image)

    multiple = model.size_divisibility or 1
    padded = model.backbone.mean.expand(3, H + -H % multiple, W + -W % multiple).clone()
    padded[:, :H, :W] = image
    features, pixel_embed, output = run_with_intermediates(train_mode(model), padded[None])
    if not kind:
        for stage, x in enumerate(features, start=2):                # res2 to res5
            found.add("features", x.flatten()[:64], golden[f"res{stage}_first64"])
            found.add("features", every_97th(x)[0, :512], golden[f"res{stage}_probe"])
        found.add("pixel embeddings", pixel_embed.flatten()[:64], golden["mask_features_first64"])
    compare_logits(output, golden, kind, found)

    class_logits, logits = network_output(model.eval(), image, [H, W])
    scores = class_scores(class_logits, logits)
    found.add("class scores" + kind, scores.flatten()[::997], golden["sem_seg_probe"])
    label = predict(model, image, is_thing, H, W, panoptic=False)[0].numpy()
    clear = golden["sem_seg_margin_f16"] > 1e-3                      # elsewhere rounding decides
    differs = (label != golden["sem_seg_argmax"]) & clear
    found.add_number("class map, pixels", int(differs.sum()))
    compare_panoptic(class_logits, logits, is_thing, golden, kind, found)


def run_with_intermediates(model, images):
    """-> features, per-pixel embeddings, and the output of any of the three models."""
    kept = {}

    def keep(name):
        def hook(module, inputs, output):
            kept[name] = output
        return hook

    hooks = [model.backbone.register_forward_hook(keep("features")),
             model.pixel_decoder.register_forward_hook(keep("pixel_embed"))]
    output = model(images)
    for hook in hooks:
        hook.remove()
    return kept["features"], kept["pixel_embed"], output


def compare_logits(output, golden, kind, found):
    """output: of the model in training mode, so of all layers"""
    if not isinstance(output, tuple):
        theirs = "mask_logits_probe" if "mask_logits_probe" in golden else "pixel_logits_probe"
        found.add("mask logits" + kind, every_97th(output), golden[theirs])
        return
    class_logits, mask_logits = output
    found.add("mask logits" + kind, every_97th(mask_logits), golden["mask_logits_probe"])
    if "class_logits" in golden:
        found.add("class logits" + kind, class_logits, golden["class_logits"])
    else:
        found.add("class logits" + kind, class_logits[-1], golden["class_logits_last"])
        found.add("class logits" + kind, every_97th(class_logits), golden["class_logits_probe"])


def every_97th(x):                                                   # [L, ...] -> [L, n]
    return x.flatten(1)[:, ::97]


def compare_panoptic(class_logits, mask_logits, is_thing, golden, kind, found):
    """Segments of one image, wherever the file has some: class_logits [Q, K+1], masks [Q, H, W]."""
    thresholds = {                                                   # of objects, of overlap
        "config": (0.7 if len(is_thing) == 150 else 0.8, 0.8),       # ADE20K's configs: 0.7
        "zero": (0., 0.),
        "mid": (0., 0.3),
        "strict_overlap": (0.5, 0.9),
    }
    for name, (object_threshold, overlap_threshold) in thresholds.items():
        if f"panoptic_{name}_seg" not in golden:
            continue
        segment_map, segments = panoptic_inference(class_logits, mask_logits, is_thing,
                                                   object_threshold, overlap_threshold)
        differs = segment_map.numpy() != golden[f"panoptic_{name}_seg"]
        found.add_number("panoptic, pixels" + kind, int(differs.sum()))

        theirs = json.loads(str(golden[f"panoptic_{name}_info"]))
        ours = [{key: segment[key] for key in ("id", "isthing", "category_id")}
                for segment in segments]
        differing = sum(a != b for a, b in itertools.zip_longest(ours, theirs))
        found.add_number("panoptic, segments", differing)


def compare_postprocessing(golden, is_thing, found):
    """postprocess_synthetic.npz: both kinds of inference, on logits with clear peaks."""
    class_logits = torch.from_numpy(golden["class_logits"])          # [Q, K+1]
    mask_logits = torch.from_numpy(golden["mask_logits"])            # [Q, H, W]
    scores = semantic_inference(class_logits[None], mask_logits[None])[0]
    found.add("class scores", scores.flatten()[::97], golden["sem_seg_probe"])
    differs = scores.argmax(0).numpy() != golden["sem_seg_argmax"]
    found.add_number("class map, pixels", int(differs.sum()))
    compare_panoptic(class_logits, mask_logits, is_thing, golden, ", spread", found)     # no ties


# ------------------------------------------------------------------------------------------- losses
def compare_losses(model, folder, case, name, found):
    """An entry of losses.json: costs, matched pairs, loss terms, their sum, norms of gradients.

    case: which batch; name: the same, with "_spread" if the weights are
    """
    expected = json.loads((folder / "losses.json").read_text())[name]
    batch = np.load(folder / f"loss_{case}.npz")
    images, labels, masks, owner, label_map = batch_of(batch, model.backbone.mean)

    model = train_mode(model)
    model.zero_grad()
    output = model(images)
    if isinstance(output, tuple):
        golden = np.load(folder / f"loss_{name}.npz")
        matches = compare_matching(*output, labels, masks, owner, expected["matching"], golden,
                                   found)
        total = compare_loss_terms(*output, labels, masks, matches, expected["unweighted"], found)
    else:
        for layer, term in enumerate(names_of_layers(len(output), "loss_sem_seg")):
            ours = per_pixel_loss(output[layer:layer + 1], label_map)
            found.add("loss terms", ours, expected["weighted"][term])
        total = per_pixel_loss(output, label_map)
    found.add("total loss", total, expected["total"])

    total.backward()
    compare_gradients(model, expected, found)


def batch_of(golden, mean):
    """-> images [2, 3, H, W], labels [N], masks [N, H, W], owner [N], label map [2, H, W]; the
    smaller image is padded, with zeros after normalization."""
    sizes = [golden[f"segment_map_{b}"].shape for b in (0, 1)]
    H, W = np.max(sizes, axis=0)
    images = mean.expand(2, 3, H, W).clone()
    label_map = torch.full((2, H, W), 255)
    labels, masks, owner = [], [], []
    for b, (height, width) in enumerate(sizes):
        images[b, :, :height, :width] = torch.from_numpy(golden[f"image_{b}"])
        segment_map = torch.from_numpy(golden[f"segment_map_{b}"])
        for segment, label in enumerate(golden[f"labels_{b}"].tolist()):
            mask = torch.zeros(H, W, dtype=torch.bool)
            mask[:height, :width] = segment_map == segment
            label_map[b][mask] = label
            labels.append(label)
            masks.append(mask)
            owner.append(b)
    return images, torch.tensor(labels), torch.stack(masks), torch.tensor(owner), label_map


def names_of_layers(L, name):
    """What the authors call a term of the decoder layers, first to last."""
    return [f"{name}_{layer}" for layer in range(L - 1)] + [name]


def compare_matching(class_logits, mask_logits, labels, masks, owner, expected, golden, found):
    """-> the recorded matches; ours are compared with them, except where rounding decides."""
    L = len(class_logits)
    matches = hungarian_match(class_logits, mask_logits, labels, masks, owner)
    our_pairs = set(zip(*(index.tolist() for index in matches)))
    small_masks = F.interpolate(masks[:, None].float(), size=mask_logits.shape[-2:]).flatten(1)

    recorded = []
    layers = [f"aux_{layer}" for layer in range(L - 1)] + ["last"]
    for layer, name in enumerate(layers):
        for b, match in enumerate(expected[name]):
            segments = (owner == b).nonzero().squeeze(1)             # [n]
            x, truth = mask_logits[layer, b].flatten(1), small_masks[segments]
            cost = (20 * pairwise_focal(x, truth) + pairwise_dice(x, truth)
                    - class_logits[layer, b].softmax(-1)[:, labels[segments]])       # [Q, n]
            found.add("matching costs", cost, golden[f"cost_{name}_{b}"])

            pairs = [(layer, b, query, segments[i].item())
                     for query, i in zip(match["query"], match["target"])]
            if match["margin"] > 1e-4:
                found.add_number("matched pairs", sum(pair not in our_pairs for pair in pairs))
            recorded += pairs
    assert len(recorded) == len(our_pairs)
    return torch.tensor(recorded).unbind(1)


def compare_loss_terms(class_logits, mask_logits, labels, masks, matches, expected, found):
    """Compares the terms layer by layer -> the total of all layers at once."""
    L = len(class_logits)
    layer, image, query, segment = matches
    for l in range(L):
        here = layer == l
        one_layer = torch.zeros_like(image[here]), image[here], query[here], segment[here]
        ce, focal, dice = mask_classification_loss(class_logits[l:l + 1], mask_logits[l:l + 1],
                                                   labels, masks, one_layer)
        found.add("loss terms", ce, expected[names_of_layers(L, "loss_ce")[l]])
        found.add("loss terms", 20 * focal, 20 * expected[names_of_layers(L, "loss_mask")[l]])
        found.add("loss terms", dice, expected[names_of_layers(L, "loss_dice")[l]])

    ce, focal, dice = mask_classification_loss(class_logits, mask_logits, labels, masks, matches)
    return ce + 20 * focal + dice


def compare_gradients(model, expected, found):
    """Norms of the gradient, of the whole model and of the recorded parameters."""
    norms = {name: parameter.grad.norm().item()
             for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = np.linalg.norm(list(norms.values()))
    error = abs(total / expected["grad_total_l2_norm"] - 1)
    found.add_number("gradient norms, relative", error)

    if "grad_l2_norm" not in expected:
        return
    for official, value in expected["grad_l2_norm"].items():
        ours, = translate({official: np.zeros(1)})
        error = abs(norms.pop(ours) - value) / max(value, 1e-6 * total)      # smaller: rounding
        found.add_number("gradient norms, relative", error)
    assert not norms, f"parameters of ours that theirs lack: {', '.join(norms)}"


# -------------------------------------------------------------------------------------------- table
def measure(folder):
    """A folder of GOLDEN_ROOT -> {quantity: the largest difference}."""
    summary = json.loads((folder / "summary.json").read_text())
    K = summary["cfg"]["SEM_SEG_HEAD"]["NUM_CLASSES"]
    things = summary.get("thing_contiguous_ids", [])
    is_thing = [k in things for k in range(K)]

    found = Differences()
    state = made_up_weights(folder)
    model = load_from_file(state)
    for kind in ("plain", "spread"):
        if kind == "spread":
            state = {name: spread(name, array) for name, array in state.items()}
            model.load_state_dict(official_to_ours(state, model))
        for file in sorted(folder.glob("eval_*.npz")):
            if ("spread" in file.name) == (kind == "spread"):
                compare_outputs(model, file, is_thing, found)
        for case in ("same", "mixed"):
            name = f"{case}_spread" if kind == "spread" else case
            if (folder / f"loss_{name}.npz").exists():
                compare_losses(model, folder, case, name, found)

    synthetic = folder / "postprocess_synthetic.npz"
    if synthetic.exists():
        compare_postprocessing(np.load(synthetic), is_thing, found)
    return found


def main():
    """The command: see the top of this file."""
    if "GOLDEN_ROOT" not in os.environ:
        sys.exit("error: set GOLDEN_ROOT to the folder of the recordings")
    root = Path(os.environ["GOLDEN_ROOT"])
    folders = [path.parent for path in sorted(root.glob("*/summary.json"))]
    columns = [measure(folder) for folder in folders]
    print("| largest difference | limit |", " | ".join(folder.name for folder in folders), "|")
    print("|---" * (len(folders) + 2) + "|")
    for quantity, limit in LIMITS.items():
        values = [f"{found[quantity]:.2g}" if quantity in found else "" for found in columns]
        print(f"| {quantity} | {limit:g} |", " | ".join(values), "|")


if __name__ == "__main__":
    main()
