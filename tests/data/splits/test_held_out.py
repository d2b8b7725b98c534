"""Splits mean what they say: training, validation and test rows stay apart, and so do patients."""

import datasets
import numpy as np
import pytest
from PIL import Image

from metalr_hf.data.loading import DataArguments, load_images
from metalr_hf.data.splits.held_out import hold_out, hold_out_rows

pytestmark = pytest.mark.usefixtures("offline")


def rows(count=40, start=0, patients=4):
    """Images of one colour a row, so that a row is known again; each patient has so many of them."""
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]), patient=datasets.Value("string")
    )
    numbers = range(start, start + count)
    columns = {
        "image": [Image.new("RGB", (4, 4), (i, 0, 0)) for i in numbers],
        "label": [i % 2 for i in numbers],
        "patient": [f"p{i // patients}" for i in numbers],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def saved(folder, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return str(folder)


def numbers(split):
    return {image.getpixel((0, 0))[0] for image in split["image"]}


def test_a_validation_split_beside_the_test_split_is_what_evaluations_look_at(tmp_path):
    name = saved(tmp_path, train=rows(), validation=rows(12, 40), test=rows(8, 60))
    splits = load_images(DataArguments(dataset_name=name))
    assert [len(numbers(split)) for split in (splits.train, splits.validation, splits.test)] == [40, 12, 8]
    other = load_images(DataArguments(dataset_name=name, validation_split="test", test_split="validation"))
    assert (numbers(other.validation), numbers(other.test)) == (numbers(splits.test), numbers(splits.validation))
    # Without a test split the result is measured on `validation`, which is then not looked at before.
    name = saved(tmp_path / "two", train=rows(), validation=rows(12, 40))
    splits = load_images(DataArguments(dataset_name=name))
    assert (splits.test.num_rows, splits.validation) == (12, None)


def test_a_validation_share_is_taken_from_the_training_split_and_never_from_the_test(tmp_path):
    splits = load_images(DataArguments(dataset_name=saved(tmp_path, train=rows(), test=rows(8, 60))))
    held = hold_out(splits, "validation", "validation_share", 0.25, seed=0, group_column=None)
    assert numbers(held.train) | numbers(held.validation) == numbers(splits.train)
    assert not numbers(held.train) & numbers(held.validation)
    assert sum(held.validation["label"]) == 5
    assert held.test is splits.test


@pytest.mark.parametrize("labels", [True, False])
def test_a_patient_stays_on_one_side(labels):
    data = rows() if labels else rows().remove_columns("label").add_column("label", [float(i) for i in range(40)])
    for seed in range(5):
        rest, held = hold_out_rows(data, "test_share", 8, seed, group_column="patient")
        assert not set(rest["patient"]) & set(held["patient"])
        assert len(rest) + len(held) == 40
        assert 4 <= len(held) <= 12


def rows_of_patients(sizes, labels):
    """A patient of each size; `labels` takes the numbers of a patient and of an image."""
    numbered = [(patient, image) for patient, size in enumerate(sizes) for image in range(size)]
    columns = {"label": [labels(*both) for both in numbered], "patient": [patient for patient, _ in numbered]}
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize(
    "labels",
    [
        lambda patient, image: image % 2,
        lambda patient, image: image % 2 if patient == 0 else patient % 2,
        lambda patient, image: image + 0.5,
    ],
    ids=["classes", "one class a patient but of the largest", "numbers"],
)
def test_a_patient_with_most_of_the_images_is_trained_on(labels):
    data = rows_of_patients((200, 30, 25, 20, 15, 10), labels)
    for seed in range(10):
        rest, held = hold_out_rows(data, "test_share", 60, seed, group_column="patient")
        assert 30 <= len(held) <= 90
        assert not set(rest["patient"]) & set(held["patient"])
        if isinstance(data[0]["label"], int):
            assert set(rest["label"]) == set(held["label"]) == {0, 1}
    assert hold_out_rows(data, "test_share", 60, seed, group_column="patient")[1]["patient"] == held["patient"]


def test_a_few_patients_are_divided_if_they_can_be():
    rest, held = hold_out_rows(
        rows_of_patients((100,) * 4, lambda patient, image: image % 2), "test_share", 80, 0, group_column="patient"
    )
    assert (len(rest), len(held)) == (300, 100)


def test_a_class_of_a_single_patient_is_refused_by_what_is_wrong():
    data = rows_of_patients((8,) * 10, lambda patient, image: int(patient == 3))
    with pytest.raises(
        ValueError, match="test_share: 16 of 80 .* in both parts .*all images of a class are of one group"
    ):
        hold_out_rows(data, "test_share", 16, 0, group_column="patient")


def test_a_share_that_whole_patients_make_another_one_is_warned_of():
    data = rows_of_patients((200, 30, 25, 20, 15, 10), lambda patient, image: patient % 2)
    expected = "test_share: 60 of 300 training images .* became 25, .* group_column='patient' .* up to 200 of them. Put"
    with pytest.warns(UserWarning, match=expected):
        rest, held = hold_out_rows(data, "test_share", 60, 0, group_column="patient")
    assert set(rest["label"]) == set(held["label"]) == {0, 1}


def test_every_split_that_is_made_keeps_patients_together(tmp_path):
    arguments = DataArguments(dataset_name=saved(tmp_path, train=rows()), group_column="patient", test_share=0.25)
    splits = load_images(arguments, seed=1)
    held = hold_out(splits, "validation", "validation_share", 0.3, 1, "patient")
    held = hold_out(held, "meta", "meta_split", 0.3, 1, "patient")
    patients = [set(split["patient"]) for split in (held.train, held.validation, held.meta, held.test)]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 10


def test_splits_that_share_a_patient_are_refused_unless_that_is_wanted(tmp_path):
    name = saved(tmp_path, train=rows(), test=rows(12, 32))
    with pytest.raises(ValueError, match=r"'train' and 'test' share 2 of its values \(p8, p9\).*--allow_shared_groups"):
        load_images(DataArguments(dataset_name=name, group_column="patient"))
    splits = load_images(DataArguments(dataset_name=name, group_column="patient", allow_shared_groups=True))
    assert splits.test.num_rows == 12


def test_a_patient_who_is_a_whole_number_in_one_split_and_a_fraction_in_the_other_is_shared(tmp_path):
    whole = rows().remove_columns("patient").add_column("patient", [i // 4 for i in range(40)])
    fractions = rows(8, 60).remove_columns("patient").add_column("patient", [9.0] * 4 + [10.0] * 4)
    name = saved(tmp_path, train=whole, test=fractions)
    with pytest.raises(ValueError, match=r"'train' and 'test' share 1 of its values \(9\)"):
        load_images(DataArguments(dataset_name=name, group_column="patient"))


def test_bad_groups_are_told_before_training(tmp_path):
    name = saved(tmp_path / "a", train=rows())
    with pytest.raises(ValueError, match=r"='subject' is neither a column \['image'.* nor a tag of DICOM files"):
        load_images(DataArguments(dataset_name=name, group_column="subject"))
    missing = rows().remove_columns("patient").add_column("patient", [None if i == 7 else "p" for i in range(40)])
    name = saved(tmp_path / "b", train=missing)
    with pytest.raises(ValueError, match="1 of the train images have no group, the first in row 7"):
        load_images(DataArguments(dataset_name=name, group_column="patient"))
    name = saved(tmp_path / "c", train=rows(), test=rows(8, 60))
    with pytest.raises(ValueError, match="the groups of a stream cannot be looked at"):
        load_images(DataArguments(dataset_name=name, group_column="patient", streaming=True))
    splits = load_images(DataArguments(dataset_name=name, streaming=True))
    with pytest.raises(ValueError, match="no share to hold out for validation_share=0.2. Name a split with validation"):
        hold_out(splits, "validation", "validation_share", 0.2, 0, None)
    with pytest.raises(ValueError, match="validation_share=1.0 must be more than 0 and less than 1"):
        DataArguments(validation_share=1.0)
    few = np.array(["p"] * 40)
    name = saved(tmp_path / "d", train=rows().remove_columns("patient").add_column("patient", few.tolist()))
    with pytest.raises(ValueError, match="test_share: 8 of 40 training images cannot be taken with each value"):
        load_images(DataArguments(dataset_name=name, group_column="patient"))


def few_rows(images, classes):
    features = datasets.Features(label=datasets.ClassLabel(num_classes=classes))
    return datasets.Dataset.from_dict({"label": [i % classes for i in range(images)]}, features=features)


@pytest.mark.parametrize(
    ("argument", "size", "images", "classes", "advised"),
    [
        ("test_share", 2, 12, 3, "--test_share 0.25"),
        ("validation_share", 4, 22, 7, "--validation_share 0.32"),
        ("max_train_samples", 3, 40, 5, "--max_train_samples 5"),
        # With one image of each there is no share that would do, and so many images leave none for the others.
        ("test_share", 1, 3, 3, None),
        ("test_share", 11, 12, 3, None),
        # A share that no argument changes.
        ("strategies", 2, 12, 3, None),
    ],
)
def test_a_share_that_is_too_small_for_the_classes_comes_with_one_that_is_not(argument, size, images, classes, advised):
    data = few_rows(images, classes)
    with pytest.raises(ValueError, match=f"{argument}: {size} of {images} training images cannot be taken") as error:
        hold_out_rows(data, argument, size, seed=0)
    assert ("Take" in str(error.value)) == (advised is not None)
    if advised is not None:
        assert str(error.value).endswith(f"as with {advised}.")
        number = float(advised.split()[1])
        taken = hold_out_rows(data, argument, round(number if number >= 1 else number * images), seed=0)[1]
        assert len(set(taken["label"])) == classes


def test_a_class_with_a_single_image_is_named():
    features = datasets.Features(label=datasets.ClassLabel(names=["benign", "Benign ", "malignant"]))
    labels = [1, *[0, 2] * 10]
    with pytest.raises(ValueError, match=r"The class 'Benign ' has a single image \(row 0\)"):
        hold_out_rows(datasets.Dataset.from_dict({"label": labels}, features=features), "test_share", 4, seed=0)
    with pytest.raises(ValueError, match=r"Most classes have a single image. .*--task regression"):
        hold_out_rows(few_rows(8, 8), "test_share", 4, seed=0)


def test_a_number_that_is_no_seed_is_told():
    with pytest.raises(ValueError, match="seed=-1 must be a whole number from 0 to 4294967295"):
        hold_out_rows(few_rows(12, 3), "test_share", 3, seed=-1)


@pytest.mark.parametrize("labels", [lambda patient, image: image % 2, lambda patient, image: image + 0.5])
def test_a_share_of_less_than_one_image_says_which_is_enough(labels):
    data = rows_of_patients((8,) * 5, labels)
    message = "test_share: 0 of 40 .*less than one image.* Take a larger share, as with --test_share 0.2[.]"
    with pytest.raises(ValueError, match=message):
        hold_out_rows(data, "test_share", 0, 0, group_column="patient")
    assert len(hold_out_rows(data, "test_share", round(0.2 * 40), 0, group_column="patient")[1]) == 8
    with pytest.raises(ValueError, match="test_share: 0 of 40") as error:
        hold_out_rows(data, "test_share", 0, 0)
    assert str(error.value).count("Take a larger share") == 1
