"""Compare the planner with published runs: python launch/benchmarks/planner.py [--picture .readme/planner.svg]

The runs are in published_runs.csv. Constants that a plan cannot know from a model's shape (speeds, and the memory of a process beside its
tensors) are fitted on a random part of a source's runs, and errors are those of its other runs.

- BLOOM: fitted on a quarter. Rows whose memory a note of the source doubts are not fitted, but their errors count.
- llm-foundry: three speeds for each device, fitted on a quarter of its runs.
- Memory of nanotron and torchtitan: few runs, so each is predicted by a fit to all others.
- MFU of nanotron: predicted by the speeds that launch/plan.py has; nothing is fitted to these runs.

Nothing is trained, and it takes seconds on one core. The last lines are the fits to all runs, which launch/training/planning/ holds.
"""

from collections.abc import Sequence

from data.command_line import read_settings, run_script
from launch.benchmarks.settings import PlannerSettings


def main(arguments: Sequence[str]) -> int:
    """Print the table, draw the picture if it is wanted, and return the exit status."""
    settings = read_settings(PlannerSettings, arguments, "Compare the planner with published runs.")

    # Torch and the fits are imported only now, so that --help and mistakes in the settings answer at once.
    from launch.benchmarks.planner_table import compare

    compare(settings)
    return 0


if __name__ == "__main__":
    run_script(main)
