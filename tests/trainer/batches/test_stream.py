"""The meta stream: the same batches whatever the workers, no trace in the training's random numbers, exact resume."""

import doctest
import random
from collections import Counter
from itertools import chain

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate
from torchvision.transforms import v2

import metalr_hf.trainer.batches.stream
from metalr_hf.trainer.batches import MetaStream, check_meta_dataset, split_meta_dataset

ROWS = 10


def augmented(row):
    """Draws from all three global generators."""
    image = torch.full((1, 4, 4), float(row)) + torch.arange(16.0).reshape(1, 4, 4) / 16
    image = v2.RandomHorizontalFlip()(v2.RandomCrop(3)(image))
    return {"x": image, "row": row, "noise": [torch.rand(()).item(), random.random(), np.random.rand()]}


def augmented_columns(columns):
    rows = [augmented(i) for i in columns["row"]]
    return {name: [row[name] for row in rows] for name in rows[0]}


class Images(Dataset):
    def __init__(self, rows=ROWS):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        return augmented(i)


class Stream(IterableDataset):
    def __init__(self, rows=ROWS):
        self.rows, self.reads = rows, 0

    def __iter__(self):
        for i in range(self.rows):
            self.reads += 1
            yield augmented(i)


class EpochStream(Stream):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(self.rows).tolist()
        yield from map(augmented, order)


def table():
    return datasets.Dataset.from_dict({"row": list(range(ROWS))})


def transformed_table():
    return table().with_transform(augmented_columns)


def streamed_table(num_shards=2):
    return table().to_iterable_dataset(num_shards=num_shards).map(lambda columns: augmented(columns["row"]))


def collate(rows):
    return {
        "x": torch.stack([torch.as_tensor(row["x"]) for row in rows]),
        "row": [row["row"] for row in rows],
        "noise": [list(map(float, row["noise"])) for row in rows],
        "collated": torch.rand(()).item(),
    }


def take(stream, n):
    return [next(stream) for _ in range(n)]


def row_numbers(batches):
    return list(chain.from_iterable(batch["row"] for batch in batches))


def same(a, b):
    rest = [{k: v for k, v in batch.items() if k != "x"} for batch in a] == [
        {k: v for k, v in batch.items() if k != "x"} for batch in b
    ]
    return rest and all(torch.equal(x["x"], y["x"]) for x, y in zip(a, b, strict=True))


MAP_STYLE = [Images, transformed_table, lambda: [augmented(i) for i in range(ROWS)]]
ITERABLE = [Stream, EpochStream, streamed_table]
every_dataset = pytest.mark.parametrize("make", [*MAP_STYLE, *ITERABLE])


@every_dataset
def test_batches_do_not_depend_on_workers_nor_on_the_global_generators(make):
    dataset = make()
    torch.manual_seed(1)
    alone = take(MetaStream(dataset, 4, collate, seed=3), 7)
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    assert same(alone, take(MetaStream(dataset, 4, collate, seed=3, num_workers=2), 7))
    assert not same(alone, take(MetaStream(dataset, 4, collate, seed=4), 7))
    assert len({batch["collated"] for batch in alone}) == 7


@every_dataset
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_training_draws_the_same_random_numbers(make, num_workers):
    dataset = make()

    def draws(between):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        between()
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    stream = MetaStream(dataset, 4, collate, num_workers=num_workers)
    assert draws(lambda: take(stream, 5)) == draws(lambda: None)


@pytest.mark.parametrize("make", [Images, Stream])
def test_augmentation_differs_between_rows_and_between_epochs(make):
    batches = take(MetaStream(make(), 5, collate), 6)
    noise = [tuple(row) for batch in batches for row in batch["noise"]]
    assert len(set(noise)) == 30


@every_dataset
def test_every_row_once_an_epoch_in_batches_of_the_asked_size(make):
    batches = take(MetaStream(make(), 4, collate), 10)
    assert {len(batch["row"]) for batch in batches} == {4}
    rows = row_numbers(batches)
    epochs = [rows[i : i + ROWS] for i in range(0, 40, ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    if make is not Stream:
        assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("make", [lambda: Images(3), lambda: Stream(3)])
def test_a_set_smaller_than_a_batch(make):
    batches = take(MetaStream(make(), 8, collate), 3)
    assert [len(batch["row"]) for batch in batches] == [8, 8, 8]
    assert Counter(row_numbers(batches)) == {0: 8, 1: 8, 2: 8}


@pytest.mark.parametrize("make", [*MAP_STYLE, *ITERABLE, lambda: streamed_table(num_shards=1)])
def test_processes_take_other_rows_of_an_epoch(make):
    streams = [MetaStream(make(), 1, collate, process_index=rank, num_processes=2) for rank in range(2)]
    for _ in range(3):
        epoch = [row_numbers(take(stream, ROWS // 2)) for stream in streams]
        assert sorted(chain.from_iterable(epoch)) == list(range(ROWS))


def test_processes_augment_differently():
    streams = [MetaStream(Images(1), 1, collate, process_index=rank, num_processes=2) for rank in range(2)]
    assert not same(*(take(stream, 1) for stream in streams))


@every_dataset
@pytest.mark.parametrize(
    ("before", "after", "taken"), [(0, 0, 0), (0, 0, 2), (0, 0, 8), (0, 2, 5), (2, 0, 5), (2, 2, 2)]
)
def test_a_resumed_stream_goes_on_bitwise(make, before, after, taken):
    dataset = make()
    options = {"seed": 5, "shuffle_buffer_size": 4}
    stream = MetaStream(dataset, 4, collate, num_workers=before, **options)
    take(stream, taken)
    state = stream.state_dict()
    assert state["position"] == taken
    assert all(type(value) is int for value in state.values())
    resumed = MetaStream(dataset, 4, collate, num_workers=after, **options)
    resumed.load_state_dict(state)
    expected = take(stream, 4)
    assert same(take(resumed, 4), expected)
    # Also on a stream that has prefetched and gone on.
    stream.load_state_dict(state)
    assert stream.state_dict() == state
    assert same(take(stream, 4), expected)


@pytest.mark.parametrize("make", ITERABLE)
def test_a_process_of_several_resumes_bitwise(make):
    options = {"process_index": 1, "num_processes": 2, "shuffle_buffer_size": 4}
    stream = MetaStream(make(), 2, collate, **options)
    take(stream, 4)
    resumed = MetaStream(make(), 2, collate, **options)
    resumed.load_state_dict(stream.state_dict())
    assert same(take(resumed, 4), take(stream, 4))


@pytest.mark.parametrize("make", [*ITERABLE, lambda: Stream(11), lambda: EpochStream(11)])
@pytest.mark.parametrize("taken", [3, 5])
def test_processes_resume_where_each_stood_from_what_one_has_saved(make, taken):
    def streams(num_processes=2):
        options = {"num_processes": num_processes, "shuffle_buffer_size": 4}
        return [MetaStream(make(), 2, collate, process_index=rank, **options) for rank in range(num_processes)]

    whole, places = streams(), []
    for stream in whole:
        take(stream, taken)
        stream.gather_places(lambda own: places.extend(own) or own)
    whole[0].gather_places(lambda own: places)
    state = whole[0].state_dict()
    for before, after in zip(whole, streams(), strict=True):
        after.load_state_dict(state)
        assert same(take(after, 9), take(before, 9))
    (alone,) = streams(1)
    alone.load_state_dict(state)
    assert len(next(alone)["row"]) == 2
    # Where the others stood is known at that moment only.
    assert "places" not in whole[0].state_dict()


def test_resuming_an_iterable_reads_its_last_epoch_only():
    stream = MetaStream(Stream(), 4, collate)
    take(stream, 102)
    dataset = Stream()
    resumed = MetaStream(dataset, 4, collate)
    resumed.load_state_dict(stream.state_dict())
    resumed._source.dataset.reads = 0
    assert same(take(resumed, 1), take(stream, 1))
    assert resumed._source.dataset.reads <= 2 * ROWS


def test_the_epoch_of_a_training_set_that_is_read_too_stays():
    dataset, table_stream = EpochStream(), streamed_table()
    dataset.set_epoch(7)
    table_stream.set_epoch(7)
    take(MetaStream(dataset, 4, collate), 6)
    take(MetaStream(table_stream, 4, collate), 6)
    assert dataset.epoch == 7
    assert table_stream.epoch == 7


class Corrupt(Images):
    corrupt = True

    def __getitem__(self, i):
        if i == 7 and self.corrupt:
            raise ValueError("broken data stream")
        return augmented(i)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_row_that_cannot_be_read_is_named(num_workers):
    stream = MetaStream(Corrupt(), ROWS, collate, num_workers=num_workers)
    with pytest.raises(RuntimeError, match=r"Row 7 \(validation batch 0\) of the meta set .*broken data stream"):
        next(stream)


def test_a_row_that_a_transform_fails_on_is_named():
    broken = table().with_transform(lambda columns: {"row": [1 // (i - 7) for i in columns["row"]]})
    with pytest.raises(RuntimeError, match=r"Row 7 \(validation batch 0\) of the meta set .*ZeroDivisionError"):
        next(MetaStream(broken, ROWS, collate))


def test_batches_are_pinned_if_asked_for():
    stream = MetaStream(Images(), 2, default_collate, pin_memory=True)
    if torch.accelerator.is_available():
        assert next(stream)["x"].is_pinned()
    else:
        with pytest.warns(UserWarning, match="pin_memory"):
            next(stream)


def test_the_batch_of_a_failure_is_tried_again():
    dataset = Corrupt()
    stream = MetaStream(dataset, 2, collate)
    expected = take(MetaStream(Images(), 2, collate), 5)
    batches = []
    while len(batches) < 5:
        try:
            batches.append(next(stream))
        except RuntimeError:
            assert stream.state_dict()["position"] == len(batches)
            dataset.corrupt = False
    assert dataset.corrupt is False
    assert same(batches, expected)


def test_a_row_of_a_stream_that_cannot_be_read_is_named():
    class Broken(IterableDataset):
        def __iter__(self):
            yield from map(augmented, range(3))
            raise ValueError("broken data stream")

    stream = MetaStream(Broken(), 2, collate)
    assert next(stream)["row"] == [0, 1]
    with pytest.raises(RuntimeError, match=r"Row 3 of epoch 0 of the meta set .*broken data stream"):
        next(stream)


def test_a_batch_that_cannot_be_collated_says_which_rows():
    def refuse(rows):
        raise TypeError("sizes differ")

    with pytest.raises(RuntimeError, match=r"Row \[\d, \d\] \(validation batch 0\) of the meta set .*sizes differ"):
        next(MetaStream(Images(), 2, refuse))


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="meta_dataset is empty"):
        MetaStream([], 2, list)
    with pytest.raises(ValueError, match="meta_dataset is empty"):
        next(MetaStream(Stream(0), 2, list))
    with pytest.raises(ValueError, match="meta_dataset is empty"):
        next(MetaStream(table().to_iterable_dataset().filter(lambda row: False), 2, list))


def test_a_stream_with_fewer_rows_than_processes_ends_for_none():
    for rank in range(4):
        stream = MetaStream(Stream(2), 3, collate, process_index=rank, num_processes=4)
        assert Counter(row_numbers(take(stream, 2))) == {0: 3, 1: 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"process_index": 2, "num_processes": 2}, r"process_index=2 must be in \[0, num_processes=2\)"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MetaStream(Images(), collate_fn=list, **{"batch_size": 2, **options})


def labelled(labels, class_label=True):
    columns = {"row": list(range(len(labels))), "label": list(labels)}
    dataset = datasets.Dataset.from_dict(columns)
    if class_label:
        names = [f"class {i}" for i in range(max(labels) + 1)]
        dataset = dataset.cast_column("label", datasets.ClassLabel(names=names))
    return dataset


LABELS = [0] * 40 + [1] * 20 + [2] * 2 + [3]


@pytest.mark.parametrize("labels", [LABELS, [f"class {i}" for i in LABELS]])
def test_split_is_stratified_disjoint_and_keeps_the_order(labels):
    dataset = labelled(labels, class_label=False)
    train, meta = split_meta_dataset(dataset, 0.25, seed=1)
    assert sorted([*train["row"], *meta["row"]]) == list(range(63))
    assert list(train["row"]) == sorted(train["row"])
    assert list(meta["row"]) == sorted(meta["row"])
    held_out = Counter(meta["label"])
    names = sorted(set(labels))
    assert [held_out[names[0]], held_out[names[1]]] == [10, 5]
    assert len(meta) in (15, 16)
    assert set(train["label"]) == set(labels)
    again, other = (split_meta_dataset(dataset, 0.25, seed=seed)[1]["row"] for seed in (1, 2))
    assert list(again) == list(meta["row"])
    assert list(other) != list(meta["row"])


def test_the_share_is_rounded_to_the_nearest():
    for seed in range(5):
        assert len(split_meta_dataset(labelled([0, 0, 0, 1, 1, 1]), 0.3, seed=seed)[1]) == 2


def test_rare_classes_give_their_share_together_and_keep_a_row():
    for seed in range(5):
        train, meta = split_meta_dataset(labelled([i % 100 for i in range(300)]), 0.1, seed=seed)
        assert len(meta) == 30
        assert max(Counter(meta["label"]).values()) == 1
        train, meta = split_meta_dataset(labelled([0, 0, 1, 1, 2, 2, 3]), 0.9, seed=seed)
        assert sorted(train["label"]) == [0, 1, 2, 3]


def test_several_labels_each_give_their_share():
    flags = [[1.0, float(i < 4)] if i < 20 else [0.0, -100.0] for i in range(40)]
    for seed in range(10):
        train, meta = split_meta_dataset(labelled(flags, class_label=False), 0.25, seed=seed)
        assert [len(train), len(meta)] == [30, 10]
        held_out = list(meta["label"])
        assert [held_out.count([1.0, 1.0]), held_out.count([1.0, 0.0])] == [1, 4]
        assert sorted([*train["row"], *meta["row"]]) == list(range(40))


def refuse_to_decode(columns):
    raise AssertionError("a row was decoded")


def test_split_reads_labels_without_decoding_images_and_keeps_the_transform():
    dataset = labelled(LABELS).select(range(62, -1, -1)).with_transform(refuse_to_decode)
    train, meta = split_meta_dataset(dataset, 0.25)
    check_meta_dataset(meta, label_column="label", num_classes=4)
    with pytest.raises(AssertionError, match="a row was decoded"):
        meta[0]
    assert train.with_format(None)["row"][0] > train.with_format(None)["row"][-1]


@pytest.mark.parametrize("labels", [[0.1 * i for i in range(20)], [[0, 1], [1, 0]] * 10])
def test_labels_that_are_no_classes_are_split_without_strata(labels):
    for dataset in (labelled(labels, class_label=False), [{"label": torch.tensor(label)} for label in labels]):
        train, meta = split_meta_dataset(dataset, 0.25)
        assert (len(train), len(meta)) == (15, 5)


@pytest.mark.parametrize("name", ["label", "labels"])
def test_split_of_a_torch_dataset(name):
    class Rows(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return {"row": i, "x": torch.rand(2), name: torch.tensor(i % 2)}

    torch.manual_seed(0)
    train, meta = split_meta_dataset(Rows(), 0.2)
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(()))
    assert len(train) == 16
    assert Counter(int(row[name]) for row in (meta[i] for i in range(4))) == {0: 2, 1: 2}
    assert not {train[i]["row"] for i in range(16)} & {meta[i]["row"] for i in range(4)}


@pytest.mark.parametrize(
    ("dataset", "share", "message"),
    [
        (labelled(LABELS), 1.0, r"meta_split=1.0 must be in \[0, 1\)"),
        (labelled(LABELS), -0.1, r"meta_split=-0.1 must be in \[0, 1\)"),
        (labelled(LABELS), float("nan"), r"meta_split=nan must be in \[0, 1\)"),
        (labelled(LABELS), 0.0, "meta_split=0.0 of 63 rows holds out none"),
        (labelled([0, 1, 2]), 0.5, "meta_split=0.5 of 3 rows holds out none. Raise it, or pass a meta_dataset"),
        ([], 0.5, "meta_split=0.5 of 0 rows holds out none"),
        (labelled(LABELS).to_iterable_dataset(), 0.2, "a stream cannot be split. Pass rows to tune on as meta_dataset"),
        (Stream(), 0.2, "a stream cannot be split. Pass rows to tune on as meta_dataset"),
        (table(), 0.2, r"meta_split: .* no column 'label' .* columns are \['row'\]"),
        ([{"x": 1}], 0.2, r"meta_split: .* no column 'label' .* columns are \['x'\]"),
        ([(1, 2)], 0.2, "meta_split: .* rows of <class 'tuple'>"),
        (labelled([0, None, 1], class_label=False), 0.4, "meta_split: .* no label in row 1"),
    ],
)
def test_what_cannot_be_split_is_refused(dataset, share, message):
    with pytest.raises(ValueError, match=message):
        split_meta_dataset(dataset, share)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (labelled([0, 1, 2]).select([]), "meta_dataset is empty"),
        ([], "meta_dataset is empty"),
        (Stream(0), "meta_dataset is empty"),
        (table(), r"meta_dataset has no column 'label' .* columns are \['row'\]"),
        (table().to_iterable_dataset(), r"meta_dataset has no column 'label' .* columns are \['row'\]"),
        (Images(), r"meta_dataset has no column 'label' .* columns are \['x', 'row', 'noise'\]"),
        (Stream(), r"meta_dataset has no column 'label' .* columns are \['x', 'row', 'noise'\]"),
        (labelled([0, 1]), "meta_dataset has 2 classes .class 0, class 1, .* but the model has 3"),
        (labelled([0, 1]).to_iterable_dataset(), "meta_dataset has 2 classes .* but the model has 3"),
        (labelled([0, 3], class_label=False), "meta_dataset has the label 3, but the model has 3 classes"),
        ([{"label": np.int64(3)}], "meta_dataset has the label 3, but the model has 3 classes"),
        (labelled([0, -1], class_label=False), "meta_dataset has rows without a label .label=-1"),
        (labelled([None, None, 1], class_label=False), "meta_dataset has rows without a label .label=None"),
        ([{"label": None}], "meta_dataset has rows without a label .label=None"),
    ],
)
def test_a_meta_set_that_cannot_be_tuned_on_is_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        check_meta_dataset(dataset, label_column="label", num_classes=3)


@pytest.mark.parametrize(
    "dataset", ["images", {"row": [1]}, datasets.DatasetDict(), iter([]), torch.utils.data.DataLoader([1])], ids=type
)
def test_what_is_no_set_of_rows_is_refused(dataset):
    with pytest.raises(TypeError, match=r"meta_dataset is a \w+: give rows, such as a datasets.Dataset"):
        check_meta_dataset(dataset, label_column="label")


class Masks(Stream):
    def __iter__(self):
        yield {"x": torch.rand(2), "labels": torch.full((2, 2), 9)}


@pytest.mark.parametrize(
    "dataset",
    [
        labelled([0, 1, 2]),
        labelled([0, 1, 2]).to_iterable_dataset(),
        labelled([0, 2], class_label=False),
        [{"labels": torch.tensor(2)}],
        [(torch.ones(2), 1)],
        Masks(),
    ],
)
def test_a_good_meta_set_passes_and_draws_no_random_number(dataset):
    torch.manual_seed(0)
    check_meta_dataset(dataset, label_column="label", num_classes=3)
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(()))


def test_examples():
    assert doctest.testmod(metalr_hf.trainer.batches.stream).failed == 0
