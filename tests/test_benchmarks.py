"""What the benchmarks count and bound: operations of a step's features, memory of a step."""

import contextlib
import gc
import io
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import features
import step
from tests.conftest import tiny_condition_unet
from vkd_gen.evaluation.cost import LiveBytes, count_macs
from vkd_gen.families import copy_without_weights
from vkd_gen.pairing import LayerPair

# ---- operations


def operations(variant, student=5, teacher=8, batch_size=3, **changes):
    """Of a layer of 4 x 4 positions: 48 rows, of which 18 enter the statistics."""
    pair = LayerPair("a", "b", (student, 4, 4), (teacher, 4, 4))
    return features.pair_operations(pair, batch_size, replace(features.VARIANTS[variant], **changes))


PROJECTION, STATISTICS = 2 * 48 * 5 * 8, 2 * 18 * 5 * 8
REFRESH = 5 * 2 * 5 * 5 * 8 + 9 * 5**3
"""The Gram matrix, vectors times map and back, and the Newton-Schulz step's two; eigenvectors."""


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("--method vkd", PROJECTION + STATISTICS + REFRESH / 10),
        ("refresh each step", PROJECTION + STATISTICS + REFRESH),
        ("--method fitnet", 3 * PROJECTION),  # backward to the rows and to the map
        ("loss smooth_l1", 2 * PROJECTION + STATISTICS + REFRESH / 10),  # the target is not projected
        # Whitened to the student's five channels, in float64: 48 rows by 8 by 5.
        ("normalization whiten", 2 * 48 * (25 + 40) + 2 * 18 * 25 + (5 * 2 * 5**3 + 9 * 5**3) / 10),
        # The rows' covariance, its factor, and the rows solved by it.
        (
            "normalization batch_whiten",
            PROJECTION + STATISTICS + REFRESH / 10 + 2 * 48 * 8 * 8 + 8**3 / 3 + 8 * 8 * 48,
        ),
    ],
)
def test_operations_of_a_pair_by_hand(variant, expected):
    assert operations(variant) == pytest.approx(expected)


def test_solutions_that_torch_does_not_count_are_counted():
    """The exponential, its derivative by a matrix of twice the size; the factors of Cayley's."""
    assert operations("projector matrix_exp", 64, 64, 1) > 5 * 2 * (64**3 + 128**3)
    assert operations("projector cayley", 64, 64, 1) > (2 / 3 + 2 + 2) * 64**3


def test_the_floor_is_three_forward_passes_of_the_student_and_one_of_the_teacher():
    student, teacher = tiny_condition_unet((8, 16)), tiny_condition_unet((16, 32))
    floor = features.count_floor(student, teacher, batch_size=2)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():  # sees attention there
        sample, timesteps, text = features.inputs_of(student, 2)
        copy_without_weights(student)(sample, timesteps, **text)
    forward = counter.get_total_flops()
    assert floor["student_forward_backward"] == pytest.approx(3 * forward, rel=0.03)
    assert floor["student_forward_backward"] < 3 * forward  # the sample has no gradient
    assert floor["teacher_forward"] > 2 * 2 * count_macs(teacher)  # which counts one sample with 8 tokens


@pytest.mark.slow
@pytest.mark.parametrize("student", features.STUDENTS)
def test_the_default_method_costs_less_than_a_fortieth_of_the_floor(student):
    """At the shapes of Stable Diffusion 1, batch 8, all pairs."""
    variants = {name: features.VARIANTS[name] for name in ("--method vkd", "--method fitnet")}
    counted = features.count(features.stable_diffusion(), features.STUDENTS[student], 8, variants)
    assert all(counted["variants"][name]["share_of_floor"] <= 0.025 for name in variants)


# ---- memory of a step


def steps_of(tmp_path, variant, **sizes):
    """A bench, and the steps of one of its variants, the first one made."""
    bench = step.Bench(step.StepConfig(**sizes), tmp_path)
    steps = bench.steps(variant)
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
        next(steps)
    return bench, steps


@pytest.mark.parametrize(
    "sizes",
    [
        {"shape": "digits", "batch_size": 16},
        pytest.param({"shape": "digits"}, marks=pytest.mark.slow),
        pytest.param({"shape": "unet-32"}, marks=pytest.mark.slow),
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_a_step_holds_little_more_than_the_floor_and_the_features(tmp_path, sizes):
    """And needs the features' memory: without them it is below the floor, whose teacher runs beside the graph."""
    peaks = {}
    for variant in ("b", "d", "no features"):
        bench, steps = steps_of(tmp_path, variant, **sizes)
        peaks[variant] = step.peak_bytes(steps)
        steps.close()
    # Digits: 16 + 32 + 32 channels at 4 x 4 and 32 + 16 at 8 x 8 of the student, twice of the teacher; float32.
    captured = bench.captured_bytes()
    assert sizes["shape"] != "digits" or captured == bench.batch_size * 4 * 3 * (80 * 16 + 48 * 64)
    assert peaks["d"] <= 1.05 * (peaks["b"] + captured)
    assert peaks["d"] > peaks["no features"] + captured / 2


def test_a_bench_of_no_images_is_refused():
    with pytest.raises(ValueError, match="--batch_size must be at least 1"):
        step.StepConfig(batch_size=0)


@pytest.mark.parametrize("num_rounds", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_nothing_grows(tmp_path, monkeypatch, request, num_rounds):
    """Bytes of tensors and number of Python's objects after each round of 10 steps, of which all are alike.

    A round holds one refresh and one log line; in those before the first that counts all images are decoded, and kept.
    The last two rounds are also watched operation by operation: Python does not know what a graph holds.
    """
    teacher = {**step.UNET_32, "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1}
    monkeypatch.setitem(step.SHAPES, "small", (teacher, 8))
    monkeypatch.setattr(step, "NUM_IMAGES", 64)
    gc.freeze()  # what is there before is not counted
    request.addfinalizer(gc.unfreeze)
    _, steps = steps_of(tmp_path, "d", shape="small")

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

    for _ in range(2):
        round_of_steps()
    held()  # gives each storage a Python object, which stays
    num_bytes, num_objects = zip(*[(round_of_steps(), held())[1] for _ in range(num_rounds)], strict=True)
    assert len(set(num_bytes)) == 1
    assert max(num_objects) - min(num_objects) <= 5
    with LiveBytes() as live:
        alive = [(round_of_steps(), live.alive)[1] for _ in range(2)]
    assert alive[0] == alive[1] < 0.05 * live.peak
