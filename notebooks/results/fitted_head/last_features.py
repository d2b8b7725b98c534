"""The head as it was trained, and its mean with one fitted to the features of the last steps, of the same run.

`python notebooks/results/fitted_head/last_features.py` prints the test accuracy and loss of both, for
EfficientNet-Lite0 on the digits.
"""

import torch
from torch.nn import functional
from torchvision.transforms.functional import to_tensor
from transformers import PrinterCallback, set_seed

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
from metalr_hf.data import demo_dataset
from metalr_hf.models import demo_model

IMAGES = demo_dataset()


def prepare(batch):
    return {"pixel_values": [2 * to_tensor(image) - 1 for image in batch["image"]], "labels": batch["label"]}


class Compared(MetaLRTrainer):
    def _refine_average(self):
        print("trained head:", measured(self.model))
        super()._refine_average()
        print("mean:        ", measured(self.model))


@torch.no_grad()
def measured(model):
    rows = IMAGES["test"].with_transform(prepare)[:]
    model.eval()
    logits = torch.cat([model(pixel_values=pixels).logits for pixels in torch.stack(rows["pixel_values"]).split(128)])
    labels = torch.tensor(rows["labels"])
    accuracy = (logits.argmax(1) == labels).float().mean()
    return f"accuracy {accuracy:.4f}, loss {functional.cross_entropy(logits, labels):.4f}"


set_seed(0)
trainer = Compared(
    demo_model(dict(enumerate(IMAGES["train"].features["label"].names))),
    MetaLRTrainingArguments(
        "runs/last_features",
        max_steps=60,
        per_device_train_batch_size=32,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=IMAGES["train"].select(range(500)).with_transform(prepare),
)
trainer.remove_callback(PrinterCallback)
trainer.train()
