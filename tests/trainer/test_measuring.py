"""What is measured in a process and what the processes exchange."""

import torch
from small_runs import images, vit

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments


def evaluated(tmp_path, measures):
    """What `compute_metrics` is given, and how often the measure was called."""
    calls, given = [], []

    def measure(logits, labels):
        calls.append(logits.shape)
        return (logits.argmax(1) == labels).float()

    def compute_metrics(prediction):
        given.append(prediction)
        return {"right": float(prediction.predictions.mean())}

    measure.measures = measures
    args = MetaLRTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = MetaLRTrainer(
        vit(),
        args,
        eval_dataset=images(),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=measure,
    )
    metrics = trainer.evaluate()
    assert trainer.preprocess_logits_for_metrics is measure
    return metrics, calls, given[0]


def test_a_measure_of_its_own_process_is_called_once_a_batch_and_takes_the_place_of_the_labels(tmp_path):
    torch.manual_seed(0)
    there, calls, given = evaluated(tmp_path, False)
    torch.manual_seed(0)
    here, same_calls, alone = evaluated(tmp_path, True)
    assert here["eval_right"] == there["eval_right"]
    assert here["eval_loss"] == there["eval_loss"]
    assert calls == same_calls
    assert (alone.predictions == given.predictions).all()
    # The labels, which may be large and of several sizes, stay where they are.
    assert (alone.label_ids == alone.predictions).all()
    assert (given.label_ids != given.predictions).any()
