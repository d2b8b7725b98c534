import numpy as np

from metalr_hf.data.cells import demo_cells


def test_cells_are_the_same_each_time_and_their_membranes_dark():
    first, again, other = (demo_cells(size=64, seed=seed, rows={"train": 6, "test": 2}) for seed in (0, 0, 1))
    images, masks = (np.stack([np.array(row[key]) for row in first["train"]]) for key in ("image", "mask"))
    assert (images == np.stack([np.array(image) for image in again["train"]["image"]])).all()
    assert not (images == np.stack([np.array(image) for image in other["train"]["image"]])).all()
    assert images.shape == masks.shape == (6, 64, 64)
    assert np.unique(masks).tolist() == [0, 1]
    assert 0.15 < masks.mean() < 0.45
    assert images[masks == 1].mean() < images[masks == 0].mean() - 30
    # Brightness alone does not solve it.
    best = max(((images < level) == masks).mean() for level in range(0, 256, 8))
    assert best < 0.93
