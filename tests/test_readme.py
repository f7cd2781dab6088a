"""The README's code runs, and what it and the pages beside the commands name exists."""

import re
from pathlib import Path

import pytest

import tests.recipes.conftest as recipes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = README + "".join((ROOT / folder / "README.md").read_text() for folder in ("recipes", "eval"))


def test_the_loop_in_the_readme_runs(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)  # it runs from anywhere
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "runs/my-student/diffusion_pytorch_model.safetensors").exists()


def test_the_file_tree_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tree,) = re.findall(r"## Where the code is\n\n```\n(.*?)```", text, flags=re.DOTALL)
    folder, named = ROOT, []
    for line in tree.splitlines():
        name = line.split()[0]
        folder = ROOT if not line.startswith(" ") else ROOT / "vkd_gen"
        assert (folder / name).exists(), name
        named.append(name)
    modules = {path.name for path in (ROOT / "vkd_gen").glob("*.py")} - {"__init__.py", "version.py"}
    assert modules <= set(named)


def test_presets_methods_and_flags_are_the_recipes():
    recipe = recipes.load_recipe("train_student_unet")
    from vkd_gen.training.methods import METHODS
    from vkd_gen.training.options import flat_config

    rows = set(re.findall(r"^\| `([a-z0-9-]+)`", PAGES, flags=re.MULTILINE))
    assert rows >= set(recipe.PRESETS) | set(METHODS)
    flags = set(re.findall(r"--([a-z]+(?:_[a-z]+)+)", re.sub(r"accelerate launch (--\w+ (\d+ )?)+", "", PAGES)))
    known = {*flat_config(recipe.PRESETS["digits"]), *flat_config(recipes.load_recipe("train_teacher_unet").DIGITS)}
    for file in (*(ROOT / "eval").glob("*.py"), *(ROOT / "recipes").glob("*.py")):
        known |= set(re.findall(r"^    ([a-z_]+): ", file.read_text(), flags=re.MULTILINE))
    assert flags <= known


@pytest.mark.parametrize("image", re.findall(r"!\[.*?\]\((.*?)\)", README))
def test_pictures_are_there(image):
    assert (ROOT / image).exists()
