"""Which folders of a folder are splits, and which are classes."""

import pytest
from PIL import Image

from metalr_hf.data.files.folders import FOLDER_BUILDER
from metalr_hf.data.files.layout import builder_of, folder_of, folders_of_splits, refuse_file, refuse_nested_classes


def made(folder, *places):
    for place in places:
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / place / "scan.png")
    return str(folder)


def splits(folder):
    return {
        split: [path.relative_to(folder).as_posix() for path in paths]
        for split, paths in folders_of_splits(str(folder)).items()
    }


WHOLE = {"train": ["."]}


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (["train/valid", "train/invalid"], {"train": ["train"]}),
        (["train/cat", "test/test tube", "val/dev"], {"train": ["train"], "validation": ["val"], "test": ["test"]}),
        (["training/a", "testing/a"], {"train": ["training"], "test": ["testing"]}),
        (["Train/a", "TEST/a"], {"train": ["Train"], "test": ["TEST"]}),
        (["train2017/a", "images_val/a"], {"train": ["train2017"], "validation": ["images_val"]}),
        (["train/a", "test/a", "unsorted"], {"train": ["train"], "test": ["test"]}),
        (["train/a", "test-1/a", "test-2/a"], {"train": ["train"], "test": ["test-1", "test-2"]}),
        (["test/a", "test/b"], {"test": ["test"]}),
        (["cat", "dog", "test tube"], WHOLE),
        (["valid", "invalid"], WHOLE),
        (["train station", "airport"], WHOLE),
        (["a/train", "a/test", "b/train"], WHOLE),
        # What an archive is unpacked to, and the layout of the Hub.
        (["photos/train/a", "photos/test/a"], {"train": ["photos/train"], "test": ["photos/test"]}),
        (["data/a", "data/b"], WHOLE),
        (["only"], WHOLE),
        ([], WHOLE),
    ],
)
def test_the_folders_directly_inside_are_the_splits_or_there_are_none(tmp_path, places, expected):
    made(tmp_path, *places)
    assert splits(tmp_path) == expected


def test_archives_are_splits_and_what_holds_no_images_is_none(tmp_path):
    for name in ("train.zip", "test.zip", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "logs").mkdir()
    made(tmp_path, ".cache", "__pycache__")
    assert splits(tmp_path) == {"train": ["train.zip"], "test": ["test.zip"]}


def test_a_table_beside_the_only_folder_is_not_left_behind(tmp_path):
    made(tmp_path, "images/train", "images/test")
    (tmp_path / "metadata.csv").write_text("file_name,label\nimages/train/scan.png,a\n")
    assert splits(tmp_path) == WHOLE


def test_folders_in_folders_of_classes_are_refused(tmp_path):
    nested = made(tmp_path / "patients", "train/normal/a0", "train/normal/a1", "train/sick/b0", "test/sick/b1")
    message = "'normal/a0'.*innermost folders: 'a0', 'a1'.*metadata.csv.*`file_name`, `label`.*--group_column patient"
    with pytest.raises(ValueError, match=message):
        refuse_nested_classes(nested)
    with pytest.raises(ValueError, match="'normal/a0'"):
        refuse_nested_classes(made(tmp_path / "whole", "normal/a0", "sick/b0"))
    (tmp_path / "patients" / "train" / "metadata.csv").write_text("file_name,label\nnormal/a0/scan.png,normal\n")
    refuse_nested_classes(nested)


@pytest.mark.parametrize(
    "places",
    [["a", "b"], ["train/a", "train/b", "test/a"], ["photos/a", "photos/b"], ["train/images/a", "train/images/b"]],
)
def test_folders_of_classes_are_taken(tmp_path, places):
    refuse_nested_classes(made(tmp_path, *places))


def test_a_folder_of_images_is_told_from_others(tmp_path):
    folder = made(tmp_path / "images", "a", "b")
    assert builder_of(folder) == "imagefolder"
    (tmp_path / "images" / "README.md").write_text("---\nlicense: mit\n---\nPhotographs")
    assert builder_of(folder) == "imagefolder"
    # Its owner has said which files are of which split.
    card = "---\nconfigs:\n- config_name: default\n  data_files: a/*\n---\n"
    (tmp_path / "images" / "README.md").write_text(card)
    assert builder_of(folder) is None
    assert builder_of(folder, is_one_of_images=True) == "imagefolder"
    (tmp_path / "images" / "b" / "scan.dcm").touch()
    assert builder_of(folder) == FOLDER_BUILDER
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.parquet").touch()
    assert builder_of(str(tmp_path / "tables")) is None


def test_the_folder_of_a_data_set(tmp_path):
    assert folder_of("imagefolder", str(tmp_path)) == folder_of(str(tmp_path)) == str(tmp_path)
    assert folder_of("user/name") is folder_of(None) is None


def test_a_file_in_place_of_a_folder(tmp_path):
    archive = tmp_path / "photos.zip"
    archive.touch()
    for given in ((str(archive),), ("imagefolder", str(archive)), (str(tmp_path), "photos.zip")):
        with pytest.raises(ValueError, match=r"photos.zip' is a file, not a folder. .* If it is an archive, unpack it"):
            refuse_file(*given)
    refuse_file(str(tmp_path))
    refuse_file("user/name")
    refuse_file(None)
