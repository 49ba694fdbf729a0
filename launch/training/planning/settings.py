"""Settings of launch/plan.py: those of a run, and what it runs on. Nothing heavy is imported here."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from data.command_line import describe
from launch.training.recipe import read_settings_with_run
from launch.training.settings import RunSettings

ALIASES = {"--tokens": "--train_tokens"}
"""Other names of options, beside those of launch/pretrain.py."""


@dataclasses.dataclass(frozen=True)
class PlanSettings(RunSettings):
    """A run, and the devices that it is planned for."""

    gpus: Annotated[int, Ge(1), Lt(2**20)] = dataclasses.field(kw_only=True)
    """Number of devices, one for each rank."""
    device: Literal["h100", "h200", "a100-40gb", "a100-80gb", "b200", "mi300x", "cpu"] = "h100"
    """Kind of the devices. cpu: this machine, whose speed is measured for half a second."""
    nodes: Annotated[int, Ge(1), Lt(2**20)] | None = None
    """Number of nodes that the devices are in (default: as few as hold them with 8 in each)."""
    network: Literal["infiniband-400", "infiniband-200", "omni-path", "ethernet-100"] | None = None
    """Network between the nodes: eight adapters of 400 or 200 Gbit/s a node, or four or one of 100 Gbit/s (default: infiniband-400, for
    a100 infiniband-200, for cpu ethernet-100)."""
    price: Annotated[float, Ge(0)] | None = None
    """Price of a device for an hour, in any currency (default: no price is shown)."""
    power_share: Annotated[float, Gt(0), Le(1)] = 0.8
    """Share of the devices' thermal design power that they take on average."""
    pue: Annotated[float, Ge(1), Le(3)] = 1.2
    """Power usage effectiveness: energy of the data centre over that of the devices."""
    disk_speed: Annotated[float, Gt(0)] = 1.0
    """Speed at which each node writes its part of a checkpoint, GB/s."""

    @property
    def gpus_per_node(self) -> int:
        """Devices in each node."""
        return self.gpus // self.nodes if self.nodes else min(self.gpus, 8)

    def complaints(self) -> list[str]:
        """Return a message for each combination of settings that is invalid."""
        complaints = super().complaints()
        per_node = self.gpus_per_node
        if self.nodes and self.gpus % self.nodes:
            below = self.gpus // self.nodes * self.nodes
            nearest = f"{below} or {below + self.nodes}" if below else str(self.nodes)
            complaints.append(f"{describe(self, 'gpus')} is not a multiple of {describe(self, 'nodes')}. Nearest: --gpus {nearest}.")
        elif self.gpus % per_node:
            below = self.gpus // per_node * per_node
            complaints.append(
                f"{describe(self, 'gpus')} does not fill nodes of {per_node}. "
                f"Nearest: --gpus {below} or {below + per_node}; or give --nodes."
            )
        return complaints


OWN_OPTIONS = tuple(f"--{name}" for name in PlanSettings.__annotations__)
"""Options that launch/pretrain.py does not have."""


def read_plan_settings(arguments: Sequence[str]) -> PlanSettings:
    """Return the settings that a command line of launch/plan.py gives. Raises UserError with every complaint."""
    return read_settings_with_run(arguments, PlanSettings, "Plan a run: layouts, memory, time and cost.", ALIASES)
