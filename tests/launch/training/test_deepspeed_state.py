"""The part of OptimizerState that the tests of layouts do not show: the loss scale, and the state before the first step."""

from types import SimpleNamespace

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from launch.checkpoints.state import whole_region
from launch.training.deepspeed_state import OptimizerState
from launch.training.optimizers import optimizer_for
from launch.training.settings import OptimizerSettings


def state_of_new_model(scale: float = 1.0) -> OptimizerState:
    model = torch.nn.Linear(3, 2)
    optimizer = optimizer_for(OptimizerSettings())
    built = optimizer.build(model)
    built.loss_scaler = DynamicLossScaler(scale, scale_window=1000, min_scale=1.0, delayed_shift=2, consecutive_hysteresis=False)
    engine = SimpleNamespace(optimizer=built, zero_optimization_stage=lambda: 0, module=model)
    shape_and_region = lambda name, parameter: (tuple(parameter.shape), whole_region(parameter.shape))  # noqa: E731
    return OptimizerState(engine, optimizer, shape_and_region, lambda shard_slice, parameter: False)


def test_resume_restores_the_loss_scale_of_fp16():
    saved, resumed = state_of_new_model(2.0**16), state_of_new_model(2.0**16)
    scaler = saved._zero.loss_scaler
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter, scaler.cur_hysteresis = 1024.0, 40, 17, 1
    assert resumed.loss_scaler != saved.loss_scaler
    resumed.resume(steps=3, loss_scaler=saved.loss_scaler)
    assert resumed._zero.loss_scaler.__dict__ == scaler.__dict__


def test_state_starts_at_zero_and_resume_sets_the_number_of_steps():
    state = state_of_new_model()
    assert state.steps == 0
    for _, tensors in state.visit(state.slices):
        assert not tensors["exp_avg"].any() and not tensors["exp_avg_sq"].any()
    state.resume(steps=7, loss_scaler=None)
    assert state.steps == 7
