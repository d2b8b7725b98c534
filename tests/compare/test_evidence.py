import numpy as np
import pandas as pd

from metalr_hf.compare.evidence import differences_table, is_baseline, paired_differences


def cells(advantages):
    """The best results of two baselines and of a strategy that is better than the second by so much."""
    cosine = [0.5 + 0.01 * i for i in range(len(advantages))]
    return pd.DataFrame(
        {
            "constant": 0.3,
            "cosine": cosine,
            "metalr": [value + more for value, more in zip(cosine, advantages, strict=True)],
        }
    )


def test_every_strategy_is_paired_with_the_best_baseline():
    text = differences_table(cells([0.02 + 0.01 * i for i in range(7)]))
    assert "| strategy | minus cosine | better in | p |" in text
    # Seven differences of one sign: p = 2 / 2 ** 7; their mean is .05 and their deviation .0216.
    assert "| metalr | **+0.050 ± 0.008** | 7 of 7 | 0.0156 |" in text
    assert "| constant | **-0.230 ± 0.008** | 0 of 7 | 0.0156 |" in text
    assert "| cosine |" not in text


def test_a_difference_that_may_be_chance_is_not_bold():
    text = differences_table(cells([0.03 * (-1) ** i for i in range(7)]))
    line = next(line for line in text.splitlines() if line.startswith("| metalr"))
    assert "**" not in line
    assert "4 of 7" in line
    assert "| metalr | +0.100 ± 0.000 | 5 of 5 | 0.0625 |" in differences_table(cells([0.1] * 5))
    assert differences_table(cells([0.1])) == ""


def test_pairs_are_those_that_have_run_and_none_is_made_up():
    best = pd.DataFrame({"cosine": [0.5, 0.6, 0.7], "metalr": [0.6, np.nan, 0.7], "twin": [0.5, 0.6, 0.7]})
    found = paired_differences(best)
    assert found.attrs["baseline"] == "cosine"
    assert found.loc["metalr", ["cells", "better"]].tolist() == [2, 1]
    assert np.isnan(found.loc["twin", "p"]), "nothing differs, so nothing is tested"
    assert paired_differences(best[["metalr"]]).empty


def test_an_average_of_another_s_strategy_is_still_another_s():
    assert is_baseline("cosine+average")
    assert not is_baseline("metalr_constant+average")


def test_means_of_the_same_scores_in_another_order_are_ties():
    # 396, 395 and 395 of 396 images, and 396, 396 and 394, as results.jsonl keeps them.
    best = pd.DataFrame({"cosine": [(1 + 1 + 0.994949) / 3] * 2, "metalr": [(1 + 0.997475 + 0.997475) / 3] * 2})
    assert paired_differences(best).loc["metalr", "better"] == 0
