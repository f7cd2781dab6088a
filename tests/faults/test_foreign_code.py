"""No Python of a model's folder is run, wherever it lies and whatever names it; each case is one line."""

import json
import sys

import pytest
from diffusers import DDIMPipeline, DDIMScheduler

from tests.conftest import one_line, tiny_unet
from tests.faults.test_weight_names import save_dit
from vkd_gen.pipelines import load_pipeline
from vkd_gen.training.unets import load_teacher

CODE = """from pathlib import Path
Path({path!r}).touch()
from diffusers import *
from diffusers import DDIMPipeline as P, UNet2DModel as M
"""
MODULES = ("evilmod", "diffusers", "transformers", "pipeline", "stable_diffusion", "modeling_unet", "__init__")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A pipeline with code under many names in each of its folders, all of which must not run."""
    folder, executed = tmp_path / "pipeline", tmp_path / "executed"
    DDIMPipeline(tiny_unet(), DDIMScheduler()).save_pretrained(folder)
    for place in (folder, folder / "unet", folder / "scheduler"):
        for module in MODULES:
            (place / f"{module}.py").write_text(CODE.format(path=str(executed)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield folder
    assert not executed.exists()
    assert "evilmod" not in sys.modules


def change(file, **entries):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **entries}))


def nest(folder, part, name):
    """Put a whole pipeline of class `name` into a part's folder."""
    DDIMPipeline(tiny_unet(), DDIMScheduler()).save_pretrained(folder / part)
    change(folder / part / "model_index.json", _class_name=name)


def nested(name, entry, part="unet"):
    return lambda folder: (nest(folder, part, name), change(folder / "model_index.json", **{part: entry}))


def index(**entries):
    return lambda folder: change(folder / "model_index.json", **entries)


def part(file, **entries):
    return lambda folder: change(folder / file, **entries)


WHOLE = "its part 'unet' is a whole pipeline, {}, and must be a UNet2DModel"
CASES = {
    "nested pipeline with code": (nested(["evil", "P"], ["diffusers", "DDIMPipeline"]), WHOLE.format("DDIMPipeline")),
    "nested, by the general class": (
        nested(["evilmod", "P"], ["diffusers", "DiffusionPipeline"]), WHOLE.format("DiffusionPipeline"),
    ),
    "nested and harmless": (nested("DDIMPipeline", ["diffusers", "DDIMPipeline"]), WHOLE.format("DDIMPipeline")),
    "nested in the scheduler": (
        nested(["evilmod", "P"], ["diffusers", "DDIMPipeline"], "scheduler"),
        "its part 'scheduler' is a whole pipeline, DDIMPipeline, and must be a scheduler",
    ),
    "nested behind a module of pipelines": (
        nested(["evilmod", "P"], ["ddim", "DDIMPipeline"]), r"its part 'unet' is \['ddim', 'DDIMPipeline'\]",
    ),
    "part of its own": (index(unet=["evilmod", "M"]), "part 'unet' is of 'evilmod'"),
    "part of a file that is called diffusers": (index(unet=["diffusers", "M"]), r"\['diffusers', 'M'\], and must be"),
    "part of transformers": (index(unet=["transformers", "AutoModel"]), "must be a UNet2DModel of diffusers"),
    "text part of its own": (index(text_encoder=["evilmod", "M"]), "part 'text_encoder' is of 'evilmod'"),
    "part of three": (index(unet=["diffusers", "UNet2DModel", "evilmod"]), "must be a UNet2DModel"),
    "part that is a string": (index(unet="evilmod.M"), "part 'unet' is evilmod.M, and must be"),
    "no part": (index(unet=[None, None]), "must be a UNet2DModel"),
    "part of another kind": (index(unet=["diffusers", "DDIMScheduler"]), "must be a UNet2DModel"),
    "scheduler that is a model": (index(scheduler=["diffusers", "UNet2DModel"]), "must be a scheduler"),
    "function in place of a class": (index(unet=["diffusers", "logging"]), "must be a UNet2DModel"),
    "part with a list as class": (
        part("unet/config.json", _class_name=["evilmod", "M"]), r"is of \"\['evilmod', 'M'\]\", not of UNet2D",
    ),
    "part of another class": (part("unet/config.json", _class_name="AutoencoderKL"), "is of 'AutoencoderKL', not of"),
    "pipeline with a list as class": (index(_class_name=["pipeline", "P"]), "one of diffusers' pipelines"),
    "module as the pipeline": (index(_class_name="evilmod"), "one of diffusers' pipelines"),
    "pipeline that is a model": (index(_class_name="UNet2DModel"), "one of diffusers' pipelines"),
    "pipeline that is no class": (index(_class_name="pipelines"), "one of diffusers' pipelines"),
    "no pipeline": (index(_class_name=None), "one of diffusers' pipelines"),
    "part of any package": (index(unet=["subprocess", "Popen"]), "part 'unet' is of 'subprocess'"),
    "part that is no name": (index(unet=[["evilmod"], "M"]), "part 'unet' is of"),
    "part elsewhere": (index(**{"../other/unet": ["diffusers", "UNet2DModel"]}), "outside of its folder"),
    "pipeline with prompts": (
        index(_class_name="StableDiffusionPipeline", text_encoder=["transformers", "CLIPTextModel"]),
        "has no vae, which a StableDiffusionPipeline needs|one of diffusers' pipelines",  # without transformers
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_code_in_a_pipelines_folder(folder, name):
    damage, words = CASES[name]
    damage(folder)
    with one_line(words):
        load_pipeline(str(folder))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: None,
        part("unet/config.json", auto_map={"AutoModel": "evilmod.M"}, trust_remote_code=True),
        part("scheduler/scheduler_config.json", auto_map={"AutoModel": "evilmod.M"}),
        index(custom_pipeline="pipeline", _ignore_files=["evilmod.py"]),
        index(x=["transformers", "CLIPTextModel"]),
    ],
    ids=["code that nothing names", "auto_map", "auto_map of the scheduler", "custom_pipeline", "a part of no use"],
)
def test_a_pipeline_beside_code_is_loaded_without_it(folder, damage):
    damage(folder)
    pipeline = load_pipeline(str(folder))
    assert type(pipeline) is DDIMPipeline
    assert type(pipeline.unet).__name__ == "UNet2DModel"


def test_a_part_that_is_another_network(folder, tmp_path):
    save_dit(tmp_path / "dit")
    change(folder / "model_index.json", unet=["diffusers", "AutoencoderKL"])
    (folder / "unet").rename(folder / "old")
    (tmp_path / "dit/vae").rename(folder / "unet")
    with pytest.raises(ValueError, match="its part 'unet' is a AutoencoderKL, not a UNet2DModel"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("name", [["evilmod", "M"], "evilmod.M", "AutoencoderKL", ["UNet2DModel"]])
def test_a_teacher_with_another_class(folder, name):
    change(folder / "unet/config.json", _class_name=name)
    with one_line(r"the configuration is of .*known are UNet2DModel"):
        load_teacher(str(folder))


def test_a_teacher_that_is_a_nested_pipeline(folder):
    nest(folder, "unet", ["evilmod", "P"])
    (folder / "unet/config.json").unlink()
    with pytest.raises(ValueError, match="holds no UNet"):
        load_teacher(str(folder))
