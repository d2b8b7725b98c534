import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from transformers import EvalPrediction

from metalr_hf.tasks.metrics import METRICS, build_compute_metrics, load_metric, score_classes

generator = np.random.default_rng(0)
LABELS = generator.integers(0, 4, 200)
LOGITS = generator.normal(size=(200, 4)).astype("float32")
LOGITS[np.arange(200), LABELS] += 1
PROBABILITIES = np.exp(LOGITS.astype("float64")) / np.exp(LOGITS.astype("float64")).sum(1, keepdims=True)


def test_figures_agree_with_scikit_learn():
    results = build_compute_metrics(["accuracy", "macro_f1", "auroc"])(EvalPrediction(LOGITS, LABELS))
    guess = LOGITS.argmax(1)
    assert results == pytest.approx(
        {
            "accuracy": accuracy_score(LABELS, guess),
            "macro_f1": f1_score(LABELS, guess, average="macro"),
            "auroc": roc_auc_score(LABELS, PROBABILITIES, multi_class="ovr"),
        }
    )
    assert all(type(value) is float for value in results.values())


def test_auroc_of_two_classes_and_of_an_absent_class():
    two, labels = LOGITS[:, :2], (LABELS > 1).astype(int)
    results = build_compute_metrics(["auroc"])(EvalPrediction(two, labels))
    assert results["auroc"] == pytest.approx(roc_auc_score(labels, two[:, 1] - two[:, 0]))
    with pytest.warns(UserWarning, match=r"none of the \d+ images measured is of class 3"):
        absent = build_compute_metrics(["auroc"])(EvalPrediction(LOGITS, np.minimum(LABELS, 2)))
    assert np.isnan(absent["auroc"])
    with pytest.warns(UserWarning, match=r"none of the \d+ images measured is of class 'virus'[.]"):
        build_compute_metrics(["auroc"], ["a", "b", "c", "virus"])(EvalPrediction(LOGITS, np.minimum(LABELS, 2)))
    with pytest.warns(UserWarning, match="is of class 'virus'[.]"):
        assert score_classes(LOGITS, np.minimum(LABELS, 2), ["a", "b", "c", "virus"])["auroc"] is None


def test_dice_by_hand_with_ignored_pixels_and_an_absent_class():
    truth = np.array([[[0, 0, 1, 255], [1, 1, 0, 0]]])
    guess = np.array([[[0, 1, 1, 1], [1, 0, 0, 0]]])
    results = load_metric("dice").compute(predictions=guess, references=truth, num_classes=3)
    # Class 0: 3 in both, 4 true and 4 guessed; class 1: 2 in both, 3 true and 3 guessed; class 2 nowhere.
    assert results["dice_0"] == pytest.approx(6 / 8)
    assert results["dice_1"] == pytest.approx(4 / 6)
    assert np.isnan(results["dice_2"])
    assert results["dice"] == pytest.approx((6 / 8 + 4 / 6) / 2)


def test_logits_in_a_tuple_are_the_first_of_it():
    outputs = EvalPrediction((LOGITS, np.zeros((200, 7))), LABELS)
    assert build_compute_metrics(["accuracy"])(outputs)["accuracy"] == accuracy_score(LABELS, LOGITS.argmax(1))


@pytest.mark.parametrize("name", list(METRICS))
def test_built_in_metrics_are_evaluate_metrics_that_write_no_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    metric = load_metric(name)
    assert isinstance(metric, evaluate.Metric)
    labels = np.array([0, 1, 1])
    guess = {"prediction_scores": np.eye(2)[labels]} if metric.takes_scores else {"predictions": labels}
    metric.add_batch(references=labels, **guess)
    # evaluate itself makes a folder, and deletes its files when they have been computed from.
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert metric.compute(**({"num_classes": 2} if name == "dice" else {}))[name] == 1.0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_any_other_name_goes_to_evaluate(tmp_path):
    script = tmp_path / "always_one" / "always_one.py"
    script.parent.mkdir()
    script.write_text(
        "import datasets\n"
        "import evaluate\n"
        "class AlwaysOne(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        integers = datasets.Value('int64')\n"
        "        features = datasets.Features(predictions=integers, references=integers)\n"
        "        return evaluate.MetricInfo(description='', citation='', inputs_description='', features=features)\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'one': 1.0}\n"
    )
    metric = load_metric(str(script))
    assert metric.compute(predictions=[0], references=[1]) == {"one": 1.0}


def test_dice_of_masks_added_one_by_one_is_that_of_all_and_agrees_with_scikit_learn():
    truth, guess = generator.integers(0, 3, (2, 4, 5, 6))
    truth[0, 0], truth[1, 1] = 255, -100
    kept = (truth != 255) & (truth >= 0)
    expected = f1_score(truth[kept], guess[kept], average=None)
    metric = load_metric("dice")
    whole = metric.compute(predictions=guess, references=truth, num_classes=3)
    assert [whole[f"dice_{i}"] for i in range(3)] == pytest.approx(expected.tolist())
    metric.add_batch(predictions=guess[:2], references=truth[:2])
    for i in (2, 3):
        metric.add(prediction=guess[i], reference=truth[i])
    assert metric.compute(num_classes=3) == whole
    nothing = metric.compute(predictions=guess[:1], references=np.full_like(truth[:1], 255), num_classes=3)
    assert all(np.isnan(value) for value in nothing.values())


def test_dice_refuses_masks_of_another_shape_and_ids_that_are_none():
    metric = load_metric("dice")
    with pytest.raises(ValueError, match=r"shape \(2, 3\), the true one \(3, 2\)"):
        metric.compute(predictions=np.zeros((1, 2, 3)), references=np.zeros((1, 3, 2)), num_classes=2)
    with pytest.raises(ValueError, match="from 0 to 255, not 256"):
        metric.compute(predictions=np.full((1, 2, 2), 256), references=np.zeros((1, 2, 2)), num_classes=2)
