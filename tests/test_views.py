"""Crops by number, aspect buckets, and the pixels of a view."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.sources import encoded, image_table, load
from vkd_gen.data.images import Images, evenly_spaced
from vkd_gen.data.views import Views, aspect_buckets, bucketed_views

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SIDES = st.integers(1, 300)


def pictures(sizes, resolution=16):
    """Colourful images of heights and widths, which are read from the disk."""
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return Images(lambda number: Image.fromarray(arrays[number]), resolution, 3, "noise", np.arange(len(sizes)))


# ---- crops


@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 5), st.booleans(), st.integers(0, 2**63))
def test_crops_lie_in_the_smallest_image_that_covers_them(height, width, old_height, old_width, crop, flip, number):
    views = Views([(height, width)], num_crops=6, seed=3)
    view = views.view(number, (old_height, old_width), crop, flip)
    assert (view.height, view.width, view.original_height, view.original_width) == (
        *(height, width),
        *(old_height, old_width),
    )
    assert 0 <= view.top <= view.resized_height - height
    assert 0 <= view.left <= view.resized_width - width
    assert (view.resized_height == height) or (view.resized_width == width)
    mirrored = views.view(number, (old_height, old_width), crop, not flip)
    assert mirrored.left == view.resized_width - width - view.left
    assert mirrored._replace(left=view.left, is_flipped=flip) == view


def test_crops_depend_on_seed_image_and_number_alone():
    """Not on how many crops there are, which other images there are, or where in the set it is."""
    many, few = Views([(8, 8)], num_crops=50, seed=1), Views([(8, 8)], num_crops=3, seed=1)
    tops = [many.view(7, (80, 8), crop).top for crop in range(50)]
    assert tops[0] == 36
    assert tops[:3] == [few.view(7, (80, 8), crop).top for crop in range(3)]
    assert len(set(tops)) > 20
    assert min(tops) < 8
    assert max(tops) > 64
    others = [Views([(8, 8)], num_crops=50, seed=2), many]
    assert all(
        tops[1:] != [views.view(number, (80, 8), crop).top for crop in range(1, 50)]
        for views, number in zip(others, (7, 8), strict=True)
    )
    images = pictures([(20, 30)] * 9)
    views, chosen = Views([(16, 16)], num_crops=2), evenly_spaced(images, 3)
    for place, number in enumerate(chosen.indices.tolist()):
        torch.testing.assert_close(chosen.view(place, views, 1, True), images.view(number, views, 1, True))


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (40, 17), (17, 40), (2, 64), (64, 3)])
def test_the_centre_is_what_pixel_models_train_on(size):
    images = pictures([size])
    pixels, view = images.view(0, Views([(16, 16)]), 0, False)
    assert torch.equal(pixels, images[0])
    assert view.original_height <= size[0]  # of a long image the middle


def test_a_view_is_what_torchvision_cuts():
    """As in diffusers' train_text_to_image_sdxl.py: resize, flip, crop."""
    transforms = pytest.importorskip("torchvision.transforms.v2.functional")
    images = pictures([(33, 71)])
    for crop in range(3):
        pixels, view = images.view(0, Views([(16, 16)], num_crops=3), crop, True)
        resized = images.read(0).resize((view.resized_width, view.resized_height), Image.Resampling.BICUBIC)
        cut = transforms.crop(transforms.hflip(transforms.pil_to_tensor(resized)), view.top, view.left, 16, 16)
        torch.testing.assert_close(pixels, cut.float() / 127.5 - 1)


def test_a_mirrored_view_is_the_mirror_of_the_view():
    images, views = pictures([(20, 50)]), Views([(16, 24)], num_crops=4)
    for crop in range(4):
        assert torch.equal(images.view(0, views, crop, True)[0], images.view(0, views, crop, False)[0].flip(-1))


def test_no_crops_are_refused():
    with pytest.raises(ValueError, match="num_crops must be at least 1, not 0"):
        Views([(8, 8)], num_crops=0)


# ---- buckets


@pytest.mark.parametrize(("resolution", "factor"), [(512, 64), (1024, 64), (256, 32), (64, 8), (64, 64), (32, 16)])
def test_buckets_are_those_of_diffusers(resolution, factor):
    buckets = aspect_buckets(resolution, factor)
    assert buckets[0] == (resolution, resolution)
    assert all(side % factor == 0 for bucket in buckets for side in bucket)
    assert len(set(buckets)) == len(buckets)
    try:
        from diffusers.training_utils import generate_aspect_ratio_buckets
    except ImportError:  # it is newer than the lowest version
        return
    assert buckets == generate_aspect_ratio_buckets(resolution, factor)


@pytest.mark.parametrize(("resolution", "factor"), [(8, 16), (0, 1), (8, 0)])
def test_buckets_need_room(resolution, factor):
    with pytest.raises(ValueError, match="aspect buckets are multiples"):
        aspect_buckets(resolution, factor)


@settings(max_examples=50)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=30))
def test_each_image_is_in_the_bucket_nearest_to_it(originals):
    buckets = aspect_buckets(64, 8)
    views = bucketed_views(np.array(originals), buckets)
    chosen = [views.sizes[views.bucket(index)] for index in range(len(originals))]
    assert set(chosen) == set(views.sizes)  # none is empty
    for (height, width), bucket in zip(originals, chosen, strict=True):
        errors = {other: abs(height * other[1] - width * other[0]) for other in buckets}
        assert errors[bucket] == min(errors.values())


def test_a_bucket_cuts_little():
    """Of a photograph of 3 : 2 a square keeps two thirds, its bucket nearly all."""
    images = pictures([(40, 60), (60, 40), (50, 50)])
    views = bucketed_views(images.sizes(), aspect_buckets(64, 8))
    assert [views.sizes[views.bucket(index)] for index in range(3)] == [(56, 80), (80, 56), (64, 64)]
    for index in range(3):
        pixels, view = images.view(index, views, 0, False)
        assert pixels.shape == (3, view.height, view.width)
        assert view.height * view.width >= 0.95 * view.resized_height * view.resized_width


# ---- sizes


@pytest.mark.parametrize("kind", ["folder", "table", "paths", "embedded"])
def test_sizes_are_those_of_decoded_images(kind, tmp_path):
    sizes = [(8, 12), (12, 8), (5, 200), (9, 9)]
    contents = [encoded(Image.new("RGB", size), "JPEG") for size in sizes]
    turned = Image.new("RGB", (8, 12)).getexif()
    turned[0x0112] = 6  # lies on its side
    contents.append(encoded(Image.new("RGB", (8, 12)), "JPEG", exif=turned))
    if kind == "table":
        image_table(contents).to_parquet(tmp_path / "a.parquet")
    else:
        for number, content in enumerate(contents):
            (tmp_path / f"{number}.jpg").write_bytes(content)
        if kind == "paths":
            parquet.write_table(
                pyarrow.table({"image": sorted(map(str, tmp_path.glob("*.jpg")))}), tmp_path / "a.parquet"
            )
    source = {"paths": tmp_path / "a.parquet", "embedded": "digits"}.get(kind, tmp_path)
    images, _ = load(source, held_out_fraction=0, **({"image_column": "image"} if kind == "paths" else {}))
    if kind == "embedded":
        assert images.sizes().tolist() == [[8, 8]] * len(images)
        return
    assert images.sizes().tolist() == [[12, 8], [8, 12], [80, 5], [9, 9], [8, 12]]
    decoded = [[image.height, image.width] for image in map(images._image, range(len(images)))]
    assert decoded == images.sizes().tolist()


def test_the_size_of_what_is_no_image_is_told(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images, _ = load(tmp_path, held_out_fraction=0)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*a\.png: its content is of no image format"):
        images.sizes()
