"""What goes into a checkpoint beside weights and moments; the rest of OptimizerState is proved by the layouts' tests."""

from types import SimpleNamespace

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from launch.checkpoints.state import whole_region
from launch.training.deepspeed_state import OptimizerState


def live(scale: float = 1.0) -> OptimizerState:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.loss_scaler = DynamicLossScaler(scale, scale_window=1000, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)
    engine = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 0, module=model)
    return OptimizerState(
        engine, lambda name, parameter: (tuple(parameter.shape), whole_region(parameter.shape)), lambda shard_slice, parameter: False
    )


def test_the_loss_scale_of_fp16_goes_on_where_it_was():
    there, here = live(2.0**16), live(2.0**16)
    scaler = there._optimizer.loss_scaler
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 1024.0, 40, 17, 1
    assert here.loss_scaler != there.loss_scaler
    here.begin_from(steps=3, loss_scaler=there.loss_scaler)
    assert here._optimizer.loss_scaler.__dict__ == scaler.__dict__


def test_before_the_first_step_the_moments_are_zero_and_the_steps_that_were_made_are_taken_over():
    state = live()
    assert state.steps == 0
    for _, numbers in state.visit(state.slices):
        assert not numbers["exp_avg"].any() and not numbers["exp_avg_sq"].any()
    state.begin_from(steps=7, loss_scaler=None)
    assert state.steps == 7
