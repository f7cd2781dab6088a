"""What a run draws: by the number alone, however it is split, resumed, streamed or read by workers."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats  # comes with scikit-learn

from tests.conftest import DrawsByNumber, flat_draws
from tests.sources import encoded, grey, grey_levels, labelled_images, numbered_images, write_shards
from vkd_gen.data.draws import DrawNumbers, Draws, both_branches
from vkd_gen.data.images import Images, ImageSpec
from vkd_gen.data.samples import Pixels
from vkd_gen.data.streaming import Position, stream_images


def assert_same_draw(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_draw_is_a_pure_function_of_seed_and_number():
    """Whatever was drawn before, alone or in a batch, in whatever order and by whichever instance."""
    images, options = labelled_images(7, 3), {"seed": 3, "random_flip": True, "guidance_dropout": 0.5}
    draws, again = (DrawsByNumber(images, **options) for _ in range(2))
    expected = [draws[number] for number in range(30)]
    order = np.random.default_rng(0).permutation(30).tolist()
    torch.manual_seed(99)
    np.random.seed(99)
    for number in [*order, *order[::-1]]:
        assert_same_draw(again[number], expected[number])
    batch = again[[11, 2, 29]]
    assert batch["noise"].shape == (3, 1, 4, 4)
    for place, number in enumerate((11, 2, 29)):
        assert_same_draw({name: values[place] for name, values in batch.items()}, expected[number])
    other = [DrawsByNumber(images, **options | {"seed": 6})[number]["class_labels"].item() == 3 for number in range(30)]
    assert other != [draw["class_labels"].item() == 3 for draw in expected]


def test_a_draw_is_what_a_new_generator_of_its_key_gives():
    """However the generator is set: resumed runs, and evidence, depend on these numbers."""
    draws = DrawsByNumber(numbered_images(7), seed=2**63 - 1)
    for number in (5, 0, 2**40):
        generator = np.random.Generator(np.random.Philox(key=np.array([2**63 - 1, 2 * number], dtype=np.uint64)))
        generator.random()  # of the flip
        noise, time = generator.standard_normal((1, 4, 4), dtype=np.float32), generator.random()
        draw = draws[number]
        assert np.array_equal(draw["noise"].numpy(), noise)
        assert draw["time"] == np.float32(time)


@pytest.mark.parametrize(("limit", "reads"), [(2 * 4 * 16, 2), (2 * 4 * 16 - 1, 21)])
def test_images_of_a_small_set_are_decoded_once(limit, reads, monkeypatch):
    monkeypatch.setattr("vkd_gen.data.samples.KEPT_BYTES", limit)
    seen = []
    draws = DrawsByNumber(Images(lambda number: seen.append(number) or grey(number), 4, 1, "two", np.arange(2)), seed=0)
    first = [draws[number]["sample"].clone() for number in range(10)]
    draws[0]["sample"].zero_()  # what was handed over is the caller's
    again = [draws[number]["sample"] for number in range(10)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len(seen) == reads


def test_seeds_and_numbers_draw_unlike_noise_and_times():
    drawn = [DrawsByNumber(numbered_images(7), seed=seed)[number] for seed in range(6) for number in range(6)]
    assert len({tuple(draw["noise"].flatten().tolist()) for draw in drawn}) == 36
    assert len({draw["time"].item() for draw in drawn}) == 36


def test_each_epoch_is_a_permutation_of_its_own():
    epochs = []
    for seed in (0, 1):
        draws = DrawsByNumber(numbered_images(50), seed=seed)
        levels = grey_levels(draws[number]["sample"] for number in range(150))
        epochs += [tuple(levels[first : first + 50]) for first in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({*epochs, tuple(range(50))}) == 7  # and none is the identity


def test_noise_is_standard_normal_and_time_uniform():
    batch = DrawsByNumber(numbered_images(40, resolution=8), seed=0)[list(range(400))]
    noise, times = batch["noise"], batch["time"]
    assert (noise.shape, noise.dtype) == ((400, 1, 8, 8), torch.float32)
    assert times.dtype == torch.float32
    assert times.min() >= 0
    assert times.max() < 1
    # Kolmogorov-Smirnov at one in a thousand; the draws are fixed, so this cannot fail by chance later.
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(times.numpy(), "uniform").pvalue > 1e-3
    # Draws do not depend on one another, nor pixels on pixels, nor the time on the noise.
    rows = noise.flatten(1)
    correlations = torch.corrcoef(torch.cat([rows.T[:20], times[None]])).triu(1)
    assert correlations.abs().max() < 0.2  # 4 standard errors of a correlation over 400
    assert abs(np.corrcoef(rows[:-1].flatten(), rows[1:].flatten())[0, 1]) < 0.025  # 4 over 25,600
    assert abs(np.corrcoef(times[:-1], times[1:])[0, 1]) < 0.2


def test_flips_mirror_half_of_the_images_and_shift_no_other_draw():
    ramp = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8) * 10, (4, 1)))
    images = Images(lambda _: ramp, 4, 1, "ramp", np.arange(10))
    plain, flipping = (DrawsByNumber(images, seed=0, random_flip=flip)[list(range(200))] for flip in (False, True))
    is_flipped = (flipping["sample"] != plain["sample"]).flatten(1).any(1)
    assert torch.equal(flipping["sample"][is_flipped], plain["sample"][is_flipped].flip(-1))
    assert 70 <= is_flipped.sum() <= 130  # 4 standard errors
    assert torch.equal(flipping["noise"], plain["noise"])
    assert torch.equal(flipping["time"], plain["time"])


# ---- labels


def test_labels_follow_their_images_and_change_no_other_draw():
    images = dataclasses.replace(labelled_images(40, 7), indices=np.arange(3, 40, 2))
    labelled = DrawsByNumber(images, seed=5)[list(range(60))]
    labels = labelled.pop("class_labels")
    assert labels.dtype == torch.int64
    assert labels.tolist() == [level % 7 for level in grey_levels(labelled["sample"])]
    plain = dataclasses.replace(images, labels=None, num_classes=0)
    assert_same_draw(labelled, DrawsByNumber(plain, seed=5)[list(range(60))])


def test_both_branches_of_a_batch_by_hand():
    batch = {
        "sample": torch.tensor([[1.0], [2.0]]),
        "noise": torch.tensor([[3.0], [4.0]]),
        "timesteps": torch.tensor([5, 6]),
        "conditioning": {"text": torch.tensor([[7], [8]]), "added": {"ids": torch.tensor([[9], [10]])}},
    }
    nothing = {"text": torch.zeros(2, 1, dtype=torch.long), "added": {"ids": torch.tensor([[9], [10]])}}
    found = both_branches(batch, nothing)
    assert [found[name].flatten().tolist() for name in ("sample", "noise", "timesteps")] == [
        [1, 2, 1, 2],
        [3, 4, 3, 4],
        [5, 6, 5, 6],
    ]
    assert found["conditioning"]["text"].flatten().tolist() == [7, 8, 0, 0]
    assert found["conditioning"]["added"]["ids"].flatten().tolist() == [9, 10, 9, 10]
    assert both_branches(batch, {}) == batch


def test_draws_of_both_branches_are_the_draws_without_dropping_and_again_told_nothing(schedule):
    samples = Pixels(labelled_images(40, 7), guidance_dropout=0.5)
    options = {"seed": 5, "batch_size": 8}
    plain = Draws(Pixels(samples.images), schedule, **options)
    doubled = Draws(samples, schedule, both_branches=True, **options)
    assert samples.guidance_dropout == 0.5  # the caller's
    for found, expected in ((doubled.first(8), plain.first(8)), (doubled.apart(8), plain.apart(8))):
        batch, once = next(found), next(expected)
        assert all(torch.equal(batch[name], torch.cat([once[name]] * 2)) for name in ("sample", "noise", "timesteps"))
        labels = once["conditioning"]["class_labels"].tolist()
        assert batch["conditioning"]["class_labels"].tolist() == labels + [7] * 8
    told = next(doubled.apart(8, guidance_dropout=0.0))
    assert len(told["sample"]) == 8
    assert 7 not in told["conditioning"]["class_labels"]


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_share_of_dropped_labels(share):
    kept, dropping = (
        DrawsByNumber(labelled_images(40, 7), seed=5, guidance_dropout=dropout)[list(range(1000))]
        for dropout in (0.0, share)
    )
    labels, found = kept["class_labels"].numpy(), dropping["class_labels"].numpy()
    dropped = found == 7
    assert (found[~dropped] == labels[~dropped]).all()
    assert labels.max() == 6
    assert abs(np.mean(dropped) - share) <= 4 * np.sqrt(share * (1 - share) / 1000)  # 4 standard errors
    # Neither the class nor the draw before has a say.
    assert np.ptp([dropped[labels == number].mean() for number in range(7)]) < 0.25
    assert abs(np.corrcoef(dropped[:-1], dropped[1:])[0, 1]) < 0.13


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": -1}, "seed must be 0 or above"),
        ({"seed": 2**63}, "seed must be below 2"),
        *[
            ({"guidance_dropout": share}, "dropout must be at least 0 and below 1")
            for share in (-0.1, 1.0, float("nan"))
        ],
    ],
)
def test_arguments_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        DrawsByNumber(labelled_images(4, 2), **{"seed": 0, **options})


# ---- numbers


def numbers_of(**options):
    return list(DrawNumbers(**{"first_step": 0, "num_steps": 5, "batch_size": 12} | options))


def test_numbers_of_one_process():
    assert numbers_of(num_steps=3, batch_size=2) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("num_processes", "passes"), [(1, 3), (2, 1), (2, 3), (12, 1)])
def test_any_split_covers_the_same_draws_in_every_step(num_processes, passes):
    split = [
        numbers_of(
            batch_size=12 // num_processes // passes,
            accumulation_steps=passes,
            process_index=index,
            num_processes=num_processes,
        )
        for index in range(num_processes)
    ]
    steps = np.array(split).reshape(num_processes, 5, -1).transpose(1, 0, 2).reshape(5, 12)
    assert np.sort(steps).tolist() == numbers_of()


@pytest.mark.parametrize("first_step", [0, 4, 5])
def test_resuming_is_a_suffix(first_step):
    options = {"batch_size": 3, "accumulation_steps": 2, "process_index": 1, "num_processes": 2}
    resumed = DrawNumbers(first_step=first_step, num_steps=5, **options)
    assert list(resumed) == numbers_of(**options)[2 * first_step :]
    assert len(resumed) == len(list(resumed))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_do_not_change_what_is_drawn(num_workers):
    expected = DrawsByNumber(numbered_images(5), seed=1)
    context = "fork" if num_workers else None
    numbers = DrawNumbers(first_step=1, num_steps=4, batch_size=3)
    found = expected.draws.loader(numbers, num_workers=num_workers, multiprocessing_context=context)
    for batch, own in zip(map(flat_draws, found), numbers, strict=True):
        assert_same_draw(batch, expected[own])


# ---- streams


@pytest.fixture
def numbered(tmp_path, datasets_cache):
    """A stream of 20 images, image i of grey level i, and its head."""
    source = write_shards(tmp_path / "numbered", range(20), (5, 1, 7, 4, 3))
    spec = ImageSpec(resolution=4, channels=1, held_out_fraction=0)
    return stream_images(str(source), spec, head_size=20, buffer_size=4)[:2]


def streamed(numbered, *, positions=None, num_steps=6, num_workers=0, **numbers):
    stream, head = numbered
    draws = DrawsByNumber(head, seed=5, random_flip=True, stream=stream).draws
    if positions is not None:
        draws.positions = positions
    numbers = DrawNumbers(**{"first_step": 0, "num_steps": num_steps, "batch_size": 3, **numbers})
    context = "fork" if num_workers else None
    return draws.loader(numbers, num_workers=num_workers, multiprocessing_context=context)


def test_noise_flip_and_time_are_those_of_the_draw(numbered):
    expected = DrawsByNumber(numbered[1], seed=5, random_flip=True)
    for step, batch in enumerate(streamed(numbered, num_steps=3, process_index=1, num_processes=2)):
        first = (2 * step + 1) * 3
        own = expected[list(range(first, first + 3))]
        assert torch.equal(batch["noise"], own["noise"])
        assert torch.equal(batch["timesteps"], own["time"])


@pytest.mark.parametrize(("num_workers", "first_step"), [(0, 1), (1, 4), (2, 1)])
def test_stopped_and_gone_on_is_the_straight_run(numbered, num_workers, first_step):
    """With any number of workers, as long as it stays the same; whatever they have read ahead."""
    options = {"num_workers": num_workers, "accumulation_steps": 2, "process_index": 1, "num_processes": 2}
    straight = list(map(flat_draws, streamed(numbered, **options)))
    assert len(straight) == 12
    positions = torch.tensor([Position()] * max(1, num_workers))
    for batch in itertools.islice(streamed(numbered, **options), 2 * first_step):
        positions[batch["reader"]] = batch["position"]
    gone_on = streamed(numbered, positions=positions, first_step=first_step, **options)
    for found, expected in zip(map(flat_draws, gone_on), straight[2 * first_step :], strict=True):
        assert_same_draw(found, expected)


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 2), (2, 0), (2, 2)])
def test_processes_and_workers_share_an_epoch(numbered, num_processes, num_workers):
    seen = []
    for index in range(num_processes):
        num_steps = 15 * max(1, num_workers)  # more than any reader has in an epoch
        own = {"batch_size": 1, "process_index": index, "num_processes": num_processes}
        batches = streamed(numbered, num_steps=num_steps, num_workers=num_workers, **own)
        seen += [grey_levels(batch["sample"])[0] for batch in batches if batch["position"][0] == 0]
    assert sorted(seen) == list(range(20))


def test_streamed_draws_can_be_sent_to_workers(numbered):
    """Workers are started afresh on macOS and Windows, and everywhere from Python 3.14 on; the head stays here."""
    dataset = streamed(numbered).dataset
    sent = pickle.dumps(dataset)
    assert encoded(0) not in sent
    assert_same_draw(flat_draws(next(iter(pickle.loads(sent)))), flat_draws(next(iter(dataset))))


@pytest.mark.parametrize(("first", "count"), [(0, 32), (1000, 32), (2**40, 8), (7, 128)])
def test_stratified_times_are_spread_over_any_draws_in_a_row(first, count):
    """The gaps between neighbours are nearly equal (three lengths at most, Steinhaus), and all else is as it was."""
    images = labelled_images(7, 3)
    draws, plain = (DrawsByNumber(images, seed=3, guidance_dropout=0.5, stratified=given) for given in (True, False))
    found, others = (some[list(range(first, first + count))] for some in (draws, plain))
    times = np.sort(found["time"].numpy())
    gaps = np.diff([*times, times[0] + 1])
    assert gaps.max() < 2.7 / count
    assert gaps.min() > 0.3 / count
    for name in ("noise", "sample", "class_labels"):
        assert torch.equal(found[name], others[name])
    assert not torch.equal(found["time"], others["time"])
    assert DrawsByNumber(images, seed=4, stratified=True)[first]["time"] != found["time"][0]
