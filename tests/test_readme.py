"""The pages name commands, flags, files and numbers that exist; the repository is as they say."""
import ast
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import evaluate
import train
from maskformer import build_model
from tools.download import DOWNLOADS
from tools.official_weights import ZOO

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README, TRAINING, RESULTS = (ROOT / name for name in
                             ("README.md", "docs/TRAINING.md", "docs/RESULTS.md"))
MODULES = ["maskformer", "matcher", "losses", "data", "train", "evaluate"]


def blocks(page, language=""):
    """The code blocks of a page, with continued lines joined."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [text.replace("\\\n", " ") for name, text in found if name == language]


def commands(page):
    """Every command of a page that starts a script of ours: the script and its arguments."""
    text = "".join(blocks(page)) + "\n".join(re.findall(r"`([^`\n]*)`", page.read_text()))
    found = []
    for line in text.splitlines():
        match = re.match(r"(?:python|torchrun .*?) (\S+\.py)(.*)", line.strip())
        if match:
            found.append((match[1], shlex.split(match[2])))
    return found


ALL_COMMANDS = [command for page in (README, TRAINING) for command in commands(page)]


# ------------------------------------------------------------------------------------ code in pages
def test_the_printed_forward_is_the_code_without_its_docstring():
    model = (ROOT / "maskformer.py").read_text().split("class MaskFormer(nn.Module)")[1]
    forward = model[model.index("    def forward("):model.index("    def encode(")]
    forward = re.sub(r' *""".*?"""\n', "", forward, count=1, flags=re.S)
    assert blocks(README, "python")[0].strip() == textwrap.dedent(forward).strip()


def test_the_snippet_prints_names_and_scores_of_a_photo(tmp_path, monkeypatch, capsys):
    config = vars(train.parse_args(["--backbone", "test_resnet", "--queries", "7"]))
    config |= {"num_classes": 3, "task": "panoptic"}
    config |= {"object_threshold": 0.3, "overlap_threshold": 0.}
    model = build_model(config)
    model.to_class.bias.data[1] = 5.                                 # every query sees a lamp
    torch.save({"model": model.state_dict(), "config": config, "step": 0,
                "classes": ["wall", "lamp", "sky"], "is_thing": [False, True, False],
                "category_ids": [1, 2, 3], "label_values": [1, 2, 3]}, tmp_path / "tiny.pt")
    Image.effect_noise((48, 32), 90).convert("RGB").save(tmp_path / "photo.jpg")

    snippet = next(text for text in blocks(README, "python") if "predict_file" in text)
    name = re.search(r'load\("(\w+)"\)', snippet)[1]
    assert name in ZOO
    monkeypatch.chdir(tmp_path)
    exec(snippet.replace(name, "tiny.pt"), {})
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(printed) > 0
    for name, score in printed:
        assert name == "lamp" and 0.3 < float(score) <= 1


# ----------------------------------------------------------------------------------------- commands
@pytest.mark.parametrize("script, arguments", ALL_COMMANDS,
                         ids=[" ".join([script, *rest]) for script, rest in ALL_COMMANDS])
def test_commands_are_understood(script, arguments):
    if script == "train.py" and "--help" not in arguments:
        args = train.parse_args(arguments)
        assert args.dataset in data.DATASETS
        for source in filter(None, (args.init, args.init_backbone)):
            assert source in ZOO
    elif script == "evaluate.py":
        source = evaluate.parse_args(arguments).checkpoint
        assert source in ZOO or source.startswith("runs/")
    elif script == "tools/download.py":
        assert arguments[0] in DOWNLOADS
    else:
        assert (ROOT / script).exists()


def test_the_readme_shows_how_to_train_and_to_test():
    scripts = [script for script, _ in commands(README)]
    assert scripts.count("train.py") >= 3 and scripts.count("evaluate.py") >= 1
    assert "pip install -r requirements.txt\n" in blocks(README) and "pytest\n" in blocks(README)


def test_a_command_has_a_block_of_its_own():
    for page in (README, TRAINING):
        for block in blocks(page):
            if re.search(r"^(python|torchrun|pip|pytest)\b", block, re.M):
                assert len(block.splitlines()) == 1


@pytest.mark.parametrize("page", [README, TRAINING, RESULTS], ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page, capsys):
    known = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--max-restarts"}
    for parse_args in (train.parse_args, evaluate.parse_args):
        with pytest.raises(SystemExit):
            parse_args(["--help"])
        known.update(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for script in (ROOT / "tools").glob("*.py"):
        known.update(re.findall(r'"(--[a-z-]+)"', script.read_text()))
    assert set(re.findall(r"(?<![-\w])--[a-z][a-z-]*", page.read_text())) <= known


# --------------------------------------------------------------------------------------- statements
def test_the_notes_are_those_of_the_code():
    in_code = set()
    for name in MODULES:
        for number in re.findall(r"NOTE (\d+):", (ROOT / f"{name}.py").read_text()):
            in_code.add((int(number), f"{name}.py"))
    heading = "## Details where paper, released code and this code differ"
    section = README.read_text().split(heading)[1].split("##")[0]
    notes = [(int(number), file)
             for number, file in re.findall(r"^(\d+)\. (\w+\.py): ", section, re.M)]
    assert set(notes) == in_code
    assert [number for number, _ in notes] == list(range(1, len(notes) + 1))


def test_names_in_the_table_of_the_paper_exist():
    table = README.read_text().split("| paper | here |")[1].split("\n\n")[0]
    code = "".join((ROOT / f"{name}.py").read_text() for name in MODULES)
    for name in re.findall(r"`([\w.]+)`", table):
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", code), name


def test_the_number_of_published_datasets_is_right():
    published = set(data.DATASETS) - {"shapes", "folder", "panoptic"}
    in_words = {4: "four", 9: "Nine"}
    text = " ".join(README.read_text().split())
    assert f"{in_words[len(published)]} published datasets" in text
    assert f"{in_words[len(DOWNLOADS)]} of them are downloaded" in text


def heading_ids(page):
    """The names by which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
            for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not heading or heading in heading_ids(target), link


# --------------------------------------------------------------------------------------------- form
def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_only_tables_are_wider_than_100_columns(page):
    lines = page.read_text().splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_no_line_of_code_is_longer_than_100_columns():
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("tests/*.py")]
    assert len(scripts) > len(MODULES)
    too_long = []
    for script in scripts:
        for number, line in enumerate(script.read_text().splitlines(), 1):
            if len(line) > 100:
                too_long.append(f"{script.name}:{number}")
    assert too_long == []


# ---------------------------------------------------------------------------------------- the house
def test_the_top_level_is_the_six_modules_and_what_belongs_to_them():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top_level = {file.split("/")[0] for file in files.splitlines() if (ROOT / file).exists()}
    assert top_level == {f"{name}.py" for name in MODULES} | {
        "tests", "tools", "docs", "requirements.txt", "README.md", "LICENSE", ".gitignore", ".ci"}


def imports(script):
    """What a script of ours imports of ours, and from where: {(module, function or None)}."""
    ours = {*MODULES, "tools"}
    found = set()

    def visit(node, function):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        found.update((name, function) for name in names if name.split(".")[0] in ours)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(script.read_text()), None)
    return found


@pytest.mark.parametrize("name, allowed", [
    ("maskformer", set()),
    ("matcher", set()),
    ("losses", set()),
    ("data", set()),
    ("evaluate", {("data", None), ("maskformer", None), ("tools.official_weights", "load")}),
    ("train", {("data", None), ("evaluate", None), ("losses", None), ("maskformer", None),
               ("matcher", None)}),
])
def test_modules_import_no_more_than_these(name, allowed):
    assert imports(ROOT / f"{name}.py") == allowed


def test_requirements_are_the_seven():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = [re.match(r"\w+", line)[0] for line in lines]
    assert sorted(names) == sorted(["torch", "torchvision", "timm", "scipy", "numpy", "pillow",
                                    "pytest"])
