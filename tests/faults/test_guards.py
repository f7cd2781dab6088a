"""What is not finite is skipped, counted and named; what has collapsed is named."""

import os

import pytest
import torch

from tests.conftest import tiny_unet
from tests.faults.small_run import end_pair, error_of, options_of, train
from tests.recipes.conftest import read_metrics, without_times
from vkd_gen import (
    LinearProjector,
    OrthogonalProjector,
)
from vkd_gen.training.guards import Watch, check_state, projector_fault
from vkd_gen.training.run_folder import RunFolder


def poison(steps, *, rank=0, term="output"):
    """A term of the loss that is not a number in certain steps of one process."""

    def before_step(run, batch, losses):
        if run.step in steps and int(os.environ.get("RANK", "0")) == rank:
            losses[term] = losses[term] * torch.nan
            losses["total"] = losses["total"] + losses[term]

    return before_step


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


def snapshot(run):
    parts = [*run._bare_module.student.state_dict().values(), *run.ema.shadow_params]
    parts += [value for state in run.optimizer.state.values() for value in state.values()]
    return [part.clone() for part in parts]


def test_a_gradient_alone_that_is_not_finite_skips_the_step(tmp_path, capsys):
    def before_step(loop, batch, losses):
        if loop.step == 3:
            loop._parameters[0].register_hook(lambda gradient: gradient * (torch.inf if loop.step == 3 else 1))

    loop = train(options_of(tmp_path / "run", max_train_steps=6), before_step=before_step)
    assert check_state(loop._bare_module, loop._parameters) is None
    (line,) = told(capsys)
    assert line.startswith("step 4 is skipped: process 0: all losses are finite, ")


def told(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "is skipped" in line]


def stop_after(step, before_step):
    def stop(run, batch, losses):
        before_step(run, batch, losses)
        if run.step == step:
            raise KeyboardInterrupt

    return stop


def test_a_step_that_is_not_finite_is_skipped_counted_and_told(tmp_path, capsys):
    seen = {}

    def before_step(run, batch, losses):
        seen[run.step] = snapshot(run)
        poison({3})(run, batch, losses)

    run = train(options_of(tmp_path / "run"), before_step=before_step)
    assert all(torch.equal(before, after) for before, after in zip(seen[3], seen[4], strict=True))
    assert not all(torch.equal(before, after) for before, after in zip(seen[4], seen[5], strict=True))
    assert run.step == 12
    lines = read_metrics(tmp_path / "run")
    assert [line.get("skipped_steps", 0) for line in lines] == [1, 0, 0]
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in lines)
    (line,) = told(capsys)
    assert line.startswith("step 4 is skipped: process 0: not finite are the losses total, output, ")
    assert "gradients are not finite" in line
    assert "at timesteps" in line


def test_a_skipped_step_is_the_same_after_a_resumption(tmp_path):
    """The count and the sums between two log lines travel with the checkpoint."""
    steps = poison({1, 4, 7})
    straight = train(options_of(tmp_path / "straight", log_every_steps=12), before_step=steps)
    options = options_of(tmp_path / "run", log_every_steps=12)
    with pytest.raises(KeyboardInterrupt):
        train(options, before_step=stop_after(10, steps))
    resumed = train(options, before_step=steps)
    one, other = (without_times(read_metrics(tmp_path / name))[-1] for name in ("run", "straight"))
    assert one == other
    assert one["skipped_steps"] == 3
    for first, second in zip(snapshot(resumed), snapshot(straight), strict=True):
        assert torch.equal(first, second)


def break_layer(layer, steps, *, rank=0):
    """In certain steps of one process a layer of the student gives out what is not a number."""

    def after_build(run):
        if int(os.environ.get("RANK", "0")) == rank:
            module = run._bare_module.get_submodule(layer)
            module.register_forward_hook(lambda *given: given[-1] * torch.nan if run.step in steps else None)

    return after_build


def train_with_a_broken_layer(options, layer, steps, rank):
    run = train(options, after_build=break_layer(layer, steps, rank=rank))
    assert run.step == 12
    assert check_state(run._bare_module, run._parameters) is None


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


LAYERS = ["student.conv_in", "student.mid_block.resnets.0.conv1", "student.conv_out"]


@pytest.mark.parametrize(
    ("layer", "rank"),
    [
        (LAYERS[1], None),
        *(slow(layer, rank) for layer in LAYERS for rank in (None, 0, 1)),
    ],
)
def test_a_layer_that_is_broken_for_some_steps_is_recovered_from(layer, rank, tmp_path, capsys):
    """Projectors and their statistics, which see the layer's output, are sound afterwards too; in one process of two
    as in one alone."""
    steps = {3, 7, 8}
    if rank is None:
        train_with_a_broken_layer(options_of(tmp_path / "run"), layer, steps, 0)
        assert [line.split(" is skipped")[0] for line in told(capsys)] == ["step 4", "step 8"]
    else:
        options = options_of(tmp_path / "run", train_batch_size=2)
        end_pair(tmp_path / "output", train_with_a_broken_layer, options, layer, steps, rank)
    assert [line.get("skipped_steps", 0) for line in read_metrics(tmp_path / "run")] == [1, 2, 0]


def test_too_many_in_a_row_stop_with_a_diagnosis(tmp_path):
    options = options_of(tmp_path / "run", max_skipped_steps=2)
    layer = "student.mid_block.resnets.0.conv1"
    with pytest.raises(ValueError) as error:
        train(options, after_build=break_layer(layer, range(4, 12)))
    message = str(error.value)
    assert message.startswith("stopped at step 7: 3 steps in a row had a loss or a gradient that is not finite")
    assert "feature/mid_block" in message
    assert f"the first layer with such an output is {layer}," in message
    assert "at timesteps" in message
    assert "checkpoint-6 is kept" in message
    point = RunFolder(tmp_path / "run").resume_point("latest")
    averages, counts = (torch.load(point / f"custom_checkpoint_{n}.pkl", weights_only=True) for n in (2, 1))
    assert all(value.isfinite().all() for value in averages["shadow_params"])
    assert counts["skipped_in_a_row"] == 2
    with pytest.raises(ValueError, match="stopped at step 7: 3 steps in a row"):  # a restart is no way around it
        train(options, after_build=break_layer(layer, range(4, 12)))


def train_poisoned(options, steps, rank):
    train(options, before_step=poison(steps, rank=rank))


@pytest.mark.parametrize("rank", [1, slow(0)])
def test_all_processes_skip_what_is_not_finite_in_one(rank, tmp_path):
    options = options_of(tmp_path / "run", train_batch_size=2)
    output = end_pair(tmp_path / "output", train_poisoned, options, {3, 8}, rank)
    assert [line.get("skipped_steps", 0) for line in read_metrics(tmp_path / "run")] == [1, 1, 0]
    line = next(line for line in output.splitlines() if "step 4 is skipped" in line)
    assert f"process {rank}: not finite are the losses total, output" in line
    assert f"process {1 - rank}: all losses are finite" in line


@pytest.mark.slow
def test_persistent_non_finite_ends_all_processes(tmp_path):
    options = options_of(tmp_path / "run", train_batch_size=2, max_skipped_steps=1)
    output = end_pair(tmp_path / "output", train_poisoned, options, set(range(4, 12)), 1, statuses=(2, 2))
    assert "stopped at step 6: 2 steps in a row" in error_of(output)
    assert "Traceback" not in (tmp_path / "output1").read_text()


# ---- projectors


def seen(student=1.0, teacher=1.0):
    """A projector that has seen features of these scales."""
    projector = OrthogonalProjector(4, 6)
    projector(student * (torch.randn(8, 16, 4) + 0.1), teacher * (torch.randn(8, 16, 6) + 0.1))
    projector.initialize()
    return projector


def test_a_sound_projector_has_no_fault():
    for scales in ((1.0, 1.0), (100.0, 1.0), (1.0, 1e-2), (1e-3, 1e-3)):
        assert projector_fault(seen(*scales)) is None
    assert projector_fault(OrthogonalProjector(4, 6)) is None
    assert projector_fault(OrthogonalProjector(6, 4, method="cayley")) is None


BROKEN = [
    (lambda made: made.solution.zero_(), "collapsed: its rows are 1 from orthonormal"),
    (lambda made: made.solution.mul_(1.01), "collapsed: its rows are 0.02 from"),
    (lambda made: made.solution.fill_(torch.nan), "collapsed: its rows are nan"),
    (lambda made: made.gain.fill_(torch.inf), "has a gain that is not finite"),
    (lambda made: made.statistics.student_mean.fill_(torch.nan), "a student_mean that is not finite"),
    (lambda made: made.statistics.target_variance.zero_(), "degenerate covariance: the teacher's"),
]


@pytest.mark.parametrize(("damage", "words"), BROKEN)
def test_a_broken_projector_is_named(damage, words):
    projector = seen()
    damage(projector)
    assert words in projector_fault(projector)


def test_features_that_do_not_vary_are_named():
    assert "the student's features do not vary" in projector_fault(seen(student=0.0))


def test_a_collapsed_projector_ends_the_run_before_it_is_saved(tmp_path):
    def collapse(run, batch, losses):
        if run.step == 4:
            run._bare_module.projectors[1].refresh_every_steps = 100  # else it would be solved anew
            run._bare_module.projectors[1].solution.data.zero_()

    with pytest.raises(
        ValueError, match=r"stopped at step 6: the projector from \S+ to \S+ has collapsed: .*rows are 1"
    ):
        train(options_of(tmp_path / "run"), before_step=collapse)
    assert [path.name for path in RunFolder(tmp_path / "run").checkpoints()] == ["checkpoint-3"]


def test_weights_that_are_not_finite_are_named():
    unet = tiny_unet()
    assert check_state(unet, list(unet.parameters())) is None
    unet.conv_in.weight.data[0] = torch.inf
    assert check_state(unet, list(unet.parameters())) == "1 weights are not finite, such as conv_in.weight"


def test_the_watch_names_the_first_layer_and_leaves_no_hook():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), LinearProjector(2, 2).linear, torch.nn.ReLU())
    model[1].weight.data.fill_(torch.nan)
    watch = Watch(model)
    watch.start()
    model(torch.randn(3, 2))
    words = watch.describe({"total": torch.tensor(torch.nan)}, [torch.arange(20)])
    assert words == (
        "not finite are the losses total, the first layer with such an output is 1, 1 weights are not finite, such as "
        "1.weight, at timesteps 0 1 2 3 4 5 6 7 ... 19"
    )
    watch.stop()
    assert not any(module._forward_hooks for module in model.modules())
