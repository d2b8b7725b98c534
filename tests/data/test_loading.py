import datasets
import pytest
from digits import NAMES, digit_images, save_image_folder

from metalr_hf.data.loading import DataArguments, load_images

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_image_folder(tmp_path_factory.mktemp("images")))


def rows(columns=("image", "label"), count=30, labels=None):
    images, names = digit_images(count)
    features = datasets.Features(
        {columns[0]: datasets.Image(), columns[1]: datasets.Value("string") if labels is None else labels}
    )
    return datasets.Dataset.from_dict({columns[0]: images, columns[1]: names}, features=features)


def saved(tmp_path, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def counts(split):
    labels = list(split["label"])
    return [labels.count(i) for i in range(3)]


@pytest.mark.parametrize("how", ["folder", "imagefolder"])
def test_a_folder_of_images(folder, how):
    arguments = {"dataset_name": folder} if how == "folder" else {"dataset_name": "imagefolder", "data_dir": folder}
    splits = load_images(DataArguments(**arguments))
    assert splits.class_names == NAMES
    assert splits.id2label == {0: "nil", 1: "one", 2: "two"}
    assert (splits.train.num_rows, splits.test.num_rows, splits.meta) == (60, 30, None)
    assert splits.train.column_names == ["image", "label"]
    assert splits.train[0]["image"].size == (20, 16)


def test_a_folder_of_parquet_files(tmp_path):
    rows(labels=datasets.ClassLabel(names=["two", "one", "nil"])).to_parquet(tmp_path / "train.parquet")
    splits = load_images(DataArguments(dataset_name=str(tmp_path), test_share=0.5))
    # The order of the data set's own classes, not of the alphabet.
    assert splits.class_names == ("two", "one", "nil")


def test_a_folder_saved_to_disk_with_string_labels_under_other_names(tmp_path):
    name = saved(tmp_path, train=rows(("picture", "kind")), test=rows(("picture", "kind"), 12))
    splits = load_images(DataArguments(dataset_name=name, label_column_name="kind"))
    assert splits.class_names == NAMES
    assert [NAMES[i] for i in splits.test["label"]] == digit_images(12)[1]


def test_a_dataset_saved_alone_and_whole_number_labels(tmp_path):
    images, names = digit_images(24)
    numbers = [{"nil": 2, "one": 10, "two": 30}[name] for name in names]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    datasets.Dataset.from_dict({"image": images, "label": numbers}, features=features).save_to_disk(str(tmp_path))
    splits = load_images(DataArguments(dataset_name=str(tmp_path), test_share=0.25))
    # Sorted as numbers, and not taken for class indices.
    assert splits.class_names == ("2", "10", "30")
    assert sorted(set(splits.train["label"])) == [0, 1, 2]


def test_paths_in_a_named_column_become_images(tmp_path):
    images, names = digit_images(12)
    files = [str(tmp_path / f"{i}.png") for i in range(12)]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    name = saved(tmp_path, train=datasets.Dataset.from_dict({"file": files, "label": names}))
    splits = load_images(DataArguments(dataset_name=name, image_column_name="file", test_share=0.5))
    assert splits.train[0]["image"].size == (20, 16)


def test_without_a_test_split_a_stratified_share_is_held_out(tmp_path):
    name = saved(tmp_path, train=rows(count=60))
    splits = load_images(DataArguments(dataset_name=name, test_share=0.3), seed=1)
    assert (splits.train.num_rows, splits.test.num_rows) == (42, 18)
    assert max(counts(splits.test)) - min(counts(splits.test)) <= 1
    pixels = [{image.tobytes() for image in split["image"]} for split in (splits.train, splits.test)]
    assert not pixels[0] & pixels[1]
    again = load_images(DataArguments(dataset_name=name, test_share=0.3), seed=1)
    assert list(again.test["label"]) == list(splits.test["label"])


def test_the_usual_names_of_the_test_split_and_the_meta_split(tmp_path):
    name = saved(tmp_path, train=rows(count=30), validation=rows(count=12))
    assert load_images(DataArguments(dataset_name=name)).test.num_rows == 12
    splits = load_images(DataArguments(dataset_name=name, meta_split_name="validation", test_share=0.2))
    assert (splits.train.num_rows, splits.meta.num_rows, splits.test.num_rows) == (24, 12, 6)


def test_a_stratified_subset(folder):
    splits = load_images(DataArguments(dataset_name=folder, max_train_samples=15))
    assert counts(splits.train) == [5, 5, 5]
    assert load_images(DataArguments(dataset_name=folder, max_train_samples=600)).train.num_rows == 60


def test_a_stream(folder):
    splits = load_images(DataArguments(dataset_name=folder, streaming=True, max_train_samples=7))
    assert isinstance(splits.train, datasets.IterableDataset)
    read = list(splits.train)
    assert len(read) == 7
    assert set(read[0]) == {"image", "label"}
    assert len(list(splits.test)) == 30
    assert splits.class_names == NAMES


def test_the_demo_is_the_default():
    splits = load_images(DataArguments(max_train_samples=500))
    assert splits.class_names == tuple("0123456789")
    assert splits.train.num_rows == 500


def test_bad_columns(tmp_path):
    label = datasets.ClassLabel(names=list(NAMES))
    there = rows(("picture", "kind"), labels=label)
    second = there.select_columns("picture").rename_column("picture", "b")
    cases = [
        (
            rows(("picture", "kind")),
            {},
            "no label column. Name the one to use with label_column_name. Its columns: 'pic",
        ),
        (there.remove_columns("picture"), {}, "no image column. Name the one to use with image_column_name"),
        (there.add_column("other", there["kind"], feature=label), {}, r"2 label columns \('kind', 'other'\)"),
        (datasets.concatenate_datasets([there, second], axis=1), {}, r"2 image columns \('picture', 'b'\)"),
        (there, {"label_column_name": "lable"}, "label_column_name='lable' is not a column.*'picture', 'kind'"),
        (there, {"image_column_name": "img"}, "image_column_name='img' is not a column.*'picture', 'kind'"),
    ]
    for i, (train, arguments, message) in enumerate(cases):
        name = saved(tmp_path / str(i), train=train)
        with pytest.raises(ValueError, match=message):
            load_images(DataArguments(dataset_name=name, **arguments))


def test_bad_labels(tmp_path):
    floats = rows().remove_columns("label").add_column("label", [0.5] * 30)
    with pytest.raises(ValueError, match=r"training split, in the column 'label', are no classes: \[0.5\]"):
        load_images(DataArguments(dataset_name=saved(tmp_path / "a", train=floats)))
    few = rows().filter(lambda row: row["label"] != "two")
    with pytest.raises(ValueError, match=r"Split 'test' has the labels \['two'\], which the training split does not"):
        load_images(DataArguments(dataset_name=saved(tmp_path / "b", train=few, test=rows())))
    label = datasets.ClassLabel(names=list(NAMES))
    hidden = rows(labels=label).remove_columns("label").add_column("label", [-1] * 30, feature=label)
    with pytest.raises(ValueError, match="Split 'test' has images without a label"):
        load_images(DataArguments(dataset_name=saved(tmp_path / "c", train=rows(labels=label), test=hidden)))
    other = rows(labels=datasets.ClassLabel(names=["two", "one", "nil"]))
    with pytest.raises(ValueError, match="Split 'test' has other classes than the training split"):
        load_images(DataArguments(dataset_name=saved(tmp_path / "d", train=rows(labels=label), test=other)))
    with pytest.raises(ValueError, match="classes of a stream are not known.*Leave out streaming"):
        load_images(DataArguments(dataset_name=saved(tmp_path / "e", train=rows(), test=rows()), streaming=True))


@pytest.mark.parametrize("argument", ["train_split", "test_split", "meta_split_name"])
def test_an_unknown_split(folder, argument):
    with pytest.raises(ValueError, match=f"{argument}='dev' is not a split of the data set. Its splits: 'train', 'te"):
        load_images(DataArguments(dataset_name=folder, **{argument: "dev"}))


def test_a_stream_without_a_test_split(folder):
    arguments = DataArguments(dataset_name=folder, train_split="test", streaming=True, meta_split_name="train")
    with pytest.raises(ValueError, match="A stream has no share to hold out.*test_split"):
        load_images(arguments)


def test_a_share_that_cannot_be_stratified(folder):
    with pytest.raises(ValueError, match="max_train_samples: 2 of 60 training images cannot be taken with every class"):
        load_images(DataArguments(dataset_name=folder, max_train_samples=2))


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_data_set_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match=f"dataset_name='{name}' could not be loaded.*the name and the network"):
        load_images(DataArguments(dataset_name=name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"augment": "mixup"}, "augment='mixup' must be one of 'none', 'flip', 'crop', 'crop_flip'"),
        ({"test_share": 1.0}, "test_share=1.0 must be more than 0 and less than 1"),
        ({"max_train_samples": 0}, "max_train_samples=0 must be 1 or more"),
        ({"image_size": -1}, "image_size=-1 must be 2 or more"),
        ({"image_size": 1}, "image_size=1 must be 2 or more"),
        ({"dataset_name": "imagefolder"}, "needs data_dir: the folder that holds one folder of images per"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**arguments)
