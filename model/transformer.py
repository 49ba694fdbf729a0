"""The ordered list of layers for a config, and the same list built as one module."""

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import Block, FinalNorm, Head, KeyValueCache, Passed, Positions, TokenEmbedding

TIED_EMBEDDING = "embedding"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One entry of the list: how to build it, and, where it shares a module with another entry, under which key."""

    module: Callable[..., nn.Module]
    arguments: tuple = ()
    tied_key: str | None = None
    forward: Callable | None = None
    """What to call in place of the module's forward (a tied module's second use): (module, inputs) -> outputs."""


def as_head(embedding: nn.Module, inputs: Passed) -> Passed:
    """The tied embedding's second use: vectors to logits."""
    return embedding(inputs, as_head=True)


def layers(config: ModelConfig, seed: int = 0, recompute: bool = False) -> list[Layer]:
    """The network as data, in order. The pipeline, ZeRO-3, the plain module and compression all read this list."""
    tied_key = TIED_EMBEDDING if config.tie_embeddings else None
    entries = [Layer(TokenEmbedding, (config, seed), tied_key)]
    if config.positions != "rotary":
        entries.append(Layer(Positions, (config, seed)))
    entries += [Layer(Block, (config, number, seed, recompute)) for number in range(config.num_layers)]
    if config.norm_position == "pre":
        entries.append(Layer(FinalNorm, (config,)))
    if config.tie_embeddings:
        entries.append(Layer(TokenEmbedding, (config, seed), tied_key, as_head))
    else:
        entries.append(Layer(Head, (config, seed)))
    return entries


class Transformer(nn.Module):
    """The list as one module: (token ids, segments) [batch, seq] -> logits [batch, seq, vocab].

    Children bear the names that DeepSpeed's PipelineModule gives them ("0", "1", ...; "tied_modules.<key>"), so parameter
    names are the same in both.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, recompute: bool = False):
        super().__init__()
        self.tied_modules = nn.ModuleDict()
        self._steps: list[tuple[str, Callable | None]] = []
        for number, layer in enumerate(layers(config, seed, recompute)):
            if layer.tied_key is None:
                self.add_module(str(number), layer.module(*layer.arguments))
                self._steps.append((str(number), layer.forward))
            else:
                if layer.tied_key not in self.tied_modules:
                    self.tied_modules[layer.tied_key] = layer.module(*layer.arguments)
                self._steps.append((f"tied_modules.{layer.tied_key}", layer.forward))

    def forward(self, tokens: Tensor, segments: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        passed = tokens, segments
        for name, forward in self._steps:
            module = self.get_submodule(name)
            passed = module(passed, cache) if forward is None else forward(module, passed)
        if cache is not None:
            cache.length += tokens.shape[1]
        return passed[0]

    def blocks(self) -> list[Block]:
        return [child for child in self.children() if isinstance(child, Block)]
