"""Volumes from the command line: training, comparing, going on from a checkpoint."""

import json

import datasets
import nibabel
import numpy as np
import pandas
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, Trainer, TrainingArguments
from volumes import QUICK, SMALL, save_folder, volume

from metalr_hf import LRHistory
from metalr_hf.cli import main
from metalr_hf.cli.arguments import named_task, parse_train_arguments
from metalr_hf.cli.compare import parse_compare_arguments
from metalr_hf.data.volumes import collate_volumes
from metalr_hf.models.loading import ModelArguments
from metalr_hf.models.losses import segmentation_loss
from metalr_hf.tasks import get_task

pytestmark = pytest.mark.usefixtures("offline")
LAYERS = ["input_block", "downsamples.0", "bottleneck", "upsamples.0", "upsamples.1", "head"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("scans"), train=6, test=2)


def train(folder, output, *arguments, task="segmentation"):
    given = ["--task", task, "--dataset_name", str(folder), "--output_dir", str(output)]
    assert main(["train", *given, *QUICK, *map(str, arguments)]) == 0
    return json.loads((output / "all_results.json").read_text())


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    larger = ["--network_args", '{"filters": [8, 16, 16]}', "--per_device_train_batch_size", "4"]
    return output, train(folder, output, *SMALL, *larger, "--max_steps", "60", "--seed", "1")


def test_a_network_learns_and_is_measured_in_mm(run):
    _, results = run
    names = ["dice", "dice_lesion", "dice_organ", "hausdorff95", "hausdorff95_lesion", "hausdorff95_organ"]
    assert sorted(name.removeprefix("test_") for name in results if "dice" in name or "hausdorff" in name) == names
    assert results["test_dice"] > 0.6
    assert results["test_hausdorff95"] < 10


def test_every_layer_is_tuned_and_the_card_names_it(run):
    output, _ = run
    assert list(LRHistory.load(output / "lr_history.csv").layers) == LAYERS
    card = (output / "README.md").read_text()
    assert "segmentation of volumes" in card
    assert "upsamples.0" in card
    assert "monai" in card


def test_the_saved_files_give_the_masks_of_new_volumes(run, tmp_path):
    output, results = run
    model = AutoModelForSemanticSegmentation.from_pretrained(output, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(output, trust_remote_code=True)
    image, mask = volume(50, axcodes="PIR")
    nibabel.save(image, tmp_path / "new.nii.gz")
    with torch.no_grad():
        outputs = model(**processor(str(tmp_path / "new.nii.gz"), return_tensors="pt"))
    (answer,) = processor.post_process_semantic_segmentation(outputs, [str(tmp_path / "new.nii.gz")])
    assert np.allclose(answer.affine, image.affine)
    guess, truth = np.asanyarray(answer.dataobj) == 1, np.asanyarray(mask.dataobj) == 1
    assert 2 * (guess & truth).sum() / (guess.sum() + truth.sum()) > results["test_dice_organ"] - 0.3


def test_a_saved_network_is_trained_on_with_its_own_preparation(run, folder, tmp_path):
    output, _ = run
    train(folder, tmp_path / "on", "--model_name_or_path", output, "--max_steps", "1", "--spacing", "2", "2", "2")
    saved, before = (json.loads((one / "preprocessor_config.json").read_text()) for one in (tmp_path / "on", output))
    assert saved["spacing"] == [2.0, 2.0, 2.0]
    assert saved["patch_size"] == before["patch_size"] == [16, 16, 8]


def test_volumes_are_segmented_in_3d_without_being_asked(folder):
    volumes = get_task("segmentation_3d")
    assert named_task(["--task", "segmentation", "--dataset_name", str(folder)]) is volumes
    assert named_task(["--task", "segmentation", "--data_dir", str(folder)]) is volumes
    assert named_task(["--task", "segmentation", "--dataset", str(folder)]) is volumes
    assert named_task(["--task", "segmentation"]) is get_task("segmentation")
    assert named_task(["--dataset_name", str(folder)]) is get_task("classification")
    arguments = ["--task", "segmentation", "--dataset_name", str(folder), "--output_dir", "runs", "--spacing"]
    assert parse_train_arguments([*arguments, "1", "1", "3"]).data.spacing == [1.0, 1.0, 3.0]


def test_columns_of_nifti_are_read(tmp_path):
    pairs = [volume(i) for i in range(5)]
    rows = {"scan": [i.to_bytes() for i, _ in pairs], "mask": [m.to_bytes() for _, m in pairs]}
    features = datasets.Features(scan=datasets.Nifti(), mask=datasets.Nifti())
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data" / "train.parquet"))
    results = train(tmp_path / "data", tmp_path / "run", *SMALL, "--max_steps", "1", "--class_names", "a", "b", "c")
    assert "test_dice_c" in results


@pytest.mark.parametrize("name", ["monai/UNet", "monai/SegResNet"])
def test_other_networks_of_monai_by_name(name, folder, tmp_path):
    args = {"monai/UNet": '{"channels": [4, 8]}', "monai/SegResNet": '{"init_filters": 8}'}[name]
    options = ["--network_args", args, "--patch_size", "16", "16", "8", "--max_steps", "1"]
    train(folder, tmp_path / "run", "--model_name_or_path", name, *options)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["network"] == name.removeprefix("monai/")


def test_a_network_that_cannot_take_the_patches_is_refused_before_training(folder, tmp_path, capsys):
    options = ["--model_name_or_path", "monai/SwinUNETR", "--patch_size", "20", "16", "12"]
    given = ["--task", "segmentation", "--dataset_name", str(folder), "--output_dir", str(tmp_path / "run")]
    assert main(["train", *given, *QUICK, *options]) == 2
    said = capsys.readouterr().err
    assert "cannot take patches of 20 × 16 × 12 voxels" in said
    assert "Give multiples of 32 with patch_size" in said


def test_a_network_of_monai_that_needs_arguments_says_so():
    task = get_task("segmentation_3d")
    splits = task.load_splits(task.data_arguments())
    arguments = task.model_arguments(ModelArguments("monai/VNetz"), splits)
    with pytest.raises(ValueError, match="needs network_args"):
        task.load_model(arguments, splits.id2label)


def test_strategies_are_compared_on_volumes(folder, tmp_path):
    given = ["--task", "segmentation", "--dataset", folder, "--output_dir", tmp_path / "out", "--seeds", "0", "--steps"]
    options = ["2", "--batch_size", "2", "--strategies", "cosine", "metalr", "--learning_rates", "1e-3", *SMALL]
    assert main(["compare", *map(str, [*given, *options])]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["done", "done"]
    assert {"dice", "hausdorff95", "class_dice"} <= set(rows[0])
    # Both saw the same patches.
    assert rows[0]["images"] == rows[1]["images"]


def test_evaluations_while_training_see_whole_volumes_that_were_held_out(folder, tmp_path):
    options = [
        *SMALL,
        "--max_steps",
        "4",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "2",
        "--validation_share",
        "0.34",
    ]
    train(folder, tmp_path / "run", *options)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_dice" in row for row in history) == 2


def test_the_demo_needs_no_data(tmp_path):
    given = ["--task", "segmentation_3d", "--output_dir", str(tmp_path / "run"), *QUICK, *SMALL, "--max_steps", "1"]
    assert main(["train", *given]) == 0
    assert "generated volumes" in (tmp_path / "run" / "README.md").read_text()


def test_rates_of_untrained_networks_are_bounded_unless_the_user_says_otherwise(folder):
    arguments = ["--task", "segmentation", "--dataset_name", str(folder), "--output_dir", "runs"]
    assert parse_train_arguments(arguments).training.lr_max == 1e-2
    assert parse_train_arguments([*arguments, "--lr_max", "0.5"]).training.lr_max == 0.5
    assert parse_train_arguments(["--task", "segmentation", "--output_dir", "runs"]).training.lr_max == 1.0
    compared = ["--task", "segmentation", "--dataset", str(folder), "--output_dir", "runs"]
    assert parse_compare_arguments(compared)[1] == {"lr_max": 1e-2}
    assert parse_compare_arguments([*compared, "--lr_max", "0.5"])[1] == {"lr_max": 0.5}


def predict(run, volumes, table, *more):
    given = [run, *volumes] if isinstance(volumes, list) else [run, volumes]
    assert main(["predict", *map(str, given), "--output", str(table), "--use_cpu", *more]) == 0
    return pandas.read_csv(table, index_col="file")


def new_volumes(folder):
    """Files that differ from those of the training in voxel size and orientation, and their masks."""
    ways = [
        ((18, 16, 10), (1.0, 1.0, 2.0), "RAS"),
        ((20, 14, 16), (1.0, 1.5, 1.0), "LPS"),
        ((17, 18, 9), (2, 1, 2), "SRA"),
    ]
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i, (shape, spacing, axcodes) in enumerate(ways):
        image, mask = volume(20 + i, shape, spacing, axcodes)
        nibabel.save(image, folder / "images" / f"{i}.nii.gz")
        nibabel.save(mask, folder / "labels" / f"{i}.nii.gz")
    return folder


def test_predicted_masks_are_bit_for_bit_those_of_the_test(run, folder, tmp_path):
    output, _ = run
    files = new_volumes(tmp_path / "new")
    table = predict(output, files / "images", tmp_path / "out" / "p.csv")
    task = get_task("segmentation_3d")
    model, processor = task.load_trained(ModelArguments(str(output)))
    splits = task.load_splits(task.data_arguments(dataset_name=str(folder)))
    _, at_test = task.transforms(splits, processor, "none")
    seen = []

    def keep(logits, labels):
        size = labels[0].shape[1:]
        if logits.shape[2:] != size:
            logits = torch.nn.functional.interpolate(logits, size=size, mode="trilinear")
        seen.append(logits.argmax(1)[0].numpy())
        return torch.zeros(1)

    rows = at_test(
        {k: [str(files / kind / n) for n in table.index] for k, kind in (("image", "images"), ("label", "labels"))}
    )
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **task.training_arguments),
        eval_dataset=[{name: column[i] for name, column in rows.items()} for i in range(len(table))],
        data_collator=collate_volumes,
        compute_loss_func=segmentation_loss,
        preprocess_logits_for_metrics=keep,
        compute_metrics=lambda prediction, compute_result: {},
    )
    trainer.evaluate()
    assert len(seen) == len(table) == 3
    for (name, row), expected in zip(table.iterrows(), seen, strict=True):
        assert row["mask"] == f"p_masks/{name}"
        mask = nibabel.load(tmp_path / "out" / row["mask"])
        assert np.array_equal(np.asarray(nibabel.as_closest_canonical(mask).dataobj), expected)
        source = nibabel.load(files / "images" / name)
        assert (mask.shape, mask.get_data_dtype()) == (source.shape, np.uint8)
        assert np.array_equal(mask.affine, source.affine)
        assert mask.header.get_zooms() == source.header.get_zooms()
        ml_of_a_voxel = np.prod(source.header.get_zooms()) / 1000
        for number, label in enumerate(("organ", "lesion"), start=1):
            assert row[f"voxels_{label}"] == (expected == number).sum()
            assert row[f"volume_ml_{label}"] == pytest.approx((expected == number).sum() * ml_of_a_voxel, abs=1e-6)
    assert (table["voxels_organ"] > 0).all()


def test_broken_volumes_are_named_and_the_others_predicted(run, tmp_path, capsys):
    output, _ = run
    files = new_volumes(tmp_path / "new") / "images"
    (files / "half.nii.gz").write_bytes((files / "0.nii.gz").read_bytes()[:900])
    (files / "text.nii").write_text("no volume")
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 9, 1), np.int16), np.eye(4)), files / "slice.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 9, 7, 2), np.int16), np.eye(4)), files / "two.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.full((8, 9, 7), np.nan, np.float32), np.eye(4)), files / "nan.nii.gz")
    table = predict(output, files, tmp_path / "p.csv", "--num_workers", "1")
    assert len(table) == 8
    told = table["error"].dropna()
    assert "text.nii" in told["text.nii"]
    assert "no NIfTI file that can be read" in told["text.nii"]
    assert "half.nii.gz" in told["half.nii.gz"]
    assert "8 × 9 × 1 voxels, which is no volume" in told["slice.nii.gz"]
    assert "the volume has 2 channels, but the model takes 1" in told["two.nii.gz"]
    assert "not finite" in told["nan.nii.gz"]
    assert len(told) == 5
    assert str(tmp_path) not in (tmp_path / "p.csv").read_text()
    assert "5 of the images could not be read" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "p_masks").iterdir()) == ["0.nii.gz", "1.nii.gz", "2.nii.gz"]
    # The second run tries those again, and no others.
    nibabel.save(volume(3)[0], files / "half.nii.gz")
    before = (tmp_path / "p_masks" / "0.nii.gz").stat().st_mtime_ns
    again = predict(output, files, tmp_path / "p.csv")
    assert again["error"].notna().sum() == 4
    assert again.loc["half.nii.gz", "voxels_organ"] > 0
    assert (tmp_path / "p_masks" / "0.nii.gz").stat().st_mtime_ns == before
    pandas.testing.assert_frame_equal(again.loc[["0.nii.gz"]], table.loc[["0.nii.gz"]], check_dtype=False)


def test_channels_of_nnu_net_and_columns_of_nifti_are_predicted_alike(tmp_path):
    folder = save_folder(tmp_path / "scans", train=4, test=3, channels=2)
    train(folder, tmp_path / "run", *SMALL, "--max_steps", "1")
    table = predict(tmp_path / "run", folder / "imagesTs", tmp_path / "p.csv")
    assert list(table.index) == [f"case_{i:03}.nii.gz" for i in range(3)]
    assert table["error"].isna().all()
    files = [[folder / "imagesTs" / f"case_{i:03}_{c:04}.nii.gz" for c in range(2)] for i in range(3)]
    rows = datasets.Dataset.from_dict(
        {"scan": [[one.read_bytes() for one in channels] for channels in files]},
        features=datasets.Features(scan=datasets.List(datasets.Nifti())),
    )
    rows.to_parquet(str(tmp_path / "test.parquet"))
    again = predict(tmp_path / "run", tmp_path / "test.parquet", tmp_path / "q.csv")
    for i in range(3):
        masks = [nibabel.load(tmp_path / one["mask"].iloc[i]) for one in (table, again)]
        assert np.array_equal(*(np.asarray(mask.dataobj) for mask in masks))
        assert np.array_equal(masks[0].affine, nibabel.load(files[i][0]).affine)
    # A channel that is missing, and one that lies elsewhere.
    files[0][1].unlink()
    other = nibabel.load(files[1][1])
    nibabel.save(nibabel.Nifti1Image(np.asarray(other.dataobj), np.eye(4)), files[1][1])
    table = predict(tmp_path / "run", folder / "imagesTs", tmp_path / "r.csv")
    assert "the volume has 1 channel, but the model takes 2" in table.loc["case_000.nii.gz", "error"]
    assert "(case_001_0001.nii.gz): the channel lies elsewhere" in table.loc["case_001.nii.gz", "error"]
    assert np.isnan(table["error"].iloc[2])
