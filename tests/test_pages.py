"""What README.md and docs/ tell the reader to type works, and what they point to is there."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from fake_clips import FROM_FILES, write_prepared

import compare
import greedy_balance
import mhm
import pmr
import toy_projection
import umt_ume

PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
TEXTS |= {
    f"{script.__name__}.py": script.__doc__
    for script in (pmr, mhm, greedy_balance, umt_ume, toy_projection, compare)
}


def commands(script):
    """Every `python <script> ...` on the pages, without comments: page, words."""
    found = {}
    for page, text in TEXTS.items():
        text = text.replace("\\\n", " ")  # a command on several lines
        text = re.sub(r"\$\(seq (\d+) (\d+)\)", r"\1 \2", text)  # two of the seeds are enough
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


SCRIPTS = {
    "pmr.py": pmr,
    "mhm.py": mhm,
    "greedy_balance.py": greedy_balance,
    "umt_ume.py": umt_ume,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param(name, *case.values, id=f"{name}:{case.id}")
        for name in SCRIPTS
        for case in commands(name)
    ],
)
def test_commands_run(name, words, tmp_path, require, data_root, features_file, monkeypatch):
    """On a tiny part of the data, on the CPU; --help and --eval-only need no more than parsing."""
    script = SCRIPTS[name]
    monkeypatch.setattr(umt_ume, "WEIGHTS", (1.0,))
    if "--help" in words:
        with pytest.raises(SystemExit) as exit_info:
            script.main(words)
        assert exit_info.value.code == 0
        return
    words = [str(features_file) if word.endswith(".npz") else word for word in words]
    args, _ = script.parse_args(words)
    require(args.dataset)
    tiny = ["--train-samples", "40", "--epochs", "1", "--device", "cpu"]
    if args.dataset in FROM_FILES:
        data_root = tmp_path / "data"
        write_prepared(data_root, args.dataset, counts=(12,), shape=(32, 32))
        tiny += ["--image-size", "32", "--num-workers", "0"]
    if args.dataset == "features":
        data_root = features_file
    tiny += ["--out", str(tmp_path), "--data-root", str(data_root)]
    tiny += ["--method", "ume", "joint", "umt", "auto"] if "methods" in words else []
    tiny += ["--seeds", *map(str, args.seeds[:2])]
    tiny += ["--rates", "2"] if script is greedy_balance else []
    if args.eval_only:
        script.main([word for word in [*words, *tiny] if word != "--eval-only"])
    assert script.main([*words, *tiny])


@pytest.mark.slow
@pytest.mark.parametrize("words", commands("toy_projection.py"))
def test_toy_projection_commands_run(words, tmp_path):
    tiny = ["--epochs", "2", "--seeds", "0", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert toy_projection.main([*words, *tiny])["runs"]


@pytest.mark.slow
@pytest.mark.parametrize("words", commands("compare.py"))
def test_compare_commands_run(words, tmp_path, require, data_root, features_file):
    args, _ = compare.parse_args(words)
    if args.join:
        files = [str(path) for path in (ROOT / "results").glob("compare_*.json")]
        assert compare.main(["--join", *files, "--out", str(tmp_path)])["rows"]
        return
    require(args.dataset)
    data_root = features_file if args.dataset == "features" else data_root
    tiny = ["--train-samples", "40", "--epochs", "1", "--device", "cpu", "--seeds", "0"]
    tiny += ["--out", str(tmp_path), "--data-root", str(data_root)]
    assert compare.main([*words, *tiny])["rows"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param(path.name, *case.values, id=f"{path.name}:{case.id}")
        for path in sorted((ROOT / "examples").glob("*.py"))
        for case in commands(f"examples/{path.name}")
    ],
)
def test_examples_run_as_they_stand(name, words, tmp_path):
    tiny = ["--train-samples", "40", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "examples" / name), *words, *tiny]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "test" in done.stdout, done.stderr


def test_commands_were_found():
    assert len(commands("pmr.py")) >= 8
    assert len(commands("mhm.py")) >= 8
    assert len(commands("greedy_balance.py")) >= 10
    assert len(commands("umt_ume.py")) >= 8
    assert len(commands("compare.py")) >= 3
    assert len(commands("toy_projection.py")) >= 5
    assert len(commands("data/prepare.py")) >= 1


@pytest.mark.parametrize("page", list(TEXTS))
def test_links_and_files_exist(page):
    text = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (folder / target).exists(), target
    for name in re.findall(r"`((?:common|data|docs|tests|results)/[\w./]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("script", ["pmr", "mhm", "greedy_balance", "umt_ume", "toy_projection"])
def test_every_function_that_the_docs_name_exists(script):
    page = TEXTS[f"docs/{script}.md"]
    table = page.split(f"| paper | function in `{script}.py` |")[1].split("\n\n")[0]
    sources = [ROOT / f"{script}.py", *(ROOT / "common").glob("*.py")]
    source = "".join(path.read_text() for path in sources)
    names = re.findall(r"`(\w+(?:\.\w+)?)`", table)
    assert len(names) >= 5
    for name in names:
        defined = rf"(?:(?:def|class) |^){name.split('.')[-1]}\b"
        assert re.search(defined, source, re.MULTILINE), name


@pytest.mark.parametrize(
    ("script", "flags"),
    {
        "pmr": "alpha mu momentum-epsilon per-epochs subset-fraction coefficients fusion",
        "mhm": "heads branches gs fusion",
        "umt_ume": "distill-weight fusion ogm-alpha drop-probability blend super-epoch",
        "greedy_balance": "tolerance window gate-mean gate-factor biased duplicate l1 until-fitted",
    }.items(),
)
def test_every_own_flag_stands_in_its_docs(script, flags):
    for flag in flags.split():
        assert f"`--{flag}`" in TEXTS[f"docs/{script}.md"]
