"""Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; with weight decay and rates for large models, arXiv 2502.16982.

The matrices of the blocks (attention and feed-forward) move by their orthogonalised momentum, times 0.2 x sqrt(larger side): then an
update has the mean square of AdamW's, and AdamW takes all other parameters at the same learning rate. A matrix is orthogonalised
whole, once a step, on one rank of its pipeline stage, however ZeRO and tensor parallelism have divided it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from launch.training.optimizers.base import Optimizer, Update, is_matrix, split_by_decay
from launch.training.optimizers.changes import Changes
from launch.training.optimizers.elementwise import adam_direction, apply_update
from launch.training.optimizers.matrix_exchange import MatrixExchange
from launch.training.optimizers.newton_schulz import newton_schulz
from launch.training.optimizers.pieces import Piece, Pieces
from model.transformer import Block


class Muon(Optimizer):
    """Muon for the matrices of blocks, AdamW for the rest.

    All parameters have both states: momentum, the mean of gradients that Muon and AdamW need, and exp_avg_sq, which stays 0 for Muon's
    matrices. Leaving it out there would save 4 bytes per weight of the blocks, but would need a third parameter group in each layout,
    and checkpoints in which parameters have different states. The name differs from AdamW's exp_avg, so that a checkpoint of one is
    not resumed by the other: AdamW would divide by the roots of the zeros.
    """

    name = "muon"
    states = {"momentum": 4, "exp_avg_sq": 4}
    json_type = "Muon"
    json_parameters = {
        "lr": ("learning_rate",),
        "momentum": ("momentum",),
        "betas": ("beta1", "beta2"),
        "eps": ("epsilon",),
        "weight_decay": ("weight_decay",),
    }
    has_adamw_rates = True
    needs_pieces = True

    def describe(self) -> str:
        """Return the name and the settings that this optimizer reads, without the learning rate."""
        return f"{super().describe()}, muon_precision {self.settings.muon_precision}"

    def build(self, model: nn.Module) -> "MuonStep":
        """Return the torch optimizer of the parameters of `model`, which may be a pipeline stage without blocks."""
        numbers = self.settings
        matrices = {
            f"{path}.{name}"
            for path, block in model.named_modules()
            if isinstance(block, Block)
            for name, parameter in block.named_parameters()
            if is_matrix(parameter)
        }
        defaults = {"betas": (numbers.beta1, numbers.beta2), "eps": numbers.epsilon, "momentum": numbers.momentum}
        defaults |= {"lr": 0.0, "cautious": numbers.cautious_decay, "hold_zeros": False}
        return MuonStep(self, matrices, split_by_decay(model, numbers.decay_coefficient), defaults)

    def report(self, built: Any) -> dict[str, Update]:
        """Return the norms of each matrix and of its change in the last step."""
        return {name: Update(*norms) for name, norms in built.changes.take(built.pieces).items()}


class MuonStep(torch.optim.Optimizer):
    """The torch optimizer. DeepSpeed gives each call of `step` all tensors or a part of them, the same part on every rank of a stage."""

    pieces: Pieces
    """Where the parameters are in these tensors. Must be set before the first step."""

    def __init__(self, optimizer: Muon, matrices: set[str], groups: list[dict], defaults: dict[str, Any]):
        """`matrices` are the names of the parameters that Muon takes."""
        super().__init__(groups, defaults)
        self._optimizer = optimizer
        self._matrices = matrices
        self._exchanges: dict[tuple[int, ...], MatrixExchange] = {}  # by the tensors that a call is given
        self.changes = Changes()
        """What a step that is reported changed."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all tensors that have a gradient."""
        given = [(group, tensor) for group in self.param_groups for tensor in group["params"] if tensor.grad is not None]
        blends: dict[str, Tensor] = {}
        for group, tensor in given:
            state = self._optimizer.state_of(self, tensor)
            state["step"] += 1
            for piece in self.pieces.of(tensor):
                weight, gradient, mean, mean_square = (
                    whole.view(-1)[piece.values] for whole in (tensor, tensor.grad, state["momentum"], state["exp_avg_sq"])
                )
                if piece.shard_slice.name in self._matrices:
                    mean.lerp_(gradient, 1 - group["momentum"])
                    blends[piece.shard_slice.name] = gradient.lerp(mean, group["momentum"])
                else:
                    states = {"step": state["step"], "exp_avg": mean, "exp_avg_sq": mean_square}
                    self._move(group, weight, adam_direction(states, gradient, group), piece)
        updates = self._orthogonalised([tensor for _, tensor in given], blends)
        for group, tensor in given:
            for piece in self.pieces.of(tensor):
                if (update := updates.get(piece.shard_slice.name)) is not None:
                    weight, update = tensor.view(-1)[piece.values], update.to(tensor.device)
                    if group["hold_zeros"]:  # their gradients are 0, but an orthogonalised matrix has no zeros there
                        update = update.masked_fill(weight == 0, 0)
                    self._move(group, weight, update, piece, 0.2 * math.sqrt(max(piece.shard_slice.shape)))

    def _move(self, group: dict, weight: Tensor, update: Tensor, piece: Piece, scale: float = 1.0) -> None:
        """Change the slice `weight` of a parameter, which is `piece`, by scale x update."""
        with self.changes.measured(self.pieces, piece, weight):
            apply_update(weight, update, group["lr"], group["weight_decay"], cautious=group["cautious"], scale=scale)

    def _orthogonalised(self, tensors: list[Tensor], blends: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's slices of the orthogonalised matrices that lie in `tensors`, given its slices of the matrices by name.

        `blends` is empty afterwards.
        """
        call = tuple(map(id, tensors))
        if call not in self._exchanges:
            names = [name for name in self.pieces.names_in(tensors) if name in self._matrices]
            self._exchanges[call] = MatrixExchange(self.pieces, names)
        exchange, device = self._exchanges[call], self.pieces.device
        precision = self._optimizer.settings.muon_precision
        in_bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
        like = torch.empty(0, dtype=torch.bfloat16 if in_bf16 else torch.float32, device=device)
        stacks, orthogonal = exchange.gather({name: blends.pop(name).to(like) for name in list(blends)}, like), []
        while stacks:  # blends and stacks are released as soon as they are read: they are as large as the matrices
            names, matrices = stacks.pop()
            orthogonal.append((names, newton_schulz(matrices)))
        return exchange.scatter(orthogonal, like)
