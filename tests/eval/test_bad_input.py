"""What a user gets wrong is told in one line that says what to do, with status 2, before the work starts."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.conftest import EVAL, save_pngs
from vkd_gen.files import LOCK


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def bad(tmp_path_factory, checkpoint):
    """A folder of what is wrong, by name."""
    root = tmp_path_factory.mktemp("bad")
    for name in ("text", "text.npz", "results/results.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("something else")
    arrays = {"floats": np.zeros((12, 8, 8, 1)), "rgba": np.zeros((12, 8, 8, 4), np.uint8)}
    arrays |= {"oblong": np.zeros((12, 8, 9, 1), np.uint8), "large": np.zeros((12, 16, 16, 1), np.uint8)}
    for name, pixels in arrays.items():
        np.savez(root / f"{name}.npz", arr_0=pixels)
    np.savez(root / "statistics.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(root / "unlike.npz", mu=np.zeros(5), sigma=np.eye(4))
    for name, count, size in (("odd", 12, 8), ("small", 12, 8), ("wide", 12, 16), ("nine", 9, 8), ("few", 3, 8)):
        save_pngs(root / name, count, size=size)
    Image.new("L", (9, 9)).save(root / "odd/000005.png")
    for name, note in (("torn", "{"), ("listed", "[1]")):
        (save_pngs(root / name, 2) / "generate.json").write_text(note)
    (shutil.copytree(checkpoint, root / "pickled") / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save(Payload(root / "executed"), root / "pickled/unet/diffusion_pytorch_model.bin")
    for name, part, file in (("own", "_class_name", "evil.py"), ("own-part", "unet", "unet/evil.py")):
        index = shutil.copytree(checkpoint, root / name) / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), part: ["evil", "Evil"]}))
        (root / name / file).write_text(f"open({str(root / 'executed')!r}, 'w')\nclass Evil: pass\n")
    config = shutil.copytree(checkpoint, root / "absurd") / "unet/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [10**9, 8]}))
    return root


GOOD = {
    "score": "{dark} --reference {bright} --extractor {network} --kid_subset_size 10 --output_dir {output}",
    "generate": "{checkpoint} --output {output} --num_images 2 --num_inference_steps 1",
    "cost": "{checkpoint}",
    "report": "{output}",
}
# Flags that take the places of the good ones, those before the first "--" of all sources; words of the message.
MISTAKES = [
    ("score", "", "at least one pipeline"),
    ("score", "nowhere.x", "cannot load the pipeline"),
    ("score", "{bad}/nowhere", "there is no pipeline folder"),
    ("score", "x x", "named twice"),
    ("score", "{bad}/text", "there is no pipeline folder"),
    ("score", "{bad}/text.npz", "cannot read images from"),
    ("score", "{bad}/nowhere.npz", "cannot read images from"),
    ("score", "{bad}/floats.npz", "float64.*uint8"),
    ("score", "{bad}/rgba.npz", r"\[12, 8, 8, 4\]; images are uint8"),
    ("score", "{bad}/odd", "image 5 .* is 9 x 9 pixels"),
    ("score", "{bad}/oblong.npz", "8 x 9 pixels"),
    ("score", "{bad}/small {bad}/wide", "unlike sizes"),
    ("score", "{bad}/nine", "9 images are too few"),
    ("score", "{bad}/small --kid_subset_size 20", "12 images are too few.*smaller --kid_subset_size"),
    ("score", "{bad}/pickled", "pickled and can run code"),
    ("score", "{bad}/own", "is not one of diffusers' pipelines; code of its own is not run"),
    ("score", "{bad}/own-part", "its part 'unet' is of 'evil'"),
    ("score", "{checkpoint} --guidance_scale 2 --num_score_samples 12", "unconditional: it takes no guidance_scale"),
    ("score", "{dark} --guidance_scale 0.5", "--guidance_scale must be at least 1"),
    ("score", "{dark} --seed 9223372036854775808", r"--seed must be at least 0 and below 2\^62"),
    ("score", "{dark} --batch_size 0", "--batch_size must be at least 1"),
    ("score", "{dark} --reference {bad}/nowhere", "there is no folder or file"),
    ("score", "{dark} --reference {bad}/nowhere.npz", "there is no file"),
    ("score", "{dark} --reference {bad}/large.npz", "16 x 16 pixels, the sources of 8 x 8"),
    ("score", "{dark} --reference {bad}/few", "the reference.*3 images are too few"),
    ("score", "{dark} --reference {bad}/unlike.npz", "which do not fit"),
    ("score", "{dark} --reference {bad}/statistics.npz", "5 dimensions.*another network"),
    ("score", "{dark} --reference {bad}/floats.npz --held_out_fraction 0.5", "an .npz reference is taken whole"),
    ("score", "{dark} --held_out_fraction 1", "held_out_fraction must be"),
    ("score", "{dark} --extractor resnet", "no extractor 'resnet'.*choose one of"),
    ("score", "{dark} --extractor none", "scores need an --extractor"),
    ("score", "{dark} --extractor clip-vit-b-32 --extractor_weights {bad}/text", "downloads the weights of clip-vit"),
    ("score", "{dark} --extractor_weights {bad}/text", "carries its weights"),
    ("score", "{dark} --output_dir {bad}/text/x", "is a file"),
    ("score", "{dark} --output_dir {bad}/results", "already holds results"),
    ("generate", "{bad}/nowhere", "there is no pipeline folder"),
    ("generate", "{checkpoint} --num_images 0", "--num_images must be at least 1"),
    ("generate", "{checkpoint} --num_images many", "many"),
    ("generate", "{checkpoint} --seed -1", "--seed must be at least 0"),
    ("generate", "{checkpoint} --output {bad}/text", "is a file"),
    ("generate", "{checkpoint} --output {bad}/text/x/y", "is a file"),
    ("generate", "{checkpoint} --output {bad}/small", "not of this command"),
    ("generate", "{checkpoint} --output {bad}/torn", "generate.json is damaged"),
    ("generate", "{checkpoint} --output {bad}/listed", "generate.json is damaged"),
    ("generate", "{checkpoint} --output {bad}/text.npz", "is there already"),
    ("cost", "", "at least one model"),
    ("cost", "{bad}/nowhere", "there is no"),
    ("cost", "{checkpoint} --batch_size 0", "--batch_size"),
    ("cost", "{checkpoint} --students bk-bse", "no student 'bk-bse'"),
    ("cost", "{checkpoint} --sample_size 1000000000", "could be built: sample_size"),
    ("cost", "{bad}/absurd", "could be built: block_out_channels"),
    ("report", "", "at least one folder"),
    ("report", "{bad}/small", "holds no results.json"),
    ("report", "{bad}/results", "cannot read the results"),
    ("report", "{bad}/results --output {bad}", "is a folder; name a file"),
]


def parsed(flags):
    """Sources, and flag -> value."""
    sources, *pairs = flags.split(" --") if not flags.startswith("--") else ["", *flags[2:].split(" --")]
    return sources.split(), dict(pair.split(maxsplit=1) for pair in pairs)


@pytest.mark.parametrize(("command", "flags", "words"), MISTAKES)
def test_a_mistake_is_told_in_one_line(
    command, flags, words, bad, tmp_path, run_eval, checkpoint, folders, feature_network, capfd
):
    places = {"bad": bad, "checkpoint": checkpoint, "dark": folders[0], "bright": folders[1]}
    places |= {"network": feature_network, "output": tmp_path / "output"}
    (_, good), (sources, changed) = (parsed(text.format(**places)) for text in (GOOD[command], flags))
    before = sorted(path for path in bad.rglob("*") if path.name != LOCK)
    given = [part for flag, value in (good | changed).items() for part in (f"--{flag}", value)]
    with pytest.raises(SystemExit) as exit_status:
        run_eval(command, *sources, *given)
    assert exit_status.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert re.search(words, line), line
    # Nothing is left but the lock of a folder that was held, and no pickle has run.
    assert sorted(path for path in bad.rglob("*") if path.name != LOCK) == before
    assert {path.name for path in (tmp_path / "output").glob("*")} <= {LOCK}


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
