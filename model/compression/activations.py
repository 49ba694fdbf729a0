"""Inputs of linear layers rounded while a network runs, laid over it from outside: the layers know nothing of it."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from model.compression.grids import fake_quantized_rows
from model.compression.packed import Activations, Scheme
from model.walk import Step


def quantize_activations(module: nn.Module, kinds: Mapping[str, Activations]) -> None:
    """Round what goes into linear layers of a module, by their names in it: each token by a scale of its own."""
    for name, kind in kinds.items():
        if kind != "none":
            module.get_submodule(name).register_forward_pre_hook(_rounded_to(kind))


def rounding_inputs(schemes: Mapping[str, Scheme]) -> Callable[[Step], None]:
    """The same for each step of a walk, as model.walk.outputs asks for it; schemes by the names of weights."""

    def prepare(step: Step) -> None:
        here = [name for name in step.parameters if name in schemes]
        kinds = {name.removeprefix(f"{step.name}.").removesuffix(".weight"): schemes[name].activations for name in here}
        quantize_activations(step.module, kinds)

    return prepare


def _rounded_to(kind: Activations) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    return lambda module, inputs: (fake_quantized_rows(inputs[0], kind),)  # type: ignore[arg-type]
