"""Optimizers for one process and whole parameters, written as in their papers or taken from torch. They share nothing with ours."""

import contextlib
import re
from collections.abc import Callable, Iterator

import torch
from torch import nn

from launch.checkpoints.state import ShardSlice
from launch.ranks.layout import Layout
from launch.training.optimizers.base import Optimizer
from launch.training.optimizers.pieces import Piece, Pieces
from launch.training.settings import OptimizerSettings

Step = Callable[..., None]
"""Updates the weights from their gradients, at a learning rate; adamw_with_changing_beta2 also takes the beta2 of the step."""


def adamw(model: nn.Module, settings: OptimizerSettings) -> Step:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.0 if settings.cautious_decay else settings.weight_decay}, {"params": others}],
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=0.0,
    )

    def step(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        with decay_beside(decayed if settings.cautious_decay else [], rate, settings):
            optimizer.step()

    return step


@contextlib.contextmanager
def decay_beside(decayed: list[nn.Parameter], rate: float, settings: OptimizerSettings) -> Iterator[None]:
    """Decay weights by their values before an update without decay: if cautious, only those that it does not move away from 0."""
    before = [w.detach().clone() for w in decayed]
    yield
    for w, old in zip(decayed, before, strict=True):
        w.data -= rate * settings.weight_decay * old * cautious_mask(old - w.detach(), old, settings)


def cautious_mask(update: torch.Tensor, w: torch.Tensor, settings: OptimizerSettings) -> torch.Tensor | float:
    """Return the indicator function of arXiv 2510.12402, or 1 without cautious decay."""
    return (update * w >= 0).to(w.dtype) if settings.cautious_decay else 1.0


def sgd(model: nn.Module, settings: OptimizerSettings) -> Step:
    """torch's SGD with momentum, and decay that acts on the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=settings.momentum)

    def step(rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        with decay_beside([parameter for parameter in model.parameters() if parameter.dim() >= 2], rate, settings):
            optimizer.step()

    return step


def lion(model: nn.Module, settings: OptimizerSettings) -> Step:
    """Algorithm 2 of arXiv 2302.06675, with vectors that have no decay."""
    means = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}

    @torch.no_grad()
    def step(rate: float) -> None:
        for w, m in means.items():
            c = (settings.beta1 * m + (1 - settings.beta1) * w.grad).sign()
            m.copy_(settings.beta2 * m + (1 - settings.beta2) * w.grad)
            decay = settings.weight_decay if w.dim() >= 2 else 0.0
            w -= rate * (c + decay * cautious_mask(c, w, settings) * w)

    return step


def adamw_with_changing_beta2(model: nn.Module, settings: OptimizerSettings) -> Step:
    """AdamW whose running means are divided by the sums of the weights that they have given to all gradients so far."""
    means = {parameter: (torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in model.parameters()}
    sums = [0.0, 0.0]

    @torch.no_grad()
    def step(rate: float, beta2: float) -> None:
        for number, beta in enumerate((settings.beta1, beta2)):
            sums[number] = beta * sums[number] + 1 - beta
        for x, (m, v) in means.items():
            m.copy_(settings.beta1 * m + (1 - settings.beta1) * x.grad)
            v.copy_(beta2 * v + (1 - beta2) * x.grad**2)
            x -= rate * (settings.weight_decay if x.dim() >= 2 else 0.0) * x
            x -= rate * (m / sums[0]) / ((v / sums[1]).sqrt() + settings.epsilon)

    return step


def lamb(model: nn.Module, settings: OptimizerSettings) -> Step:
    """Algorithm 2 of arXiv 1904.00962, with vectors (norms, biases) that have neither decay nor trust ratio."""
    means = {parameter: (torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in model.parameters()}
    count = 0

    @torch.no_grad()
    def step(rate: float) -> None:
        nonlocal count
        count += 1
        for x, (m, v) in means.items():
            m.copy_(settings.beta1 * m + (1 - settings.beta1) * x.grad)
            v.copy_(settings.beta2 * v + (1 - settings.beta2) * x.grad**2)
            r = (m / (1 - settings.beta1**count)) / ((v / (1 - settings.beta2**count)).sqrt() + settings.epsilon)
            if x.dim() >= 2:
                r = r + settings.weight_decay * cautious_mask(r, x, settings) * x
                if x.norm() > 0 and r.norm() > 0:
                    r = x.norm() / r.norm() * r
            x -= rate * r

    return step


def lars(model: nn.Module, settings: OptimizerSettings) -> Step:
    """Algorithm 1 of arXiv 1708.03888, with vectors that have neither decay nor a rate of their own."""
    momenta = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}

    @torch.no_grad()
    def step(rate: float) -> None:
        for w, v in momenta.items():
            decay = settings.weight_decay if w.dim() >= 2 else 0.0
            local = 1.0
            if w.dim() >= 2 and w.norm() > 0 and w.grad.norm() > 0:
                local = 0.001 * w.norm() / (w.grad.norm() + decay * w.norm())
            v.copy_(settings.momentum * v + rate * local * w.grad)
            v += rate * local * decay * cautious_mask(v, w, settings) * w
            w -= v

    return step


def muon(model: nn.Module, settings: OptimizerSettings) -> Step:
    """arXiv 2502.16982, with exact products; torch's AdamW for all but the linear layers of attention and feed-forward."""
    pattern = re.compile(r"\.(attention|cross_attention)\.(query|key|value|output)\.weight$|\.feed_forward\.(gate|up|down)\.weight$")
    momenta = {parameter: torch.zeros_like(parameter) for name, parameter in model.named_parameters() if pattern.search(name)}
    rest = nn.Module()
    for index, parameter in enumerate(parameter for parameter in model.parameters() if parameter not in momenta):
        rest.register_parameter(str(index), parameter)
    step_of_the_rest = adamw(rest, settings)

    @torch.no_grad()
    def step(rate: float) -> None:
        step_of_the_rest(rate)
        for w, m in momenta.items():
            m.copy_(settings.momentum * m + (1 - settings.momentum) * w.grad)
            x = settings.momentum * m + (1 - settings.momentum) * w.grad
            x = x / x.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            w -= rate * (settings.weight_decay * cautious_mask(x, w, settings) * w + 0.2 * max(w.shape) ** 0.5 * x)

    return step


REFERENCES = {"adamw": adamw, "lamb": lamb, "lars": lars, "lion": lion, "muon": muon, "sgd": sgd}
"""Reference by the name of the optimizer."""


def attach_whole(optimizer: Optimizer, built: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give an optimizer of ours the map of a model that one process has whole."""
    slices = [ShardSlice.of_whole(name, parameter.shape) for name, parameter in model.named_parameters()]
    held = [Piece(one, index, 0, 0, False) for index, one in enumerate(slices)]
    optimizer.attach(built, Pieces(list(model.parameters()), held, Layout(1), 0, torch.device("cpu")))
