"""Squared norms of gradients: of the gradient of each micro-batch, and of their mean, which the optimizer gets.

launch/training/noise_scale.py estimates the gradient noise scale from them. Nothing here runs without log.noise_scale.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from launch.ranks.layout import Layout
from launch.training.deepspeed_state import OptimizerState
from model.attention import AttentionWeights
from model.layers import FeedForward, LayerNorm, RMSNorm, TokenEmbedding

_PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "norms": (LayerNorm, RMSNorm),
    "attention": (AttentionWeights,),
    "feed_forward": (FeedForward,),
    "embedding": (TokenEmbedding,),
}
OTHERS = "others"
"""Parameters of none of the parts above: head, positions and others."""
PARTS = (*_PARTS, OTHERS)
"""Parts of the model whose squares are kept apart. Norms inside attention (of queries and keys) belong to norms."""
_ROW = 1024
_CLIPPING_EPSILON = 1e-6
"""Value that DeepSpeed and torch add to the norm before they divide the largest allowed norm by it."""


@dataclasses.dataclass(frozen=True)
class GradientSquares:
    """Squared norms in one optimizer step, by part of the model; the same on every rank."""

    micro_batch: dict[str, float]
    """Mean over all micro-batches of the squared norm of each one's gradient. The loss of a micro-batch is scaled so that the mean of
    these gradients is the gradient of the step."""
    mean: dict[str, float]
    """Squared norm of the mean of these gradients, before clipping."""
    num_micro_batches: int
    """Micro-batches of the step, of all data ranks."""
    micro_batch_size: int
    """Sequences of a micro-batch."""


class SquaresMeter:
    """Measures the squares of this rank: by hooks on the parameters, and on the optimizer's gradients before each of its steps.

    A hook sees the gradient of one micro-batch before ZeRO adds it to those of others. Norms stay on the device until the end of the
    step. Under tensor parallelism every rank has the whole gradient of a parameter that is not split, so each counts its share of it.
    In a pipeline the tied embedding is left out of both: its gradient is a sum over two stages, of which no hook sees the whole.
    """

    def __init__(
        self,
        model: nn.Module,
        built: torch.optim.Optimizer,
        state: OptimizerState,
        layout: Layout,
        clipping: float,
        is_split: Callable[[nn.Parameter], bool],
    ):
        """Register the hooks. `built` updates the tensors of `state`; `clipping` is the largest norm, 0 without clipping.

        `is_split` is true for a parameter of which each tensor-parallel rank has a part.
        """
        self._layout, self._clipping = layout, clipping
        self._micro_batch_norms: dict[tuple[str, bool], list[Tensor]] = {}
        self._mean_norms: dict[str, list[Tensor]] = {}
        parts = _parts_of(model, leaves_out_tied(layout))
        for name, parameter in model.named_parameters():
            if name in parts and parameter.requires_grad:
                key = parts[name], is_split(parameter)
                parameter.register_hook(functools.partial(self._note_micro_batch, key))
        self._held: dict[Tensor, list[tuple[str, slice]]] = {}  # tensors are compared by identity
        owned, tensors = {one.name for one in state.owned}, state.tensors
        for shard_slice, tensor, offset, *_ in state.pieces(0, lambda _: False):
            if shard_slice.name in owned and shard_slice.name in parts:
                values = slice(offset, offset + shard_slice.count)
                self._held.setdefault(tensors[tensor], []).append((parts[shard_slice.name], values))
        built.register_step_pre_hook(self._note_mean)

    def _note_micro_batch(self, key: tuple[str, bool], gradient: Tensor) -> None:
        self._micro_batch_norms.setdefault(key, []).append(_norm(gradient))

    def _note_mean(self, optimizer: torch.optim.Optimizer, *_) -> None:
        """Note the norms of the gradients that the optimizer is given now: all of them, or those of one group or sub-group."""
        for tensor in (tensor for group in optimizer.param_groups for tensor in group["params"]):
            for part, values in self._held.get(tensor, ()) if tensor.grad is not None else ():
                self._mean_norms.setdefault(part, []).extend(_norm(rows) for rows in _rows_of(tensor.grad.view(-1)[values]))

    def take(self) -> list[float]:
        """Return this rank's summands of the last step, and begin anew. Their sums over all ranks are what `squares_of` reads."""
        shares = {True: 1.0, False: 1 / self._layout.tensor_parallel_size}
        summands = [[(self._micro_batch_norms.get((part, split), []), share) for split, share in shares.items()] for part in PARTS] + [
            [(self._mean_norms.get(part, []), 1.0)] for part in PARTS
        ]
        device = next((norms[0].device for norms in self._micro_batch_norms.values()), torch.device("cpu"))
        zero = torch.zeros((), dtype=torch.float64, device=device)
        sums = [sum(((_sum_of_squares(norms) * share).to(device) for norms, share in one if norms), zero) for one in summands]
        self._micro_batch_norms, self._mean_norms = {}, {}
        return torch.stack(sums).tolist()  # the one transfer of the step

    def squares_of(
        self, sums: list[float], num_micro_batches: int, micro_batch_size: int, norm: float, loss_scale: float
    ) -> GradientSquares:
        """Return the squares of a step whose summands `take` returned, given their sums over all ranks.

        `num_micro_batches` are those of one rank, by which DeepSpeed divides each loss; `norm` is that of the gradient before clipping.
        """
        clipped = min(1.0, self._clipping / (norm + _CLIPPING_EPSILON)) if self._clipping else 1.0
        total = num_micro_batches * self._layout.data_parallel_size
        scale = (num_micro_batches / loss_scale) ** 2 / total
        return GradientSquares(
            {part: value * scale for part, value in zip(PARTS, sums[: len(PARTS)], strict=True)},
            {part: value / clipped**2 for part, value in zip(PARTS, sums[len(PARTS) :], strict=True)},
            total,
            micro_batch_size,
        )


def leaves_out_tied(layout: Layout) -> bool:
    """True if tied embeddings are left out of the squares in this layout."""
    return layout.pipeline_stages > 1


def _parts_of(model: nn.Module, without_tied: bool) -> dict[str, str]:
    """Return the part of each parameter by its name."""
    parts = {name: OTHERS for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():  # a module comes after those around it
        for part, kinds in _PARTS.items():
            if isinstance(module, kinds):
                parts |= {f"{prefix}.{name}": part for name, _ in module.named_parameters()}
    return {name: part for name, part in parts.items() if not (without_tied and name.startswith("tied_modules."))}


def _rows_of(values: Tensor) -> list[Tensor]:
    """Return views of a vector: as rows of _ROW values, and what is left as one row."""
    left = len(values) % _ROW
    whole, rest = values.split([len(values) - left, left])
    return [rows for rows in (whole.view(-1, _ROW), rest.view(1, -1)) if rows.numel()]


def _norm(rows: Tensor) -> Tensor:
    """Return the norm of a tensor as a scalar in float64, from the norms of its rows in float32.

    A single float32 sum of 40 million squares is 0.6 % too small on a CPU (torch 2.13).
    """
    return torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32), dtype=torch.float64)


def _sum_of_squares(norms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(norms)).square().sum()
