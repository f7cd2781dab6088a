"""The training loop's own arithmetic against torch's and diffusers' plain forms, and what it waits for."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from diffusers.training_utils import EMAModel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.faults.small_run import options_of, train

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


def test_the_moving_average_is_diffusers(tmp_path):
    references = []

    def after_build(run):
        reference = EMAModel(
            run.unet.parameters(), decay=run.options.ema_max_decay, use_ema_warmup=True, power=0.75, foreach=False
        )
        references.append(reference)
        ours = run._average

        def average():
            ours()
            reference.step(run.unet.parameters())
            assert run.ema.state_dict().keys() == reference.state_dict().keys()
            assert run.ema.cur_decay_value == reference.cur_decay_value
            assert run.ema.optimization_step == reference.optimization_step

        run._average = average

    run = train(options_of(tmp_path / "run", max_train_steps=6), after_build=after_build)
    assert run.ema.optimization_step == 6
    for found, expected in zip(run.ema.shadow_params, references[0].shadow_params, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_fused_optimizer_is_the_plain_one(tmp_path):
    """Where there is a gradient: Adam makes whole steps of rounding errors too, in biases that a group norm undoes."""
    largest = {}

    def plain(run):
        for group in run.optimizer.param_groups:
            assert group["fused"]
            group["fused"] = None
        step = run.optimizer.step

        def watched():
            for name, parameter in run._bare_model.student.named_parameters():
                largest[name] = max(largest.get(name, 0.0), float(parameter.grad.abs().max()))
            step()

        run.optimizer.step = watched

    runs = [
        train(options_of(tmp_path / name, max_train_steps=6), after_build=after_build)
        for name, after_build in (("fused", lambda run: None), ("plain", plain))
    ]
    fused, expected = (dict(run._bare_model.student.named_parameters()) for run in runs)
    compared = [name for name, gradient in largest.items() if gradient > 1e-6]
    assert len(compared) >= 0.9 * len(expected)
    for name in compared:
        torch.testing.assert_close(fused[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers that are read from tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_but_the_guards_flags(tmp_path):
    """Between log lines and refreshes, that is; the flags are read by `tolist`, all in one, which is not counted."""
    reads, before = Reads(), {}

    def before_step(run, batch, losses):
        before[run.step] = reads.count

    options = options_of(tmp_path / "run", max_train_steps=9, log_every_steps=9, checkpointing_steps=9)
    with reads:
        train(options, before_step=before_step)
    # Projectors are refreshed after step 1 and after each even one: between backward of step n and that of n + 1.
    quiet = [before[step + 1] - before[step] for step in (2, 4, 6)]
    refreshing = [before[step + 1] - before[step] for step in (3, 5, 7)]
    assert quiet == [0, 0, 0]
    assert all(count > 0 for count in refreshing)  # the counter counts


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed-zero2", "DEEPSPEED")])
def test_accelerate_reads_the_configurations(name, kind):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.mixed_precision == "bf16"
    assert config.num_processes == 8
