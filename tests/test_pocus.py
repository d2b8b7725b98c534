"""What notebooks/pocus.md says works on a generated miniature of POCUS's folder."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from digits import save_vit
from PIL import Image

from metalr_hf.cli import main
from metalr_hf.cli.compare import make_cell, parse_compare_arguments
from metalr_hf.data.splits import fold_rows

pytestmark = [
    pytest.mark.usefixtures("offline"),
    # datasets leaves the file open.
    pytest.mark.filterwarnings("ignore:.*metadata.csv:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*metadata.csv:pytest.PytestUnraisableExceptionWarning"),
]

PAGE = (Path(__file__).parents[1] / "notebooks" / "pocus.md").read_text(encoding="utf-8")
FRAMES, VIDEOS = 3, 5


def save_miniature(folder):
    """Frames of one video share its brightness, and the classes their stripes."""
    generator = np.random.default_rng(0)
    for stripes, (label, prefix) in enumerate({"covid": "Cov", "pneumonia": "Pneu", "regular": "Reg"}.items(), start=1):
        (folder / label).mkdir(parents=True)
        names = [f"{prefix}-Atlas+({i}).gif_frame{10 * k}.jpg" for i in range(VIDEOS) for k in range(FRAMES)]
        for name in [*names, f"{prefix}-still.png"]:
            pixels = 60 * (np.arange(16)[:, None] * stripes // 8 % 2) + generator.integers(0, 60, (16, 16))
            Image.fromarray(pixels.astype("uint8")).save(folder / label / name)
        (folder / label / ".DS_Store").touch()


def block(language):
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL).group(1)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The page's command, after its script, with a network and a budget for tests."""
    monkeypatch.chdir(tmp_path)
    save_miniature(tmp_path / "image_dataset")
    exec(block("python"), {})
    small = ["--model", str(save_vit(tmp_path / "vit")), "--image_size", "16", "--batch_size", "8", "--steps", "3"]
    program, *argv = shlex.split(block("bash").replace("\\\n", " "))
    assert program == "metalr-hf"
    return [*argv, *small, "--seeds", "0", "--learning_rates", "1e-3"]


def test_every_video_is_in_one_fold_and_every_class_in_each(command):
    arguments, _, rows = parse_compare_arguments(command[1:])
    cell = make_cell(arguments.model[0], "image_dataset", arguments, rows)
    assert cell.classes == ["covid", "pneumonia", "regular"]
    assert len(cell.train) == 3 * (VIDEOS * FRAMES + 1)
    tested = [cell.train.select(test) for _, test in fold_rows(cell.train, 5, 0, "video")]
    videos = [set(test["video"]) for test in tested]
    assert sum(map(len, videos)) == len(set.union(*videos)) == 3 * (VIDEOS + 1)
    assert "covid/Cov-Atlas+(0)" in set.union(*videos)
    assert all(set(test["label"]) == {0, 1, 2} for test in tested)


@pytest.mark.slow
def test_the_papers_settings_and_the_default_side_by_side(command):
    assert main(command) == 0
    rows = [json.loads(line) for line in Path("runs/pocus/results.jsonl").read_text().splitlines()]
    assert [(row["fold"], row["strategy"], row["status"]) for row in rows] == [
        (fold, name, "done") for fold in range(5) for name in ("metalr_paper", "metalr")
    ]
    report = Path("runs/pocus/report.md").read_text(encoding="utf-8")
    assert "Accuracy of each class, over all folds" in report
    assert "| strategy | learning rate | covid | pneumonia | regular | total | macro F1 |" in report
