"""The files of a comparison: what reading and mending them do."""

import pytest

from metalr_hf.compare.results import append_line, keep_settings, mend_lines, only_process, read_lines

CUT = '{"seed": 0, "rate": 1e-05}\n{"seed": 1}\n{"se'


def test_reading_leaves_a_file_as_it_is_and_mending_takes_out_what_is_no_row(tmp_path):
    file = tmp_path / "results.jsonl"
    assert read_lines(file) == mend_lines(file) == []
    assert not file.exists()
    file.write_text(CUT)
    assert read_lines(file) == [{"seed": 0, "rate": 1e-5}, {"seed": 1}]
    assert file.read_text() == CUT
    assert mend_lines(file) == read_lines(file)
    assert file.read_text() == '{"seed": 0, "rate": 1e-05}\n{"seed": 1}\n'
    assert mend_lines(file, lambda row: row["seed"] == 0) == [{"seed": 0, "rate": 1e-5}]
    append_line(file, {"seed": 2})
    assert file.read_text() == '{"seed": 0, "rate": 1e-05}\n{"seed": 2}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_one_process_s_and_keeps_its_settings(tmp_path):
    with only_process(tmp_path), pytest.raises(BlockingIOError, match="at work in output_dir"), only_process(tmp_path):
        pass
    keep_settings(tmp_path, {"steps": 60, "tuning": {}})
    with pytest.raises(ValueError, match=r"with other settings \(there, here\): {'steps': \(60, 61\)}"):
        keep_settings(tmp_path, {"steps": 61, "tuning": {}})
    keep_settings(tmp_path, {"steps": 60, "tuning": {}})
