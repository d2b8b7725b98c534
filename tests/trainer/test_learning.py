"""From a learning rate 10 to 100 times too low, the tuned run learns and the plain one does not."""

import pytest
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
from metalr_hf.data.loading import DataArguments, load_images
from metalr_hf.data.transforms import load_image_processor, prepare_images
from metalr_hf.models.demo import demo_model
from metalr_hf.tasks.metrics import build_compute_metrics


@pytest.mark.slow
def test_the_demo_learns_from_a_start_rate_that_is_too_low(tmp_path):
    splits = load_images(DataArguments(max_train_samples=500, augment="none", image_size=32))
    accuracy = {}
    for trainer_class, arguments_class in ((Trainer, TrainingArguments), (MetaLRTrainer, MetaLRTrainingArguments)):
        set_seed(0)
        model = demo_model(splits.id2label)
        prepared = prepare_images(splits, load_image_processor(model, image_size=32), "none")
        args = arguments_class(
            str(tmp_path),
            max_steps=40,
            per_device_train_batch_size=32,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=prepared.train,
            data_collator=default_data_collator,
            compute_metrics=build_compute_metrics(["accuracy"]),
        )
        trainer.train()
        accuracy[trainer_class] = trainer.evaluate(prepared.test)["eval_accuracy"]
    assert accuracy[MetaLRTrainer] > 0.8
    assert accuracy[MetaLRTrainer] > accuracy[Trainer] + 0.4
