"""What a user gets wrong is told in one line that says what to do, with status 2, before the work starts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from tests.conftest import tiny_unet
from tests.eval.conftest import EVAL, save_pngs
from vkd_gen.files import LOCK
from vkd_gen.sampling import stock_pipeline


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def array_at(tmp, pixels, name="arr_0"):
    np.savez(tmp / "array.npz", **{name: pixels})
    return tmp / "array.npz"


def statistics_at(tmp, width, covariance=None):
    np.savez(tmp / "statistics.npz", mu=np.zeros(width), sigma=np.eye(width) if covariance is None else covariance)
    return tmp / "statistics.npz"


def text_at(tmp, name="file.txt"):
    (tmp / name).write_text("something else")
    return tmp / name


def odd_sizes(tmp):
    save_pngs(tmp / "odd", 12)
    Image.new("L", (9, 9)).save(tmp / "odd" / "000005.png")
    return tmp / "odd"


def pickled_pipeline(tmp):
    folder = tmp / "pickled"
    stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(Payload(tmp / "executed"), folder / "unet/diffusion_pytorch_model.bin")
    return folder


def whole_pipeline(tmp):
    stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp / "whole")
    return tmp / "whole"


def pipeline_with_code(tmp, part, file):
    """Code that diffusers would import, which leaves a file."""
    folder = whole_pipeline(tmp)
    index = json.loads((folder / "model_index.json").read_text())
    index[part] = ["evil", "Evil"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / file).write_text(f"open({str(tmp / 'executed')!r}, 'w')\nclass Evil: pass\n")
    return folder


def changed(tmp, file, **entries):
    """A pipeline of which one file says something else."""
    folder = tmp / "changed"
    stock_pipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder)
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **entries}))
    return folder


def note_of(tmp, text):
    """A folder of images whose note on how they were made says something else."""
    folder = save_pngs(tmp / "made", 2)
    (folder / "generate.json").write_text(text)
    return folder


def finished(tmp):
    text_at(tmp, "results.json")
    return tmp


# name -> flags of eval/score.py in place of the good ones, words of the message
SCORE = {
    "nothing to score": (lambda tmp: {"sources": []}, "at least one pipeline"),
    "no such source": (lambda tmp: {"sources": [tmp / "nowhere"]}, "there is no pipeline folder"),
    "the same source twice": (lambda tmp: {"sources": ["x", "x"]}, "named twice"),
    "a file that is no array": (lambda tmp: {"sources": [text_at(tmp)]}, "there is no pipeline folder"),
    "a damaged array": (lambda tmp: {"sources": [text_at(tmp, "x.npz")]}, "cannot read images from"),
    "an array of numbers": (lambda tmp: {"sources": [array_at(tmp, np.zeros((12, 8, 8, 1)))]}, "float64.*uint8"),
    "an array of another shape": (
        lambda tmp: {"sources": [array_at(tmp, np.zeros((12, 8, 8, 4), np.uint8))]},
        r"\[12, 8, 8, 4\]; images are uint8",
    ),
    "images of unlike sizes": (lambda tmp: {"sources": [odd_sizes(tmp)]}, "image 5 .* is 9 x 9 pixels"),
    "images that are not square": (
        lambda tmp: {"sources": [array_at(tmp, np.zeros((12, 8, 9, 1), np.uint8))]},
        "8 x 9 pixels",
    ),
    "sources of unlike sizes": (
        lambda tmp: {"sources": [save_pngs(tmp / "a", 12), save_pngs(tmp / "b", 12, size=16)]},
        "unlike sizes",
    ),
    "too few images": (lambda tmp: {"sources": [save_pngs(tmp / "few", 9)]}, "9 images are too few"),
    "fewer images than a KID subset": (
        lambda tmp: {"sources": [save_pngs(tmp / "few", 12)], "--kid_subset_size": 20},
        "12 images are too few.*smaller --kid_subset_size",
    ),
    "a pickled pipeline": (lambda tmp: {"sources": [pickled_pipeline(tmp)]}, "pickled and can run code"),
    "a pipeline of a class of its own": (
        lambda tmp: {"sources": [pipeline_with_code(tmp, "_class_name", "evil.py")]},
        "is not one of diffusers' pipelines; code of its own is not run",
    ),
    "a pipeline whose part is of a class of its own": (
        lambda tmp: {"sources": [pipeline_with_code(tmp, "unet", "unet/evil.py")]},
        "its part 'unet' is of 'evil'",
    ),
    "guidance without classes": (
        lambda tmp: {"sources": [whole_pipeline(tmp)], "--guidance_scale": 2, "--num_score_samples": 12},
        "unconditional: it takes no guidance_scale",
    ),
    "guidance below one": (lambda tmp: {"--guidance_scale": 0.5}, "--guidance_scale must be at least 1"),
    "a seed beyond 64 bits": (lambda tmp: {"--seed": 2**63}, r"--seed must be at least 0 and below 2\^62"),
    "an array that is not there": (lambda tmp: {"sources": [tmp / "nowhere.npz"]}, "cannot read images from"),
    "a reference array that is not there": (lambda tmp: {"--reference": tmp / "nowhere.npz"}, "there is no file"),
    "a reference of another size": (
        lambda tmp: {"--reference": array_at(tmp, np.zeros((12, 16, 16, 1), np.uint8))},
        "16 x 16 pixels, the sources of 8 x 8",
    ),
    "statistics that do not fit": (
        lambda tmp: {"--reference": statistics_at(tmp, 5, covariance=np.eye(4))},
        "which do not fit",
    ),
    "weights for a network that is downloaded": (
        lambda tmp: {"--extractor": "clip-vit-b-32", "--extractor_weights": text_at(tmp)},
        "downloads the weights of clip-vit-b-32 itself",
    ),
    "a hub id that is not there": (lambda tmp: {"sources": ["nobody/nothing"]}, "cannot load the pipeline"),
    "no such reference": (lambda tmp: {"--reference": tmp / "nowhere"}, "there is no folder or file"),
    "a reference of too few images": (
        lambda tmp: {"--reference": save_pngs(tmp / "few", 3)},
        "the reference.*3 images are too few",
    ),
    "statistics of another network": (
        lambda tmp: {"--reference": statistics_at(tmp, 5)},
        "5 dimensions.*another network",
    ),
    "a held-out share of all": (lambda tmp: {"--held_out_fraction": 1}, "--held_out_fraction must be"),
    "no such extractor": (lambda tmp: {"--extractor": "resnet"}, "no extractor 'resnet'.*choose one of"),
    "weights for a network that carries its own": (
        lambda tmp: {"--extractor_weights": text_at(tmp)},
        "carries its weights",
    ),
    "no extractor": (lambda tmp: {"--extractor": "none"}, "scores need an --extractor"),
    "a reference of objects": (
        lambda tmp: {"--reference": array_at(tmp, np.array([Payload(tmp / "executed")], dtype=object))},
        "cannot read images",
    ),
    "no batch": (lambda tmp: {"--batch_size": 0}, "--batch_size must be at least 1"),
    "an output that is a file": (lambda tmp: {"--output_dir": text_at(tmp) / "x"}, "is a file"),
    "an output that holds results": (lambda tmp: {"--output_dir": finished(tmp)}, "already holds results"),
}

GENERATE = {
    "no images": (lambda tmp: {"--num_images": 0}, "--num_images must be at least 1"),
    "a negative seed": (lambda tmp: {"--seed": -1}, "--seed must be at least 0"),
    "no checkpoint": (lambda tmp: {"sources": [tmp / "nowhere"]}, "there is no pipeline folder"),
    "an output that is a file": (lambda tmp: {"--output": text_at(tmp)}, "is a file"),
    "an output below a file": (lambda tmp: {"--output": text_at(tmp) / "x" / "y"}, "is a file"),
    "an output of something else": (lambda tmp: {"--output": save_pngs(tmp / "x", 2)}, "not of this command"),
    "not a number": (lambda tmp: {"--num_images": "many"}, "many"),
    "no batch": (lambda tmp: {"--batch_size": 0}, "--batch_size must be at least 1"),
    "a damaged note": (lambda tmp: {"--output": note_of(tmp, "{")}, "generate.json is damaged"),
    "a note of another kind": (lambda tmp: {"--output": note_of(tmp, "[1]")}, "generate.json is damaged"),
    "an array that is there": (lambda tmp: {"--output": text_at(tmp, "x.npz")}, "is there already"),
}

COST = {
    "no model": (lambda tmp: {"sources": []}, "at least one model"),
    "no such model": (lambda tmp: {"sources": [tmp / "nowhere"]}, "there is no"),
    "no batch": (lambda tmp: {"--batch_size": 0}, "--batch_size"),
    "no such student": (lambda tmp: {"--students": "bk-bse"}, "no student 'bk-bse'"),
    "absurd size": (lambda tmp: {"--sample_size": 10**9}, "could be built: sample_size"),
    "absurd model": (
        lambda tmp: {"sources": [changed(tmp, "unet/config.json", block_out_channels=[10**9, 8])]},
        "could be built: block_out_channels",
    ),
}

REPORT = {
    "no folder": (lambda tmp: {"sources": []}, "at least one folder"),
    "a folder without results": (lambda tmp: {"sources": [tmp]}, "holds no results.json"),
    "damaged results": (lambda tmp: {"sources": [finished(tmp)]}, "cannot read the results"),
    "an output that is a folder": (lambda tmp: {"--output": tmp}, "is a folder; name a file"),
}
CASES = [
    pytest.param(command, name, id=f"{command}: {name}")
    for command, cases in (("score", SCORE), ("generate", GENERATE), ("cost", COST), ("report", REPORT))
    for name in cases
]


@pytest.mark.parametrize(("command", "name"), CASES)
def test_mistake_is_told_in_one_line(command, name, tmp_path, run_eval, checkpoint, folders, feature_network, capfd):
    make, words = {"score": SCORE, "generate": GENERATE, "cost": COST, "report": REPORT}[command][name]
    output = tmp_path / "output"
    flags = {
        "score": {"sources": [folders[0]], "--reference": folders[1], "--extractor": feature_network,
                  "--kid_subset_size": 10, "--output_dir": output},
        "generate": {"sources": [checkpoint], "--output": output, "--num_images": 2, "--num_inference_steps": 1},
        "cost": {"sources": [checkpoint]},
        "report": {"sources": [tmp_path]},
    }[command] | make(tmp_path)  # fmt: skip
    sources = flags.pop("sources")
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_status:
        run_eval(command, *sources, *(part for flag in flags.items() for part in flag))
    assert exit_status.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert len(lines) == 1
    assert re.search(words, lines[0]), lines[0]
    # Nothing is left but the lock of a folder that was held, and no pickle has run.
    held = {path.parent for path in tmp_path.rglob(LOCK) if len(list(path.parent.iterdir())) == 1}
    after = {path for path in tmp_path.rglob("*") if "cache" not in path.parts and path.name != LOCK} - held
    assert sorted(after) == before


@pytest.mark.parametrize(
    "command", ["score", *(pytest.param(name, marks=pytest.mark.slow) for name in ("generate", "cost", "report"))]
)
def test_the_real_command_tells_it_in_one_line_too(command, tmp_path):
    flags = {"score": ["--reference", "digits"], "generate": ["--output", str(tmp_path / "x")]}.get(command, [])
    script = [sys.executable, str(EVAL / f"{command}.py"), "./nowhere", *flags]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*nowhere.*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []
