import csv
import os

import datasets
import nibabel
import numpy as np
import pandas
import pytest
import torch
from cells import save_cells
from digits import digit_images, findings, save_image_folder, save_timm, save_vit, save_with_metadata
from PIL import Image
from scans import save_dicom, save_dicom_folder, save_nifti
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForSemanticSegmentation,
    MobileNetV2ImageProcessor,
    MobileViTImageProcessor,
    pipeline,
)

from metalr_hf.cli import main
from metalr_hf.data.files import read_image
from metalr_hf.data.loading import DataArguments
from metalr_hf.data.masks import read_mask
from metalr_hf.models.loading import ModelArguments
from metalr_hf.tasks import TASKS, get_task
from metalr_hf.tasks.prediction import content_of, mask_stems
from metalr_hf.tasks.registry import task_of

pytestmark = pytest.mark.usefixtures("offline")
QUICK = [
    *("--learning_rate", "1e-3", "--per_device_train_batch_size", "8", "--use_cpu", "true", "--disable_tqdm", "true"),
    *("--max_steps", "2", "--save_strategy", "no", "--report_to", "none"),
]


def train(output, data, model, *more):
    named = [] if model is None else ["--model_name_or_path", str(model)]
    where = [] if data is None else ["--dataset_name", str(data)]
    assert main(["train", "--output_dir", str(output), *where, *named, *QUICK, *more]) == 0
    return output


def predict(run, images, output, *more):
    code = main(["predict", str(run), str(images), "--output", str(output), "--use_cpu", *more])
    return pandas.read_csv(output, index_col="file") if code == 0 else code


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_image_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("run")
    return train(folder / "run", photos, save_vit(folder / "vit"))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return save_dicom_folder(tmp_path_factory.mktemp("scans"), endings=(".dcm", ""))


def test_probabilities_are_those_of_transformers_pipeline(tmp_path, run, photos):
    table = predict(run, photos / "test", tmp_path / "out" / "predictions.csv")
    assert len(table) == 30
    assert list(table.columns) == [
        "prediction",
        "probability_nil",
        "probability_one",
        "probability_two",
        "warning",
        "error",
        "content",
        "model",
    ]
    classify = pipeline("image-classification", model=str(run))
    for name, row in table.iterrows():
        told = {answer["label"]: answer["score"] for answer in classify(str(photos / "test" / name))}
        assert {label: row[f"probability_{label}"] for label in told} == pytest.approx(told, abs=1e-5)
        assert told[row["prediction"]] == max(told.values())
    assert table["error"].isna().all()
    assert table["warning"].isna().all()


def test_images_of_fewer_bits_and_of_one_colour_are_warned_of(tmp_path, scans, capsys):
    run = train(tmp_path / "run", scans, save_vit(tmp_path / "vit"))
    folder = tmp_path / "new"
    folder.mkdir()
    levels = np.arange(400).reshape(20, 20)
    Image.fromarray((levels * 10).astype("uint16")).save(folder / "deep.png")
    Image.fromarray((levels // 2).astype("uint8")).save(folder / "shallow.png")
    # All of it is above the window.
    Image.fromarray((levels + 60_000).astype("uint16")).save(folder / "above.png")
    table = predict(run, folder, tmp_path / "p.csv")
    assert table["error"].isna().all()
    assert np.isfinite(table["probability_left"]).all()
    assert pandas.isna(table.loc["deep.png", "warning"])
    assert table.loc["shallow.png", "warning"].startswith("the image has 8 bits; the model was trained on more, of")
    assert table.loc["above.png", "warning"] == "the model sees one even colour"
    assert "The answers to 2 of the images may mislead: the column 'warning' says why." in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["photos", "scans", "voi"])
@pytest.mark.parametrize("save_model", [save_vit, save_timm])
def test_the_input_is_bit_for_bit_that_of_the_test(tmp_path, photos, scans, kind, save_model):
    data, more = (photos, []) if kind == "photos" else (scans, [])
    if kind == "voi":
        values, more = np.arange(400, dtype="uint16").reshape(20, 20) * 9, ["--intensity_window", "voi"]
        for i in range(12):
            folder = tmp_path / "voi" / ("train" if i < 8 else "test") / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            save_dicom(folder / f"{i}.dcm", values, WindowCenter=200 * (i + 1), WindowWidth=900)
        data = tmp_path / "voi"
    model = save_model(tmp_path / "model")
    output = train(tmp_path / "run", data, model, *more)
    task = get_task("classification")
    arguments = DataArguments(dataset_name=str(data), intensity_window=more[1:] or None)
    splits = task.load_splits(arguments)
    processor = task.load_processor(
        ModelArguments(str(model)), task.load_model(ModelArguments(str(model)), splits.id2label)
    )
    tested = task.prepare(splits, processor, "crop_flip").test
    saved = task.load_trained(ModelArguments(str(output)))[1]
    files = splits.test.cast_column("image", datasets.Image(decode=False))
    for row, expected in zip(files, tested, strict=True):
        pixels, _ = task.read(row["image"], saved)
        assert torch.equal(pixels, expected["pixel_values"])


def test_broken_files_are_named_and_tried_again(tmp_path, scans, capfd):
    output = train(tmp_path / "run", scans, save_vit(tmp_path / "vit"))
    folder = tmp_path / "new"
    (folder / "deep").mkdir(parents=True)
    files = [path for path in sorted((scans / "test").rglob("*")) if path.is_file()]
    for i, file in enumerate(files[:4]):
        (folder / "deep" / f"{i}.dcm").write_bytes(file.read_bytes())
    save_dicom(folder / "frames.dcm", np.zeros((8, 4), "uint16"), NumberOfFrames=2, Rows=4)
    (folder / "half.dcm").write_bytes(files[0].read_bytes()[:700])
    (folder / "text.png").write_text("no image")
    table = predict(output, folder, tmp_path / "p.csv", "--batch_size", "3")
    assert len(table) == 7
    assert table["error"].notna().sum() == 3
    assert "has 2 frames" in table.loc["frames.dcm", "error"]
    assert str(tmp_path) not in (tmp_path / "p.csv").read_text()
    assert "3 of the images could not be read" in capfd.readouterr().err
    good = table[table["error"].isna()]
    (folder / "text.png").unlink()
    Image.new("L", (24, 24)).save(folder / "text.png")
    table = predict(output, folder, tmp_path / "p.csv")
    assert table["error"].notna().sum() == 2
    assert np.isfinite(table.loc["text.png", "probability_left"])
    # The others were not predicted again.
    assert list(table.index[:4]) == list(good.index)
    pandas.testing.assert_frame_equal(table.loc[good.index], good, check_dtype=False)


def test_a_second_run_goes_on_where_a_killed_one_stopped(tmp_path, run, photos, monkeypatch):
    whole = predict(run, photos / "test", tmp_path / "whole.csv", "--batch_size", "4")
    lines = (tmp_path / "whole.csv").read_text().splitlines(keepends=True)
    (tmp_path / "p.csv").write_text("".join(lines[:9]) + lines[9][:20])
    task = TASKS["classification"]
    read, seen = type(task).read, []
    monkeypatch.setattr(type(task), "read", lambda *given: seen.append(given[1]) or read(*given))
    table = predict(run, photos / "test", tmp_path / "p.csv", "--batch_size", "4")
    assert len(seen) == 30 - 8
    assert sorted(table.index) == sorted(whole.index)
    numbers = [name for name in table if name.startswith("probability")]
    assert table.loc[whole.index, numbers].to_numpy() == pytest.approx(whole[numbers].to_numpy(), abs=1e-6)
    seen.clear()
    predict(run, photos / "test", tmp_path / "p.csv")
    assert not seen


def test_other_images_of_the_same_names_are_predicted_anew(tmp_path, run, photos, capsys):
    files = sorted((photos / "test").rglob("*.png"))
    for patient, own in (("a", files[:3]), ("b", files[2:5])):
        (tmp_path / patient).mkdir()
        for i, file in enumerate(own):
            # The third image of one is the first of the other, and in both there is one that is the same.
            (tmp_path / patient / f"{i:03}.png").write_bytes((files[1] if i == 1 else file).read_bytes())
    first = predict(run, tmp_path / "a", tmp_path / "p.csv")
    assert "in the table already" not in capsys.readouterr().out
    second = predict(run, tmp_path / "b", tmp_path / "p.csv")
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of the 3 images were in the table already. Rows replaced, as their images have changed since: 2." in said
    assert sorted(second.index) == ["000.png", "001.png", "002.png"]
    assert second.loc["000.png", "content"] == first.loc["002.png", "content"]
    expected = predict(run, tmp_path / "b", tmp_path / "alone.csv").loc[second.index]
    pandas.testing.assert_frame_equal(second, expected)
    capsys.readouterr()
    predict(run, tmp_path / "b", tmp_path / "p.csv")
    assert "3 of the 3 images were in the table already." in capsys.readouterr().out


def test_other_rows_of_the_same_numbers_are_predicted_anew(tmp_path, run):
    for name, start in (("one", 0), ("other", 60)):
        rows = {"scan": digit_images(4, start=start)[0]}
        (tmp_path / name).mkdir()
        datasets.Dataset.from_dict(rows, features=datasets.Features(scan=datasets.Image())).to_parquet(
            tmp_path / name / "test.parquet"
        )
    predict(run, tmp_path / "one" / "test.parquet", tmp_path / "p.csv")
    table = predict(run, tmp_path / "other" / "test.parquet", tmp_path / "p.csv")
    alone = predict(run, tmp_path / "other" / "test.parquet", tmp_path / "alone.csv")
    pandas.testing.assert_frame_equal(table, alone)


def test_the_content_of_a_volume_is_that_of_all_its_channels(tmp_path):
    entries = [{"bytes": content, "path": None} for content in (b"ab", b"c", b"a", b"bc")]
    assert content_of(entries[:2]) != content_of(entries[2:])
    assert content_of([entries[0], None]) != content_of(entries[:2])
    (tmp_path / "file").write_bytes(b"ab")
    assert content_of({"bytes": None, "path": str(tmp_path / "file")}) == content_of(entries[0])
    assert content_of({"bytes": None, "path": str(tmp_path / "nothing")}) == ""


def test_hidden_files_are_no_images(tmp_path, run, photos):
    file = next((photos / "test").rglob("*.png"))
    for name in ("a.png", "._a.png", ".thumbnails/a.png"):
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "new" / name).write_bytes(file.read_bytes() if name == "a.png" else b"Mac OS X")
    assert list(predict(run, tmp_path / "new", tmp_path / "p.csv").index) == ["a.png"]


def test_masks_have_the_names_of_their_images_unless_two_would_have_one():
    assert mask_stems(["a/0.png", "b/0.png", "1.2.840.7", "test/0", "x.nii.gz"]) == {
        "a/0.png": "a/0",
        "b/0.png": "b/0",
        "1.2.840.7": "1.2.840.7",
        "test/0": "test/0",
        "x.nii.gz": "x.nii.gz",
    }
    for names in (["a.png", "a.jpg"], ["a.dcm", "a"], ["a.png", "A.TIF"]):
        assert mask_stems(names) == {name: name for name in names}
    # The mask of the first of these would have the name that the third has in full.
    assert mask_stems(["a.png.tif", "a.jpg", "a.png"])["a.png.tif"] == "a.png.tif"


def test_a_mask_does_not_take_the_place_of_one_that_is_in_the_table(tmp_path):
    data, model = save_cells(tmp_path / "cells"), save_timm(tmp_path / "model")
    output = train(tmp_path / "run", data, model, "--task", "segmentation", "--image_size", "32")
    for i, name in enumerate(("first/a.png", "second/a.jpg")):
        (tmp_path / name).parent.mkdir()
        Image.effect_noise((40 + i, 30), 40).save(tmp_path / name)
    predict(output, tmp_path / "first", tmp_path / "p.csv")
    table = predict(output, tmp_path / "second", tmp_path / "p.csv")
    assert table["mask"].to_dict() == {"a.png": "p_masks/a.png", "a.jpg": "p_masks/a.jpg.png"}
    masks = [read_mask({"bytes": None, "path": str(tmp_path / mask)}) for mask in table["mask"]]
    assert [mask.shape for mask in masks] == [(30, 40), (30, 41)]


def test_a_table_of_another_model_is_left_alone(tmp_path, run, photos, capsys):
    predict(run, photos / "test", tmp_path / "p.csv")
    before = (tmp_path / "p.csv").read_text()
    other = AutoModelForImageClassification.from_pretrained(run)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(tmp_path / "run")
    AutoImageProcessor.from_pretrained(run).save_pretrained(tmp_path / "run")
    assert predict(tmp_path / "run", photos / "test", tmp_path / "p.csv") == 2
    assert "is a table of another model or of something else. Give another file" in capsys.readouterr().err
    assert (tmp_path / "p.csv").read_text() == before
    assert len(predict(tmp_path / "run", photos / "test", tmp_path / "p.csv", "--overwrite")) == 30


def test_a_split_or_a_column_of_a_folder_is_refused(tmp_path, run, photos, capsys):
    assert predict(run, photos, tmp_path / "p.csv", "--split", "test") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "split='test': of a folder of images" in said
    assert f"such as '{photos}/test', and leave out split" in said
    assert predict(run, photos, tmp_path / "p.csv", "--image_column_name", "scan") == 2
    assert "image_column_name='scan': files and folders" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()


def test_files_parquet_and_saved_data_sets_are_predicted_alike(tmp_path, run, photos):
    pictures, _ = digit_images(6, start=60)
    rows = datasets.Dataset.from_dict({"scan": pictures}, features=datasets.Features(scan=datasets.Image()))
    rows.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    datasets.DatasetDict({"a": rows, "b": rows.select([0])}).save_to_disk(tmp_path / "saved")
    first = predict(run, tmp_path / "test-00000-of-00001.parquet", tmp_path / "p.csv")
    assert list(first.index) == [f"test/{i}" for i in range(6)]
    again = predict(run, tmp_path / "saved", tmp_path / "s.csv")
    assert list(again.index) == [*(f"a/{i}" for i in range(6)), "b/0"]
    assert len(predict(run, tmp_path / "saved", tmp_path / "b.csv", "--split", "b")) == 1
    numbers = [name for name in first if name.startswith("probability")]
    assert again[numbers].to_numpy()[:6] == pytest.approx(first[numbers].to_numpy(), abs=1e-6)
    files = sorted(str(path) for path in (photos / "test").rglob("*.png"))
    more = ["--output", str(tmp_path / "f.csv"), "--use_cpu", "--num_workers", "2"]
    assert main(["predict", str(run), *files, *more]) == 0
    assert len(pandas.read_csv(tmp_path / "f.csv")) == len(files)


def test_several_labels_and_numbers_in_their_units(tmp_path):
    data = save_with_metadata(tmp_path / "labels", findings)
    columns = ["--target_column_names", "even", "loop", "bent"]
    output = train(tmp_path / "run", data, save_vit(tmp_path / "vit"), "--task", "multi_label", *columns)
    table = predict(output, data / "test", tmp_path / "p.csv")
    assert list(table.columns)[:4] == ["prediction", "probability_even", "probability_loop", "probability_bent"]
    for _, row in table.iterrows():
        named = [name for name in ("even", "loop", "bent") if row[f"probability_{name}"] > 0.5]
        assert (row["prediction"] if isinstance(row["prediction"], str) else "") == "|".join(named)
    ink = save_with_metadata(tmp_path / "ink", lambda name, image, row: {"ink": 1000.0 + np.asarray(image).mean()})
    output = train(
        tmp_path / "numbers", ink, save_vit(tmp_path / "vit2"), "--task", "regression", "--target_column_names", "ink"
    )
    table = predict(output, ink / "test", tmp_path / "n.csv")
    assert table["prediction_ink"].between(900, 1300).all()


def test_masks_have_the_size_of_their_images(tmp_path):
    data, model = save_cells(tmp_path / "cells"), save_timm(tmp_path / "model")
    output = train(tmp_path / "run", data, model, "--task", "segmentation", "--image_size", "32")
    for i, size in enumerate([(40, 30), (96, 96)]):
        (tmp_path / "new" / "sub").mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 40).save(tmp_path / "new" / "sub" / f"{i}.png")
    table = predict(output, tmp_path / "new", tmp_path / "p.csv")
    for name, row in table.iterrows():
        assert row["mask"] == f"p_masks/{name}"
        mask = read_mask({"bytes": None, "path": str(tmp_path / row["mask"])})
        with Image.open(tmp_path / "new" / name) as image:
            assert mask.shape == (image.height, image.width)
        assert (mask == 1).mean() == pytest.approx(row["share_1"])
        assert row["share_0"] + row["share_1"] == pytest.approx(1)
    # The input is bit for bit that of the test.
    task = get_task("segmentation")
    splits = task.load_splits(task.data_arguments(dataset_name=str(data)))
    _, saved = task.load_trained(ModelArguments(str(output)))
    tested = task.prepare(splits, saved, "none").test
    files = splits.test.cast_column("image", datasets.Image(decode=False))
    for row, expected in zip(files, tested, strict=True):
        assert torch.equal(task.read(row["image"], saved)[0], expected["pixel_values"])


@pytest.mark.parametrize("saved_by", ["others", "this package"])
@pytest.mark.parametrize("image_processor", [MobileViTImageProcessor, MobileNetV2ImageProcessor])
def test_masks_lie_where_their_images_do_if_the_processor_of_the_model_cuts_out_the_centre(
    tmp_path, saved_by, image_processor
):
    config = MobileNetV2Config(depth_multiplier=0.1, min_depth=8, depth_divisible_by=8, image_size=64, num_labels=2)
    MobileNetV2ForSemanticSegmentation(config).save_pretrained(tmp_path)
    image_processor(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    task, arguments = get_task("segmentation"), ModelArguments(str(tmp_path))
    if saved_by == "this package":
        model = task.load_model(arguments, {0: "skin", 1: "lesion"})
        task.load_processor(arguments, model, 32).save_pretrained(tmp_path)
    _, processor = task.load_trained(arguments)
    values = np.zeros((200, 400), "uint8")
    values[:, 150:200] = 255
    Image.fromarray(values).save(tmp_path / "image.png")
    pixels, size = task.read({"bytes": None, "path": str(tmp_path / "image.png")}, processor)
    assert pixels.shape == ((3, 32, 32) if saved_by == "this package" else (3, 64, 64))
    grey = pixels.mean(0) - (pixels.max() + pixels.min()) / 2
    (answer,) = task.answers(torch.stack([-grey, grey])[None], ["skin", "lesion"], [size])
    columns = np.flatnonzero(answer["mask"].any(0))
    # A pixel of the model's input is as wide as 12.5 of the image.
    assert (columns[0], columns[-1]) == pytest.approx((150, 199), abs=13)
    assert answer["mask"].all(0)[columns[0] : columns[-1] + 1].all()


def test_masks_of_nifti_slices_lie_where_their_images_do(tmp_path):
    data, model = save_cells(tmp_path / "cells"), save_timm(tmp_path / "model")
    output = train(tmp_path / "run", data, model, "--task", "segmentation", "--image_size", "32")
    values = np.random.default_rng(0).integers(0, 255, (30, 20, 1)).astype("uint8")
    affine = np.diag([-0.5, 0.5, 4.0, 1.0])
    (tmp_path / "new").mkdir()
    save_nifti(tmp_path / "new" / "a.nii", values, affine)
    Image.fromarray(np.asarray(read_image({"bytes": None, "path": str(tmp_path / "new" / "a.nii")}))).save(
        tmp_path / "new" / "b.png"
    )
    table = predict(output, tmp_path / "new", tmp_path / "new" / "p.csv")
    assert table["mask"].to_dict() == {"a.nii": "p_masks/a.nii.gz", "b.png": "p_masks/b.png"}
    # As they are seen, the mask of the slice and that of its picture are one; in its file it lies as the slice does.
    nifti, picture = (read_mask({"bytes": None, "path": str(tmp_path / "new" / name)}) for name in table["mask"])
    assert np.array_equal(nifti, picture)
    saved = nibabel.load(tmp_path / "new" / table.loc["a.nii", "mask"])
    assert saved.shape == values.shape
    assert np.array_equal(saved.affine, affine)
    # The masks lie below the images, and are none themselves.
    assert list(predict(output, tmp_path / "new", tmp_path / "new" / "p.csv").index) == ["a.nii", "b.png"]


def test_a_mask_never_leads_out_of_its_folder(tmp_path, run, photos, monkeypatch):
    (tmp_path / "here").mkdir()
    file = next((photos / "test").rglob("*.png"))
    (tmp_path / "scan.png").write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path / "here")
    assert list(predict(run, "../scan.png", tmp_path / "p.csv").index) == ["scan.png"]


def test_the_task_is_told_by_the_model(run, tmp_path):
    assert task_of(AutoConfig.from_pretrained(run)) is TASKS["classification"]
    from transformers import DetrConfig

    with pytest.raises(ValueError, match="No task is known for a model like this"):
        task_of(DetrConfig(architectures=["DetrForObjectDetection"]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["RUN", "/no/such/folder", "--output", "p.csv"], "images='/no/such/folder' does not exist"),
        (["/no/such/run", "PHOTOS", "--output", "p.csv"], "predict: run='/no/such/run': no model there"),
        (["RUN", "PHOTOS", "--output", "p.txt"], "output='p.txt' is the table to write: give it a name that ends in"),
        (["RUN", "PHOTOS", "--output", "p.csv", "--batch_size", "0"], "batch_size=0 must be 1 or more"),
        (["RUN", "EMPTY", "--output", "p.csv"], "there are no images in that folder"),
        (["RUN", "PHOTOS", "--output", "p.csv", "--task", "guessing"], "task='guessing' is no task"),
    ],
)
def test_bad_input_is_one_line(tmp_path, run, photos, capsys, more, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    meant = {"RUN": str(run), "PHOTOS": str(photos), "EMPTY": str(tmp_path / "empty")}
    assert main(["predict", *(meant.get(word, word) for word in more)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not os.path.exists("p.csv")


def test_the_table_is_plain_csv(tmp_path, run, photos):
    predict(run, photos / "test", tmp_path / "p.csv")
    with open(tmp_path / "p.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert len({len(row) for row in rows}) == 1
    assert rows[1][-1].startswith(f"{run.name}@")
