"""The plan of the house: floors, the anatomy of a script, and how much there is of everything."""

import ast
import builtins
import dis
from graphlib import TopologicalSorter

import pytest
import torch
from conftest import ROOT

BUDGETS = {"pmr": 380, "greedy_balance": 520, "umt_ume": 430, "mhm": 480}
BUDGETS |= {"toy_projection": 400, "baselines": 400}
FLOORS = [  # nothing imports upward
    {"experiments", "examples", "data", "benchmarks"},
    {*BUDGETS},
    {"common.command_line", "common.parser", "common.run"},
    {"common.evaluation", "common.tasks"},
    {"common.networks", "common.datasets", "common.metrics"},
    {f"common.{x}" for x in ("device", "storage", "seeding", "errors", "flags", "optimizer")}
    | {"common", "common.tables", "common.curves", "common.progress", "common.checks"}
    | {"common.lock", "common.terminal", "common.naming"},
]
PLACES = (
    "*.py",
    "common/**/*.py",
    "experiments/*.py",
    "examples/*.py",
    "data/*.py",
    "benchmarks/*.py",
)
TEXTS = {path: path.read_text() for place in PLACES for path in ROOT.glob(place)}
SCRIPTS = {name: TEXTS[ROOT / f"{name}.py"] for name in BUDGETS}
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in TEXTS}
MODULES = {name.removesuffix(".__init__"): path for path, name in NAMES.items()}


def imports(path):
    """Modules of the project that a file imports, and how many names from them."""
    package, found, names = path.relative_to(ROOT).parent.parts, set(), 0
    for node in ast.walk(ast.parse(TEXTS[path])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            parts = {f"{module}.{alias.name}" for alias in node.names}
            found |= parts & MODULES.keys() or {module}
            names += len(node.names) if module.split(".")[0] == "common" else 0
    return found & MODULES.keys(), names


def floor(module):
    """0 is the highest. A folder of common/ is one room."""
    rooms = {module, module.rpartition(".")[0], ".".join(module.split(".")[:2])} - {""}
    return next(i for i, names in enumerate(FLOORS) if rooms & names)


def test_nothing_imports_upward_and_there_are_no_circles():
    graph = {module: imports(path)[0] for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    for module, imported in graph.items():
        for other in imported:
            same = floor(other) == floor(module) and other not in SCRIPTS
            assert same or floor(other) > floor(module), (module, other)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_keeps_to_its_budget_and_to_the_order_of_its_parts(name):
    text = SCRIPTS[name]
    assert text.count("\n") <= BUDGETS[name]
    assert text.endswith('\n\nif __name__ == "__main__":\n    run_command(main)\n')
    assert imports(ROOT / f"{name}.py")[1] <= 25
    second = "Data" if name == "toy_projection" else "Model"
    banners = [f"\n# ---- {x} ----\n" for x in ("Method", second, "Training", "Command line")]
    places = [text.index(banner) for banner in banners]
    assert places == sorted(places) and all(text.count(banner) == 1 for banner in banners)


def free_names(code):
    """What functions take from outside of themselves, those inside of others too."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return names.union(*(free_names(x) for x in code.co_consts if hasattr(x, "co_consts")))


@pytest.mark.parametrize("name", SCRIPTS)
def test_method_block_runs_when_cut_out(name):
    block = SCRIPTS[name].split("\n# ---- Method ----\n")[1].split("\n# ---- ")[0]
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if hasattr(node, "module") else [x.name for x in node.names]
            assert {x.split(".")[0] for x in modules} <= {"torch", "math", "typing"}
    space = {"__name__": "cut_out"}
    exec(block, space)
    assert free_names(compile(block, name, "exec")) <= space.keys() | vars(builtins).keys()
    assert any(hasattr(x, "__module__") and x.__module__ == "cut_out" for x in space.values())
    assert isinstance(space["torch"], type(torch))


def test_main_has_the_same_loop_in_every_script():
    start, end = "        run = Run(config)\n", "        summaries.append(run.summary)\n"
    names = [name for name in SCRIPTS if name != "toy_projection"]
    loops = [SCRIPTS[n].split(start)[1].split(end)[0] for n in names]
    assert [n for n, loop in zip(names, loops, strict=True) if loop != loops[0]] == []


def test_nothing_is_there_in_two_dialects():
    once = {"MultimodalNet", "forward_split", "split_folds", "number", "average_probabilities"}
    found = {}
    for path, text in TEXTS.items():
        for node in ast.parse(text).body:
            if getattr(node, "name", None) in once:
                found.setdefault(node.name, {})[path.name] = ast.get_source_segment(text, node)
    assert {name: list(x) for name, x in found.items() if len({*x.values()}) > 1} == {}


def test_nothing_grows_too_large():
    tests = sum(path.read_text().count("\n") for path in (ROOT / "tests").glob("*.py"))
    assert tests <= sum(text.count("\n") for text in TEXTS.values())
    assert (ROOT / "README.md").read_text().count("\n") <= 160
    sizes = [x.stat().st_size for x in (ROOT / "results").rglob("*") if x.is_file()]
    assert sum(sizes) < 10**6
