"""The training loop's own arithmetic against torch's and diffusers' plain forms, and what it waits for."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vkd_gen as vkd
from tests.faults.small_run import options_of, train
from tests.recipes.conftest import SHORT_STUDENT, read_metrics, recipe_runner
from vkd_gen.training.loop import Loop

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


def test_what_a_run_ends_with_is_the_average_over_its_steps(tmp_path):
    """With diffusers' warm-up of the decay: 1 - (1 + step)^-0.75, 0 at first."""
    seen = []

    def before_step(loop, batch, losses):
        seen.append([parameter.detach().clone() for parameter in loop.network.parameters()])

    loop = train(options_of(tmp_path / "run", max_train_steps=6), before_step=before_step)
    ended = load_file(tmp_path / "run" / "weights.safetensors")
    names = [name for name, _ in loop.network.named_parameters()]
    average = seen[0]
    for step, weights in enumerate([*seen[1:], [ended[f"raw/student.{name}"] for name in names]]):
        share = (1 + step) ** -0.75
        average = [old + share * (new - old) for old, new in zip(average, weights, strict=True)]
    for name, expected in zip(names, average, strict=True):
        torch.testing.assert_close(ended[f"ema/{name}"], expected, rtol=1e-5, atol=1e-6)


def test_a_line_of_the_log_is_the_mean_over_its_steps(tmp_path):
    for every in (1, 5):
        train(options_of(tmp_path / str(every), max_train_steps=5, log_every_steps=every))
    lines, (mean,) = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "5")
    for name in ("loss/total", "gradient_norm"):
        assert mean[name] == pytest.approx(sum(line[name] for line in lines) / 5, rel=1e-6)


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(tmp_path):
    norms = []

    def after_build(loop):
        def measure(*_):
            gradients = [parameter.grad for parameter in loop.module.parameters() if parameter.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

        loop.optimizer.optimizer.register_step_pre_hook(measure)

    train(options_of(tmp_path / "run", max_train_steps=2, max_grad_norm=0.01), after_build=after_build)
    assert norms == pytest.approx([0.01] * 2, rel=1e-3)
    assert read_metrics(tmp_path / "run")[-1]["gradient_norm"] > 0.01


def test_the_fused_optimizer_is_the_plain_one(tmp_path):
    """Where there is a gradient: Adam makes whole steps of rounding errors too, in biases that a group norm undoes."""
    largest = {}

    def plain(run):
        for group in run.optimizer.param_groups:
            assert group["fused"]
            group["fused"] = None

        def watch(*_):
            for name, parameter in run._bare_module.student.named_parameters():
                largest[name] = max(largest.get(name, 0.0), float(parameter.grad.abs().max()))

        run.optimizer.optimizer.register_step_pre_hook(watch)

    runs = [
        train(options_of(tmp_path / name, max_train_steps=6), after_build=after_build)
        for name, after_build in (("fused", lambda run: None), ("plain", plain))
    ]
    fused, expected = (dict(run._bare_module.student.named_parameters()) for run in runs)
    compared = [name for name, gradient in largest.items() if gradient > 1e-6]
    assert len(compared) >= 0.9 * len(expected)
    for name in compared:
        torch.testing.assert_close(fused[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


ATEN = torch.ops.aten
WAITING_OPERATORS = {
    *(ATEN._local_scalar_dense, ATEN.equal, ATEN.is_nonzero, ATEN.item),
    *(ATEN.nonzero, ATEN.masked_select, ATEN._unique2, ATEN.unique_dim, ATEN.unique_consecutive, ATEN.bincount),
    *(ATEN._linalg_check_errors, ATEN._linalg_eigh, ATEN._linalg_svd, ATEN.linalg_eig, ATEN.linalg_lstsq),
}
"""Their result, or its shape, is needed on the host, or cusolver waits."""
WAITING_CALLS = {"tolist", "numpy", "__array__", "cpu"}
"""Of tensors; on a CPU no operator comes of them. `tensor` and `as_tensor` with a device copy to it and wait."""


class Calls(TorchFunctionMode):
    """Counts calls that wait where the tensor is on a GPU, whether an operator comes of them here or not."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        makes = name in ("tensor", "as_tensor") and kwargs.get("device") is not None
        if name in WAITING_CALLS or makes:
            self.waits.append(name)
        return function(*args, **kwargs)


class Waits(TorchDispatchMode):
    """Notes in `found` what makes the host wait for a GPU, on any device, while its context lasts."""

    def __init__(self):
        super().__init__()
        self.found = []
        self._calls = Calls(self.found)

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, operator = kwargs or {}, function.overloadpacket
        by_mask = operator in (ATEN.index, ATEN.index_put, ATEN.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counts = operator is ATEN.repeat_interleave and kwargs.get("output_size") is None
        if operator in WAITING_OPERATORS or by_mask or counts:
            self.found.append(str(function))
        return function(*args, **kwargs)


DELIBERATE = {
    "item": lambda losses: losses["total"].item(),
    "float": lambda losses: float(losses["total"]),
    "if": lambda losses: 1 if losses["total"] > 0 else 0,
    "tolist": lambda losses: losses["total"].tolist(),
    "cpu": lambda losses: losses["total"].cpu(),
    "numpy": lambda losses: losses["total"].detach().numpy(),
    "nonzero": lambda losses: losses["total"][None].nonzero(),
    "mask": lambda losses: losses["total"][None][losses["total"][None] > 0],
    "equal": lambda losses: torch.equal(losses["total"], losses["total"]),
    "solve": lambda losses: torch.linalg.solve(torch.eye(2), losses["total"].detach() * torch.eye(2)),
    "inv": lambda losses: torch.linalg.inv(torch.eye(2)),
    "cholesky": lambda losses: torch.linalg.cholesky(torch.eye(2)),
    "tensor": lambda losses: torch.tensor(1.0, device=losses["total"].device),
    "repeat": lambda losses: torch.arange(2).repeat_interleave(torch.tensor([1, 2])),
}


@pytest.mark.parametrize("name", DELIBERATE)
def test_a_wait_is_noted(name):
    with Waits() as waits:
        losses = {"total": (torch.rand(()) * 2).add(1)}
        assert not waits.found
        DELIBERATE[name](losses)
        assert waits.found


def test_a_step_waits_once_between_log_lines_and_refreshes(pipeline_folder, tmp_path, monkeypatch):
    """The recipe's own step by its default method reads its figures at once; and the test notices what else waits."""
    waits, before, deliberate = Waits(), {}, {7: "item", 8: "tolist"}
    batches, losses_of = Loop.__iter__, vkd.distillation_losses

    def counted(loop):
        for batch in batches(loop):
            before[loop.step] = len(waits.found)
            yield batch

    def losses_with_waits(*args, **kwargs):
        losses = losses_of(*args, **kwargs)
        step = max(before, default=-1)
        if step in deliberate:
            DELIBERATE[deliberate[step]](losses)
        return losses

    monkeypatch.setattr(Loop, "__iter__", counted)
    monkeypatch.setattr(vkd, "distillation_losses", losses_with_waits)
    # On a CPU it looks at the timesteps, where that is no wait; on a GPU it does not.
    monkeypatch.setattr("vkd_gen.distillation._check_timesteps", lambda *_: None)
    flags = [
        *SHORT_STUDENT,
        "--extractor",
        "none",
        "--no-score_teacher",
        "--teacher",
        pipeline_folder,
        "--output_dir",
        tmp_path / "run",
    ]
    flags += ["--max_train_steps", 12, "--log_every_steps", 10, "--projector_refresh_steps", 5]
    flags += ["--max_train_samples", 8, "--feature_decay_end", 1]  # features to the end
    with waits:
        recipe_runner(monkeypatch, tmp_path)("train_student_unet", *flags)
    counts = {step: before[step + 1] - before[step] for step in range(1, 11)}
    # Step n + 1 is made between batch n and the next. After step 1 and each fifth one projectors are refreshed; the
    # tenth writes a log line too.
    assert [step for step, count in counts.items() if count == 1] == [1, 2, 3, 5, 6, 10]
    assert (counts[7], counts[8]) == (2, 2)


def test_accelerate_reads_the_configuration():
    config = load_config_from_file(str(CONFIGS / "ddp.yaml"))
    assert config.distributed_type == "MULTI_GPU"
    assert config.mixed_precision == "bf16"
    assert config.num_processes == 8
