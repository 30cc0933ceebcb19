"""What README.md says is so."""
import re
import shlex
from pathlib import Path

import pytest

import data
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MODULES = ["maskformer", "matcher", "losses", "data", "batches", "train", "evaluate", "run", "pretrained"]
CEILINGS = dict(maskformer=300, matcher=100, losses=110, data=500, batches=200, train=350, evaluate=450, run=300,
                pretrained=220)


def blocks(language):
    return [text for name, text in re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S) if name == language]


def test_the_printed_forward_is_the_code():
    printed = blocks("python")[0].strip()
    assert printed in "\n".join(line[4:] for line in (ROOT / "maskformer.py").read_text().split("\n"))


@pytest.mark.parametrize("command", re.findall(r"^(?:python|torchrun [^\n]*?) train\.py(?:[^\n#\\]|\\\n)*", README, re.M))
def test_training_commands_are_understood(command):
    args = train.parse(shlex.split(command.replace("\\\n", "").split("train.py")[1]))
    assert args.steps > 0 and args.dataset in data.DATASETS


def test_there_are_training_commands():
    assert len(re.findall(r"train\.py", "".join(blocks("")))) >= 6


def test_the_notes_are_those_of_the_code():
    in_code = {int(n) for name in MODULES for n in re.findall(r"NOTE (\d+)", (ROOT / f"{name}.py").read_text())}
    section = README.split("## Details")[1].split("##")[0]
    assert in_code == {int(n) for n in re.findall(r"(?:^|\s)(\d)\. [A-Z]", section)} == set(range(1, len(in_code) + 1))


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_as_long_as_stated_and_no_longer_than_agreed(name):
    lines = (ROOT / f"{name}.py").read_text().split("\n")[:-1]
    stated = re.search(rf"\[{name}\.py\].*\| (\d+) \|$", README, re.M)
    assert len(lines) == int(stated[1]) <= CEILINGS[name] and max(map(len, lines)) <= 110


def test_the_three_core_modules_import_no_sibling():
    for name in ("maskformer", "matcher", "losses"):
        imported = re.findall(r"^(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        assert not set(imported) & set(MODULES)


def test_requirements_are_the_seven():
    names = {re.match(r"\w+", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    assert names == {"torch", "torchvision", "timm", "scipy", "numpy", "pillow", "pytest"}
