"""Several labels an image, in every form that a data set has them, and what is said of those that cannot be used."""

import re

import datasets
import pytest
from digits import digit_images, findings, save_with_metadata

from metalr_hf.data.labels.sets import UNKNOWN, LabelSetArguments, load_label_sets

pytestmark = pytest.mark.usefixtures("offline")
COLUMNS = ["even", "loop", "bent"]
LISTS = {"nil": ["even", "loop"], "one": [], "two": ["bent", "even"]}
FIGURES = {"nil": [0, 1, 1], "one": [0, 0, 0], "two": [1, 1, 0]}


def saved(tmp_path, values, feature, test=None):
    images, names = digit_images(30)
    kind = datasets.Features(image=datasets.Image(), findings=feature)

    def rows(of):
        return datasets.Dataset.from_dict({"image": images, "findings": [of(name) for name in names]}, features=kind)

    datasets.DatasetDict(train=rows(values), test=rows(test or values)).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved"), names


def load(name, **arguments):
    return load_label_sets(LabelSetArguments(dataset_name=name, **arguments))


def test_columns_of_zeros_and_ones_with_unknown_entries(tmp_path):
    folder = str(save_with_metadata(tmp_path, findings))
    splits = load(folder, target_column_names=COLUMNS)
    assert splits.class_names == tuple(COLUMNS)
    assert splits.train.column_names == ["image", "label"]
    names = digit_images(60)[1]
    for row, (label, name) in enumerate(zip(splits.train["label"], names, strict=True)):
        assert label == [name != "one", UNKNOWN if row % 10 == 7 else name == "nil", name == "two"]


@pytest.mark.parametrize(
    ("values", "feature", "arguments"),
    [
        (LISTS.get, datasets.List(datasets.Value("string")), {}),
        (
            lambda name: [("bent", "even", "loop").index(label) for label in LISTS[name]],
            datasets.List(datasets.ClassLabel(names=["bent", "even", "loop"])),
            {},
        ),
        (FIGURES.get, datasets.List(datasets.Value("int64")), {"class_names": ["bent", "even", "loop"]}),
        (
            lambda name: [bool(figure) for figure in FIGURES[name]],
            datasets.List(datasets.Value("bool")),
            {"class_names": ["bent", "even", "loop"]},
        ),
        (lambda name: "|".join(LISTS[name]), datasets.Value("string"), {"label_separator": "|"}),
        (lambda name: "|".join(LISTS[name]), datasets.Value("large_string"), {"label_separator": "|"}),
        (
            lambda name: "|".join(LISTS[name]),
            datasets.Value("large_string"),
            {"label_separator": "|", "label_column_name": "findings"},
        ),
    ],
)
def test_lists_of_names_of_classes_and_of_figures_and_divided_text(tmp_path, values, feature, arguments):
    folder, names = saved(tmp_path, values, feature)
    splits = load(folder, **arguments)
    assert splits.class_names == ("bent", "even", "loop")
    assert [list(label) for label in splits.train["label"]] == [FIGURES[name] for name in names]


def test_numbers_of_labels_are_no_figures(tmp_path):
    numbers = {"nil": [4, 7], "one": [], "two": [1]}
    folder, names = saved(tmp_path, numbers.get, datasets.List(datasets.Value("int64")))
    splits = load(folder)
    assert splits.class_names == ("1", "4", "7")
    assert splits.train[0]["label"] == {"nil": [0, 1, 1], "one": [0, 0, 0], "two": [1, 0, 0]}[names[0]]


@pytest.mark.parametrize("held_back", [None, []], ids=str)
def test_a_test_split_whose_labels_are_held_back_leaves_figures_what_they_are(tmp_path, held_back):
    folder, names = saved(tmp_path, FIGURES.get, datasets.List(datasets.Value("int64")), test=lambda name: held_back)
    if held_back is None:
        splits = load(folder)
        assert splits.class_names == ("0", "1", "2")
        assert [list(label) for label in splits.train["label"]] == [FIGURES[name] for name in names]
        assert splits.test["label"][0] == [UNKNOWN] * 3
    else:
        with pytest.raises(ValueError, match="Split 'test', column 'findings', row 0 has 0 figures for 3 labels"):
            load(folder)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ([0, 2, 0], "row 1 holds 2, which is neither 0 nor 1"),
        ([0, 1, 2], "row 1 holds 2, which is neither 0 nor 1"),
        ([], "row 1 has 0 figures for 3 labels"),
        ([1, 0], "row 1 has 2 figures for 3 labels"),
    ],
    ids=str,
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_one_odd_list_does_not_make_labels_of_figures(tmp_path, split, odd, message):
    images, names = digit_images(12)
    lists = [FIGURES[name] for name in names]
    kind = datasets.Features(image=datasets.Image(), findings=datasets.List(datasets.Value("int64")))
    rows = {
        name: datasets.Dataset.from_dict(
            {"image": images, "findings": [lists[0], odd, *lists[2:]] if name == split else lists}, features=kind
        )
        for name in ("train", "test")
    }
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=f"Split '{split}', column 'findings', {message}"):
        load(str(tmp_path))


def test_numbers_of_labels_of_which_every_image_has_as_many(tmp_path):
    numbers = {"nil": [4, 7], "one": [1, 4], "two": [7, 1]}
    folder, _ = saved(tmp_path, numbers.get, datasets.List(datasets.Value("int64")), test=lambda name: None)
    assert load(folder).class_names == ("1", "4", "7")


def test_a_missing_list_is_unknown_and_some_labels_can_be_chosen(tmp_path):
    values = {**LISTS, "one": None}
    folder, names = saved(tmp_path, values.get, datasets.List(datasets.Value("string")))
    splits = load(folder, class_names=["loop", "even"])
    expected = {"nil": [1, 1], "one": [UNKNOWN, UNKNOWN], "two": [0, 1]}
    assert [list(label) for label in splits.train["label"]] == [expected[name] for name in names]
    assert splits.id2label == {0: "loop", 1: "even"}


def test_some_columns_can_be_chosen_and_keep_their_names(tmp_path):
    folder = str(save_with_metadata(tmp_path, findings))
    every = load(folder, target_column_names=COLUMNS)
    chosen = load(folder, target_column_names=COLUMNS, class_names=COLUMNS[:0:-1])
    assert chosen.class_names == tuple(COLUMNS[:0:-1])
    assert [list(label) for label in chosen.train["label"]] == [list(label[:0:-1]) for label in every.train["label"]]


def test_a_patient_stays_on_one_side(tmp_path):
    folder = save_with_metadata(tmp_path, lambda name, image, row: {**findings(name, image, row), "patient": row // 3})
    (folder / "test").rename(tmp_path.parent / f"{tmp_path.name}-away")
    splits = load(str(folder), target_column_names=COLUMNS, group_column="patient")
    patients = [set(split["patient"]) for split in (splits.train, splits.test)]
    assert not patients[0] & patients[1]
    assert splits.train.num_rows + splits.test.num_rows == 60


@pytest.mark.parametrize(
    ("column", "arguments", "message"),
    [
        (
            {"even": "yes"},
            {"target_column_names": COLUMNS},
            "Split 'train', column 'even', row 0 holds 'yes', which is neither 0 nor 1",
        ),
        ({"loop": 2}, {"target_column_names": COLUMNS}, "column 'loop', row 0 holds 2"),
        (
            {"bent": 0},
            {"target_column_names": COLUMNS},
            "In the 60 training images of the split 'train' the label 'bent' never occurs",
        ),
        ({}, {"target_column_names": ["evne"]}, "'evne' is not a column of the split 'train'"),
        ({}, {}, "no label column. Name the one to use with label_column_name"),
        ({}, {"label_column_name": "even"}, "the labels are no lists but such as 1. It takes a column of lists"),
    ],
)
def test_columns_that_cannot_be_learned_are_told_in_one_line(tmp_path, column, arguments, message):
    folder = save_with_metadata(tmp_path, lambda *args: {**findings(*args), **column})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(str(folder), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "inner", "message"),
    [
        (
            {"nil": [1, 0], "one": [1], "two": [0, 1]},
            "float32",
            "has 1 figures for 2 labels|has 2 figures for 1 labels",
        ),
        ({"nil": ["a", None], "one": ["a"], "two": ["b"]}, "string", "a label in the list is None. Leave it out"),
        ({"nil": [], "one": [], "two": []}, "string", "no label occurs"),
    ],
)
def test_lists_that_cannot_be_learned_are_told_in_one_line(tmp_path, values, inner, message):
    folder, _ = saved(tmp_path, values.get, datasets.List(datasets.Value(inner)))
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_label_of_the_test_split_alone(tmp_path):
    kind = datasets.List(datasets.Value("string"))
    folder, _ = saved(tmp_path, LISTS.get, kind, test=lambda name: ["rare"])
    with pytest.raises(ValueError, match="Split 'test', column 'findings', row 0 has the label 'rare', which no image"):
        load(folder)


def test_arguments_that_exclude_each_other():
    with pytest.raises(ValueError, match="are both given. Leave out one"):
        LabelSetArguments(target_column_names=["a"], label_column_name="b")
    with pytest.raises(ValueError, match="metrics='accuracy' is no metric of this task.*There are: macro_auroc"):
        LabelSetArguments(metrics=["accuracy"])
    with pytest.raises(ValueError, match="Leave out streaming"):
        LabelSetArguments(streaming=True)
