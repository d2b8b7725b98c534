"""Local folders of images: which images are of which split, and tables that do not go together."""

import json
import shutil
from collections import Counter

import datasets
import pytest
from digits import digit_images, save_image_folder
from open_files import LEFT_OPEN
from scans import save_dicom_folder

from metalr_hf.data import LabelSetArguments, QuantityArguments, load_label_sets, load_quantities
from metalr_hf.data.files import folders
from metalr_hf.data.files.local import load_folder
from metalr_hf.data.labels.sets import UNKNOWN
from metalr_hf.data.loading import DataArguments, load_images

pytestmark = [pytest.mark.usefixtures("offline", "open_files_are_left_here"), LEFT_OPEN]


def classes(folder, names=("nil", "one")):
    """A folder a class, with ten images each."""
    images, _ = digit_images(10)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(images):
            image.save(folder / name / f"{i}.png")
    return folder


def table(folder, header, *rows):
    folder.mkdir(parents=True)
    images, _ = digit_images(len(rows))
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    lines = [f"file_name,{header}", *(f"{i}.png,{row}" for i, row in enumerate(rows))]
    (folder / "metadata.csv").write_text("\n".join(lines))


def counts(rows, names):
    return Counter(names[label] for label in rows["label"])


@pytest.mark.parametrize("how", ["folder", "imagefolder"])
def test_a_class_named_as_a_split_is_a_class(tmp_path, how):
    classes(tmp_path / "train", ("test tube", "valid", "invalid"))
    given = {"dataset_name": str(tmp_path)} if how == "folder" else {"data_dir": str(tmp_path)}
    splits = load_images(DataArguments(**given))
    assert counts(splits.train, splits.class_names) == {"test tube": 8, "valid": 8, "invalid": 8}
    assert counts(splits.test, splits.class_names) == {"test tube": 2, "valid": 2, "invalid": 2}
    classes(tmp_path / "test", ("test tube", "valid", "invalid"))
    splits = load_images(DataArguments(**given))
    assert (len(splits.train), len(splits.test)) == (30, 30)


def test_names_of_files_make_no_splits(tmp_path):
    classes(tmp_path)
    for path in list(tmp_path.rglob("[0-4].png")):
        path.rename(path.with_name(f"patient_test_{path.name}"))
    splits = load_images(DataArguments(dataset_name=str(tmp_path)))
    assert (len(splits.train), len(splits.test)) == (16, 4)


def test_brackets_in_the_names_of_folders(tmp_path):
    save_image_folder(tmp_path / "scans [2023]")
    (tmp_path / "scans [2023]" / "train").rename(tmp_path / "scans [2023]" / "train [1]")
    splits = load_images(DataArguments(dataset_name=str(tmp_path / "scans [2023]")))
    assert (len(splits.train), len(splits.test)) == (60, 30)


@pytest.mark.parametrize("streaming", [False, True])
def test_archives_of_splits(tmp_path, streaming):
    # `datasets` reads no classes from folders in archives.
    for split, labels in (("train", "abab"), ("test", "ab")):
        table(tmp_path / split, "label", *labels)
        shutil.make_archive(str(tmp_path / "zipped" / split), "zip", tmp_path / split)
    splits = load_folder(str(tmp_path / "zipped"), streaming=streaming)
    assert {name: [row["label"] for row in rows] for name, rows in splits.items()} == {
        "train": list("abab"),
        "test": list("ab"),
    }


def test_classes_in_archives(tmp_path):
    classes(tmp_path / "photos")
    archive = shutil.make_archive(str(tmp_path / "zipped" / "train"), "zip", tmp_path / "photos")
    with pytest.raises(ValueError, match="train.zip' is not read: it has no metadata.csv"):
        load_images(DataArguments(dataset_name=str(tmp_path / "zipped")))
    with pytest.raises(ValueError, match="^data_dir='.*train.zip' is a file, not a folder"):
        load_images(DataArguments(data_dir=archive))
    # Beside scans, it was left out.
    save_dicom_folder(tmp_path / "scans")
    shutil.copy(archive, tmp_path / "scans" / "train" / "more.zip")
    with pytest.raises(ValueError, match="more.zip' is not read"):
        load_images(DataArguments(dataset_name=str(tmp_path / "scans")))


@pytest.mark.parametrize("links", [["c"], ["a", "b", "c"], ["train/c"], ["train"]], ids=str)
def test_folders_that_are_links_are_followed(tmp_path, links):
    classes(tmp_path / "elsewhere" / "train", "abc")
    photos = tmp_path / "photos"
    if links == ["c"]:
        classes(photos, "ab")
    elif links == ["train/c"]:
        classes(photos / "train", "ab")
    else:
        photos.mkdir()
    for link in links:
        (photos / link).symlink_to(tmp_path / "elsewhere" / "train" / link.removeprefix("train").strip("/"))
    splits = load_images(DataArguments(dataset_name=str(photos)))
    assert counts(splits.train, splits.class_names) == {"a": 8, "b": 8, "c": 8}


def test_links_to_folders_of_scans_are_followed(tmp_path):
    save_dicom_folder(tmp_path / "elsewhere")
    (tmp_path / "scans" / "train").mkdir(parents=True)
    for name in ("left", "right"):
        (tmp_path / "scans" / "train" / name).symlink_to(tmp_path / "elsewhere" / "train" / name)
    splits = load_images(DataArguments(dataset_name=str(tmp_path / "scans")))
    assert (splits.class_names, len(splits.train) + len(splits.test)) == (("left", "right"), 24)


def test_a_folder_is_searched_for_scans_once(tmp_path, monkeypatch):
    searched = []
    image_files = folders.image_files
    monkeypatch.setattr(folders, "image_files", lambda folder: searched.append(folder) or image_files(folder))
    load_images(DataArguments(dataset_name=str(classes(tmp_path))))
    assert searched == [str(tmp_path)]


def test_classes_are_numbered_alike_in_all_splits(tmp_path):
    folder = save_image_folder(tmp_path)
    shutil.rmtree(folder / "test" / "nil")
    splits = load_images(DataArguments(dataset_name=str(folder)))
    assert set(splits.test["label"]) == {1, 2}


def test_patients_in_folders_of_classes_are_refused(tmp_path):
    for name in ("normal", "sick"):
        classes(tmp_path / "train" / name, (f"{name}0", f"{name}1"))
    with pytest.raises(ValueError, match="innermost folders: 'normal0', 'normal1'"):
        load_images(DataArguments(dataset_name=str(tmp_path)))


def test_unknown_labels_in_one_split_alone(tmp_path):
    table(tmp_path / "train", "edema,effusion", ",0", "1,0", "0,1", "1,1")
    table(tmp_path / "test", "edema,effusion", "0,0", "1,0", "0,1", "1,1")
    columns = ["edema", "effusion"]
    splits = load_label_sets(LabelSetArguments(dataset_name=str(tmp_path), target_column_names=columns))
    assert splits.train[1]["label"] == splits.test[1]["label"] == [1, 0]
    assert splits.train[0]["label"][0] != 0


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("word", ["None", "N/A"])
def test_words_that_a_table_is_read_without_are_told(tmp_path, word, split):
    texts = ["edema|effusion", word, "edema", "", word, "nan"]
    for name in ("train", "test"):
        table(tmp_path / name, "findings", *(texts if name == split else texts[::2][:2]))
    arguments = LabelSetArguments(dataset_name=str(tmp_path), label_separator="|", label_column_name="findings")
    message = (
        rf"Split '{split}', column 'findings': the metadata.csv holds '{word}' in 2 rows, .* Write '\|' and nothing"
    )
    with pytest.raises(ValueError, match=message):
        load_label_sets(arguments)
    # As the message says.
    written = tmp_path / split / "metadata.csv"
    written.write_text(written.read_text().replace(f",{word}", ",|"))
    labels = list(getattr(load_label_sets(arguments), split)["label"])
    assert [labels[row] for row in (0, 1, 2, 4)] == [[1, 1], [0, 0], [1, 0], [0, 0]]
    assert labels[3] == labels[5] == [UNKNOWN, UNKNOWN]


def test_whole_numbers_in_one_split_and_fractions_in_another(tmp_path):
    table(tmp_path / "train", "age", *range(40, 50))
    table(tmp_path / "test", "age", 40.5, 41)
    splits = load_quantities(QuantityArguments(dataset_name=str(tmp_path), label_column_name="age"))
    assert [list(splits.train[0]["label"]), *splits.test["label"]] == [[40], [40.5], [41]]
    stream = load_folder(str(tmp_path), streaming=True)
    assert isinstance(stream, datasets.IterableDatasetDict)
    assert [row["age"] for row in stream["test"]] == [40.5, 41.0]
    assert next(iter(stream["train"]))["age"] == 40.0


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("label,site", ["a,1", "b,2"], "'site' is missing in train, int64 in test"),
        ("label", [1, 2], "'label' is text in train, int64 in test"),
    ],
)
def test_tables_that_do_not_go_together(tmp_path, header, rows, message):
    table(tmp_path / "train", "label", *"abab")
    table(tmp_path / "test", header, *rows)
    with pytest.raises(ValueError, match=f"splits have different columns: {message}. Give every folder"):
        load_images(DataArguments(dataset_name=str(tmp_path)))


def test_text_of_a_csv_goes_together_with_that_of_a_jsonl_file(tmp_path):
    table(tmp_path / "train", "label", *"abab")
    table(tmp_path / "test", "label", *"ab")
    (tmp_path / "test" / "metadata.csv").unlink()
    rows = [json.dumps({"file_name": f"{i}.png", "label": label}) for i, label in enumerate("ba")]
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(rows))
    splits = load_images(DataArguments(dataset_name=str(tmp_path)))
    assert (splits.class_names, list(splits.test["label"])) == (("a", "b"), [1, 0])


def test_a_split_with_a_table_and_one_without(tmp_path):
    table(tmp_path / "train", "label", *"abab")
    classes(tmp_path / "test", "ab")
    with pytest.raises(ValueError, match="'label' is text in train, ClassLabel in test. Give every folder"):
        load_images(DataArguments(dataset_name=str(tmp_path)))


def test_a_table_beside_splits_with_and_without_tables(tmp_path):
    table(tmp_path / "train", "label", *"abab")
    classes(tmp_path / "test", "ab")
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/0.png,a\ntest/a/0.png,b\n")
    for given in ({"dataset_name": str(tmp_path)}, {"data_dir": str(tmp_path)}):
        with pytest.raises(ValueError, match=r"metadata.csv' is not read, .* take this one away"):
            load_images(DataArguments(**given))


def test_files_that_a_table_names_wrongly(tmp_path):
    table(tmp_path / "missing", "label", *"ababababab")
    (tmp_path / "missing" / "7.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"Split 'train', row 7 \(.*7.png\): there is no such file. Correct"):
        load_images(DataArguments(dataset_name=str(tmp_path / "missing")))
    table(tmp_path / "absolute", "label", *"abab")
    path = tmp_path / "absolute" / "metadata.csv"
    path.write_text(path.read_text().replace("0.png", f"{tmp_path}/absolute/0.png"))
    with pytest.raises(ValueError, match="could not be loaded: .*absolute/0.png.*must be a relative path"):
        load_images(DataArguments(dataset_name=str(tmp_path / "absolute")))
