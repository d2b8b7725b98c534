"""Segmentation networks in the Trainer: losses, metrics, layers and files."""

import json
import os

import numpy as np
import pytest
import torch
from cells import SIZE, cells, save_cells, save_segformer, segformer
from digits import save_timm
from sklearn.metrics import f1_score
from small_runs import arguments, losses
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, Trainer, set_seed

from metalr_hf import LRHistory, MetaLRTrainer
from metalr_hf.cli import main
from metalr_hf.cli.train import RUN_FILES
from metalr_hf.models.losses import segmentation_loss
from metalr_hf.models.monai_networks import MonaiConfig, MonaiForSemanticSegmentation
from metalr_hf.models.unet import TimmUNetForSemanticSegmentation
from metalr_hf.tasks.segmentation import load_mask_processor, load_segmentation_model, segmentation_trainer_arguments

NAMES = ["inside", "membrane"]
QUICK = ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", "--per_device_train_batch_size", "4"]


pytestmark = pytest.mark.usefixtures("offline")


def rows(split="train", size=SIZE, depth=None, count=12):
    prepared = []
    for row in cells(train=count, test=6, size=size)[split]:
        pixels = torch.from_numpy(np.array(row["image"]) / 127.5 - 1).float()
        mask = torch.from_numpy(np.array(row["mask"])).long()
        if depth is not None:
            # The same cells in each slice, with noise of its own.
            generator = torch.Generator().manual_seed(0)
            pixels = pixels.expand(depth, -1, -1) + 0.1 * torch.randn(depth, size, size, generator=generator)
            prepared.append({"pixel_values": pixels[None], "labels": mask.expand(depth, -1, -1)})
        else:
            prepared.append({"pixel_values": pixels.expand(3, -1, -1), "labels": mask})
    return prepared


def unet(encoder="test_resnet"):
    set_seed(0)
    return TimmUNetForSemanticSegmentation.from_encoder(encoder, pretrained=False, num_labels=2)


def train(folder, model, data=None, test=None, **kwargs):
    run = MetaLRTrainer(
        model=model,
        args=arguments(folder, per_device_train_batch_size=4, per_device_eval_batch_size=4, **kwargs),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows("test") if test is None else test,
        **segmentation_trainer_arguments(NAMES),
    )
    run.train()
    return run


@pytest.mark.parametrize("make", [segformer, unet])
@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_every_layer_of_segmentation_networks_is_tuned(tmp_path, make, source):
    run = train(tmp_path, make(), meta_source=source, max_steps=4, learning_rate=1e-3)
    rates = run.lr_history.learning_rates
    assert run.lr_history.layers[-1] == "head"
    assert (rates[-1] != rates[0]).all()
    assert run.lr_history.meta_losses[-1] > 0


@pytest.mark.parametrize("batchwise", [False, True])
def test_dice_of_the_test_rows_is_that_of_scikit_learn(tmp_path, batchwise):
    run = train(tmp_path, segformer(), max_steps=2, batch_eval_metrics=batchwise)
    results = run.evaluate()
    test = rows("test")
    truth = torch.stack([row["labels"] for row in test])
    with torch.no_grad():
        logits = run.model.eval()(torch.stack([row["pixel_values"] for row in test])).logits
    assert logits.shape[-1] == SIZE // 4
    guess = torch.nn.functional.interpolate(logits, size=(SIZE, SIZE), mode="bilinear").argmax(1)
    dice = f1_score(truth.flatten(), guess.flatten(), average=None)
    assert [results["eval_dice_inside"], results["eval_dice_membrane"]] == pytest.approx(dice.tolist())
    assert results["eval_dice"] == pytest.approx(dice.mean())
    # Twice the same: nothing is left over from the first time.
    assert run.evaluate()["eval_dice"] == results["eval_dice"]


def test_no_logits_are_kept_for_the_metric(tmp_path):
    run = train(tmp_path, segformer(), max_steps=1)
    predictions = run.predict(rows("test")).predictions
    assert (predictions.dtype, predictions.shape) == (np.uint8, (6, SIZE, SIZE))


@pytest.mark.usefixtures("keep")
@pytest.mark.parametrize("untuned", [{"hyper_lr": 0.0}, {"lr_rule": "keep", "meta_source": "stream"}], ids=str)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_without_tuning_it_is_the_stock_trainer_bit_for_bit(tmp_path, accumulation, untuned):
    setting = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4, "max_steps": 3}
    tuned = train(tmp_path / "a", unet(), gradient_accumulation_steps=accumulation, max_steps=3, **untuned)
    stock = Trainer(
        model=unet(),
        args=arguments(tmp_path / "b", **setting),
        train_dataset=rows(),
        **segmentation_trainer_arguments(NAMES),
    )
    stock.train()
    assert losses(tuned) == losses(stock)
    # The model's own loss is the same one.
    own = Trainer(model=unet(), args=arguments(tmp_path / "c", **setting), train_dataset=rows())
    own.train()
    assert losses(own) == pytest.approx(losses(stock), rel=1e-3)


def test_statistics_of_batch_norm_are_untouched_by_validation(tmp_path):
    def statistics(**kwargs):
        model = train(tmp_path, unet(), max_steps=1, **kwargs).model
        return torch.cat([b.flatten().float() for name, b in model.named_buffers() if "running" in name])

    # One step: the weights in the only training forward are the same with validation after it and without.
    assert torch.equal(statistics(meta_source="stream"), statistics(hyper_lr=0.0))


@pytest.mark.slow
def test_a_unet_learns_the_membranes_from_a_rate_30_times_too_low(tmp_path):
    test = rows("test", size=48)
    tuned, stock = (
        train(tmp_path / name, unet(), rows(size=48, count=24), test, max_steps=40, learning_rate=1e-4, **kwargs)
        for name, kwargs in (("tuned", {"calibrate": True}), ("stock", {"hyper_lr": 0.0}))
    )
    assert tuned.evaluate()["eval_dice"] > max(0.7, stock.evaluate()["eval_dice"] + 0.05)


def test_a_network_for_volumes_learns(tmp_path):
    set_seed(0)
    options = {"network_args": {"channels": (4, 8), "strides": (2,)}, "patch_size": (4, SIZE, SIZE), "num_labels": 2}
    model = MonaiForSemanticSegmentation(MonaiConfig(network="UNet", **options))
    volumes, test = rows(depth=4, count=8), rows("test", depth=4)
    run = train(tmp_path, model, volumes, test, max_steps=40, learning_rate=2e-2)
    results = run.evaluate()
    assert results["eval_dice"] > 0.7
    run.save_model(tmp_path / "saved")
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "saved").eval()
    inputs = torch.stack([row["pixel_values"] for row in test])
    with torch.no_grad():
        torch.testing.assert_close(again(inputs).logits, run.model.eval()(inputs).logits)


def dice_of(folder, images):
    """Of the saved model with its saved processor on a folder's test images, without anything of this package."""
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor([row["image"].convert("RGB") for row in images], return_tensors="pt"))
    masks = processor.post_process_semantic_segmentation(outputs, target_sizes=[(SIZE, SIZE)] * len(images))
    truth = np.concatenate([np.array(row["mask"]).ravel() for row in images])
    return f1_score(truth, torch.stack(masks).flatten(), average=None).mean()


def test_the_default_run_learns_and_leaves_its_files(tmp_path, monkeypatch, capsys):
    small = cells()
    monkeypatch.setattr("metalr_hf.data.masks.loading.demo_cells", lambda: small)
    command = ["train", "--task", "segmentation", "--output_dir", str(tmp_path), "--image_size", str(SIZE)]
    assert main([*command, "--max_steps", "12", *QUICK]) == 0
    assert set(RUN_FILES) <= set(os.listdir(tmp_path))
    results = json.loads((tmp_path / "all_results.json").read_text())
    # All inside a cell would be 0.42.
    assert results["test_dice"] > 0.55
    assert dice_of(tmp_path, small["test"]) == pytest.approx(results["test_dice"], abs=1e-3)
    assert results["test_dice"] == pytest.approx((results["test_dice_inside"] + results["test_dice_membrane"]) / 2)
    config = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).config
    assert config.id2label == dict(enumerate(NAMES))
    assert LRHistory.load(tmp_path / "lr_history.csv").layers[-2:] == ["decoder.4", "head"]
    assert "dice_membrane" in capsys.readouterr().out


def test_a_segformer_on_a_folder_of_images_and_its_model_again(tmp_path):
    images = str(save_cells(tmp_path / "images"))
    model = str(save_segformer(tmp_path / "model"))
    command = ["train", "--task", "segmentation", "--dataset_name", images, *QUICK, "--max_steps", "3"]
    command += ["--class_names", *NAMES, "--meta_split", "0.25"]
    assert main([*command, "--model_name_or_path", model, "--output_dir", str(tmp_path / "a")]) == 0
    saved = AutoImageProcessor.from_pretrained(tmp_path / "a")
    assert not saved.do_reduce_labels
    results = json.loads((tmp_path / "a" / "all_results.json").read_text())
    assert dice_of(tmp_path / "a", cells()["test"]) == pytest.approx(results["test_dice"], abs=1e-3)
    assert main([*command, "--model_name_or_path", str(tmp_path / "a"), "--output_dir", str(tmp_path / "b")]) == 0


def test_a_stream_and_a_timm_network_as_encoder(tmp_path):
    images = str(save_cells(tmp_path / "images"))
    model = str(save_timm(tmp_path / "model"))
    command = ["train", "--task", "segmentation", "--dataset_name", images, *QUICK, "--max_steps", "2", "--streaming"]
    command += ["--class_names", *NAMES, "--model_name_or_path", model, "--output_dir", str(tmp_path / "run")]
    assert main([*command, "--image_size", str(SIZE)]) == 0
    saved = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run")
    assert saved.config.encoder == "test_resnet"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert dict(processor.size) == {"height": SIZE, "width": SIZE}


def test_encoders_of_one_size_are_built_for_that_of_the_images(tmp_path):
    name = str(save_timm(tmp_path, "test_vit"))
    model = load_segmentation_model(name, dict(enumerate(NAMES)), 64)
    assert model.config.encoder_args["img_size"] == 64
    processor = load_mask_processor(model, name, 64)
    inputs = processor(cells()["test"][0]["image"].convert("RGB"), return_tensors="pt")
    assert model(**inputs).logits.shape == (1, 2, 64, 64)
    assert list(processor.image_mean) == list(model.encoder.pretrained_cfg["mean"])


def test_a_bad_mask_ends_the_command_before_training_with_the_file_and_the_value(tmp_path, capsys):
    splits = cells()
    save_cells(tmp_path / "images", splits)
    mask = np.array(splits["train"][3]["mask"])
    mask[0, 0] = 77
    from PIL import Image

    Image.fromarray(mask).save(tmp_path / "images" / "train" / "3_mask.png")
    command = ["train", "--task", "segmentation", "--dataset_name", str(tmp_path / "images"), *QUICK]
    assert main([*command, "--output_dir", str(tmp_path / "run"), "--class_names", *NAMES]) == 2
    assert "3_mask.png): the mask holds the class id 77, which is none of the 2 classes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_loss_reaches_every_model_of_transformers_with_logits():
    model, row = segformer(), rows(count=1)[0]
    labels = row["labels"][None]
    outputs = model(row["pixel_values"][None])
    assert segmentation_loss(outputs, labels) > model(row["pixel_values"][None], labels).loss
