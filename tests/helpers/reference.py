"""A slow, readable reference: optimizer steps as functions of the learning rate, differentiated by autograd.

Every update is written out from the equation in its optimizer's documentation, for one tensor, as
`update(p, g, state, lr, options) -> (new p, new state)`. `state` is an empty dict before the first step, `options` is
the param group, and `lr` is a tensor that may require a gradient. Nothing here assumes that a step is linear in the
learning rate, and no optimizer takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
TensorUpdate = Callable[[Tensor, Tensor, State, Tensor, Mapping[str, Any]], tuple[Tensor, State]]


def sgd(p: Tensor, g: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    g = _l2(_ascent(g, options), p, options)
    momentum, dampening = options["momentum"], options["dampening"]
    if momentum == 0:
        return p - lr * g, {}
    b = momentum * state["b"] + (1 - dampening) * g if state else g
    direction = g + momentum * b if options["nesterov"] else b
    return p - lr * direction, {"b": b}


def adam(p: Tensor, g: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    g = _l2(_ascent(g, options), p, options)
    return _adam(p, g, state, lr, options)


def adamw(p: Tensor, g: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    return _adam(_decay(p, lr, options), _ascent(g, options), state, lr, options)


def _adam(p: Tensor, g: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    beta1, beta2 = options["betas"]
    t, m, v = _moments(g, state, beta1, beta2)
    largest = torch.maximum(state.get("largest", torch.zeros_like(v)), v)
    second = largest if options["amsgrad"] else v
    first = m / (1 - beta1**t)
    new_p = p - lr * first / ((second / (1 - beta2**t)).sqrt() + options["eps"])
    return new_p, {"t": t, "m": m, "v": v, "largest": largest}


def rmsprop(p: Tensor, g: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    g = _l2(_ascent(g, options), p, options)
    decay, momentum = options["alpha"], options["momentum"]
    zero = torch.zeros_like(g)
    v = decay * state.get("v", zero) + (1 - decay) * g**2
    mean = decay * state.get("mean", zero) + (1 - decay) * g
    variance = v - mean**2 if options["centered"] else v
    b = momentum * state.get("b", zero) + g / (variance.sqrt() + options["eps"])
    return p - lr * b, {"v": v, "mean": mean, "b": b}


def adagrad(p: Tensor, g: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    g = _l2(_ascent(g, options), p, options)
    t = state.get("t", 0) + 1
    total = state.get("total", torch.full_like(g, options["initial_accumulator_value"])) + g**2
    decayed = lr / (1 + (t - 1) * options["lr_decay"])
    return p - decayed * g / (total.sqrt() + options["eps"]), {"t": t, "total": total}


def nadam(p: Tensor, g: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    beta1, beta2 = options["betas"]
    p, g = _coupled_or_decoupled(p, _ascent(g, options), lr, options)
    t, m, v = _moments(g, state, beta1, beta2)
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (step * options["momentum_decay"])) for step in (t, t + 1))
    product = state.get("product", 1.0) * mu
    first = mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
    new_p = p - lr * first / ((v / (1 - beta2**t)).sqrt() + options["eps"])
    return new_p, {"t": t, "m": m, "v": v, "product": product}


def radam(p: Tensor, g: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    beta1, beta2 = options["betas"]
    p, g = _coupled_or_decoupled(p, _ascent(g, options), lr, options)
    t, m, v = _moments(g, state, beta1, beta2)
    first = m / (1 - beta1**t)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / (1 - beta2**t)
    if length <= 5:
        return p - lr * first, {"t": t, "m": m, "v": v}
    rectification = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    adaptive = math.sqrt(1 - beta2**t) / (v.sqrt() + options["eps"])
    return p - lr * first * rectification * adaptive, {"t": t, "m": m, "v": v}


def adamax(p: Tensor, g: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    beta1, beta2 = options["betas"]
    g = _l2(_ascent(g, options), p, options)
    t, m, _ = _moments(g, state, beta1, beta2)
    largest = torch.maximum(beta2 * state.get("largest", torch.zeros_like(g)), g.abs() + options["eps"])
    return p - lr * m / ((1 - beta1**t) * largest), {"t": t, "m": m, "v": m, "largest": largest}


def adadelta(p: Tensor, g: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    g = _l2(_ascent(g, options), p, options)
    rho, eps, zero = options["rho"], options["eps"], torch.zeros_like(g)
    v = rho * state.get("v", zero) + (1 - rho) * g**2
    step = (state.get("u", zero) + eps).sqrt() / (v + eps).sqrt() * g
    u = rho * state.get("u", zero) + (1 - rho) * step**2
    return p - lr * step, {"v": v, "u": u}


def muon(p: Tensor, g: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    momentum = options["momentum"]
    b = momentum * state.get("b", torch.zeros_like(g)) + (1 - momentum) * g
    direction = momentum * b + (1 - momentum) * g if options["nesterov"] else b
    rows, columns = p.shape
    factor = {
        None: math.sqrt(max(1, rows / columns)),
        "original": math.sqrt(max(1, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "spectral_unclamped": math.sqrt(rows / columns),
    }[options["adjust_lr_fn"]]
    orthogonal = _newton_schulz(direction, options["ns_coefficients"], options["ns_steps"], options["eps"])
    return _decay(p, lr, options) - lr * factor * orthogonal, {"b": b}


UPDATES: dict[str, TensorUpdate] = {
    "SGD": sgd,
    "Adam": adam,
    "AdamW": adamw,
    "RMSprop": rmsprop,
    "Adagrad": adagrad,
    "NAdam": nadam,
    "RAdam": radam,
    "Adamax": adamax,
    "Adadelta": adadelta,
    "Muon": muon,
}


def update(
    optimizer: str,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: Mapping[str, State],
    lr: Mapping[str, Tensor],
    options: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, State]]:
    """One step of the optimizer of that class name; every mapping goes by the parameter's name."""
    stepped = {
        name: UPDATES[optimizer](params[name], g, state.get(name, {}), lr[name], options[name])
        for name, g in grads.items()
    }
    return {name: p for name, (p, _) in stepped.items()}, {name: s for name, (_, s) in stepped.items()}


def reference_hypergradient(
    validation_loss: Callable[[dict[str, Tensor]], Tensor],
    step: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    alphas: Mapping[str, float],
) -> Tensor:
    """∂ L_val(θ̂(α)) / ∂α, by autograd through the step and the validation loss.

    Args:
        validation_loss: From parameters by name to the loss.
        step: From learning rates by layer to the parameters after the step.
        alphas: The learning rate of every layer.
    """
    leaves = {layer: torch.tensor(a, dtype=torch.float64, requires_grad=True) for layer, a in alphas.items()}
    return torch.stack(torch.autograd.grad(validation_loss(step(leaves)), list(leaves.values())))


def finite_difference(
    loss_after_step: Callable[[dict[str, float]], float],
    alphas: Mapping[str, float],
    relative_step: float = 3e-4,
) -> Tensor:
    """∂ L_val / ∂α by central differences: the step is really taken twice for every layer."""
    slopes = []
    for layer, alpha in alphas.items():
        width = relative_step * alpha
        above, below = (loss_after_step({**alphas, layer: alpha + sign * width}) for sign in (1, -1))
        slopes.append((above - below) / (2 * width))
    return torch.tensor(slopes, dtype=torch.float64)


def _ascent(g: Tensor, options: Mapping[str, Any]) -> Tensor:
    return -g if options["maximize"] else g


def _l2(g: Tensor, p: Tensor, options: Mapping[str, Any]) -> Tensor:
    return g + options["weight_decay"] * p


def _decay(p: Tensor, lr: Tensor, options: Mapping[str, Any]) -> Tensor:
    return p - lr * options["weight_decay"] * p


def _coupled_or_decoupled(p: Tensor, g: Tensor, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return (_decay(p, lr, options), g) if options["decoupled_weight_decay"] else (p, _l2(g, p, options))


def _moments(g: Tensor, state: State, beta1: float, beta2: float) -> tuple[int, Tensor, Tensor]:
    zero = torch.zeros_like(g)
    m = beta1 * state.get("m", zero) + (1 - beta1) * g
    v = beta2 * state.get("v", zero) + (1 - beta2) * g**2
    return state.get("t", 0) + 1, m, v


def _newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    a, b, c = coefficients
    # In bfloat16, and with fused multiply-adds, because Muon rounds there: another order gives other third digits.
    x = matrix.bfloat16()
    tall = matrix.shape[0] > matrix.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
