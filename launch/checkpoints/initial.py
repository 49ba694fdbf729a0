"""The weights that a run starts from with --init: read a parameter at a time into whatever layout, in place of fresh ones."""

import functools
from pathlib import Path

from torch import Tensor

from data.command_line import UserError
from launch.checkpoints.opening import OpenedModel, open_model
from launch.checkpoints.state import KINDS, ShardSlice
from model.config import ModelConfig
from model.transformer import layers, parameter_shapes

opened = functools.cache(open_model)
"""A model that a run starts from; settings and weights are read of the same one, found once."""


class InitialWeights:
    """Another model's weights as the beginning of this one's: what OptimizerState reads as it reads a checkpoint.

    Parameters are the same where they have the same name inside the same layer of the list, counted by kind: an encoder may have
    a classifier, or a head for tokens, that the other has not.
    """

    def __init__(self, path: str, config: ModelConfig):
        self.path = path
        self.opened: OpenedModel = opened(path)
        self.opened.refuse_quantized("a run starts from weights that are not")
        there = {role: name for name, role in _roles(self.opened.config).items()}
        here = _roles(config)
        same_outputs = all(getattr(self.opened.config, name) == getattr(config, name) for name in ("num_classes", "token_head"))
        self._names = {name: there[role] for name, role in here.items() if role in there and (same_outputs or ".classes." not in role)}
        self.fresh = [name for name in here if name not in self._names]
        """Parameters of this model that the other has not: they stay as they were drawn. Classes of another task are not taken over."""
        self.unused = sorted(set(self.opened.state) - set(self._names.values()))
        """Parameters of the other that this model has not."""

    def read(self, wanted: ShardSlice, kind: str, into: Tensor) -> None:
        """Fill `into` [count] with the numbers of a shard_slice; moments begin at zero. Raises UserError where the shapes differ."""
        if kind != KINDS[0]:
            into.zero_()
        elif wanted.name in self._names:
            whole = self.opened.state[self._names[wanted.name]]
            if tuple(whole.shape) != wanted.shape:
                raise UserError(
                    f"init {self.path} holds {self._names[wanted.name]} as {list(whole.shape)}; this model has {list(wanted.shape)}."
                )
            into.copy_(wanted.of(whole))

    def __str__(self) -> str:
        taken, step = len(self._names), self.opened.step
        parts = [f"{self.path}{f' (step {step:,})' if step is not None else ''}: {taken} of {taken + len(self.fresh)} parameters"]
        parts += [f"fresh: {', '.join(self.fresh)}"] if self.fresh else []
        parts += [f"not used: {', '.join(self.unused)}"] if self.unused else []
        return "; ".join(parts)

    @property
    def tokenizer(self) -> Path | None:
        return self.opened.tokenizer


def _roles(config: ModelConfig) -> dict[str, str]:
    """Of each parameter, by name, its layer's kind and number among those, and its name inside: what it is called in any list."""
    kinds: dict[str, int] = {}
    of_child: dict[str, str] = {}
    for number, layer in enumerate(layers(config)):
        kind = layer.module.__name__
        child = str(number) if layer.tied_key is None else f"tied_modules.{layer.tied_key}"
        if child not in of_child:
            of_child[child] = f"{kind} {kinds.setdefault(kind, 0)}"
            kinds[kind] += 1
    children = {name: next(child for child in of_child if name.startswith(f"{child}.")) for name in parameter_shapes(config)}
    return {name: of_child[child] + name.removeprefix(child) for name, child in children.items()}
