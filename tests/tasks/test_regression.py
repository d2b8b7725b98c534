"""Numbers an image through the command line: trained, resumed, compared, published, and read in their units."""

import json

import numpy as np
import pytest
import torch
from digits import digit_images, save_timm, save_vit, save_with_metadata
from huggingface_hub import ModelCard
from stand_in_hub import FILES
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from metalr_hf.cli import main

pytestmark = pytest.mark.usefixtures("offline")


def dose(image):
    """Of a size that no network begins with."""
    return 1000.0 + 20.0 * float(np.asarray(image).mean())


def numbers(name, image, row):
    return {"dose": dose(image), "digit": ("nil", "one", "two").index(name)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(save_with_metadata(tmp_path_factory.mktemp("images"), numbers))


def train(images, model, output, *more):
    command = ["train", "--task", "regression", "--dataset_name", images, "--model_name_or_path", str(model)]
    command += ["--output_dir", str(output), "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]
    command += ["--per_device_train_batch_size", "10", "--augment", "none", "--learning_rate", "1e-3"]
    return main([*command, *more])


def answers(folder):
    """Of the saved model with its saved processor on the test images, without anything of this package."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    pictures = [picture.convert("RGB") for picture in digit_images(30, start=60)[0]]
    with torch.no_grad():
        return model(**AutoImageProcessor.from_pretrained(folder)(pictures, return_tensors="pt")).logits


def test_it_is_trained_published_and_answers_in_units(images, tmp_path, hub, user):
    run = tmp_path / "run"
    more = ["--num_train_epochs", "15", "--save_strategy", "no", "--calibrate", "false"]
    assert train(images, save_vit(tmp_path / "vit"), run, *more) == 0
    results = json.loads((run / "all_results.json").read_text())
    assert {f"test_{name}" for name in ("mae", "rmse", "r2", "pearson", "loss")} <= set(results)
    assert results["test_r2"] > 0.3
    pictures = digit_images(30, start=60)[0]
    truth = np.array([dose(picture) for picture in pictures])
    found = answers(run)
    assert np.abs(found[:, 0].numpy() - truth).mean() == pytest.approx(results["test_mae"], rel=1e-4)
    config = AutoModelForImageClassification.from_pretrained(run).config
    assert (config.problem_type, config.id2label) == ("regression", {0: "dose"})
    [answer] = pipeline("image-classification", str(run), device="cpu")(pictures[0].convert("RGB"))
    assert answer["label"] == "dose"
    assert answer["score"] == pytest.approx(found[0, 0].item(), rel=1e-5)

    assert user.metalr_hf("publish", run, "--repo_id", "me/dose").returncode == 0
    assert hub.files("me/dose") == FILES
    card = ModelCard((hub.folder("me/dose") / "README.md").read_text())
    assert "A model for image regression: ViT" in card.text
    assert "It estimates, in the units of the data: dose." in card.text
    assert {"mae", "rmse", "r_squared", "pearsonr"} <= set(card.data.metrics)


def test_several_numbers_of_a_timm_network(images, tmp_path):
    run = tmp_path / "run"
    more = ["--target_column_names", "dose", "digit", "--max_steps", "2", "--image_size", "32"]
    assert train(images, save_timm(tmp_path / "timm"), run, *more) == 0
    results = json.loads((run / "all_results.json").read_text())
    assert {"test_mae_dose", "test_mae_digit", "test_r2"} <= set(results)
    # Two steps in, the answers are near the means, each in its unit.
    assert answers(run).mean(0).tolist() == pytest.approx([2000.0, 1.0], rel=0.5, abs=1.0)
    assert "model(transform(image)[None]))" in (run / "README.md").read_text()


def test_checkpoints_are_in_units_and_a_run_goes_on_from_them(images, tmp_path):
    vit = save_vit(tmp_path / "vit")
    more = ["--max_steps", "8", "--save_steps", "4", "--save_strategy", "steps"]
    assert train(images, vit, tmp_path / "whole", *more) == 0
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert answers(checkpoint).mean().item() == pytest.approx(2000.0, rel=0.5)
    assert train(images, vit, tmp_path / "rest", *more, "--resume_from_checkpoint", str(checkpoint)) == 0
    torch.testing.assert_close(answers(tmp_path / "rest"), answers(tmp_path / "whole"), rtol=1e-3, atol=0.1)


def test_a_trained_model_is_trained_on_and_a_start_of_zero_steps_changes_nothing(images, tmp_path):
    assert train(images, save_vit(tmp_path / "vit"), tmp_path / "run", "--max_steps", "4") == 0
    still = ["--max_steps", "1", "--learning_rate", "0", "--hyper_lr", "0", "--calibrate", "false"]
    assert train(images, tmp_path / "run", tmp_path / "next", *still) == 0
    torch.testing.assert_close(answers(tmp_path / "next"), answers(tmp_path / "run"), rtol=1e-4, atol=0.05)


def test_the_unit_makes_no_difference_to_what_is_learned(images, tmp_path):
    vit = save_vit(tmp_path / "vit")
    other = save_with_metadata(tmp_path / "other", lambda name, image, row: {"dose": dose(image) / 1000.0 - 50.0})
    for name, data in (("large", images), ("small", str(other))):
        assert train(data, vit, tmp_path / name, "--label_column_name", "dose", "--max_steps", "6") == 0
    torch.testing.assert_close(
        answers(tmp_path / "small"), answers(tmp_path / "large") / 1000.0 - 50.0, rtol=1e-4, atol=1e-3
    )
    rates = [
        (tmp_path / name / "lr_history.csv").read_text().splitlines()[-1].split(",")[1:] for name in ("large", "small")
    ]
    np.testing.assert_allclose(np.array(rates[0], float), np.array(rates[1], float), rtol=0.05)


def test_it_is_compared_over_folds_too(images, tmp_path):
    command = ["compare", "--task", "regression", "--dataset", images, "--model", str(save_vit(tmp_path / "vit"))]
    command += ["--output_dir", str(tmp_path / "side"), "--strategies", "cosine", "metalr", "--learning_rates", "1e-3"]
    assert main([*command, "--seeds", "0", "--steps", "2", "--batch_size", "8", "--folds", "2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "side" / "results.jsonl").read_text().splitlines()]
    assert [(row["status"], row["metric"]) for row in rows] == [("done", "r2")] * 4
    assert all(row["rmse"] < 2000 for row in rows)
    assert "entries are test r2" in (tmp_path / "side" / "report.md").read_text()


def test_a_target_without_a_number_is_one_line(tmp_path, capsys):
    folder = save_with_metadata(tmp_path / "images", lambda name, image, row: {"dose": None if row == 3 else row / 2})
    assert train(str(folder), save_vit(tmp_path / "vit"), tmp_path / "run") == 2
    printed = capsys.readouterr().err.strip()
    assert "Split 'train', column 'dose', row 3 has no number" in printed
    assert "Traceback" not in printed
