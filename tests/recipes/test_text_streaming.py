"""Captioned images read from front to back: a student of Stable Diffusion trained on what it never holds."""

import io
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import refused
from tests.faults.small_run import end_pair, run_student
from tests.recipes.conftest import assert_same_weights, read_metrics, run_until, without_times
from tests.text_pipelines import tiny_pipeline

datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.usefixtures("datasets_cache")

STUDENT = "train_student_unet"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_pipeline("sd1", folder)
    return folder


def pictures():
    """Bytes of a square on white, higher than wide, and its caption."""
    generator = np.random.default_rng(0)
    for number in range(20):
        name, colour = [("red", (220, 30, 30)), ("blue", (30, 30, 220))][number % 2]
        pixels = np.full((44, 36, 3), 255, np.uint8)
        top, left = generator.integers(0, 20, 2)
        pixels[top : top + 16, left : left + 16] = colour
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        yield buffer.getvalue(), f"a {name} square {number}"


def write_set(folder, kind, *, without=()):
    """Four shards of five pictures; those of some numbers are without a caption."""
    folder.mkdir()
    rows = [(content, None if number in without else text) for number, (content, text) in enumerate(pictures())]
    for shard in range(4):
        part = rows[5 * shard : 5 * shard + 5]
        if kind == "parquet":
            columns = {"image": [{"bytes": content, "path": None} for content, _ in part]}
            columns["text"] = [text for _, text in part]
            features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
            datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"train-{shard:03}.parquet")
            continue
        with tarfile.open(folder / f"{shard:03}.tar", "w") as archive:
            for number, (content, text) in enumerate(part):
                for end, member in (("png", content), ("txt", None if text is None else text.encode())):
                    if member is not None:
                        entry = tarfile.TarInfo(f"{5 * shard + number:04}.{end}")
                        entry.size = len(member)
                        archive.addfile(entry, io.BytesIO(member))
    return folder


def flags_of(teacher, data, run, *more):
    """A run of six steps of four pictures in all; the head is three of each shard."""
    short = ["--preset", "custom", "--teacher", teacher, "--dataset", data, "--output_dir", run, "--streaming"]
    short += ["--stream_head", 12, "--stream_buffer", 3, "--max_train_steps", 6, "--train_batch_size", 4]
    short += ["--log_every_steps", 1, "--checkpointing_steps", 2, "--lr_warmup_steps", 0, "--method", "output"]
    short += ["--calibration_samples", 16, "--num_timestep_bins", 2, "--eval_batch_size", 8, "--no_inherit_weights"]
    short += ["--num_inference_steps", 1, "--extractor", "none", "--no-score_teacher", "--diagnostics_every_steps", 0]
    short += ["--random_flip", "--num_crops", 2]
    short += ["--dataloader_num_workers", 0]
    return [*short, *more]


@pytest.mark.parametrize(
    ("kind", "workers"),
    [("tars", 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("parquet", 0), ("tars", 2)))],
)
def test_a_streamed_run_is_resumed_bit_for_bit(kind, workers, teacher, tmp_path, run_recipe, capfd):
    """In the second pass through the pictures; those without captions, in the head and behind it, are left out."""
    data = write_set(tmp_path / "data", kind, without=[1, 9])
    more = ["--on_missing_caption", "skip", "--dataloader_num_workers", workers]
    straight, resumed = (flags_of(teacher, data, tmp_path / name, *more) for name in ("straight", "resumed"))
    run_recipe(STUDENT, *straight)
    told = capfd.readouterr().out
    assert "of a stream of 4 shards" in told
    assert "1 of 12 images" in told
    assert "encoded as they are drawn" in told
    run_until(5, run_recipe, STUDENT, *resumed)
    torch.manual_seed(7)
    run_recipe(STUDENT, *resumed, "--resume_from_checkpoint", "latest")
    assert "going on from" in capfd.readouterr().out
    lines = without_times(read_metrics(tmp_path / "straight"))
    assert lines == without_times(read_metrics(tmp_path / "resumed"))
    assert np.isfinite([line["loss/output"] for line in lines if "loss/output" in line]).all()
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")
    assert not list((tmp_path / "cache").glob("encodings/*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_two_processes_go_on_with_their_own_shards(kind, teacher, tmp_path):
    data, cache = write_set(tmp_path / "data", kind), {"VKD_GEN_CACHE": str(tmp_path / "cache")}
    flags = flags_of(teacher, data, tmp_path / "straight", "--train_batch_size", 2)
    end_pair(tmp_path / "output", run_student, flags, **cache)
    shutil.copytree(tmp_path / "straight/checkpoint-4", tmp_path / "resumed/checkpoint-4")
    flags[flags.index("--output_dir") + 1] = tmp_path / "resumed"
    end_pair(tmp_path / "output", run_student, [*flags, "--resume_from_checkpoint", "latest"], **cache)
    later = [line for line in without_times(read_metrics(tmp_path / "straight")) if line["step"] > 4]
    assert later == without_times(read_metrics(tmp_path / "resumed"))
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")


@pytest.mark.parametrize("kind", ["tars", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_picture_without_a_caption_behind_the_head(kind, teacher, tmp_path, run_recipe, capfd):
    """Is told of when it is read."""
    data = write_set(tmp_path / "data", kind, without=[9])
    told = refused(capfd, run_recipe, STUDENT, *flags_of(teacher, data, tmp_path / "run"))
    assert "image 4 of shard 1 of" in told
    assert "no caption" in told


def test_what_cannot_be_streamed(teacher, tmp_path, run_recipe, capfd):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (content, text) in zip(range(4), pictures(), strict=False):
        (folder / f"{number}.png").write_bytes(content)
        (folder / f"{number}.txt").write_text(text)
    told = refused(capfd, run_recipe, STUDENT, *flags_of(teacher, folder, tmp_path / "run"))
    assert "cannot be streamed; leave out --streaming" in told
