import subprocess
import sys

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
