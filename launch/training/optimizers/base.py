"""The base class of optimizers: all that the engine, checkpoints, the plan and DeepSpeed's JSON need to know about one."""

import abc
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from launch.checkpoints.state import WEIGHT, kinds_in, optimizer_name_in
from launch.training.optimizers.pieces import Pieces
from launch.training.settings import OptimizerSettings

WEIGHT_BYTES = 4
"""Size of a float32 weight, which the optimizer updates and a checkpoint stores."""


class Update(NamedTuple):
    """Figures about the last update of one parameter."""

    weight_norm: float | None = None
    """Norm of the parameter before the update; None if it is not known."""
    change_norm: float | None = None
    """Norm of the change; None if it is not known."""
    trust_ratio: float | None = None
    """Factor of the learning rate of LAMB and LARS; None for other optimizers."""


def scalars_of(updates: Mapping[str, Update]) -> dict[str, float]:
    """Return scalars about the last updates, by parameter, of all parameters of a model."""
    scalars: dict[str, float] = {}
    if ratios := [update.trust_ratio for update in updates.values() if update.trust_ratio is not None]:
        scalars |= {"trust_ratio_min": min(ratios), "trust_ratio_median": median(ratios), "trust_ratio_max": max(ratios)}
    known = [(one.weight_norm, one.change_norm) for one in updates.values() if one.weight_norm is not None and one.change_norm is not None]
    if total := math.hypot(*(weight for weight, _ in known)):
        scalars["relative_update"] = math.hypot(*(change for _, change in known)) / total
    return {f"optimizer/{name}": value for name, value in scalars.items()}


class Optimizer(abc.ABC):
    """An optimizer with its settings. DeepSpeed drives the torch optimizer that `build` returns, in every layout.

    The defaults below fit an optimizer that keeps, as torch's do, its states and a tensor "step" for each tensor that it updates.
    """

    name: ClassVar[str]
    """Name in OPTIMIZERS and in checkpoints."""
    states: ClassVar[Mapping[str, int]]
    """Bytes per parameter of each state, in the order in which checkpoints store them. In files every state is float32."""
    json_type: ClassVar[str]
    """Value of `optimizer.type` in DeepSpeed's JSON."""
    json_parameters: ClassVar[Mapping[str, tuple[str, ...]]]
    """The fields of OptimizerSettings that this optimizer reads, by their key in `optimizer.params` of DeepSpeed's JSON."""

    has_adamw_rates: ClassVar[bool] = False
    """True if learning rate and weight decay mean what they mean in AdamW, so that published values for AdamW fit."""
    resumes_from: ClassVar[tuple[str, ...]] = ()
    """Names of other optimizers whose states mean the same: with --allow_changes, a run resumes from their checkpoints."""
    needs_pieces: ClassVar[bool] = False
    """True if a step needs whole parameters, of which a rank may hold only a part. The engine then calls `attach`."""

    def __init__(self, settings: OptimizerSettings):
        self.settings = settings

    @abc.abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the torch optimizer of the parameters of `model`, with learning rate 0: the engine sets it before each step."""

    def attach(self, built: torch.optim.Optimizer, pieces: Pieces) -> None:
        """Give `built` the map of parameters in the tensors that it updates. Every rank calls this once, after DeepSpeed has made them."""
        built.pieces = pieces  # type: ignore[attr-defined]  # our own torch optimizers have it

    def report(self, built: torch.optim.Optimizer) -> Mapping[str, Update]:
        """Return figures about the last step for the parameters of this rank's pipeline stage, by name. Every rank calls this together.

        It is asked for in steps that are logged, and only if `needs_pieces`: lamb has all figures of an Update, lars the trust ratio, muon
        the two norms. The other optimizers exchange nothing and report nothing.
        """
        return {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the tensors that a checkpoint stores for each parameter: the weight, then the states."""
        return WEIGHT, *self.states

    @property
    def state_bytes(self) -> int:
        """Bytes of all states per parameter, in memory."""
        return sum(self.states.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint per parameter."""
        return WEIGHT_BYTES * len(self.kinds)

    def describe(self) -> str:
        """Return the name and the settings that this optimizer reads, without the learning rate."""
        settings, fields = self.settings, [field for fields in self.json_parameters.values() for field in fields]
        numbers = [f"{field} {getattr(settings, field):g}" for field in fields if field not in ("learning_rate", "weight_decay")]
        decay = ["weight_decay", *(["independent"] if settings.decay == "independent" else []), f"{settings.weight_decay:g}"]
        return ", ".join([self.name, *numbers, ("cautious " if settings.cautious_decay else "") + " ".join(decay)])

    def record(self) -> dict[str, object]:
        """Return the manifest's entries about this optimizer, which launch/checkpoints/state.py reads."""
        return {"optimizer_name": self.name, "optimizer_states": list(self.states), "optimizer_description": self.describe()}

    def refusal_of(self, checkpoint: Path, manifest: dict) -> str | None:
        """Return a message if the states in a checkpoint are not those of this optimizer."""
        saved = optimizer_name_in(manifest)
        if saved in (self.name, *self.resumes_from) and kinds_in(manifest) == self.kinds:
            return None
        return (
            f"{checkpoint} holds the state of the optimizer {saved}, which {self.name} cannot use. Resume with optimizer.name {saved}, or "
            "start another run from its weights with --init and another --output."
        )

    def json_values(self) -> dict[str, object]:
        """Return the values of `optimizer.params` in DeepSpeed's JSON."""
        values = {key: [getattr(self.settings, field) for field in fields] for key, fields in self.json_parameters.items()}
        return {key: value if len(value) > 1 else value[0] for key, value in values.items()}

    def state_of(self, built: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
        """Return the state of one tensor that `built` updates; before the first step it is created as zeros, as torch does."""
        state = built.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            state |= {name: torch.zeros_like(tensor, requires_grad=False) for name in self.states}
        return state

    def steps(self, built: torch.optim.Optimizer) -> int:
        """Return the number of steps that changed weights."""
        return max((int(state["step"]) for state in built.state.values() if "step" in state), default=0)

    def set_steps(self, built: torch.optim.Optimizer, steps: int) -> None:
        """Continue counting at `steps`."""
        for state in built.state.values():
            state["step"].fill_(steps)


def split_by_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the parameters of `model` as groups for a torch optimizer: matrices with weight decay, vectors (biases, norms) without.

    A stage of a pipeline may have only one of the two groups.
    """
    matrices = [parameter for parameter in model.parameters() if is_matrix(parameter)]
    vectors = [parameter for parameter in model.parameters() if not is_matrix(parameter)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def is_matrix(parameter: nn.Parameter) -> bool:
    """True if a parameter has two or more dimensions. Under ZeRO-3 its own shape is that of its partition; ds_shape is the whole."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
