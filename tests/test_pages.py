"""What README.md, docs/ and the docstrings tell the reader to type works, and what they point to is
there. Experiments are parsed, and their grids made, but not run: their own tests do that."""

import importlib
import re
import runpy
import shlex
import sys

import pytest
from conftest import ROOT
from fake_clips import FROM_FILES, write_prepared
from test_pmr import no_probes, quick  # noqa: F401

import baselines
import greedy_balance
import mhm
import pmr
import umt_ume
from common import evaluation
from common.command_line import Command
from common.datasets import DATASETS
from common.networks.encoders import ENCODERS
from common.parser import dataset_of
from experiments import compare, grid, pages
from experiments import toy_projection as toy_experiments

SCRIPTS = {script.SCRIPT.name: script for script in (pmr, greedy_balance, umt_ume, mhm, baselines)}
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py"), *ROOT.glob("examples/*.py")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
TEXTS |= {path.relative_to(ROOT).as_posix(): path.read_text().split('"""')[1] for path in SOURCES}


def find_commands():
    """(program, words) -> page, of every `python ...`, without comments. Program: a file, or a
    module of experiments/."""
    found = {}
    for page, text in TEXTS.items():
        text = text.replace("\\\n", " ")  # a command on several lines
        text = re.sub(r"\$\(seq (\d+) (\d+)\)", r"\1 \2", text)
        for line in re.findall(r"(?:^|`|&& *| {4})python ((?:-m |\w+/)*\w+\.[^`\n]*)", text, re.M):
            program, *words = shlex.split(line.removeprefix("-m "), comments=True)
            whole = words or not program.startswith("experiments.")  # else only a name
            if whole and "<dataset>" not in words:
                found.setdefault((program, *words), page)
    return found


COMMANDS = find_commands()
NOT_RUN = (
    "data/prepare.py",
    "benchmarks/",
    "experiments.pages",
)  # downloads, benches, what is below


class NotRun(Exception):
    """In place of the runs of an experiment."""


def check_grid(experiment, made):
    """In place of `Experiment.run`: every part is a command that its script takes."""
    for part in made.parts:
        settings = experiment.given | part
        script = importlib.import_module(settings.pop("script", experiment.script.SCRIPT.name))
        assert Command(script.SCRIPT, experiment.settings_of(script, settings)).methods
    raise NotRun


@pytest.fixture
def no_experiments(monkeypatch):
    def refuse(*_):
        raise NotRun

    monkeypatch.setattr(grid.Experiment, "run", check_grid)
    monkeypatch.setattr(compare, "run_everything", refuse)
    monkeypatch.setattr(toy_experiments, "run_tables", refuse)
    monkeypatch.setattr(umt_ume, "linear_probe", evaluation.linear_probe)  # the quick one


@pytest.mark.slow
@pytest.mark.usefixtures("no_experiments", "thin_resnet")
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if not c[0].startswith(NOT_RUN)], ids=" ".join
)
def test_commands_run(command, tmp_path, require, root_of, features_file, monkeypatch):
    """On a tiny part of the data, on the CPU, one seed."""
    program, *words = command
    tiny = ["--epochs", "1", "--device", "cpu", "--seeds", "0", "--out", str(tmp_path)]
    name = program.removesuffix(".py").split(".")[-1]
    if name != "toy_projection":
        words = [str(features_file) if word.endswith(".npz") else word for word in words]
        dataset = dataset_of(words, SCRIPTS.get(name, pmr).SCRIPT.dataset)
        require(dataset)
        root = root_of(dataset)
        if dataset in FROM_FILES:
            root = tmp_path / "data"
            write_prepared(root, dataset, counts=(12,), shape=(32, 32))
            tiny += ["--image-size", "32", "--num-workers", "0"]
        tiny += ["--train-samples", "40", "--data-root", str(root)]
    if "--join" in words:
        words = ["--join", *map(str, ROOT.glob("results/compare_*.json"))]
    if program.startswith("examples/"):
        return run_example(program, [*words, *tiny], monkeypatch)
    main = importlib.import_module(program.removesuffix(".py")).main
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            main(words)
    elif program.startswith("experiments.") and "--join" not in words:
        with pytest.raises(NotRun):
            main([*words, *tiny])
    else:
        if "--eval-only" in words:
            main([word for word in [*words, *tiny] if word != "--eval-only"])
        assert main([*words, *tiny])


def run_example(file, words, monkeypatch):
    """As it stands, in this process; what it adds to the project is taken out again. That its
    method trains is in test_compare.py."""
    for names in (baselines.RULES, baselines.METHODS):
        monkeypatch.setitem(names, "half-speed", None)
    for names in (DATASETS, ENCODERS):
        monkeypatch.setitem(names, "halves", None)
    monkeypatch.setattr(sys, "argv", [file, *words])
    if "own_method" in file:
        with pytest.raises(NotRun):
            runpy.run_path(str(ROOT / file), run_name="__main__")
    else:
        runpy.run_path(str(ROOT / file), run_name="__main__")


def test_commands_were_found():
    programs = [program for program, *_ in COMMANDS]
    wanted = {"pmr": 8, "baselines": 5, "greedy_balance": 4, "umt_ume": 7, "mhm": 5}
    wanted |= {"toy_projection": 4, "data/prepare": 4, "examples/own_method": 1}
    for name, count in wanted.items():
        assert programs.count(f"{name}.py") >= count, name
    wanted = {"compare": 4, "pmr": 3, "greedy_balance": 4, "umt_ume": 5, "mhm": 2}
    for name, count in wanted.items():
        assert programs.count(f"experiments.{name}") >= count, name
    assert "pip install -r requirements.txt && python pmr.py\n" in TEXTS["README.md"]
    assert "pip install -r requirements.txt && pytest\n" in TEXTS["README.md"]
    assert "pip install --quiet -r requirements.txt && pytest" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("page", list(TEXTS))
def test_links_and_files_exist_and_tables_are_those_of_results(page):
    """If a table differs: python -m experiments.pages README.md data/README.md docs/*.md"""
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
    folders = "common|data|docs|tests|results|experiments|examples|benchmarks"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name
    for script in re.findall(r"\bdocs/(\w+\.md)\b", text):
        assert (ROOT / "docs" / script).exists(), script
    if page.endswith(".md"):
        assert pages.renew_tables(TEXTS[page]) == TEXTS[page]
        assert text.count("<!-- table ") == len(pages.MARKERS.findall(text))
        bare = pages.MARKERS.sub("", text)
        assert not re.search(r"^\|.*\d ± \d", bare, re.MULTILINE)  # no table without markers


@pytest.mark.parametrize("name", [*SCRIPTS, "toy_projection"])
def test_what_the_docs_name_exists_and_every_own_flag_is_there(name):
    page, own = TEXTS[f"docs/{name}.md"], []
    table = re.search(rf"\| \w+ \| function in `{name}\.py` \|(.*?)\n\n", page, re.DOTALL)[1]
    sources = [ROOT / f"{name}.py", *ROOT.glob("common/**/*.py"), *ROOT.glob("experiments/*.py")]
    source = "".join(path.read_text() for path in sources)
    functions = re.findall(r"`(?:\w+\.)?(\w+)`", table)
    assert len(functions) >= 5
    for function in functions:
        assert re.search(rf"(?:(?:def|class) |^){function}\b", source, re.MULTILINE), function
    if name in SCRIPTS:
        SCRIPTS[name].SCRIPT.add_flags(lambda flag, **_: own.append(flag))
        own += ["--fusion"] if len(SCRIPTS[name].SCRIPT.fusions) > 1 else []
        assert not [flag for flag in own if f"`{flag}`" not in page]
