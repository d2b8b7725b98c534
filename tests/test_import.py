import ast
import subprocess
import sys
from pathlib import Path

import pytest

import metalr_hf

STATEMENTS = {
    "package": "import metalr_hf, metalr_hf.cli",
    "tuning": "import metalr_hf.tuning",
    "scheduler": "from metalr_hf import MetaLRScheduler",
    "trainer": "from metalr_hf import MetaLRTrainer",
}


@pytest.fixture(scope="module")
def loaded():
    """The modules that are loaded after each of the statements, in one process."""
    code = "import sys\n" + "\n".join(f"{statement}; print(*sys.modules)" for statement in STATEMENTS.values())
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(zip(STATEMENTS, (set(line.split()) for line in shown.splitlines()), strict=True))


def test_importing_the_package_loads_neither_torch_nor_timm_nor_matplotlib(loaded):
    assert not {"torch", "transformers", "timm", "matplotlib", "pandas", "sklearn", "datasets"} & loaded["package"]


def test_the_scheduler_needs_no_trainer_and_the_trainer_no_plots(loaded):
    assert not {"transformers", "timm", "matplotlib"} & loaded["scheduler"]
    assert "matplotlib" not in loaded["trainer"]


def test_every_public_name_is_there():
    assert all(getattr(metalr_hf, name) is not None for name in metalr_hf.__all__)
    assert not hasattr(metalr_hf, "no_such_name")


PACKAGE = Path(metalr_hf.__file__).parent
# From the ground up: a module imports from its own folder and from those above it in this list.
ORDER = ["layers", "tuning", "models", "plots", "data", "tasks", "hub", "trainer", "compare", "benchmark", "cli"]
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
LONGEST = 400


def for_type_checkers(tree):
    """The imports that are not run."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    return {id(inner) for block in blocks for inner in ast.walk(block)}


def imported_by(module):
    """The modules of the package that a module imports, in functions too."""
    tree = ast.parse((PACKAGE / module).read_text(encoding="utf-8"))
    home, skipped = Path(module).parent, for_type_checkers(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in skipped:
            continue
        base = home
        for _ in range(node.level - 1):
            base = base.parent
        base = base / (node.module or "").replace(".", "/")
        for name in node.names:
            for path in (base / f"{name.name}.py", base.parent / f"{base.name}.py", base / "__init__.py"):
                if (PACKAGE / path).is_file():
                    yield path.as_posix()
                    break


def folder(module):
    return module.partition("/")[0] if "/" in module else ""


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_to_what_lies_below(module):
    height = ["", *ORDER].index(folder(module))
    above = [other for other in imported_by(module) if ["", *ORDER].index(folder(other)) > height]
    assert not above


def test_no_two_modules_import_each_other():
    below = {module: {other for other in imported_by(module) if other != module} for module in MODULES}
    for _ in MODULES:
        leaves = {module for module, others in below.items() if not others}
        below = {module: others - leaves for module, others in below.items() if module not in leaves}
    assert not {module: others for module, others in below.items() if not module.endswith("__init__.py")}


def test_tuning_needs_no_transformers(loaded):
    assert not {"transformers", "datasets", "timm", "accelerate"} & loaded["tuning"]


def test_the_folders_are_those_of_the_plan():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "settings.py", "messages.py"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short_and_its_name_does_not_repeat_its_folder(module):
    assert len((PACKAGE / module).read_text(encoding="utf-8").splitlines()) <= LONGEST
    assert not [home for home in Path(module).parent.parts if home.rstrip("s") in Path(module).stem]
