"""The house: imports go down the floors only, units of one floor do not know each other, no torch where none is
needed, and nothing anywhere that runs code from data.

The rules are read off the syntax tree, so an import inside a function counts as well.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ternlm

ROOT = Path(ternlm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

FLOORS = [
    {"errors", "files"},
    {"settings", "device", "run_directory"},
    {"ops", "tokenizers", "tracking"},
    {"nn", "data"},
    {"models"},
    {"checkpoint", "generation"},
    {"evaluation", "export"},
    {"training"},
    {"recipes", "report", "benchmark"},
    {"experiment", "twin"},
    {"cli"},
]
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}

TORCH_FREE = [
    "errors",
    "settings",
    "files",
    "run_directory",
    "tokenizers",
    "tracking",
    "tracking.interface",
    "tracking.jsonl",
    "tracking.csv",
    "tracking.console",
    "tracking.background",
    "tracking.retrying",
    "tracking.system",
    "tracking.tensorboard",
    "tracking.wandb",
    "tracking.wandb_process",
    "report",
    "report.status",
    "report.screen",
    "report.history",
    "report.analysis_pictures",
    "report.benchmark",
    "report.analysis_tables",
    "report.blocks",
    "report.charts",
    "report.heading",
    "report.markdown",
    "report.page",
    "report.vector",
    "report.comparison",
    "report.comparison_picture",
    "report.card",
    "report.card_training",
    "report.chunk_text",
    "report.chunk_page",
    "report.chunk_picture",
    "report.sweep",
    "report.sweep_text",
    "report.sweep_picture",
    "report.record",
    "report.sections",
    "report.alignment",
    "report.logged_schedule",
    "report.spread",
    "training.status",
    "training.schedule",
    "training.sweep",
    "training.sweep_record",
    "training.sweep_trials",
    "data",
    "data.decoding",
    "data.scripts",
    "recipes",
    "experiment",
    "experiment.stages",
    "experiment.measuring",
    "twin",
    "twin.definition",
    "twin.record",
    "twin.stages",
    "report.twin",
    "cli",
]


def unit_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_units(file: Path) -> set[str]:
    found = set()
    for module in imported_modules(ast.parse(file.read_text())):
        package, _, rest = module.partition(".")
        unit = rest.partition(".")[0]
        if package == "ternlm" and unit in FLOOR:
            found.add(unit)
    return found - {unit_of(file)}


def test_every_unit_has_a_floor() -> None:
    units = {unit_of(file) for file in FILES} - {"__init__", "__main__"}
    assert units <= FLOOR.keys(), f"give {units - FLOOR.keys()} a floor"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_strictly_down(file: Path) -> None:
    unit = unit_of(file)
    if unit == "__init__":
        assert not imported_units(file)
        return
    floor = FLOOR.get(unit, len(FLOORS))
    wrong = {other for other in imported_units(file) if FLOOR[other] >= floor}
    assert not wrong, f"{unit} (floor {floor}) must not know {wrong}"


def test_the_rule_sees_imports_of_every_form() -> None:
    tree = ast.parse(
        "import ternlm.cli\nfrom ternlm import training as t\nfrom ternlm.nn.linear import BitLinear\n"
        "def f():\n    from ternlm.data import loader\n"
    )
    units = {module.split(".")[1] for module in imported_modules(tree) if module.startswith("ternlm.")}
    assert units == {"cli", "training", "nn", "data"}


def test_importing_what_needs_no_torch_leaves_it_out() -> None:
    modules = ", ".join(f"ternlm.{name}" for name in TORCH_FREE)
    code = f"import sys, {modules}; print(sorted({{'torch', 'transformers', 'datasets', 'wandb'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def names_called(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def forbidden(tree: ast.AST) -> list[str]:
    """What runs code from data, wherever it hides: calls by name, and modules that unpickle."""
    bad_modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    bad_calls = {
        *("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load", "torch.package"),
        *("importlib.import_module", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load"),
        *("yaml.load_all", "pd.read_pickle"),
    }
    found = [module for module in imported_modules(tree) if module.split(".")[0] in bad_modules]
    for name, call in names_called(tree):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        is_bad = name in bad_calls or name.endswith((".read_pickle", ".to_pickle"))
        is_bad |= keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False"
        is_bad |= keywords.get("trust_remote_code", "False") != "False" or "weights_only" in keywords
        if is_bad:
            found.append(name)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_l02_nothing_runs_code_from_data(file: Path) -> None:
    assert forbidden(ast.parse(file.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x', weights_only=True)",
        "torch.save(x, 'y')",
        "eval('1')",
        "exec(code)",
        "yaml.load(text)",
        "np.load('x', allow_pickle=True)",
        "subprocess.run('x', shell=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "def f():\n    import dill",
    ],
)
def test_l02_the_rule_catches_each_way_of_running_code(code: str) -> None:
    assert forbidden(ast.parse(code))


def test_no_handler_is_bare() -> None:
    handlers = ((file, node) for file in FILES for node in ast.walk(ast.parse(file.read_text())))
    assert not [f"{f.name}:{n.lineno}" for f, n in handlers if isinstance(n, ast.ExceptHandler) and n.type is None]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_file_says_what_it_holds(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text()))
    assert file.stem not in ("utils", "helpers", "common", "misc")
