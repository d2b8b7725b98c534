"""Splits of rows with several labels each: every label in its share, groups on one side, the same by seed."""

import datasets
import numpy as np
import pytest

from metalr_hf.data.splits.folds import fold_rows, stratified_subset
from metalr_hf.data.splits.held_out import hold_out_rows
from metalr_hf.data.splits.several_labels import divide_by_labels, label_flags

# From one row in a hundred to every second one.
SHARES = (0.01, 0.02, 0.05, 0.1, 0.3, 0.5)
ROWS = 1000


def table(patients=3, unknown=0.0):
    """Labels that come together more often than by chance; the rows of a patient are alike."""
    random = np.random.default_rng(0)
    flags = random.random((ROWS, len(SHARES))) < SHARES
    flags[:, 1] |= flags[:, 0]
    alike = np.arange(ROWS) // patients
    flags = np.where(random.random((ROWS, 1)) < 0.5, flags, flags[alike * patients])
    values = np.where(random.random(flags.shape) < unknown, -100.0, flags.astype(float))
    names = [f"p{i}" for i in alike]
    columns = {"label": values.tolist(), "patient": names, "row": list(range(ROWS))}
    return datasets.Dataset.from_dict(columns).cast_column("label", datasets.List(datasets.Value("float32")))


def positives(rows):
    return (np.array(list(rows["label"])) == 1).sum(0)


@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_every_label_has_its_share_of_a_held_out_part(unknown):
    data = table(unknown=unknown)
    for seed in range(3):
        rest, held = hold_out_rows(data, "test_share", 200, seed)
        assert (len(rest), len(held)) == (800, 200)
        assert sorted([*rest["row"], *held["row"]]) == list(range(ROWS))
        assert np.abs(positives(held) - 0.2 * positives(data)).max() <= 1
    again = hold_out_rows(data, "test_share", 200, 2)[1]
    assert again["row"] == held["row"] != hold_out_rows(data, "test_share", 200, 1)[1]["row"]


def test_patients_stay_together_and_labels_have_about_their_share():
    data = table()
    for seed in range(3):
        rest, held = hold_out_rows(data, "test_share", 200, seed, group_column="patient")
        assert not set(rest["patient"]) & set(held["patient"])
        assert abs(len(held) - 200) <= 3
        # Of rare labels there is one more or less; of those that every second patient has, room for whole patients.
        apart = np.abs(positives(held) - 0.2 * positives(data))
        assert apart[:4].max() <= 1
        assert (apart <= 0.04 * positives(data) + 1).all()


@pytest.mark.parametrize("group_column", [None, "patient"])
def test_folds_have_every_label_too(group_column):
    data = table()
    folds = fold_rows(data, 5, 0, group_column)
    assert sorted(row for _, test in folds for row in test) == list(range(ROWS))
    for train, test in folds:
        assert len(train) + len(test) == ROWS
        assert abs(len(test) - 200) <= 3
        apart = np.abs(positives(data.select(test)) - 0.2 * positives(data))
        assert (apart <= 2 if group_column is None else apart <= 0.04 * positives(data) + 2).all()
        if group_column:
            assert not set(data[train]["patient"]) & set(data[test]["patient"])


def test_a_subset_has_every_label_in_its_share():
    data = table()
    subset = stratified_subset(data, 300, seed=0)
    assert len(subset) == 300
    assert np.abs(positives(subset) - 0.3 * positives(data)).max() <= 1


def test_a_label_that_is_too_rare_for_both_is_trained_on():
    data = datasets.Dataset.from_dict({"label": [[1.0, 0.0]] + [[0.0, float(i % 2)] for i in range(19)]})
    for seed in range(5):
        rest, held = hold_out_rows(data, "test_share", 4, seed)
        assert positives(rest)[0] == 1
        assert positives(held)[1] == 2


def test_a_few_large_groups_are_divided_all_the_same():
    data = datasets.Dataset.from_dict({"label": [[1.0, 0.0]] * 40, "patient": ["a"] * 20 + ["b"] * 20})
    with pytest.warns(UserWarning, match="test_share: 8 of 40 training images were to be held out, but it became 20"):
        rest, held = hold_out_rows(data, "test_share", 8, 0, group_column="patient")
    assert (len(rest), len(held)) == (20, 20)
    alone = data.remove_columns("patient").add_column("patient", ["a"] * 40)
    with pytest.raises(ValueError, match="test_share: 8 of 40 training images cannot be taken with each value"):
        hold_out_rows(alone, "test_share", 8, 0, group_column="patient")
    assert divide_by_labels(label_flags(alone), (32, 8), 0, np.zeros(40)) is None


def test_numbers_and_classes_are_no_flags():
    for labels in ([[0.5, 1.0], [0.0, 1.0]], [0, 1], [0.0, 1.0], [[], []], [[1.0], [0.0, 1.0]], [["a"], ["b"]]):
        assert label_flags(datasets.Dataset.from_dict({"label": labels})) is None
