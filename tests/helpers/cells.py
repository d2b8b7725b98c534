"""Small segmentation data and networks for the tests: generated cells on disk, and a SegFormer."""

import json

from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor, set_seed

from metalr_hf.data.cells import demo_cells

SIZE = 32


def cells(train=12, test=4, size=SIZE):
    return demo_cells(size=size, rows={"train": train, "test": test})


def save_cells(folder, splits=None):
    """A folder of images a split, with a table that names each image's mask."""
    for name, split in (cells() if splits is None else splits).items():
        (folder / name).mkdir(parents=True)
        lines = []
        for i, row in enumerate(split):
            row["image"].save(folder / name / f"{i}.png")
            row["mask"].save(folder / name / f"{i}_mask.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "mask_file_name": f"{i}_mask.png"}))
        (folder / name / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def segformer(classes=2):
    set_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=classes,
    )
    return SegformerForSemanticSegmentation(config)


def save_segformer(folder, classes=5):
    """A SegFormer with another number of classes and an image processor that would take class 0 for none."""
    segformer(classes).save_pretrained(folder)
    SegformerImageProcessor(size={"height": SIZE, "width": SIZE}, do_reduce_labels=True).save_pretrained(folder)
    return folder
