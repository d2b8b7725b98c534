import pytest

from metalr_hf import MetaLRTrainingArguments
from metalr_hf.settings import check_count


def test_the_number_of_tuning_steps_says_how_to_tune_to_the_end(tmp_path):
    with pytest.raises(ValueError, match="tuning_steps=-3 must be 1 or more; to tune to the last step, .* take 0 and"):
        MetaLRTrainingArguments(str(tmp_path), tuning_steps=-3)
    assert MetaLRTrainingArguments(str(tmp_path), tuning_steps=0).tuning_steps == 0


def test_a_count_is_1_or_more():
    with pytest.raises(ValueError, match="meta_every=0 must be 1 or more[.]$"):
        check_count("meta_every", 0)
