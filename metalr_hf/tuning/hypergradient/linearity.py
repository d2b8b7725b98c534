"""Checks that an optimizer can be tuned: its update is linear in the learning rate, and its state independent of it."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# `args.optim` of transformers to why it cannot be tuned. What is not named here is probed.
REFUSED_OPTIMIZERS = {
    **dict.fromkeys(
        ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"),
        "a schedule-free optimizer averages its iterates with weights made of past learning rates",
    ),
    **dict.fromkeys(
        ("lomo", "adalomo"), "LOMO updates the parameters inside the backward, so there is no step to tune"
    ),
    **dict.fromkeys(
        (
            "galore_adamw_layerwise",
            "galore_adamw_8bit_layerwise",
            "galore_adafactor_layerwise",
            "apollo_adamw_layerwise",
        ),
        "a layer-wise optimizer steps inside the backward, so there is no step to tune",
    ),
}
ALTERNATIVES = "Use adamw_torch, sgd, or another optimizer whose update is linear in the learning rate."

# Some optimizers change their regime after a few steps (RAdam at the sixth).
_PROBE_STEPS = 8


def check_optimizer_name(optim: str) -> None:
    """Raises if `args.optim` names an optimizer that cannot be tuned.

    Args:
        optim (`str`): A value of `transformers.training_args.OptimizerNames`.

    Raises:
        ValueError: with the reason.

    Example:

    ```python
    >>> from metalr_hf.tuning.hypergradient.linearity import check_optimizer_name
    >>> check_optimizer_name("adamw_torch")
    >>> check_optimizer_name("lomo")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: optim='lomo' cannot be tuned: LOMO updates the parameters inside the backward, ...

    ```
    """
    reason = REFUSED_OPTIMIZERS.get(str(getattr(optim, "value", optim)))
    if reason is not None:
        raise ValueError(f"optim={str(getattr(optim, 'value', optim))!r} cannot be tuned: {reason}. {ALTERNATIVES}")


def check_linear(optimizer: Optimizer) -> None:
    """Raises unless the optimizer's update is linear in its learning rate, by trying it.

    A copy of the optimizer with its own settings takes a few steps on small tensors: the last of them with the
    learning rate and, from the same state, with half of it. The second must move the tensors half as far, and leave
    the same state behind. The optimizer itself, its parameters and the random number generators are not touched.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, not wrapped.

    Raises:
        TypeError: if it is no optimizer.
        ValueError: with what did not hold.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.hypergradient.linearity import check_linear
    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> check_linear(torch.optim.AdamW([weight]))
    >>> check_linear(torch.optim.LBFGS([weight]))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    ValueError: LBFGS cannot be tuned: ...

    ```
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {name}: give an optimizer, such as torch.optim.AdamW(model.parameters()).")
    if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
        raise ValueError(
            f"{name} cannot be tuned: it wraps another optimizer, and what it adds to the step is not known. "
            f"{ALTERNATIVES}"
        )
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    try:
        start, full, half = _try_steps(optimizer, torch.device("cpu"), torch.float64)
        tolerance = 1e-4
    except Exception as error:
        if device.type == "cpu":
            raise _untried(name, error) from error
        # Some optimizers have kernels for the accelerator alone, and none of them for float64.
        try:
            start, full, half = _try_steps(optimizer, device, torch.float32)
            tolerance = 1e-2
        except Exception as error:
            raise _untried(name, error) from error
    for before, after_full, after_half in zip(start, _parameters(full), _parameters(half), strict=True):
        # On the CPU first: Apple's GPUs have no float64.
        step, half_step = (after_full - before).cpu().double(), (after_half - before).cpu().double()
        if not step.any():
            raise ValueError(f"{name} cannot be tuned: its step did not move the parameters. {ALTERNATIVES}")
        if not torch.allclose(step, 2 * half_step, rtol=tolerance, atol=tolerance * float(step.abs().max())):
            raise ValueError(
                f"{name} cannot be tuned: its update is not linear in the learning rate (with half the rate it moves "
                f"{float(half_step.norm() / step.norm()):.2f} times as far). {ALTERNATIVES}"
            )
    if not _equal(_state(full), _state(half), tolerance):
        raise ValueError(
            f"{name} cannot be tuned: its state depends on the learning rate, so a step taken cannot be rescaled "
            f"afterwards. {ALTERNATIVES}"
        )


def _try_steps(
    optimizer: Optimizer, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Optimizer, Optimizer]:
    """Parameters before the last step, and the probes after it with the whole and with half the learning rate."""
    probe = _probe_copy(optimizer, device, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        for _ in range(_PROBE_STEPS - 1):
            _step(probe, _draw_gradients(probe, generator))
        gradients = _draw_gradients(probe, generator)
        start, full, half = _parameters(probe), _duplicate(probe), _duplicate(probe)
        for group in half.param_groups:
            group["lr"] = group["lr"] * 0.5
        _step(full, gradients)
        _step(half, gradients)
    return start, full, half


def _untried(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"{name} cannot be tuned: its step could not be tried on small tensors ({type(error).__name__}: {error}). "
        f"{ALTERNATIVES}"
    )


def _probe_copy(optimizer: Optimizer, device: torch.device, dtype: torch.dtype) -> Optimizer:
    """The same optimizer with a fresh state, over one small tensor a group in place of its parameters."""
    probe = _like(optimizer, defaultdict(dict), [])
    for group in optimizer.param_groups:
        options = {k: v.cpu().clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        # Large enough to be above what an optimizer may cut it off at.
        options["lr"] = 1.0
        # These change no equation, but may refuse the CPU.
        options.update({k: False for k in ("fused", "capturable") if options.get(k)})
        like = next(iter(group["params"]), torch.zeros(1))
        shape = [4] * max(like.ndim, 1)
        values = torch.linspace(0.5, 1.5, math.prod(shape), device=device, dtype=dtype).reshape(shape)
        probe.param_groups.append({"params": [values.requires_grad_()], **options})
        # Before torch 2.12 it makes its state when it is constructed, and not at the first step.
        if isinstance(optimizer, torch.optim.Adagrad):
            probe.state[values] = {
                "step": torch.tensor(0.0),
                "sum": torch.full_like(values, group["initial_accumulator_value"]),
            }
    return probe


def _duplicate(probe: Optimizer) -> Optimizer:
    # Together, so that the state's keys remain the groups' parameters.
    return _like(probe, *copy.deepcopy((probe.state, probe.param_groups)))


def _like(optimizer: Optimizer, state: Any, param_groups: list[dict[str, Any]]) -> Optimizer:
    # Not copy.copy: Optimizer.__getstate__ keeps only what torch's own optimizers have.
    twin = object.__new__(type(optimizer))
    left_out = ("step", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    twin.__dict__.update({name: value for name, value in vars(optimizer).items() if name not in left_out})
    twin.__dict__.update(_optimizer_step_pre_hooks={}, _optimizer_step_post_hooks={})
    twin.state, twin.param_groups = state, param_groups
    return twin


def _draw_gradients(probe: Optimizer, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(p.shape, generator=generator).to(p) for g in probe.param_groups for p in g["params"]]


def _step(probe: Optimizer, gradients: list[Tensor]) -> None:
    parameters = [p for group in probe.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    # The class's own step: the instance's may be wrapped by learning-rate schedulers.
    type(probe).step(probe)


def _parameters(probe: Optimizer) -> list[Tensor]:
    return [p.detach().clone() for group in probe.param_groups for p in group["params"]]


def _state(probe: Optimizer) -> list[Any]:
    """What the optimizer keeps between steps, its options other than the learning rate included."""
    kept = [[probe.state.get(p) for p in group["params"]] for group in probe.param_groups]
    options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in probe.param_groups]
    return [kept, options]


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.allclose(a.cpu().double(), b.cpu().double(), rtol=tolerance, atol=0.0)
    if isinstance(a, dict):
        return all(key in b and _equal(value, b[key], tolerance) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return math.isclose(a, b, rel_tol=tolerance)
    return not isinstance(a, (int, str)) or a == b
