"""Of a folder of images nothing is left out without a word."""

import re
import zipfile

import pytest
from PIL import Image

from metalr_hf.data.files.checks import check_folder
from metalr_hf.data.files.layout import folders_of_splits


def made(folder, *places):
    for place in places:
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(folder / place / "scan.png")
    return folder


def zipped(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "")


def check(folder, **how):
    check_folder(str(folder), folders_of_splits(str(folder)), **how)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("inside", [".", "photos"])
def test_a_table_beside_the_splits(tmp_path, name, inside):
    made(tmp_path / inside, "train/a", "train/b", "test/a")
    check(tmp_path)
    (tmp_path / inside / name).touch()
    found = rf"{tmp_path / inside / name}' is not read, for it lies beside the folders of splits \('train', 'test'\). "
    with pytest.raises(ValueError, match=f"{found}Give each a {name} of its own"):
        check(tmp_path)


def test_a_table_of_the_whole_folder_is_beside_no_splits(tmp_path):
    made(tmp_path / "photos", "a", "b")
    (tmp_path / "metadata.csv").touch()
    check(tmp_path / "photos")
    (tmp_path / "photos" / "metadata.csv").write_text("file_name,label\na/scan.png,ill\nb/scan.png,well\n")
    check(tmp_path / "photos")


@pytest.mark.parametrize("train", ["train", "Training"])
@pytest.mark.parametrize("others", [["bus"], ["bus", "car", "test"]], ids=str)
def test_a_class_called_train(tmp_path, train, others):
    made(tmp_path, train, *others)
    named = ", ".join(repr(name) for name in others if name != "test")
    message = f"has '{train}', which is named as a split .* classes, beside {named}. .* train/{train}/ and train/bus/"
    with pytest.raises(ValueError, match=message):
        check(tmp_path)
    # As the message says.
    for name in others:
        (tmp_path / name).rename(tmp_path / train / name)
    check(made(tmp_path, f"{train}/{train}"))


def test_two_classes_that_are_called_train_and_one_that_is_not(tmp_path):
    with pytest.raises(ValueError, match="has 'train', 'train 2', which is named"):
        check(made(tmp_path, "train", "train 2", "bus"))


@pytest.mark.parametrize("places", [["test", "bus"], ["valid", "invalid"], ["train station", "bus"]], ids=str)
def test_names_of_splits_that_make_none_alone_are_classes(tmp_path, places):
    check(made(tmp_path, *places))


def test_an_empty_class_is_warned_of(tmp_path):
    made(tmp_path, "train/a", "train/b/patient", "train/.cache", "test/a")
    check(tmp_path)
    (tmp_path / "train" / "c" / "patient").mkdir(parents=True)
    with pytest.warns(UserWarning, match="train' has folders without a file: 'c'. They make no class"):
        check(tmp_path)
    # Where a table lists the images, folders are no classes.
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\na/scan.png,ill\nb/patient/scan.png,well\n")
    check(tmp_path)


def test_images_beside_splits_are_warned_of(tmp_path):
    made(tmp_path, "train/a", "train/b", "test/a", "logs/empty")
    (tmp_path / "logs" / "empty" / "scan.png").unlink()
    check(tmp_path)
    made(tmp_path, "unsorted", ".")
    zipped(tmp_path / "photos.zip", "a/0.png")
    found = "splits ('train', 'test'), so that what lies beside them is not read: 'photos.zip', 'scan.png', 'unsorted'"
    with pytest.warns(UserWarning, match=re.escape(found)):
        check(tmp_path)


def test_a_train_with_a_table_is_a_split(tmp_path):
    made(tmp_path, "train", "unsorted")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\nscan.png,ill\n")
    with pytest.warns(UserWarning, match="not read: 'unsorted'"):
        check(tmp_path)


@pytest.mark.parametrize("link", ["c", "a/11.png", "a/metadata.csv", "more.zip"])
@pytest.mark.parametrize("split", [".", "train"])
def test_links_that_lead_nowhere(tmp_path, split, link):
    made(tmp_path / split, "a", "b")
    (tmp_path / split / "notes.txt").symlink_to("not-mounted")
    check(tmp_path)
    (tmp_path / split / link).symlink_to("not-mounted")
    named = link if split == "." else f"{split}/{link}"
    with pytest.raises(ValueError, match=f"not there: 1, the first '{named}' to 'not-mounted'. Fetch or mount"):
        check(tmp_path)


def test_links_that_lead_nowhere_beside_a_table_and_beside_splits(tmp_path):
    made(tmp_path, "train")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\nscan.png,ill\n")
    (tmp_path / "train" / "left-out.png").symlink_to("not-mounted")
    check(tmp_path)
    (tmp_path / "test").symlink_to("not-mounted")
    with pytest.raises(ValueError, match="not there: 1, the first 'test' to 'not-mounted'"):
        check(tmp_path)


@pytest.mark.parametrize("archive", ["photos.zip", "train.zip", "train/more.ZIP", "train/a/more.zip"])
@pytest.mark.parametrize("names", [["a/0.png", "b/0.png"], ["0.png"]], ids=str)
def test_folders_of_classes_in_archives(tmp_path, archive, names):
    zipped(tmp_path / archive, *names)
    with pytest.raises(ValueError, match=f"{archive}' is not read: it has no metadata.csv, .* Unpack it, and move"):
        check(tmp_path)
    # Only what its table lists is read then, of folders too.
    (tmp_path / "train").mkdir(exist_ok=True)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\nscan.png,ill\n")
    if archive.startswith("train/"):
        check(tmp_path)


def test_an_archive_beside_what_was_unpacked_from_it(tmp_path):
    made(tmp_path, "train/a", "train/b")
    zipped(tmp_path / "train.zip", "a/0.png", "b/0.png")
    with pytest.raises(ValueError, match="train.zip' is not read: .* Unpack it, and move it out of the folder"):
        check(tmp_path)


def test_images_that_a_table_does_not_list_or_lists_again_are_told(tmp_path):
    made(tmp_path, "train/a", "train/b", "train/masks")
    table = tmp_path / "train" / "metadata.csv"
    table.write_text("file_name,mask_file_name\na/scan.png,masks/scan.png\nb/scan.png,\n")
    check(tmp_path)
    table.write_text("file_name,mask_file_name\na/scan.png,masks/scan.png\n")
    with pytest.warns(UserWarning, match=r"train' does not list 1 of its 3 images, the first 'b.scan.png'"):
        check(tmp_path)
    table.write_text("file_name,mask_file_name\na/scan.png,masks/scan.png\nb/scan.png,\na/scan.png,\n")
    with pytest.warns(UserWarning, match=r"lists images again in 1 rows, the first 'a/scan.png'"):
        check(tmp_path)


def test_archives_with_tables_are_read_but_not_beside_images_without_one(tmp_path):
    zipped(tmp_path / "train.zip", "images/0.png", "images/metadata.jsonl")
    check(tmp_path)
    with pytest.raises(ValueError, match="train.zip' is not read: beside DICOM, NIfTI and npy files"):
        check(tmp_path, has_scans=True)
    zipped(made(tmp_path / "photos", "train/a", "train/b") / "train" / "more.zip", "0.png", "metadata.csv")
    with pytest.raises(ValueError, match="more.zip' is not read: .* and images that no table lists"):
        check(tmp_path / "photos")


def test_hidden_files_are_nothing_that_is_left_out(tmp_path):
    made(tmp_path, "a", "b")
    (tmp_path / "a" / "._photos.zip").touch()
    (tmp_path / "a" / ".#scan.png").symlink_to("user@machine.1234")
    check(tmp_path)
    made(tmp_path / "photos", "train/a", "train/b")
    (tmp_path / "photos" / "._scan.png").touch()
    check(tmp_path / "photos")


def test_an_archive_that_is_broken(tmp_path):
    (tmp_path / "train.zip").touch()
    with pytest.raises(ValueError, match=r"train.zip' cannot be opened \(File is not a zip file\). Fetch it again"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"file_name;label\na.png;ill\n", r"has no column file_name, .* 'file_name;label'. The columns .* by commas"),
        (b"file_name;age\na.png;4\nb.png;40,5\nc.png;1,2,3\n", r"cannot be read \(Error .*\). .* divided by commas"),
        (
            b"filename,label\na.png,ill\n",
            "has no column file_name, .* columns: 'filename', 'label'. Call one of them so",
        ),
        ("file_name,label\na.png,Röntgen\n".encode("latin-1"), "cannot be read .* its text is UTF-8"),
        (b"", r"cannot be read \(No columns to parse"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, text, message):
    made(tmp_path, "train")
    (tmp_path / "train" / "metadata.csv").write_bytes(text)
    with pytest.raises(ValueError, match=f"The table '{tmp_path / 'train' / 'metadata.csv'}' {message}") as error:
        check(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["file_name", "image_file_name", "file_names", "scan_file_names"])
def test_a_table_names_files_as_datasets_has_it(tmp_path, column):
    made(tmp_path, "train")
    (tmp_path / "train" / "metadata.csv").write_text(f"{column},label\nscan.png,ill\n")
    check(tmp_path)
