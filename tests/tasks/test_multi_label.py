"""Several labels an image through the command line: trained, compared, published, and read by transformers."""

import json

import numpy as np
import pytest
import torch
from digits import digit_images, findings, save_image_folder, save_timm, save_vit, save_with_metadata
from huggingface_hub import ModelCard
from sklearn.metrics import roc_auc_score
from stand_in_hub import FILES
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from metalr_hf.cli import main

pytestmark = pytest.mark.usefixtures("offline")
COLUMNS = ["even", "loop", "bent"]
METRICS = ("macro_auroc", "macro_f1", "mean_average_precision")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(save_with_metadata(tmp_path_factory.mktemp("images"), findings))


def train(images, model, output, *more):
    command = ["train", "--task", "multi_label", "--dataset_name", images, "--model_name_or_path", str(model)]
    command += ["--target_column_names", *COLUMNS, "--output_dir", str(output), "--report_to", "none"]
    command += ["--use_cpu", "true", "--disable_tqdm", "true", "--per_device_train_batch_size", "10", *more]
    return main(command)


def test_it_is_trained_published_and_read_by_transformers(images, tmp_path, hub, user):
    run = tmp_path / "run"
    more = ["--num_train_epochs", "12", "--augment", "none", "--learning_rate", "1e-3", "--save_strategy", "no"]
    # Whether an untrained ViT learns anything of 60 images in 72 steps depends on the draw.
    more += ["--calibrate", "false", "--seed", "1"]
    assert train(images, save_vit(tmp_path / "vit"), run, *more) == 0
    results = json.loads((run / "all_results.json").read_text())
    assert all(0 <= results[f"test_{name}"] <= 1 for name in METRICS)
    assert results["test_macro_auroc"] > 0.7

    model = AutoModelForImageClassification.from_pretrained(run).eval()
    assert model.config.problem_type == "multi_label_classification"
    assert model.config.id2label == dict(enumerate(COLUMNS))
    pictures, names = digit_images(30, start=60)
    pictures = [picture.convert("RGB") for picture in pictures]
    with torch.no_grad():
        logits = model(**AutoImageProcessor.from_pretrained(run)(pictures, return_tensors="pt")).logits
    # Of the images of which the label is known.
    truth = [[findings(name, None, row)[label] for label in COLUMNS] for row, name in enumerate(names)]
    truth = np.array(truth, dtype=float)
    scores = [
        roc_auc_score(truth[~np.isnan(truth[:, k]), k], logits[~np.isnan(truth[:, k]), k]) for k in range(len(COLUMNS))
    ]
    assert np.mean(scores) == pytest.approx(results["test_macro_auroc"])
    # Each label is answered by itself, and the answers do not add up to one.
    answers = {
        one["label"]: one["score"] for one in pipeline("image-classification", str(run), device="cpu")(pictures[0])
    }
    assert [answers[name] for name in COLUMNS] == pytest.approx(logits[0].sigmoid().tolist(), abs=1e-5)

    assert user.metalr_hf("publish", run, "--repo_id", "me/findings").returncode == 0
    assert hub.files("me/findings") == FILES
    card = ModelCard((hub.folder("me/findings") / "README.md").read_text())
    assert "It says which of 3 labels an image has: even, loop, bent." in card.text
    assert {"roc_auc", "f1", "mean_average_precision"} <= set(card.data.metrics)
    loops = int(np.nansum(truth[:, 1]))
    assert any(line.startswith("| loop |") and line.endswith(f"| {loops} |") for line in card.text.splitlines())


def test_a_timm_network_answers_with_a_sigmoid_each(images, tmp_path):
    run = tmp_path / "run"
    assert train(images, save_timm(tmp_path / "timm"), run, "--max_steps", "2", "--image_size", "32") == 0
    model = AutoModelForImageClassification.from_pretrained(run)
    assert (model.config.problem_type, model.config.num_labels) == ("multi_label_classification", 3)
    card = (run / "README.md").read_text()
    assert "model(transform(image)[None]).sigmoid())" in card


def test_a_model_of_several_labels_is_fine_tuned_to_classes(images, tmp_path):
    assert train(images, save_vit(tmp_path / "vit"), tmp_path / "run", "--max_steps", "1") == 0
    command = ["train", "--dataset_name", str(save_image_folder(tmp_path / "classes")), "--max_steps", "1"]
    command += ["--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "next")]
    assert main([*command, "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]) == 0
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "next").config
    assert config.problem_type == "single_label_classification"


def test_accumulated_batches_train_as_one_large_batch(images, tmp_path):
    vit, weights = save_vit(tmp_path / "vit"), []
    for i, (size, steps) in enumerate(((12, 1), (3, 4))):
        more = ["--max_steps", "3", "--augment", "none", "--calibrate", "false", "--optim", "sgd", "--hyper_lr", "0"]
        more += ["--learning_rate", "0.1", "--per_device_train_batch_size", str(size), "--max_grad_norm", "0"]
        assert train(images, vit, tmp_path / str(i), *more, "--gradient_accumulation_steps", str(steps)) == 0
        weights.append(AutoModelForImageClassification.from_pretrained(tmp_path / str(i)).state_dict())
    # The unknown labels are not spread evenly over the parts.
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_it_is_compared_over_folds_too(images, tmp_path):
    vit = str(save_vit(tmp_path / "vit"))
    command = [
        "compare",
        "--task",
        "multi_label",
        "--dataset",
        images,
        "--model",
        vit,
        "--target_column_names",
        *COLUMNS,
    ]
    command += ["--output_dir", str(tmp_path / "side"), "--strategies", "cosine", "metalr", "--learning_rates", "1e-3"]
    assert main([*command, "--seeds", "0", "--steps", "2", "--batch_size", "8", "--folds", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "side" / "results.jsonl").read_text().splitlines()]
    assert [(row["status"], row["metric"]) for row in rows] == [("done", "macro_auroc")] * 4
    assert all(set(row["class_macro_auroc"]) == set(COLUMNS) for row in rows)
    report = (tmp_path / "side" / "report.md").read_text()
    assert "entries are test macro auroc" in report


def test_faults_are_one_line_before_training(images, tmp_path, capsys):
    assert train(images, save_vit(tmp_path / "vit"), tmp_path / "run", "--class_names", "even", "lop") == 2
    printed = capsys.readouterr().err.strip()
    assert "class_names: 'lop' is no label of the split 'train'" in printed
    assert "Traceback" not in printed
    assert train(images, tmp_path / "vit", tmp_path / "run", "--label_smoothing_factor", "0.1") == 2
    assert (
        "label_smoothing_factor=0.1: the loss that class_weights or this task asks for does not"
        in capsys.readouterr().err
    )
