"""The network: its block, the ordered list of layers for a configuration, and that list built as one module."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attention, CrossAttention
from model.cache import KeyValueCache
from model.config import ModelConfig, Part
from model.layers import (
    Classifier,
    EmbeddingNorm,
    FeedForward,
    FinalNorm,
    Head,
    HeadBias,
    Stream,
    TokenEmbedding,
    TokenTransform,
    TokenTypes,
    norm,
)
from model.positions import POSITION_LAYERS, AbsolutePositions

TIED_EMBEDDING = "embedding"
"""Key of the embedding where several entries of the list share it."""

Module = TypeVar("Module", bound=nn.Module)


class Block(nn.Module):
    """Self-attention, in the decoder of an encoder-decoder cross-attention, then feed-forward, each added to the residual stream.

    With `recompute` the backward pass runs the block's forward pass again instead of keeping its intermediate results.
    """

    def __init__(self, config: ModelConfig, layer_number: int, seed: int, recompute: bool = False, part: Part = "decoder"):
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        self.dropout = config.dropout
        self.recompute = recompute
        self.attention_norm = norm(config)
        self.attention = Attention(config, layer_number, seed, part)
        self.cross_attention: CrossAttention | None = None
        if part == "decoder" and config.architecture == "encoder_decoder":
            self.cross_attention_norm = norm(config)
            self.cross_attention = CrossAttention(config, layer_number, seed)
        self.feed_forward_norm = norm(config)
        self.feed_forward = FeedForward(config, layer_number, seed)

    def forward(self, stream: Stream, cache: KeyValueCache | None = None) -> Stream:
        """hidden [batch, seq, hidden] -> same; the other fields of the stream are unchanged."""
        if self.recompute and self.training and torch.is_grad_enabled():
            return stream._replace(hidden=checkpoint(self.transform, stream, use_reentrant=False))
        return stream._replace(hidden=self.transform(stream, cache))

    def transform(self, stream: Stream, cache: KeyValueCache | None = None) -> Tensor:
        """The stream -> its new hidden states.  [batch, seq, hidden]"""
        segments, table = stream.segments, stream.relative_table
        hidden = self.add(stream.hidden, self.attention_norm, lambda x: self.attention(x, segments, cache, table))
        if (cross_attention := self.cross_attention) is not None:
            encoding, source_segments = stream.encoding, stream.source_segments
            hidden = self.add(hidden, self.cross_attention_norm, lambda x: cross_attention(x, segments, encoding, source_segments, cache))
        return self.add(hidden, self.feed_forward_norm, self.feed_forward)

    def add(self, hidden: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
        """x + part(norm(x)) with the norm first (pre), or norm(x + part(x)) with the norm last (post)."""
        if self.norm_first:
            return hidden + F.dropout(part(norm(hidden)), self.dropout, self.training)
        return norm(hidden + F.dropout(part(hidden), self.dropout, self.training))


@dataclasses.dataclass(frozen=True)
class Layer:
    """One entry of the list of layers: how to build its module and how to call it."""

    module: Callable[..., nn.Module]
    arguments: tuple = ()
    tied_key: str | None = None
    """Key of a module that several entries share; None: the entry has its own."""
    forward: Callable[[nn.Module, Stream], Stream] | None = None
    """Called with (module, stream) instead of module(stream), for the later uses of a shared module."""
    reads_cache: bool = False
    """True if generation calls module(stream, cache)."""


def as_head(embedding: nn.Module, stream: Stream) -> Stream:
    """Use the tied embedding as the head: vectors to logits."""
    return embedding(stream, use="head")


def as_target(embedding: nn.Module, stream: Stream) -> Stream:
    """Use the shared embedding where the decoder begins: embed the target and keep the encoder's output for cross-attention."""
    return embedding(stream, use="target")


def layers(config: ModelConfig, seed: int = 0, recompute: bool = False) -> list[Layer]:
    """The network as an ordered list. The pipeline, ZeRO-3, the plain module and compression are all built from it."""
    is_pair = config.architecture == "encoder_decoder"
    first_part: Part = "decoder" if config.architecture == "decoder" else "encoder"
    tied_key = TIED_EMBEDDING if is_pair or (config.tie_embeddings and config.token_head) else None
    entries = [Layer(TokenEmbedding, (config, seed), tied_key)]
    if config.token_types:
        entries.append(Layer(TokenTypes, (config, seed)))
    entries += _positions(config, seed, first_part)
    if config.architecture == "encoder":
        entries.append(Layer(EmbeddingNorm, (config,)))
    entries += _blocks(config, seed, recompute, range(config.num_layers), first_part)
    if is_pair:
        entries.append(Layer(TokenEmbedding, (config, seed), tied_key, as_target))
        entries += _positions(config, seed, "decoder")
        entries += _blocks(config, seed, recompute, range(config.num_layers, config.total_blocks), "decoder")
    if config.num_classes:
        entries.append(Layer(Classifier, (config, seed)))
    if not config.token_head:
        return entries
    if config.architecture == "encoder":
        entries.append(Layer(TokenTransform, (config, seed)))
    entries.append(Layer(TokenEmbedding, (config, seed), tied_key, as_head) if config.tie_embeddings else Layer(Head, (config, seed)))
    if config.architecture == "encoder":
        entries.append(Layer(HeadBias, (config,)))
    return entries


def first_uses(config: ModelConfig) -> Iterator[tuple[str, Layer]]:
    """Each module of the list once, with the prefix of its parameters' names."""
    seen = set()
    for number, layer in enumerate(layers(config)):
        name = _name_of(number, layer)
        if name not in seen:
            seen.add(name)
            yield name, layer


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the network's parameters by name, in their order; takes no memory for weights."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Transformer(config).named_parameters()}


def _name_of(number: int, layer: Layer) -> str:
    """The child name of an entry's module, as DeepSpeed's PipelineModule has it."""
    return f"tied_modules.{layer.tied_key}" if layer.tied_key else str(number)


def _positions(config: ModelConfig, seed: int, part: Part) -> list[Layer]:
    module = POSITION_LAYERS.get(config.positions)
    if module is None:
        return []
    return [Layer(module, (config, seed, part), reads_cache=part == "decoder" and issubclass(module, AbsolutePositions))]


def _blocks(config: ModelConfig, seed: int, recompute: bool, numbers: range, part: Part) -> list[Layer]:
    """One stack of blocks, and the final norm if the blocks are pre-norm."""
    stack = [Layer(Block, (config, number, seed, recompute, part), reads_cache=part == "decoder") for number in numbers]
    return [*stack, Layer(FinalNorm, (config,))] if config.norm_position == "pre" else stack


def select_outputs(config: ModelConfig, stream: Stream) -> Tensor | tuple[Tensor, Tensor]:
    """The network's outputs from the stream after its last layer: token logits, with classes the pair (token logits, class logits)."""
    if not config.num_classes:
        return stream.hidden
    assert stream.class_logits is not None
    return stream.hidden, stream.class_logits


def load_into_meta(module: Module, weights: Mapping[str, Tensor], device: torch.device | str) -> Module:
    """Give a module that was built on the meta device these tensors as its weights, without a copy, and set its eval mode."""
    module.load_state_dict(weights, assign=True)
    for buffer in module.buffers():  # tables of positions have real numbers even on the meta device
        buffer.data = buffer.data.to(device)
    return module.eval()


class Transformer(nn.Module):
    """The list of layers as one module.

    A decoder or encoder takes (tokens, segments[, token types]), an encoder-decoder (source, source segments, tokens, segments),
    each [batch, seq]. The result is logits [batch, seq, vocab]; with classes a pair of them and class logits [batch, classes],
    where the first has no meaning if there is no token head.

    The children's names are those of DeepSpeed's PipelineModule ("0", "1", ...; "tied_modules.<key>"), so parameter names are the
    same in both.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, recompute: bool = False):
        super().__init__()
        self.config = config
        self.tied_modules = nn.ModuleDict()
        self._layers = [(_name_of(number, layer), layer) for number, layer in enumerate(layers(config, seed, recompute))]
        for name, layer in self._layers:
            if layer.tied_key is None:
                self.add_module(name, layer.module(*layer.arguments))
            elif layer.tied_key not in self.tied_modules:
                self.tied_modules[layer.tied_key] = layer.module(*layer.arguments)
        self._decoder_start = next((number for number, (_, layer) in enumerate(self._layers) if layer.forward is as_target), 0)

    def forward(self, *inputs: Tensor, cache: KeyValueCache | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits, with classes (logits, class logits). With a cache, tokens are the new ones, and the cache grows by them."""
        stream = Stream.from_tensors(inputs)
        if cache is None:
            return select_outputs(self.config, self._run(self._layers, stream))
        num_tokens = (stream.hidden if stream.target is None else stream.target).shape[1]
        if self._decoder_start:  # the source is encoded once
            if cache.encoding is None:
                cache.encoding = self._run(self._layers[: self._decoder_start], stream).hidden
            stream = stream._replace(hidden=cache.encoding)
        outputs = select_outputs(self.config, self._run(self._layers[self._decoder_start :], stream, cache))
        cache.length += num_tokens
        return outputs

    def _run(self, part: list[tuple[str, Layer]], stream: Stream, cache: KeyValueCache | None = None) -> Stream:
        for name, layer in part:
            module = self.get_submodule(name)
            if layer.forward is not None:
                stream = layer.forward(module, stream)
            elif layer.reads_cache and cache is not None:
                stream = module(stream, cache)
            else:
                stream = module(stream)
        return stream

    @classmethod
    def from_state(
        cls, config: ModelConfig, state: Mapping[str, Tensor], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Transformer":
        """The network with these weights, in its eval mode. Each tensor of `state` is read once."""
        with torch.device("meta"):
            network = cls(config)
        return load_into_meta(network, {name: tensor.to(device, dtype) for name, tensor in state.items()}, device)

    def blocks(self) -> list[Block]:
        """The blocks in their order."""
        return [child for child in self.children() if isinstance(child, Block)]
