"""Contexts that keep a pass out of what the training sees: buffers, training flags, random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module, mode: str = "train") -> Iterator[None]:
    """A context in which a forward and a backward leave no trace in the model but gradients.

    Buffers (batch-norm statistics), the training flag of every module and the random number generators of Python,
    NumPy, torch and the model's device are put back on leaving.

    Args:
        model (`torch.nn.Module`): The model.
        mode (`str`, *optional*, defaults to `"train"`):
            How batch-norm and dropout work inside: `"train"`, as in the training step (a module that is held in eval
            mode stays so), or `"eval"`.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.contexts import untouched
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    >>> with untouched(model):
    ...     _ = model(torch.randn(4, 2))
    >>> int(model[1].num_batches_tracked)
    0

    ```
    """
    places = [(module._buffers, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    buffers = [buffer for _, _, buffer in places if buffer is not None]
    training = [module.training for module in model.modules()]
    with torch.no_grad():
        saved = [buffer.clone() for buffer in buffers]
    with preserve_random_state(next((p.device for p in model.parameters()), torch.device("cpu"))):
        try:
            if mode == "eval":
                model.eval()
            yield
        finally:
            for module, flag in zip(model.modules(), training, strict=True):
                module.training = flag
            # A forward may put new tensors in their places.
            for held, name, buffer in places:
                held[name] = buffer
            with torch.no_grad():
                if buffers:
                    torch._foreach_copy_(buffers, saved)


@contextmanager
def preserve_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Puts the random number generators of Python, NumPy and torch back on leaving.

    Args:
        device (`torch.device`, *optional*): An accelerator whose generator is put back too.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.contexts import preserve_random_state
    >>> with preserve_random_state():
    ...     drawn = torch.rand(2)
    >>> torch.equal(torch.rand(2), drawn)
    True

    ```
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    accelerator = device is not None and device.type not in ("cpu", "meta")
    devices = [device] if accelerator and device.type != "mps" else []  # type: ignore[union-attr]
    mps_state = torch.mps.get_rng_state() if accelerator and not devices else None
    with torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cuda"):  # type: ignore[union-attr]
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)
