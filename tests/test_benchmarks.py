"""What the benchmarks count and bound: operations against torch's own counter, memory of a step."""

import contextlib
import gc
import importlib.util
import io
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vkd_gen as vkd
from tests.conftest import make_batch, tiny_condition_unet, tiny_unet
from vkd_gen.calibration import calibrate
from vkd_gen.diagnostics import Diagnostics
from vkd_gen.distillation import projected_losses
from vkd_gen.evaluation.cost import LiveBytes, count_macs
from vkd_gen.features import copy_without_weights
from vkd_gen.pairing import LayerPair
from vkd_gen.projectors import IdentityProjector

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    specification = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def features():
    return load("features")


@pytest.fixture(scope="module")
def step():
    return load("step")


# ---- operations

BATCH, SIDE = 3, 4


def pair_of(student, teacher):
    return LayerPair("a", "b", (student, SIDE, SIDE), (teacher, SIDE, SIDE))


def projector_of(kind, student, target):
    match kind:
        case "linear":
            return vkd.LinearProjector(student, target)
        case "least_squares":
            return vkd.LeastSquaresProjector(student, target, refresh_every_steps=1)
        case "identity":
            return IdentityProjector(student, target)
    return vkd.OrthogonalProjector(student, target, method=kind, refresh_every_steps=1)


def statistics_of(channels):
    rows = torch.randn(100, channels, dtype=torch.float64)
    covariance = rows.T @ rows / 100
    return vkd.FeatureStatistics(torch.zeros(2, channels), torch.ones(2) / 2, covariance, covariance)


def counted_by_torch(projector, normalizer, loss, student, teacher):
    """Products in one step of the real parts, the second: the first has no running means yet."""
    rows = torch.randn(BATCH, SIDE**2, student, requires_grad=True)
    target = torch.randn(BATCH, SIDE**2, teacher)
    for step in (1, 2):
        with FlopCounterMode(display=False) as counter:
            normalized = normalizer(target, torch.tensor([1, 500, 900]))
            projected_losses(projector, rows, normalized, loss).sum().backward()
            if hasattr(projector, "after_step"):
                projector.after_step(step)
    return counter.get_total_flops()


CHOICES = [
    *[(kind, "none", "mse") for kind in ("solved", "fixed", "cayley", "matrix_exp", "least_squares", "linear")],
    *[("solved", kind, "mse") for kind in ("layer_norm", "center", "standardize", "whiten", "batch_whiten")],
    ("solved", "none", "smooth_l1"),
    ("solved", "none", "cka"),
    ("identity", "none", "mse"),
]


@pytest.mark.parametrize("widths", [(5, 8), (8, 8), (8, 5)], ids=str)
@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
def test_counted_products_are_those_that_torch_sees(features, choice, widths):
    projector, normalization, loss = choice
    if projector == "identity" and widths[0] != widths[1]:
        pytest.skip("needs equal widths")
    if normalization == "layer_norm" and widths[0] >= widths[1]:
        pytest.skip("rows of sum zero leave a direction empty: the SVD's case")
    operations = features.pair_operations(
        pair_of(*widths), BATCH, projector=projector, normalization=normalization, loss=loss, refresh_every_steps=1
    )
    rank = min(widths) if normalization == "whiten" else None
    normalizer = vkd.FeatureNormalizer(normalization, statistics_of(widths[1]), rank=rank)
    module = projector_of(projector, widths[0], normalizer.target_channels)
    seen = counted_by_torch(module, normalizer, loss, *widths)
    assert sum(entry.flops for entry in operations if entry.is_product) == seen


def test_operations_of_a_pair_known_value(features):
    """By hand: 48 rows, 18 of them for the statistics, 5 -> 8 channels, a refresh every 10 steps."""
    operations = features.pair_operations(pair_of(5, 8), BATCH)
    by_part = {part: features.flops_of(operations, part) for part in features.PARTS}
    assert by_part["projection"] == 2 * 48 * 5 * 8 + 48 * 13 + 40
    assert by_part["statistics"] == 2 * 18 * 5 * 8 + 4 * 18 * 13 + 13 * 40
    assert by_part["refresh"] == pytest.approx((5 * 2 * 5 * 5 * 8 + 9 * 5**3 + 5 * 40) / 10)
    assert by_part["normalization"] == 0
    assert by_part["loss"] == 5 * 48 * 5 + 2 * 48 * 13
    assert features.flops_of(operations) == pytest.approx(sum(by_part.values()))


def test_solutions_that_no_counter_sees_are_counted(features):
    """Of a refresh the eigenvectors, of the exponential all, of whitening the factor."""
    hidden = {
        (projector, normalization): sum(
            entry.flops
            for entry in features.pair_operations(
                pair_of(64, 64), 1, projector=projector, normalization=normalization, refresh_every_steps=1
            )
            if not entry.is_product
        )
        for projector, normalization in (("fixed", "none"), ("solved", "none"), ("fixed", "batch_whiten"))
    }
    assert hidden["solved", "none"] - hidden["fixed", "none"] > 9 * 64**3
    assert hidden["fixed", "batch_whiten"] - hidden["fixed", "none"] > 64**3 / 3


def test_the_rarer_the_refresh_the_cheaper(features):
    costs = [
        features.flops_of(features.pair_operations(pair_of(5, 8), BATCH, refresh_every_steps=every), "refresh")
        for every in (1, 10)
    ]
    assert costs[0] == pytest.approx(10 * costs[1])


def test_the_floor_is_three_forward_passes_of_the_student_and_one_of_the_teacher(features):
    student, teacher = tiny_condition_unet((8, 16)), tiny_condition_unet((16, 32))
    floor = features.count_floor(student, teacher, batch_size=2)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():  # sees attention there
        sample, timesteps, text = features.inputs_of(student, 2)
        copy_without_weights(student)(sample, timesteps, **text)
    forward = counter.get_total_flops()
    assert floor["student_forward_backward"] == pytest.approx(3 * forward, rel=0.03)
    assert floor["student_forward_backward"] < 3 * forward  # the sample has no gradient
    assert floor["teacher_forward"] > 2 * 2 * count_macs(teacher)  # which counts one sample with 8 tokens
    assert floor["optimizer"] == 14 * sum(parameter.numel() for parameter in student.parameters())


def test_a_look_at_the_gradients_costs_two_floors_of_its_draws(features, schedule):
    student_unet, teacher_unet = tiny_unet(), tiny_unet((16, 32))
    pairs = vkd.pair_layers(student_unet, teacher_unet)
    teacher = vkd.FrozenTeacher(teacher_unet, [pair.teacher for pair in pairs])
    batch = make_batch(4)
    statistics = calibrate(teacher, [make_batch(64)], schedule, num_timestep_bins=1)
    projectors = [vkd.OrthogonalProjector(pair.student_channels, pair.teacher_channels) for pair in pairs]
    normalizers = [vkd.FeatureNormalizer("none", statistics[pair.teacher]) for pair in pairs]
    projected = vkd.ProjectedStudent(student_unet, pairs, projectors, normalizers)
    look = Diagnostics(projected, teacher, [batch], schedule=schedule)
    weights = vkd.LossWeights(denoising=0)
    look(weights)  # the first one also takes the teacher's ranks
    with FlopCounterMode(display=False) as counter:
        look(weights)
    both = {"student": 4 * 2 * count_macs(student_unet), "teacher": 4 * 2 * count_macs(teacher_unet)}
    floor = {"teacher_forward": both["teacher"], "student_forward_backward": 3 * both["student"]}
    expected = features.look_share(floor, features.NUM_DIAGNOSTIC_DRAWS, 1) * sum(floor.values())
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.1)  # products of the features among it


@pytest.mark.slow
@pytest.mark.parametrize("student", ["half width", "bk-small"])
def test_the_default_method_costs_less_than_a_fortieth_of_the_floor(features, student):
    """At the shapes of Stable Diffusion 1, batch 8, all pairs, refreshes by decomposition included."""
    config = features.TEACHERS["stable-diffusion-1"]
    with torch.device("meta"):
        teacher = features.unet_class(config).from_config(config)
        counted = features.count(teacher, features.STUDENTS[student], 8)
    shares = {name: row["share_of_floor"] for name, row in counted["variants"].items()}
    cheap = {name for name, share in shares.items() if share <= 0.025}
    assert {"--method vkd", "--method fitnet", "projector cayley", "normalization batch_whiten"} <= cheap
    assert shares["--method vkd"] + counted["share_of_refreshes_by_svd"] <= 0.025
    assert sum(row["share_of_floor"] for row in counted["pairs"]) == pytest.approx(shares["--method vkd"])


def test_unknown_kinds_are_refused(features):
    for count, arguments in (
        (features.projector_operations, ("x", 1, 1, 1)),
        (features.normalizer_operations, ("x", 1, 1, 1)),
        (features.loss_operations, ("x", 1, 1, 1)),
    ):
        with pytest.raises(ValueError, match="unknown"):
            count(*arguments)


# ---- memory of a step


def steps_of(step, tmp_path, variant, **sizes):
    """A bench, and the steps of one of its variants, the first one made."""
    bench = step.Bench(step.StepConfig(**sizes), tmp_path)
    steps = bench.variants()[variant]()
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
        next(steps)
    return bench, steps


@pytest.mark.parametrize(
    "sizes",
    [
        {"shape": "digits", "batch_size": 32},
        pytest.param({"shape": "digits"}, marks=pytest.mark.slow),
        pytest.param({"shape": "unet-32"}, marks=pytest.mark.slow),
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_a_step_holds_little_more_than_the_floor_and_the_features(step, tmp_path, sizes):
    """And needs the features' memory: without them it is below the floor, whose teacher runs beside the graph."""
    peaks = {}
    for variant in ("b", "d", "no features"):
        bench, steps = steps_of(step, tmp_path, variant, **sizes)
        peaks[variant] = step.peak_bytes(steps)
        steps.close()
    assert peaks["d"] <= 1.05 * (peaks["b"] + step.captured_bytes(bench))
    assert peaks["d"] > peaks["no features"] + step.captured_bytes(bench) / 2


def test_captured_bytes_known_value(step, tmp_path):
    """Digits: 16 + 32 + 32 channels at 4 x 4 and 32 + 16 at 8 x 8 of the student, twice of the teacher; float32."""
    bench = step.Bench(step.StepConfig(batch_size=2), tmp_path)
    assert step.captured_bytes(bench) == 2 * 4 * 3 * (80 * 16 + 48 * 64)


def test_a_bench_of_no_images_is_refused(step):
    with pytest.raises(ValueError, match="--batch_size must be at least 1"):
        step.main(step.StepConfig(batch_size=0))


@pytest.mark.parametrize("num_rounds", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_nothing_grows(step, tmp_path, monkeypatch, num_rounds):
    """Bytes of tensors and number of Python's objects after each round of 10 steps, of which all are alike.

    A round holds one refresh and one log line; in those before the first that counts all images are decoded, and kept.
    The last two rounds are also watched operation by operation: Python does not know what a graph holds.
    """
    teacher = {**step.UNET_32, "sample_size": 8, "block_out_channels": (16, 32)}
    monkeypatch.setitem(step.SHAPES, "small", step.Shape(teacher, vkd.Reduction(width=0.5), batch_size=32))
    _, steps = steps_of(step, tmp_path, "d", shape="small")

    def round_of_steps():
        with contextlib.redirect_stderr(io.StringIO()):
            for _ in range(step.STEPS_PER_ROUND):
                next(steps)
        gc.collect()

    def held():
        everything = gc.get_objects()
        storages = {
            value.untyped_storage()._cdata: value.untyped_storage().nbytes()
            for value in everything
            if isinstance(value, torch.Tensor)
        }
        return sum(storages.values()), len(everything)

    for _ in range(3):
        round_of_steps()
    held()  # gives each storage a Python object, which stays
    num_bytes, num_objects = zip(*[(round_of_steps(), held())[1] for _ in range(num_rounds)], strict=True)
    assert len(set(num_bytes)) == 1
    assert max(num_objects) - min(num_objects) <= 5
    with LiveBytes() as live:
        alive = [(round_of_steps(), live.alive)[1] for _ in range(2)]
    assert alive[0] == alive[1] < 0.05 * live.peak
