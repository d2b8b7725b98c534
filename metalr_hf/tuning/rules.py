"""The learning-rate rules: from the learning rates and their hypergradients to new learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..messages import did_you_mean


class Rule:
    """Base class of the learning-rate rules.

    A rule maps the learning rates α of all layers and the hypergradients h = ∂L_val/∂α to new learning rates. It
    sees the layers as one vector and may keep a state. Trust region and bounds are applied afterwards, by
    [`limit_change`], so that a rule is its equation and nothing else.

    Args:
        hyper_lr (`float`): The step size η of the learning rates.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.rules import Rule, register_rule
    >>> @register_rule("sign")
    ... class Sign(Rule):
    ...     "α (1 - η sign h)"
    ...
    ...     def __call__(self, lr, hypergradient):
    ...         return lr * (1 - self.hyper_lr * hypergradient.sign())
    >>> Sign(hyper_lr=0.5)(torch.tensor([1e-3]), torch.tensor([-2.0]))
    tensor([0.0015])

    ```
    """

    # For a subclass that does not call __init__ and keeps its step size by another name.
    hyper_lr: float = 0.1

    def __init__(self, hyper_lr: float = 0.1):
        self.hyper_lr = hyper_lr

    def __call__(self, lr: Tensor, hypergradient: Tensor) -> Tensor:
        """Applies the rule.

        Args:
            lr (`torch.Tensor` of shape `(layers,)`, float64, on the CPU): The learning rates α, all above zero or zero.
            hypergradient (`torch.Tensor` of shape `(layers,)`, float64, on the CPU): h = ∂L_val/∂α, finite.

        Returns:
            `torch.Tensor` of shape `(layers,)`, float64: the new learning rates, not yet limited.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define __call__(lr, hypergradient)")

    def state_dict(self) -> dict[str, Any]:
        """The state between calls, in tensors and plain containers."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what [`~Rule.state_dict`] gave."""

    def reset(self) -> None:
        """Forgets the state, for a run that begins anew. A rule that keeps one has to define it."""


RULES: dict[str, type[Rule]] = {}

RuleType = TypeVar("RuleType", bound=type[Rule])


def register_rule(name: str) -> Callable[[RuleType], RuleType]:
    """Class decorator that makes a [`Rule`] available by name, e.g. as `lr_rule` of the training arguments.

    Args:
        name (`str`): The name. An existing one is replaced.

    Returns:
        `Callable`: the decorator, which returns the class unchanged.

    Example:

    ```python
    >>> from metalr_hf.tuning.rules import RULES, Rule, register_rule
    >>> @register_rule("constant")
    ... class Constant(Rule):
    ...     def __call__(self, lr, hypergradient):
    ...         return lr
    >>> RULES["constant"] is Constant
    True

    ```
    """

    def register(rule: RuleType) -> RuleType:
        RULES[name] = rule
        return rule

    return register


def get_rule(name: str | Rule, hyper_lr: float | None = None) -> Rule:
    """Builds a registered rule.

    Args:
        name (`str` or [`Rule`]): `"additive"`, `"proportional"`, `"adam"` or the name of a rule of your own. A rule
            already built is returned as it is.
        hyper_lr (`float`, *optional*, defaults to 0.1): The step size η of the learning rates.

    Returns:
        [`Rule`]: a new rule with an empty state.

    Raises:
        ValueError: if no rule has that name, or `hyper_lr` is given for a rule already built.

    Example:

    ```python
    >>> from metalr_hf.tuning.rules import get_rule
    >>> get_rule("proportional", hyper_lr=0.1).hyper_lr
    0.1

    ```
    """
    if isinstance(name, Rule):
        if hyper_lr is not None:
            raise ValueError(
                f"hyper_lr={hyper_lr!r} is given beside a rule that is built and has its own, {name.hyper_lr!r}. Leave "
                f"it out, or build the rule with it: {type(name).__name__}(hyper_lr={hyper_lr!r})."
            )
        return name
    if name not in RULES:
        hint = did_you_mean(str(name), RULES, cutoff=0.4)
        raise ValueError(
            f"lr_rule={name!r} is not a learning-rate rule.{hint} Registered: {', '.join(sorted(RULES))}; add your own "
            "with metalr_hf.tuning.rules.register_rule."
        )
    hyper_lr = Rule.hyper_lr if hyper_lr is None else hyper_lr
    rule = RULES[name](hyper_lr=hyper_lr)
    if "hyper_lr" not in vars(rule):
        rule.hyper_lr = hyper_lr
    return rule


@register_rule("additive")
class Additive(Rule):
    """α ← α - η h.

    Plain gradient descent on the learning rates (step 2 of Chen et al. 2023, Algorithm 1). h has the scale of
    loss / α, so a useful η is of the order of α² / loss: about 1e-6 for α around 1e-3.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.rules import Additive
    >>> Additive(hyper_lr=1e-6)(torch.tensor([1e-3]), torch.tensor([-100.0]))
    tensor([0.0011])

    ```
    """

    def __call__(self, lr: Tensor, hypergradient: Tensor) -> Tensor:
        return lr - self.hyper_lr * hypergradient


@register_rule("proportional")
class Proportional(Rule):
    """α ← α (1 - η h).

    The proportional hyper-learning rate of Chen et al. 2023, section 2.2: the step size of every α is η α, so all
    layers may move by orders of magnitude whatever their rates are.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.rules import Proportional
    >>> Proportional(hyper_lr=0.1)(torch.tensor([1e-3, 1e-5]), torch.tensor([-2.0, 5.0]))
    tensor([1.2000e-03, 5.0000e-06])

    ```
    """

    def __call__(self, lr: Tensor, hypergradient: Tensor) -> Tensor:
        return lr * (1 - self.hyper_lr * hypergradient)


@register_rule("adam")
class AdamRule(Rule):
    """log α ← log α - η Adam(α h).

    α h = ∂L_val/∂log α. Adam (Kingma and Ba 2015) normalises it, so that the size of the loss and of the layer drop
    out and η is the relative change of a learning rate per step.

    Args:
        hyper_lr (`float`): η.
        betas (`tuple[float, float]`): Decay rates of the two moments.
        eps (`float`): Added to the root of the second moment.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.rules import AdamRule
    >>> AdamRule(hyper_lr=0.1)(torch.tensor([1e-3, 1e-3]), torch.tensor([-1.0, -100.0])) / 1e-3  # e^0.1 for both
    tensor([1.1052, 1.1052])

    ```
    """

    def __init__(self, hyper_lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        super().__init__(hyper_lr)
        self.betas = betas
        self.eps = eps
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self.exp_avg: Tensor | None = None
        self.exp_avg_sq: Tensor | None = None

    def __call__(self, lr: Tensor, hypergradient: Tensor) -> Tensor:
        gradient = lr * hypergradient
        if self.exp_avg is None or self.exp_avg_sq is None:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(gradient), torch.zeros_like(gradient)
        beta1, beta2 = self.betas
        self.steps += 1
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * gradient
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * gradient**2
        first = self.exp_avg / (1 - beta1**self.steps)
        second = self.exp_avg_sq / (1 - beta2**self.steps)
        return lr * torch.exp(-self.hyper_lr * first / (second.sqrt() + self.eps))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]
        self.exp_avg = state_dict["exp_avg"]
        self.exp_avg_sq = state_dict["exp_avg_sq"]


def limit_change(
    lr: Tensor,
    new_lr: Tensor,
    max_lr_change: float | None = None,
    lr_min: float = 0.0,
    lr_max: float = math.inf,
) -> Tensor:
    """Keeps new learning rates in the trust region and within the bounds.

    Args:
        lr (`torch.Tensor` of shape `(layers,)`): The learning rates α before the rule.
        new_lr (`torch.Tensor` of shape `(layers,)`): What the rule made of them.
        max_lr_change (`float`, *optional*): The trust region c: α'/α stays within [1/c, c]. `None` or
            infinity switches it off.
        lr_min (`float`, *optional*, defaults to 0.0): Lower bound.
        lr_max (`float`, *optional*, defaults to `math.inf`): Upper bound.

    Returns:
        `torch.Tensor` of shape `(layers,)`: the limited learning rates.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning.rules import limit_change
    >>> limit_change(torch.tensor([1e-3, 1e-3]), torch.tensor([9e-3, 1e-4]), max_lr_change=2.0, lr_max=1.5e-3)
    tensor([0.0015, 0.0005])

    ```
    """
    # Infinity times a rate of zero is no number.
    if max_lr_change is not None and math.isfinite(max_lr_change):
        new_lr = torch.minimum(torch.maximum(new_lr, lr / max_lr_change), lr * max_lr_change)
    return new_lr.clamp(lr_min, lr_max)
