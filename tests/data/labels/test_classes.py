"""Labels as people have them: which are read, and what is said of those that cannot be."""

import shutil
import warnings

import datasets
import pytest
from digits import NAMES, digit_images, save_image_folder
from open_files import LEFT_OPEN

from metalr_hf.data.loading import DataArguments, load_images

pytestmark = [pytest.mark.usefixtures("offline", "open_files_are_left_here"), LEFT_OPEN]


def load(name, **kwargs):
    return load_images(DataArguments(dataset_name=str(name), **kwargs))


def table(folder, labels):
    """A folder of images with their labels, as they would be typed, in a metadata.csv."""
    folder.mkdir(exist_ok=True)
    images, _ = digit_images(len(labels))
    lines = ["file_name,label"]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        image.save(folder / f"{i:03}.png")
        lines.append(f"{i:03}.png,{label}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def test_true_and_false_are_two_classes(tmp_path):
    truth = [i % 3 == 0 for i in range(30)]
    table(tmp_path / "train", truth)
    table(tmp_path / "test", truth[:12])
    splits = load(tmp_path)
    assert splits.class_names == ("False", "True")
    assert list(splits.train["label"]) == [int(value) for value in truth]
    assert list(splits.test["label"]) == [int(value) for value in truth[:12]]


@pytest.mark.parametrize("test_labels", [[1, 0, 1], [1.0, 0.0, 1.0]], ids=str)
def test_whole_numbers_that_a_table_has_as_fractions_are_classes(tmp_path, test_labels):
    table(tmp_path / "train", [float(i % 2) for i in range(30)])
    table(tmp_path / "test", test_labels)
    splits = load(tmp_path)
    assert splits.class_names == ("0", "1")
    assert list(splits.train["label"]) == [i % 2 for i in range(30)]
    assert list(splits.test["label"]) == [1, 0, 1]


def test_whole_numbers_that_parquet_has_as_fractions_are_classes(tmp_path):
    images, _ = digit_images(30)
    rows = datasets.Dataset.from_dict({"image": images, "labels": [30.0, 2.0, 10.0] * 10})
    rows.to_parquet(tmp_path / "train.parquet")
    assert load(tmp_path).class_names == ("2", "10", "30")


def test_fractions_are_no_classes(tmp_path):
    message = r"in the column 'label', are no classes: \[0.5, 1.5\]. .* label_column_name, or .* --task regression"
    with pytest.raises(ValueError, match=message):
        load(table(tmp_path / "fractions", [i % 3 / 2 for i in range(12)] + [1.5]))


@pytest.mark.parametrize("labels", [("x", "y"), (0, 1), (0.0, 1.0), (True, False)], ids=str)
def test_a_missing_label_is_named_with_its_row_and_file_however_late(tmp_path, labels):
    given = [labels[i % 2] for i in range(40)]
    given[33] = ""
    with pytest.raises(ValueError, match=r"Split 'train' has .* label: 1 of 40, the first in row 33 \(.*/033.png\)"):
        load(table(tmp_path / "images", given))


def test_a_missing_number_in_one_split_of_several_is_named(tmp_path):
    given = [i % 2 for i in range(40)]
    table(tmp_path / "test", given[:12])
    given[33] = ""
    table(tmp_path / "train", given)
    with pytest.raises(ValueError, match=r"Split 'train' has .* label: 1 of 40, the first in row 33 \(.*/033.png\)"):
        load(tmp_path)


def test_a_missing_label_of_a_class_label_is_named(tmp_path):
    images, names = digit_images(30)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(NAMES)))
    labels = [NAMES.index(name) for name in names]
    labels[20] = None
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="Split 'train' has images without a label: 1 of 30, the first in row 20"):
        load(tmp_path)


def test_one_class_is_nothing_to_learn(tmp_path):
    with pytest.raises(ValueError, match="The split 'train' has only the class 'x', but it takes two classes or more"):
        load(table(tmp_path / "table", ["x"] * 30))
    folder = save_image_folder(tmp_path / "folders")
    for name in ("one", "two"):
        shutil.rmtree(folder / "train" / name)
    with pytest.raises(
        ValueError, match=r"Split 'train' has .* label: 2\d of 2\d, the first .* Images were found in .*train/nil/"
    ):
        load(folder)


def test_folders_without_classes_are_told_what_was_found_and_what_is_expected(tmp_path):
    flat = save_image_folder(tmp_path / "flat")
    for path in sorted((flat / "test").rglob("*.png")):
        path.rename(flat / "test" / path.name)
    for path in (flat / "test").iterdir():
        if path.is_dir():
            path.rmdir()
    expected = r"Classes are read from folders, two or more, .*: train/<class>/ and test/<class>/.*metadata.csv"
    found = r"Images were found in test/ \(30\), train/nil/ \(\d+\), train/one/ \(\d+\), train/two/ \(\d+\)\. "
    with pytest.raises(ValueError, match=f"no label column.*{found}{expected}"):
        load(flat)
    with pytest.raises(ValueError, match=found):
        load("imagefolder", data_dir=str(flat))
    alone = save_image_folder(tmp_path / "alone")
    shutil.rmtree(alone / "test")
    for name in ("one", "two"):
        shutil.rmtree(alone / "train" / name)
    with pytest.raises(ValueError, match=rf"Images were found in train/nil/ \(\d+\)\. {expected}"):
        load(alone)


def test_a_class_that_only_the_test_split_has_is_warned_of(tmp_path):
    folder = save_image_folder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)
    shutil.rmtree(folder / "train" / "two")
    with pytest.warns(UserWarning, match=r"split 'test' has .* 1 class that the split 'train' has none of \('two'\)"):
        assert load(folder).class_names == NAMES


def test_classes_that_are_one_in_several_spellings_are_warned_of(tmp_path):
    labels = ["virus", "virus ", "VIRUS", "normal", "bacteria"] * 6
    with pytest.warns(
        UserWarning, match="differ in blanks or in upper and lower case alone: 'VIRUS', 'virus', 'virus '[.]"
    ):
        assert len(load(table(tmp_path, labels)).class_names) == 5
