"""What holds for every value: either a result that keeps its promise, or a ValueError in one line; nothing else."""

import itertools
import math

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import DrawsByNumber, tiny_condition_unet, tiny_unet
from vkd_gen.data.draws import DrawNumbers
from vkd_gen.data.images import Images
from vkd_gen.evaluation.sources import blocks_of_process
from vkd_gen.families import Reduction, build_student, family_of, kept_stages, reduce_config
from vkd_gen.limits import check_sizes
from vkd_gen.normalization import FeatureNormalizer, FeatureStatistics
from vkd_gen.pairing import pair_layers
from vkd_gen.projectors import OrthogonalProjector, orthonormality_error

settings.register_profile(
    "fast",
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fast")

ANY_FLOAT = st.floats(allow_nan=True, allow_infinity=True)
WIDTHS = st.integers(1, 12)
SEEDS = st.integers(0, 2**32 - 1)


def or_one_line(make):
    """What `make` gives, or None after a ValueError of one line; any other exception is a defect."""
    try:
        return make()
    except ValueError as error:
        message = str(error)
    assert message.strip()
    assert "\n" not in message
    return None


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- projectors


@given(
    student=st.integers(-2, 12),
    target=st.integers(-2, 12),
    method=st.sampled_from(["solved", "cayley", "matrix_exp", "fixed", "svd", "", "SOLVED"]),
    start=st.sampled_from(["identity", "procrustes", "random", ""]),
    momentum=ANY_FLOAT | st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    refresh=st.integers(-1, 3),
)
def test_an_orthogonal_projector_is_orthonormal_or_refused(student, target, method, start, momentum, refresh):
    projector = or_one_line(
        lambda: OrthogonalProjector(
            student, target, method=method, start=start, momentum=momentum, refresh_every_steps=refresh
        )
    )
    is_valid = min(student, target, refresh) >= 1 and 0 <= momentum < 1
    is_valid = (
        is_valid and method in ("solved", "cayley", "matrix_exp", "fixed") and start in ("identity", "procrustes")
    )
    assert (projector is not None) == is_valid
    if projector is not None:
        assert orthonormality_error(projector.matrix()) < 1e-5


@given(bad=st.sampled_from([math.nan, math.inf, -math.inf]), student=WIDTHS, target=WIDTHS, in_student=st.booleans())
def test_features_that_are_no_numbers_do_not_enter_the_statistics(bad, student, target, in_student):
    projector = OrthogonalProjector(student, target, refresh_every_steps=1)
    pair = [rows(0, 1, 6, student), rows(1, 1, 6, target)]
    projector(*pair)
    projector.after_step(1)
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    pair[0 if in_student else 1][0, 3, 0] = bad
    projector(*pair)
    projector.after_step(2)
    for name, value in projector.state_dict().items():
        assert value.isfinite().all(), name
        if name.startswith("statistics"):
            assert torch.equal(value, before[name]), name


@given(start=st.integers(0, 5).flatmap(lambda n: st.lists(st.lists(ANY_FLOAT, min_size=n, max_size=n), max_size=4)))
def test_a_start_is_orthonormal_or_refused(start):
    matrix = torch.tensor(start, dtype=torch.float64).float() if start and start[0] else torch.zeros(len(start), 0)
    projector = or_one_line(lambda: OrthogonalProjector(2, 3, method="fixed", start=matrix))
    if projector is not None:
        assert matrix.shape == (2, 3)
        assert orthonormality_error(matrix) <= 1e-4


# ---- normalizers


def statistics_of(seed, channels, bins=3, scale=1.0):
    values = rows(seed, 40, channels).double() * scale
    covariance = values.T @ values / 40
    share = torch.full((bins,), 1 / bins, dtype=torch.float64)
    return FeatureStatistics(rows(seed, bins, channels).double(), share, covariance, covariance / scale**2)


@given(
    kind=st.sampled_from(["none", "layer_norm", "center", "standardize", "whiten", "batch_whiten", "zca", ""]),
    channels=st.integers(1, 6),
    rank=st.none() | st.integers(-1, 8),
    exponent=ANY_FLOAT | st.sampled_from([0.0, 0.5, 1.0]),
    shrinkage=ANY_FLOAT | st.sampled_from([0.0, 1e-3, 1.0]),
    has_statistics=st.booleans(),
    seed=SEEDS,
)
def test_a_normalizer_gives_numbers_or_is_refused(kind, channels, rank, exponent, shrinkage, has_statistics, seed):
    statistics = statistics_of(seed, channels) if has_statistics else None
    normalizer = or_one_line(
        lambda: FeatureNormalizer(
            kind, statistics, channels=channels, rank=rank, exponent=exponent, shrinkage=shrinkage
        )
    )
    if normalizer is None:
        return
    assert 0 <= shrinkage <= 1
    found = or_one_line(lambda: normalizer(rows(seed, 4, 9, channels), torch.tensor([0, 500, 999, 10**6])))
    if found is not None:
        assert found.shape == (4, 9, normalizer.target_channels)
        assert found.isfinite().all()
    if has_statistics and kind not in ("none", "layer_norm"):
        covariance = normalizer.target_covariance()
        assert covariance.shape == (normalizer.target_channels,) * 2
        assert torch.linalg.eigvalsh(covariance).min() > -1e-6


# ---- the builder


@given(
    width=ANY_FLOAT | st.floats(0.01, 4),
    layers=st.none() | st.integers(-1, 3) | st.lists(st.integers(-1, 3), max_size=3).map(tuple),
    drop=st.lists(st.integers(-3, 3), max_size=3).map(tuple),
    attention=st.lists(st.integers(-3, 3), max_size=2).map(tuple),
    transformer=st.none() | st.integers(-1, 3),
    mid=st.booleans(),
    conditional=st.booleans(),
)
def test_a_student_can_be_built_or_is_refused(width, layers, drop, attention, transformer, mid, conditional):
    with torch.device("meta"):
        teacher = tiny_condition_unet() if conditional else tiny_unet(attention=True)
    reduction = Reduction(
        width=width,
        layers_per_block=layers,
        drop_stages=drop,
        drop_mid_block=mid,
        drop_attention=attention,
        transformer_layers=transformer,
    )
    config = or_one_line(lambda: reduce_config(teacher.config, reduction))
    if config is None or or_one_line(lambda: check_sizes(config, "it") or True) is None:
        return
    with torch.device("meta"):
        student = build_student(teacher, reduction)
    channels = student.config.block_out_channels
    assert len(channels) == len(kept_stages(2, reduction)) >= 1
    if width <= 1 and not drop:
        assert all(own <= other for own, other in zip(channels, teacher.config.block_out_channels, strict=True))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY_FLOAT | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(config=st.dictionaries(st.sampled_from(["block_out_channels", "layers_per_block", "sample_size", "x"]), VALUES))
@settings(max_examples=15)
def test_any_configuration_is_sized_up_in_one_line(config):
    or_one_line(lambda: check_sizes(config, "it"))


# ---- pairing


@given(
    layers=st.sampled_from(["all", "mid_and_up", "last_up", "self_attention", "some", ""]),
    student_channels=st.lists(st.sampled_from([4, 8]), min_size=1, max_size=3).map(tuple),
    teacher_channels=st.lists(st.sampled_from([8, 16]), min_size=1, max_size=3).map(tuple),
    size=st.sampled_from([4, 8, 16]),
)
@settings(max_examples=6)
def test_pairs_are_of_equal_resolution(layers, student_channels, teacher_channels, size):
    with torch.device("meta"):
        student, teacher = tiny_unet(student_channels, size=size), tiny_unet(teacher_channels, size=size)
    pairs = or_one_line(lambda: pair_layers(student, teacher, layers=layers))
    for pair in pairs or ():
        assert pair.student_shape[1:] == pair.teacher_shape[1:]
        assert pair.student.split("/")[0] in [stage.layer for stage in family_of(student).stages(student)]
        assert pair.teacher.split("/")[0] in [stage.layer for stage in family_of(teacher).stages(teacher)]
    assert len({pair.student for pair in pairs or ()}) == len(pairs or ())


NAMES = st.sampled_from(["mid_block", "mid_block/2", "down_blocks.0", "up_blocks.1", "conv_in", "time_embedding"])


@given(pairs=st.lists(st.tuples(NAMES | st.text(max_size=6), NAMES | st.text(max_size=6)), max_size=3))
@settings(max_examples=8)
def test_named_pairs_are_found_or_refused(pairs):
    with torch.device("meta"):
        unet = tiny_unet()
    found = or_one_line(lambda: pair_layers(unet, unet, pairs=pairs))
    if found is not None:
        assert len(found) == len(pairs)
        assert all(pair.student_shape[1:] == pair.teacher_shape[1:] for pair in found)


# ---- seeds


def few_images(count):
    return Images(lambda index: Image.new("L", (2, 2), index), 2, 1, "numbered", np.arange(count))


@given(
    seed=st.integers(-(2**70), 2**70) | SEEDS | st.sampled_from([2**63 - 1, 2**63, 2**64]),
    dropout=st.floats(0, 0.99) | ANY_FLOAT,
    draw=st.integers(0, 2**40),
)
def test_draws_are_numbers_and_the_same_again_or_refused(seed, dropout, draw):
    items = []
    for _ in range(2):
        draws = or_one_line(lambda: DrawsByNumber(few_images(7), seed=seed, guidance_dropout=dropout))
        if draws is None:
            assert seed < 0 or seed >= 2**63 or not 0 <= dropout < 1
            return
        items.append(draws[draw])
    assert all(torch.equal(items[0][name], items[1][name]) for name in items[0])
    assert items[0]["noise"].isfinite().all()
    assert 0 <= items[0]["time"] < 1


# ---- shares of processes


@given(count=st.integers(0, 60), batch=st.integers(1, 9), processes=st.integers(1, 6))
def test_blocks_cover_every_image_once(count, batch, processes):
    shares = [list(blocks_of_process(count, batch, index, processes)) for index in range(processes)]
    blocks = sorted((list(block) for share in shares for block in share), key=lambda block: block[0])
    assert list(itertools.chain(*blocks)) == list(range(count))
    assert blocks == [list(block) for block in blocks_of_process(count, batch)]  # the same company for each image
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(count=st.integers(-2, 9), batch=st.integers(-2, 3), index=st.integers(-2, 3), processes=st.integers(-1, 3))
def test_blocks_that_cannot_be_are_refused(count, batch, index, processes):
    found = or_one_line(lambda: blocks_of_process(count, batch, index, processes))
    assert (found is not None) == (count >= 0 and batch >= 1 and 0 <= index < processes)
    assert found is None or all(0 <= number < count for block in found for number in block)


@given(
    first=st.integers(-2, 3),
    batch=st.integers(-2, 3),
    accumulation=st.integers(-1, 2),
    index=st.integers(-2, 3),
    processes=st.integers(-1, 3),
)
def test_shares_that_cannot_be_are_refused(first, batch, accumulation, index, processes):
    found = or_one_line(
        lambda: DrawNumbers(
            first_step=first,
            num_steps=3,
            batch_size=batch,
            accumulation_steps=accumulation,
            process_index=index,
            num_processes=processes,
        )
    )
    assert (found is not None) == (first >= 0 and min(batch, accumulation) >= 1 and 0 <= index < processes)
    if found is not None:
        assert len(list(found)) == len(found) == max(0, 3 - first) * accumulation
