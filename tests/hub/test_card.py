import re

import pytest
import torch
from hostile_text import HOSTILE, rendered, shown
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from small_runs import arguments, images, vit

from metalr_hf import MetaLRTrainer
from metalr_hf.hub.card import Evaluation, LayerFacts, RunFacts, model_card, reading
from metalr_hf.hub.facts import run_facts
from metalr_hf.tasks.metrics import build_compute_metrics

LAYERS = [
    LayerFacts("stem", 1e-4, 2e-5, 2e-5, 1e-4),
    LayerFacts("blocks.0", 1e-4, 9e-5, 8e-5, 1e-4),
    LayerFacts("blocks.1", 1e-4, 3e-4, 1e-4, 4e-4),
    LayerFacts("head", 1e-3, 4e-3, 1e-3, 5e-3),
]
KNOWN = {
    "base_model": "google/vit-base-patch16-224",
    "license": "apache-2.0",
    "dataset": "clinic/cells",
    "dataset_on_hub": True,
    "classes": ["benign", "malignant"],
    "train_images": 1200,
    "step": 60,
    "evaluation": Evaluation("test", {"loss": 0.25, "macro_f1": 0.9}, [["benign", "0.9", "0.8", "0.85", 10]], step=60),
}


def facts(**known):
    settings = {"optimizer steps": 60, "seed": 42}
    first = ("transformers", "image-classification", "ViTForImageClassification")
    return RunFacts(*first, LAYERS, settings, "How they were drawn.", **known)


CARD = """---
base_model: google/vit-base-patch16-224
datasets:
- clinic/cells
library_name: transformers
license: apache-2.0
metrics:
- f1
pipeline_tag: image-classification
tags:
- image-classification
- metalr
model-index:
- name: vit-base-patch16-224 on clinic/cells
  results:
  - task:
      type: image-classification
    dataset:
      name: clinic/cells
      type: clinic/cells
      split: test
    metrics:
    - type: f1
      value: 0.9
      name: macro_f1
---

# vit-base-patch16-224 on clinic/cells

A model for image classification: ViTForImageClassification, fine-tuned from \
[google/vit-base-patch16-224](https://huggingface.co/google/vit-base-patch16-224) on \
[clinic/cells](https://huggingface.co/datasets/clinic/cells), with 1,200 training images. It tells 2 classes apart: \
benign, malignant.

## Use it

```python
from transformers import pipeline

model = pipeline("image-classification", model="your-name/your-model")
print(model("image.png"))
```

## Results

On the test split:

| metric | value |
| --- | ---: |
| loss | 0.2500 |
| macro_f1 | 0.9000 |

| class | precision | recall | F1 | images |
| --- | ---: | ---: | ---: | ---: |
| benign | 0.9 | 0.8 | 0.85 | 10 |

## What every layer did
"""


def test_a_card_by_one_full_pattern():
    card = str(model_card(facts(**KNOWN)))
    assert card.startswith(CARD)
    assert "| blocks.1 | 1.0e-04 | 3.0e-04 | 1.0e-04 – 4.0e-04 | rose, ×3 |" in card
    assert "| blocks.0 | 1.0e-04 | 9.0e-05 | 8.0e-05 – 1.0e-04 | stayed |" in card
    assert "How they were drawn." in card
    assert "{{MetaLR}: Meta-tuning of Learning Rates" in card
    assert re.findall(r"^## (.+)$", card, re.MULTILINE) == [
        "Use it",
        "Results",
        "What every layer did",
        "How it was trained",
        "Limits",
        "Cite",
    ]


def test_what_is_not_known_is_left_out():
    card = model_card(facts())
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "None" not in str(card)
    assert "fine-tuned from" not in card.text
    assert "This run was not evaluated" in card.text


def test_what_was_tested_on_has_its_name():
    card = model_card(facts(**KNOWN, test_split="validation"))
    assert "On the validation split:" in card.text
    assert card.data.eval_results[0].dataset_split == "validation"
    card = model_card(facts(**KNOWN, test_split=None))
    assert "On images held out of the training split:" in card.text
    assert card.data.eval_results[0].dataset_split is None


@pytest.mark.parametrize(("asked", "used"), [("bf16", "bf16"), ("fp16", "float32")])
def test_the_precision_is_the_one_that_was_used(tmp_path, asked, used):
    # No network is run in fp16 on a CPU.
    run = MetaLRTrainer(vit(), arguments(tmp_path, max_steps=1, **{asked: True}), train_dataset=images())
    run.train()
    assert run_facts(run).settings["precision"] == used


def test_a_timm_model_and_an_adapter_are_loaded_by_their_own_library():
    card = model_card(RunFacts("timm", "image-classification", "resnet18", LAYERS, {}, ""))
    assert 'timm.create_model("hf-hub:your-name/your-model", pretrained=True)' in card.text
    assert {"timm", "transformers", "metalr"} <= set(card.data.tags)
    adapter = RunFacts("peft", "image-classification", "ViT", LAYERS, {}, "")
    assert "## Use it" not in model_card(adapter).text
    adapter.base_model = "google/vit-base-patch16-224"
    assert 'PeftModel.from_pretrained(base, "your-name/your-model")' in model_card(adapter).text


def test_rates_that_were_not_tuned_are_not_read():
    card = model_card(facts(tuned=False))
    assert "The learning rates were not tuned." in card.text
    assert "transfers" not in card.text


@pytest.mark.parametrize(
    ("problem", "labels", "told"),
    [
        ("regression", [1.0, 2.0, 3.0], "It estimates, in the units of the data: "),
        ("multi_label_classification", [1.0, 0.0, -100.0], "It says which of 3 labels an image has: "),
    ],
)
def test_the_card_of_a_script_says_what_its_model_answers(tmp_path, problem, labels, told):
    model = vit()
    model.config.problem_type = problem
    rows = [{"pixel_values": row["pixel_values"], "labels": torch.tensor(labels)} for row in images(8)]
    run = MetaLRTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows, eval_dataset=rows)
    run.train()
    run.evaluate()
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert told in text
    assert "classes apart" not in text


def test_results_of_other_weights_are_told_apart():
    card = model_card(facts(**{**KNOWN, "step": 100}))
    assert "On the test split at optimizer step 60, not with the final weights:" in card.text
    assert card.data.eval_results is None


def test_the_reading_says_what_the_figures_say():
    text = reading(LAYERS)
    assert text.startswith(
        "Of 4 learning rates, 2 rose, 1 fell, 1 stayed within a quarter of the start. "
        # (0.2 · 0.9 · 3 · 4) to the power of a quarter is 1.2.
        "Together they went to 1.2 times their start; measured by that, head gained most, 3.3 times, "
        "and stem least, 0.16 times."
    )
    # The mean of the backbone is the cube root of 2e-5 · 9e-5 · 3e-4, that of its output half √(9e-5 · 3e-4).
    assert "At the end the head's was 49 times the backbone's mean" in text
    assert "output half 8.2 times that of its input half" in text
    assert "Together" not in reading([LayerFacts("all", 1, 1, 1, 1)])
    assert "backbone" not in reading([LayerFacts("all", 0.0, 0.0, 0.0, 0.0)])


HUB_RULES = {
    "library_name": lambda value: value in ("transformers", "timm", "peft"),
    "pipeline_tag": lambda value: re.fullmatch("[a-z-]+", value),
    "tags": lambda value: all(isinstance(tag, str) and 0 < len(tag) <= 50 for tag in value),
    "metrics": lambda value: all(isinstance(metric, str) for metric in value),
    "datasets": lambda value: [validate_repo_id(name) for name in value],
    "base_model": lambda value: validate_repo_id(value) is None,
    "license": lambda value: isinstance(value, str),
    "model-index": lambda value: all(
        {"type"} <= set(result["task"])
        and {"type", "name"} <= set(result["dataset"])
        and all({"type", "value"} <= set(metric) for metric in result["metrics"])
        for model in value
        for result in model["results"]
    ),
}


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """A run whose classes and data set have names that would do harm."""
    model = vit()
    model.config.id2label = dict(enumerate(HOSTILE))
    model.config.num_labels = len(HOSTILE)
    model.classifier = torch.nn.Linear(16, len(HOSTILE))
    rows = [{"pixel_values": row["pixel_values"], "labels": i % len(HOSTILE)} for i, row in enumerate(images())]
    run = MetaLRTrainer(
        model=model,
        args=arguments(tmp_path_factory.mktemp("hostile"), max_steps=2),
        train_dataset=rows,
        compute_metrics=build_compute_metrics(["accuracy", "macro_f1"]),
    )
    run.train()
    run.evaluate(rows, metric_key_prefix="test")
    return run


@pytest.mark.parametrize("dataset", ["a: b\n- c: | {{ 7*7 }} <script>'\"`", "---\nlicense: mit\n---", "someone/cells"])
def test_hostile_names_do_nothing(hostile_run, dataset):
    hostile_run.create_model_card(dataset=dataset, tags=["a: b", "- c\n---"])
    card = ModelCard.load(f"{hostile_run.args.output_dir}/README.md")
    assert card.data.eval_results[0].dataset_name == dataset
    assert card.data.license is None
    assert card.data.tags[2:] == ["a: b", "- c\n---"]
    data = card.data.to_dict()
    assert set(data) <= set(HUB_RULES)
    for name, value in data.items():
        assert HUB_RULES[name](value), (name, value)
    tokens = rendered(card.text)
    inline = [child for token in tokens for child in token.children or []]
    assert not [token for token in [*tokens, *inline] if token.type.startswith("html")]
    allowed = {"lr_history.csv", "https://arxiv.org/abs/2206.01408", "https://huggingface.co/datasets/someone/cells"}
    assert {token.attrs["href"] for token in inline if token.type == "link_open"} <= allowed
    assert [token.attrs["src"] for token in inline if token.type == "image"] == ["learning_rates.png"]
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"][1:]
    assert headings == ["Use it", "Results", "What every layer did", "How it was trained", "Limits", "Cite"]
    cells = [
        "".join(child.content for child in tokens[i + 1].children).strip("\u2068\u2069")
        for i, token in enumerate(tokens)
        if token.type == "td_open"
    ]
    start = cells.index(shown(HOSTILE[0]))
    assert cells[start : start + 5 * len(HOSTILE) : 5] == [shown(name) for name in HOSTILE]
    assert sum(map(int, cells[start + 4 : start + 5 * len(HOSTILE) : 5])) == 48


@pytest.mark.parametrize(
    ("options", "tuned", "drawn"),
    [
        ({"tuning_steps": 0}, "at every step", "At each tuned step a shuffled"),
        ({"tuning_steps": 3}, "at the first 3 steps", "At each tuned step a shuffled"),
        # Of a run that is shorter.
        ({"tuning_steps": 40}, "at every step", "At each tuned step a shuffled"),
        ({"tuning_steps": 0, "meta_every": 2}, "at one step in 2", "At one step in 2 a shuffled"),
        ({"meta_every": 2, "tuning_steps": 3}, "at one step in 2 of the first 3", "At one step in 2 a shuffled"),
    ],
)
def test_how_often_rates_were_tuned(tmp_path, options, tuned, drawn):
    args = arguments(tmp_path, max_steps=4, meta_source="stream", **options)
    run = MetaLRTrainer(vit(), args, train_dataset=images())
    run.train()
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert f"| rates tuned | {tuned} |" in text
    assert f"{drawn} validation batch" in text


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("polynomial", "an average along the run (polynomial)"),
        ("0.9", "an average along the run (exponential, decay 0.9)"),
    ],
)
def test_that_the_weights_are_an_average(tmp_path, kind, told):
    run = MetaLRTrainer(vit(), arguments(tmp_path, max_steps=1, average_weights=kind), train_dataset=images())
    run.train()
    run.create_model_card()
    assert f"| weights | {told} |" in (tmp_path / "README.md").read_text()


def test_what_a_run_had_in_place_of_what_was_asked_for(tmp_path):
    class SmallMemory(MetaLRTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 16, "meta_batch_size": 16}
    args = arguments(tmp_path, max_steps=2, meta_source="stream", average_weights="polynomial", **options)
    run = SmallMemory(model=vit(), args=args, train_dataset=images())
    run.args.average_weights = "none"
    run.train()
    run.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "| images a step | 4 |" in text
    assert "validation batch of 4 images" in text
    assert "an average along the run" not in text


def test_that_rates_are_constant_and_warmed_up_where_they_are(tmp_path):
    for options, told in (({}, "constant"), ({"warmup_steps": 1}, "constant_with_warmup, 1 warm-up steps")):
        args = arguments(tmp_path, max_steps=2, lr_scheduler_type=None, **options)
        run = MetaLRTrainer(vit(), args, train_dataset=images())
        run.train()
        run.create_model_card()
        assert f"| schedule | {told} |" in (tmp_path / "README.md").read_text()


def test_the_range_of_a_rate_is_before_the_schedule_also_where_that_was_changed_on_the_way(tmp_path):
    def train(max_steps, resume=None):
        options = {"lr_scheduler_type": "linear", "warmup_steps": 1, "tuning_steps": 0, "calibrate": True}
        args = arguments(tmp_path, max_steps=max_steps, save_strategy="steps", save_steps=3, **options)
        run = MetaLRTrainer(vit(), args, train_dataset=images())
        run.train(resume_from_checkpoint=resume)
        return run

    train(4)
    run = train(9, str(tmp_path / "checkpoint-3"))
    # The first step has the length 0. The third is recorded when the fourth begins.
    shapes = torch.tensor([[(end - step) / (end - 1)] for step, end in enumerate([4, 9, 9, 9, 9, 9, 9, 9], start=1)])
    rates = torch.tensor(run.lr_history.learning_rates[1:]) / shapes
    layers = run_facts(run).layers
    assert [layer.name for layer in layers] == run.lr_history.layers
    assert [layer.low for layer in layers] == pytest.approx(rates.amin(0).tolist())
    assert [layer.high for layer in layers] == pytest.approx(rates.amax(0).tolist())
    assert [layer.final for layer in layers] == pytest.approx(rates[-1].tolist())
    assert all(layer.low < layer.high for layer in layers)
