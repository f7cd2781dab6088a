"""Text pipelines, generated and scored: each image is of its own prompt; what does not fit is told in one line."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.clip_models import save_clip
from tests.conftest import refused
from tests.eval.conftest import save_pngs
from tests.text_pipelines import tiny_pipeline
from vkd_gen.evaluation.clip import load_clip
from vkd_gen.evaluation.published import COCO30K_ROWS
from vkd_gen.models import Model

PROMPTS = ["a red cat", "blue", "a hat, red", "b", "cat, blue"]
STEPS = ("--num_inference_steps", 2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A text pipeline, a CLIP, prompts and images to compare with."""
    root = tmp_path_factory.mktemp("text")
    tiny_pipeline("sd1", root / "sd1")
    save_clip(root / "tiny-clip")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "empty.txt").write_text("")
    (root / "table.csv").write_text("a,b\nx,y\n")
    save_pngs(root / "real", 12, size=16, mode="RGB")
    (root / "no-weights").mkdir()
    (root / "no-weights/config.json").write_bytes((root / "tiny-clip/config.json").read_bytes())
    return root


def pixels_in(folder):
    return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in sorted(folder.glob("*.png"))])


def test_images_are_of_their_prompts_and_seeds(made, tmp_path, run_eval):
    flags = [made / "sd1", "--prompts", made / "prompts.txt", "--num_images", 7, *STEPS]
    flags += ["--guidance_scale", 4, "--seed", 3]
    run_eval("generate", *flags, "--output", tmp_path / "plain", "--batch_size", 4)
    more = ["--resolution", 48, "--resize", 16, "--negative_prompt", "b", "--sampler", "euler"]
    run_eval("generate", *flags, *more, "--output", tmp_path / "small")
    model = Model(tiny_pipeline("sd1"))
    prompts = [PROMPTS[number % 5] for number in range(7)]
    sampling = {"num_inference_steps": 2, "guidance_scale": 4.0}
    expected = model.images(range(3, 10), conditioning={"prompt": prompts}, **sampling).permute(0, 2, 3, 1)
    assert (pixels_in(tmp_path / "plain").int() - expected.int()).abs().max() <= 1
    assert pixels_in(tmp_path / "small").shape == (7, 16, 16, 3)
    protocol = json.loads((tmp_path / "small/protocol.json").read_text())
    assert protocol["sampler"] == "EulerDiscreteScheduler"
    assert protocol["resize"] == "48 to 16, PIL's antialiased bicubic"
    assert protocol["guidance_scale"] == 4
    assert protocol["negative_prompt"] == "b"
    assert protocol["prompts"].startswith("5 of ")
    rows = [json.loads(line) for line in (tmp_path / "plain/metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == prompts
    assert rows[6]["file_name"] == "000006.png"


def test_resizing_is_pils_antialiased_bicubic():
    from vkd_gen.evaluation.samples import resized

    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for channels in (1, 3):
        small = resized(images[:, :channels], 8)
        for image, found in zip(images[:, :channels], small, strict=True):
            one = Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).resize((8, 8), Image.Resampling.BICUBIC)
            assert np.array_equal(np.asarray(one).reshape(8, 8, channels), found.permute(1, 2, 0).numpy())


def test_scores_of_a_pipeline_and_of_its_images_agree(made, tmp_path, run_eval, feature_network, capfd):
    sampling = ["--prompts", made / "prompts.txt", *STEPS, "--resize", 16]
    scores = ["--reference", made / "real", "--extractor", feature_network, "--kid_subset_size", 10]
    scores += ["--clip_model", made / "tiny-clip"]
    run_eval("generate", made / "sd1", *sampling, "--num_images", 12, "--output", tmp_path / "images")
    flags = ["--num_score_samples", 12, "--output_dir", tmp_path / "scores", "--preset", "coco30k", "--resolution", 32]
    flags += ["--sampler", "pndm", "--guidance_scale", 7.5]
    run_eval("score", made / "sd1", tmp_path / "images", *sampling, *scores, *flags)
    results = json.loads((tmp_path / "scores/results.json").read_text())
    first, second = list(results["rows"].values())[:2]
    assert first == pytest.approx(second, rel=1e-4)
    prompts = [PROMPTS[number % 5] for number in range(12)]
    images = pixels_in(tmp_path / "images").permute(0, 3, 1, 2)
    expected = load_clip(str(made / "tiny-clip"))(images, prompts).double().mean()
    assert first["clip_score_tiny_clip"] == pytest.approx(float(expected), rel=1e-4)
    assert results["protocol"]["clip_model"] == "tiny-clip"
    assert "Nota-NetsPresso" in results["protocol"]["published"]
    assert {name: results["rows"][name] for name in COCO30K_ROWS} == COCO30K_ROWS
    assert "CLIP score" in capfd.readouterr().out


def test_the_preset_stands_for_flags_that_others_go_before(run_eval, made, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("vkd_gen.evaluation.samples.usable_steps", lambda _, steps: seen.append(steps) or steps)
    monkeypatch.setattr(Model, "images", lambda _self, seeds, **options: seen.append(options) or 1 / 0)
    flags = ["--prompts", made / "prompts.txt", "--output", tmp_path / "x", "--resolution", 64]
    with pytest.raises(ZeroDivisionError):
        run_eval("generate", made / "sd1", "--preset", "coco30k", *flags)
    assert seen[0] == 25
    assert seen[1]["guidance_scale"] == 7.5
    assert seen[1]["size"] == 64


GOOD = {
    "generate": "{made}/sd1 --prompts {made}/prompts.txt --num_images 2 --num_inference_steps 1 --output {output}",
    "score": "{made}/sd1 --prompts {made}/prompts.txt --num_score_samples 12 --num_inference_steps 1 --resize 16 "
    "--kid_subset_size 10 --reference {made}/real --extractor {network} --output_dir {output}",
}
MISTAKES = [
    ("--prompts {made}/nowhere.txt", "nowhere.txt is not there"),
    ("--prompts {made}/nowhere", "no folder or file"),
    ("--prompts {made}/empty.txt", "empty.txt holds no prompt"),
    ("--prompts {made}/table.csv", "name one by --caption_column"),
    ("--prompts {made}/table.csv --caption_column c", "has no column 'c'"),
    ("--prompts {made}/real", "no usable caption"),
    ("--prompts digits", "has no captions"),
    ("--guidance_scale 0.5", "--guidance_scale must be at least 1"),
    ("--guidance_scale nan", "--guidance_scale must be at least 1"),
    ("--resolution 33", "must be a multiple of 2 pixels, not 33"),
    ("--resolution 0", "--resolution must be at least 1"),
    ("--resize 0", "--resize must be at least 1"),
    ("--sampler heun", "heun"),
    ("--preset coco", "there is no preset 'coco'"),
]
OF_SCORES = [
    ("--clip_model {made}/no-weights", "cannot load the --clip_model .*weights are missing"),
    ("--clip_model {made}/real", "cannot load the --clip_model .*config.json is not there"),
    ("--clip_model laion/nothing", "cannot load the --clip_model laion/nothing"),
]


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [("generate", *mistake) for mistake in MISTAKES] + [("score", *mistake) for mistake in OF_SCORES],
)
def test_a_mistake_is_told_in_one_line(command, flags, words, made, tmp_path, run_eval, feature_network, capfd):
    places = {"made": made, "network": feature_network, "output": tmp_path / "output"}
    given = f"{GOOD[command]} {flags}".format(**places).split()
    assert re.search(words, refused(capfd, run_eval, command, *given))
    assert not list((tmp_path / "output").glob("*.png"))


@pytest.mark.parametrize("command", ["generate", "score"])
def test_a_text_pipeline_without_prompts(command, made, tmp_path, run_eval, feature_network, capfd):
    places = {"made": made, "network": feature_network, "output": tmp_path / "output"}
    given = GOOD[command].format(**places).replace(f"--prompts {made}/prompts.txt", "").split()
    assert "name some by --prompts" in refused(capfd, run_eval, command, *given)
    if command == "score":
        given = [str(made / "real"), *given[1:], "--clip_model", str(made / "tiny-clip")]
        assert "name these by --prompts" in refused(capfd, run_eval, command, *given)


def test_prompts_are_refused_by_what_takes_none(made, checkpoint, tmp_path, run_eval, capfd):
    flags = [checkpoint, "--num_images", 2, "--output", tmp_path / "x"]
    assert "takes no prompts" in refused(capfd, run_eval, "generate", *flags, "--negative_prompt", "b")
    assert "and of no other size" in refused(capfd, run_eval, "generate", *flags, "--resolution", 16)
    assert "takes no prompts" in refused(capfd, run_eval, "generate", *flags, "--prompts", made / "prompts.txt")
