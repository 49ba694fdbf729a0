"""The weights that a run with --init starts from: read one parameter at a time, into any layout, instead of fresh ones."""

import functools
from pathlib import Path

from torch import Tensor

from data.command_line import UserError
from launch.checkpoints.opening import OpenedModel, open_model
from launch.checkpoints.state import WEIGHT, ShardSlice
from model.config import ModelConfig
from model.transformer import layers, parameter_shapes

opened = functools.cache(open_model)
"""Open a model that a run starts from, once: its settings and its weights come from the same checkpoint."""


class InitialWeights:
    """Weights of another model that a run starts from. The optimizer's state reads them as it reads a checkpoint.

    Two parameters correspond if they have the same name in the same layer, where layers are counted by kind: an encoder may have a
    classifier or a token head that the other model does not have.
    """

    def __init__(self, path: str, config: ModelConfig):
        """Open the model at `path` for a run with `config`. Raises UserError if it cannot be opened or is quantized."""
        self.path = path
        self.opened: OpenedModel = opened(path)
        self.opened.refuse_quantized("a run starts from weights that are not")
        saved = {role: name for name, role in _roles(self.opened.config).items()}
        own = _roles(config)
        same_outputs = all(getattr(self.opened.config, name) == getattr(config, name) for name in ("num_classes", "token_head"))
        self._names = {name: saved[role] for name, role in own.items() if role in saved and (same_outputs or ".classes." not in role)}
        self.fresh = [name for name in own if name not in self._names]
        """Parameters of this model without a counterpart: they keep their fresh values. So do classes of another task."""
        self.unused = sorted(set(self.opened.state) - set(self._names.values()))
        """Parameters of the other model without a counterpart."""

    def read(self, wanted: ShardSlice, kind: str, into: Tensor) -> None:
        """Fill `into` [count] with the values of a slice; the optimizer's states start at zero. Raises UserError if shapes differ."""
        if kind != WEIGHT:
            into.zero_()
        elif wanted.name in self._names:
            whole = self.opened.state[self._names[wanted.name]]
            if tuple(whole.shape) != wanted.shape:
                raise UserError(
                    f"init {self.path} holds {self._names[wanted.name]} as {list(whole.shape)}; this model has {list(wanted.shape)}."
                )
            into.copy_(wanted.take_from(whole))

    def __str__(self) -> str:
        taken, step = len(self._names), self.opened.step
        parts = [f"{self.path}{f' (step {step:,})' if step is not None else ''}: {taken} of {taken + len(self.fresh)} parameters"]
        parts += [f"fresh: {', '.join(self.fresh)}"] if self.fresh else []
        parts += [f"not used: {', '.join(self.unused)}"] if self.unused else []
        return "; ".join(parts)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's file next to the other model."""
        return self.opened.tokenizer


def _roles(config: ModelConfig) -> dict[str, str]:
    """Return what each parameter is in any list of layers: its layer's kind, the count among layers of that kind, and its name inside."""
    kinds: dict[str, int] = {}
    role_of_child: dict[str, str] = {}
    for number, layer in enumerate(layers(config)):
        kind = layer.module.__name__
        child = str(number) if layer.tied_key is None else f"tied_modules.{layer.tied_key}"
        if child not in role_of_child:
            role_of_child[child] = f"{kind} {kinds.setdefault(kind, 0)}"
            kinds[kind] += 1
    children = {name: next(child for child in role_of_child if name.startswith(f"{child}.")) for name in parameter_shapes(config)}
    return {name: role_of_child[child] + name.removeprefix(child) for name, child in children.items()}
