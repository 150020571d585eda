"""What README.md and docs/ tell the reader to type works, and what they point to is there."""

import re
import shlex

import pytest
from conftest import ROOT

import pmr

PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
TEXTS["pmr.py"] = pmr.__doc__


def commands(script):
    """Every `python <script> ...` on the pages, without comments: page, words."""
    found = {}
    for page, text in TEXTS.items():
        text = text.replace("\\\n", " ")  # a command on several lines
        for line in re.findall(
            rf"(?:^|`|&& *| {{4}})python {re.escape(script)}([^`\n]*)", text, re.M
        ):
            words = shlex.split(line, comments=True)
            if "<dataset>" not in words:
                found[tuple(words)] = page
    return [pytest.param(words, id=f"{page}:{' '.join(words)}") for words, page in found.items()]


def test_the_two_commands_of_the_readme():
    readme = TEXTS["README.md"]
    assert "pip install -r requirements.txt && python pmr.py\n" in readme
    assert "pip install -r requirements.txt && pytest\n" in readme
    assert "pip install --quiet -r requirements.txt && pytest" in (ROOT / ".ci/run").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("words", commands("pmr.py"))
def test_pmr_commands_run(words, tmp_path, require, data_root):
    """On a tiny part of the data, on the CPU; --help and --eval-only need no more than parsing."""
    if "--help" in words:
        with pytest.raises(SystemExit) as exit_info:
            pmr.main(words)
        assert exit_info.value.code == 0
        return
    args, _ = pmr.parse_args(list(words))
    require(args.dataset)
    tiny = ["--train-samples", "40", "--epochs", "1", "--device", "cpu"]
    tiny += ["--out", str(tmp_path), "--data-root", str(data_root)]
    if args.eval_only:
        pmr.main([word for word in [*words, *tiny] if word != "--eval-only"])
    assert pmr.main([*words, *tiny])


def test_commands_were_found():
    assert len(commands("pmr.py")) >= 8
    assert len(commands("data/prepare.py")) >= 1


@pytest.mark.parametrize("page", list(TEXTS))
def test_links_and_files_exist(page):
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (folder / target).exists(), target
    for name in re.findall(r"`((?:common|data|docs|tests|results)/[\w./]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_every_function_that_the_docs_name_exists():
    table = TEXTS["docs/pmr.md"].split("| paper | function in `pmr.py` |")[1].split("\n\n")[0]
    source = (ROOT / "pmr.py").read_text() + (ROOT / "common" / "fusion.py").read_text()
    names = re.findall(r"`(\w+(?:\.\w+)?)`(?! in)", table)
    assert len(names) >= 12
    for name in names:
        assert re.search(rf"(?:def|class) {name.split('.')[-1]}\b", source), name


def test_every_own_flag_of_pmr_stands_in_its_docs():
    parser_help = [f"--{name.replace('_', '-')}" for name in ("alpha", "mu", "momentum_epsilon")]
    for flag in [*parser_help, "--per-epochs", "--subset-fraction", "--coefficients", "--fusion"]:
        assert f"`{flag}`" in TEXTS["docs/pmr.md"]
