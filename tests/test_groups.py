"""Batches of one aspect bucket, by the numbers of their draws alone."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vkd_gen.data.draws import DrawNumbers, Draws
from vkd_gen.data.groups import grouped_order, largest_bucket, num_grouped
from vkd_gen.schedule import Schedule
from vkd_gen.training.facts import compare_facts

BUCKETS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)


class Shapes:
    """Samples whose values are their numbers, and whose widths are their buckets."""

    random_flip, guidance_dropout = False, 0.0

    def __init__(self, buckets):
        self.buckets = None if buckets is None else np.array(buckets)
        self.count = len(buckets)

    def __len__(self):
        return self.count

    def read(self, index):
        return index

    def shape(self, item):
        return (1, 1, 1 + int(self.buckets[item]))

    def draw(self, item, generator):
        return torch.full(self.shape(item), float(item))

    def tell(self, item, generator):
        return {}

    def finish(self, batch):
        return batch


def draws_of(buckets, group_size, seed=0):
    return Draws(
        Shapes(buckets),
        Schedule(torch.linspace(0.9, 0.1, 10), torch.linspace(0.1, 0.9, 10), "epsilon"),
        seed=seed,
        batch_size=7,
        group_size=group_size,
    )


def images_of(batch):
    return batch["sample"][:, 0, 0, 0].long().tolist()


# ---- the order of an epoch


@given(BUCKETS, st.integers(1, 9), st.integers(0, 2**32))
def test_groups_are_of_one_bucket_and_hold_every_image(buckets, group_size, seed):
    order = grouped_order(buckets, group_size, np.random.default_rng(seed))
    assert len(order) == num_grouped(buckets, group_size)
    groups = buckets[order].reshape(-1, group_size)
    assert (groups == groups[:, :1]).all()
    assert set(order.tolist()) == set(range(len(buckets)))
    counts = np.bincount(order)
    for bucket in np.unique(buckets):  # an image comes oftener only to fill the last group
        own = counts[buckets == bucket]
        assert own.max() - own.min() <= 1
        assert own.sum() - len(own) < group_size
    assert np.array_equal(order, grouped_order(buckets, group_size, np.random.default_rng(seed)))


def test_groups_of_all_buckets_are_mixed():
    buckets = np.repeat(np.arange(4), 100)
    found = buckets[grouped_order(buckets, 10, np.random.default_rng(0))].reshape(-1, 10)[:, 0]
    assert sorted(found) == sorted(np.repeat(np.arange(4), 10))
    assert (np.diff(found) != 0).sum() > 20


def test_one_bucket_of_whole_groups_is_a_permutation():
    order = grouped_order(np.zeros(40, dtype=int), 8, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(40))


def test_the_largest_bucket():
    assert largest_bucket(np.array([2, 0, 2, 1, 2, 0])).tolist() == [0, 2, 4]


# ---- draws


@settings(deadline=None, max_examples=30)
@given(BUCKETS, st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
def test_processes_and_passes_share_the_same_draws(buckets, batch_size, num_processes, accumulation_steps):
    """The batches of all processes together are those of one, and an epoch holds every image."""
    draws = draws_of(buckets, batch_size)
    num_passes = 2 * (-(-num_grouped(buckets, batch_size) // batch_size))
    expected = [images_of(draws[range(n * batch_size, (n + 1) * batch_size)]) for n in range(num_passes)]
    found = {}
    for process in range(num_processes):
        own = draws_of(buckets, batch_size)  # each process has one of its own
        numbers = DrawNumbers(
            first_step=0,
            num_steps=-(-num_passes // (accumulation_steps * num_processes)),
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            process_index=process,
            num_processes=num_processes,
        )
        for batch in numbers:
            found[batch[0] // batch_size] = images_of(own[batch])
    assert [found[n] for n in range(num_passes)] == expected
    for epoch in (expected[: num_passes // 2], expected[num_passes // 2 :]):
        assert {index for batch in epoch for index in batch} == set(range(len(buckets)))


def test_draws_are_a_function_of_seed_and_number():
    buckets = np.arange(50) % 3
    order = np.random.default_rng(0).permutation(30).tolist()
    draws, again, other = draws_of(buckets, 4), draws_of(buckets, 4), draws_of(buckets, 4, seed=1)
    expected = {n: draws[range(4 * n, 4 * n + 4)] for n in range(30)}
    for number in order:
        batch = again[range(4 * number, 4 * number + 4)]
        assert torch.equal(batch["sample"], expected[number]["sample"])
        assert torch.equal(batch["noise"], expected[number]["noise"])
    epochs = [
        [images_of(some[range(4 * n, 4 * n + 4)]) for n in range(15)] for some in (draws, other)
    ]  # ceil(17 / 4) * 3 groups, and more
    assert epochs[0] != epochs[1]


@given(BUCKETS, st.integers(1, 100))
def test_draws_of_one_shape_together(buckets, count):
    """The first draws, each once, in lists of one bucket; without groups every image comes once in an epoch."""
    draws = draws_of(buckets, 1)
    found = list(draws.alike(count))
    assert sorted(number for numbers in found for number in numbers) == list(range(count))
    assert all(numbers == sorted(numbers) and len(numbers) <= 7 for numbers in found)
    for numbers in found:
        assert len(set(buckets[images_of(draws.batch(numbers))])) == 1
    everyone = [image for numbers in draws.alike(len(buckets)) for image in images_of(draws.batch(numbers))]
    assert sorted(everyone) == list(range(len(buckets)))
    assert list(draws_of([0] * 9, None).alike(9)) == [[*range(7)], [7, 8]]


def test_what_is_measured_apart_is_of_the_largest_bucket():
    """Inheritance puts batches together, so they are of one shape."""
    buckets = [0, 1, 1, 0, 1, 2]
    batches = list(draws_of(buckets, 4).apart(20))
    assert {index for batch in batches for index in images_of(batch)} == {1, 2, 4}
    counts = collections.Counter(index for batch in batches for index in images_of(batch))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_run_of_buckets_goes_on_with_its_batch_size(tmp_path):
    before = {"aspect_buckets": True, "train_batch_size": 8, "num_processes": 1, "gradient_accumulation_steps": 2}
    point = tmp_path / "checkpoint-4"
    compare_facts(before, {**before, "num_processes": 2, "gradient_accumulation_steps": 1}, point, lambda line: None)
    with pytest.raises(ValueError, match=r"of aspect buckets.*: go on with --train_batch_size 8"):
        compare_facts(before, {**before, "train_batch_size": 16, "gradient_accumulation_steps": 1}, point, print)
