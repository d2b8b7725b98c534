"""Weights of classes in training, under accumulation, in the validation loss, in a comparison and on the card."""

import json

import pytest
import torch
from digits import NAMES, findings, save_image_folder, save_vit, save_with_metadata
from small_runs import arguments, images, vit
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification

from metalr_hf import MetaLRTrainer
from metalr_hf.cli import main
from metalr_hf.models.target_losses import ClassLoss

pytestmark = pytest.mark.usefixtures("offline")
WEIGHTS = torch.tensor([0.5, 1.0, 4.0])
LOGITS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As many images of two digits, and few of the third."""
    place = save_image_folder(tmp_path_factory.mktemp("images"))
    for path in sorted((place / "train" / "two").iterdir())[4:]:
        path.unlink()
    return str(place)


def train(images, model, output, *more):
    command = ["train", "--dataset_name", images, "--model_name_or_path", str(model), "--output_dir", str(output)]
    command += ["--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true", "--augment", "none"]
    return main([*command, "--per_device_train_batch_size", "8", *more])


def test_the_loss_is_that_of_torch_times_the_mean_weight():
    loss = ClassLoss(WEIGHTS.tolist())
    expected = cross_entropy(LOGITS, LABELS, weight=WEIGHTS, reduction="sum") / len(LABELS)
    torch.testing.assert_close(loss(LOGITS, LABELS), expected)
    # Images without a class do not count.
    unknown = torch.cat([LABELS, torch.tensor([-100])])
    torch.testing.assert_close(loss(torch.cat([LOGITS, LOGITS[:1]]), unknown), expected)
    constant = (WEIGHTS * LABELS.bincount()).log().expand(12, 3)
    torch.testing.assert_close(loss(constant, LABELS), loss.constant_loss(LABELS))


def test_the_validation_loss_of_the_hypergradient_is_weighted_too(tmp_path):
    loss = ClassLoss(WEIGHTS.tolist())
    trainer = MetaLRTrainer(vit(), arguments(tmp_path, max_steps=2), train_dataset=images(), compute_loss_func=loss)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer.model.eval()
    logits = trainer.model(pixel_values=batch["pixel_values"]).logits
    expected = cross_entropy(logits, batch["labels"], weight=WEIGHTS[: logits.shape[1]], reduction="sum") / 8
    torch.testing.assert_close(trainer.compute_meta_loss(batch), expected)


def test_accumulated_batches_train_as_one_large_batch(folder, tmp_path):
    model, weights = save_vit(tmp_path / "vit"), []
    for i, (size, steps) in enumerate(((12, 1), (3, 4))):
        more = ["--max_steps", "3", "--calibrate", "false", "--optim", "sgd", "--hyper_lr", "0", "--max_grad_norm", "0"]
        more += ["--learning_rate", "0.1", "--gradient_accumulation_steps", str(steps), "--class_weights", "balanced"]
        assert train(folder, model, tmp_path / str(i), *more, "--per_device_train_batch_size", str(size)) == 0
        weights.append(AutoModelForImageClassification.from_pretrained(tmp_path / str(i)).state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_rare_class_is_warned_of_weighed_measured_and_on_the_card(folder, tmp_path, caplog):
    model = save_vit(tmp_path / "vit")
    assert train(folder, model, tmp_path / "plain", "--max_steps", "2") == 0
    said = caplog.text
    caplog.clear()
    assert "'two' has 4: fewer than ten" in said
    assert "--class_weights balanced" in said
    results = json.loads((tmp_path / "plain" / "all_results.json").read_text())
    assert 0 <= results["test_balanced_accuracy"] <= 1
    assert 0 <= results["test_auroc"] <= 1
    assert [name for name in results if name in ("test_accuracy", "test_macro_f1")]

    assert train(folder, model, tmp_path / "run", "--max_steps", "2", "--class_weights", "balanced") == 0
    said = caplog.text
    caplog.clear()
    assert "'two' has 4" in said
    assert "--class_weights" not in said, "advice that has been followed"
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| loss | cross-entropy, classes weighted" in card
    assert "balanced_accuracy" in card
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "run").config
    assert config.id2label == dict(enumerate(NAMES))


def test_weights_of_several_labels_and_in_a_comparison(folder, tmp_path):
    labels, model = str(save_with_metadata(tmp_path / "labels", findings)), save_vit(tmp_path / "vit")
    columns = ["--target_column_names", "even", "loop", "bent"]
    more = ["--task", "multi_label", *columns, "--max_steps", "2", "--class_weights", "1", "2", "3"]
    assert train(labels, model, tmp_path / "run", *more) == 0
    assert "images that have a label weighted 1, 2, 3" in (tmp_path / "run" / "README.md").read_text()
    command = ["compare", "--dataset", folder, "--model", str(model), "--output_dir", str(tmp_path / "side")]
    command += ["--strategies", "cosine", "metalr", "--learning_rates", "1e-3", "--seeds", "0", "--steps", "2"]
    assert main([*command, "--batch_size", "8", "--class_weights", "balanced"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "side" / "results.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["done"] * 2
    assert "balanced" in (tmp_path / "side" / "settings.json").read_text()


def test_faults_are_one_line(folder, tmp_path, capsys):
    model = save_vit(tmp_path / "vit")
    assert train(folder, model, tmp_path / "run", "--class_weights", "1", "2") == 2
    assert "class_weights has 2 numbers for 3 classes (nil, one, two)" in capsys.readouterr().err
    smooth = ["--class_weights", "balanced", "--label_smoothing_factor", "0.1"]
    assert train(folder, model, tmp_path / "run", *smooth) == 2
    assert (
        "label_smoothing_factor=0.1: the loss that class_weights or this task asks for does not"
        in capsys.readouterr().err
    )
