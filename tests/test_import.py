import ast
import subprocess
import sys
from pathlib import Path

import pytest

import metalr_hf


def loaded_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_package_loads_neither_torch_nor_timm_nor_matplotlib():
    heavy = {"torch", "transformers", "timm", "matplotlib", "pandas", "sklearn", "datasets"}
    assert not heavy & loaded_after("import metalr_hf, metalr_hf.cli")


def test_the_scheduler_needs_no_trainer_and_the_trainer_no_plots():
    assert not {"transformers", "timm", "matplotlib"} & loaded_after("from metalr_hf import MetaLRScheduler")
    assert "matplotlib" not in loaded_after("from metalr_hf import MetaLRTrainer")


def test_every_public_name_is_there():
    assert all(getattr(metalr_hf, name) is not None for name in metalr_hf.__all__)
    assert not hasattr(metalr_hf, "no_such_name")


ROOMS = Path(metalr_hf.__file__).parent


def rooms_below(room, found=()):
    """The rooms that a room imports, in a function too, and those that they import."""
    tree = ast.parse((ROOMS / f"{room}.py").read_text(encoding="utf-8"))
    found = set(found)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            # `from .room import name`, or `from . import room`.
            for other in [node.module] if node.module else [name.name for name in node.names]:
                if other not in found and (ROOMS / f"{other}.py").exists():
                    found = {other} | rooms_below(other, {*found, other})
    return found


TUNING = ["hypergradient", "rules", "layers", "history", "scheduler", "calibration", "guard"]


@pytest.mark.parametrize("room", [*TUNING, "trainer"])
def test_arrows_point_one_way(room):
    below = rooms_below(room)
    assert "trainer" not in below
    assert room == "trainer" or not {"training_args", "checkpoints", "hub_trainer", "collapse"} & below
