"""Who may import whom, in one table, read from the source; and what importing the library loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vkd_gen

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "vkd_gen"
COMMANDS = ("recipes", "eval", "benchmarks", "experiments")

# What is absent is forbidden. A folder is one row; inside it its files may import one another.
NO_SIBLING = "choices reductions features schedule limits files text"
FOUNDATIONS = {name: set() for name in NO_SIBLING.split()}
CORE = FOUNDATIONS | {
    "version": set(),
    "hub": {"text"},
    "loading": {"hub", "limits"},
    "losses": {"choices"},
    "projectors": {"choices", "losses"},
    "pictures": {"files", "text"},
    "provenance": {"files", "text"},
    "normalization": {"choices"},
    "encoders": {"choices", "provenance"},
    "data": {"choices", "encoders", "files", "hub", "loading", "provenance", "schedule", "text"},
    "pairing": {"choices", "families", "features"},
    "families": {"choices", "reductions", "features", "schedule"},
    "text_pipelines": {"hub", "limits", "loading", "text"},
    "pipelines": {"choices", "hub", "loading", "text", "text_pipelines"},
    "models": {
        "choices", "encoders", "families", "files", "pipelines", "provenance", "schedule", "text", "text_pipelines",
    },
    "calibration": {"features", "schedule", "normalization"},
    "distillation": {
        "families", "features", "pairing", "projectors", "normalization", "calibration", "losses", "schedule",
    },
    "diagnostics": {"distillation", "families", "features", "projectors", "normalization", "losses", "schedule"},
}  # fmt: skip
SHELL = {*CORE, "cli", "vkd_gen"}
ALLOWED = CORE | {
    "cli": {"files", "text", "version"},
    "training": {*SHELL, "evaluation"},
    "evaluation": SHELL,
    "__init__": set(CORE),
}

# torch and diffusers, and what comes with them; all else is imported in the function that needs it.
CORE_PACKAGES = {"torch", "diffusers", "jaxtyping", "numpy", "PIL", "safetensors"}


def imported_names(source, *, module_level_only=False):
    """Full dotted names that a file imports: `from a.b import c` is `a.b.c`."""
    tree = ast.parse(source)
    nodes = tree.body if module_level_only else ast.walk(tree)
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def library_row(path):
    """The row of the table that a file of the library belongs to."""
    first = path.relative_to(LIBRARY).parts[0]
    return first.removesuffix(".py")


def library_imports(source):
    """Rows that a file of the library imports; `vkd_gen` for the package itself, `.` for a relative import."""
    rows = set()
    for name in imported_names(source):
        parts = name.split(".")
        if parts[0] == "":
            rows.add(".")
        elif parts[0] == "vkd_gen":
            inside = len(parts) > 1 and ((LIBRARY / parts[1]).is_dir() or (LIBRARY / f"{parts[1]}.py").is_file())
            rows.add(parts[1] if inside else "vkd_gen")
    return rows


def forbidden_library_imports(source, row):
    return library_imports(source) - ALLOWED[row] - {row}


def forbidden_command_imports(source, siblings):
    """Imports of other scripts by a recipe, an evaluation command or a benchmark."""
    return {
        name for name in imported_names(source) if name.split(".")[0] in {"", "tests", "conftest", *COMMANDS, *siblings}
    }


def files(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "assets" not in path.parts)


def relative(path):
    return str(path.relative_to(ROOT))


# ---- the rules


@pytest.mark.parametrize("path", files("vkd_gen"), ids=relative)
def test_library_imports_what_the_design_allows(path):
    row = library_row(path)
    assert row in ALLOWED, f"{relative(path)} is not in the design's table of who may import whom"
    assert forbidden_library_imports(path.read_text(), row) == set()


@pytest.mark.parametrize("path", [path for path in files("vkd_gen") if library_row(path) in CORE], ids=relative)
def test_core_needs_torch_and_diffusers_alone(path):
    names = imported_names(path.read_text(), module_level_only=True)
    packages = {name.split(".")[0] for name in names} - {"vkd_gen"} - set(sys.stdlib_module_names)
    assert packages <= CORE_PACKAGES


@pytest.mark.parametrize("path", [path for folder in ("vkd_gen", *COMMANDS) for path in files(folder)], ids=relative)
def test_commands_import_the_library_and_never_each_other(path):
    """And nothing imports them; but files of experiments/, and of benchmarks/, share modules of their own."""
    siblings = {other.stem for folder in COMMANDS for other in files(folder)}
    if path.parent.name in ("experiments", "benchmarks"):
        siblings -= {other.stem for other in files(path.parent.name)}
    assert forbidden_command_imports(path.read_text(), siblings) == set()


def test_there_is_something_to_check():
    assert len(files("vkd_gen")) > 15
    assert len(files("recipes")) >= 2


# ---- the checker itself


@pytest.mark.parametrize(
    ("row", "source", "expected"),
    [
        ("losses", "from vkd_gen.features import to_rows", {"features"}),
        ("losses", "import vkd_gen.features", {"features"}),
        ("losses", "def f():\n    from vkd_gen import schedule", {"schedule"}),
        ("losses", "from . import features", {"."}),
        ("losses", "import vkd_gen as vkd", {"vkd_gen"}),
        ("pairing", "from vkd_gen.features import feature_shapes\nimport torch", set()),
        ("pipelines", "from vkd_gen.training.loop import Loop", {"training"}),
        ("training", "from vkd_gen.evaluation.cost import count_macs", set()),
        ("evaluation", "from vkd_gen.training.options import x", {"training"}),
        ("training", "from vkd_gen.training.options import x\nfrom vkd_gen.data import y", set()),
        ("evaluation", "from vkd_gen import FrozenTeacher", set()),
        ("pipelines", "from vkd_gen import FrozenTeacher", {"vkd_gen"}),
    ],
)
def test_violations_in_the_library_are_found(row, source, expected):
    assert forbidden_library_imports(source, row) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from train_teacher_unet import main", {"train_teacher_unet.main"}),
        ("import recipes.train_teacher_unet", {"recipes.train_teacher_unet"}),
        ("from .other import x", {".other.x"}),
        ("def f():\n    import generate", {"generate"}),
        ("from experiments.tables import Comparison", {"experiments.tables.Comparison"}),
        ("import torch\nimport vkd_gen as vkd\nfrom vkd_gen.training.loop import Loop", set()),
    ],
)
def test_violations_in_commands_are_found(source, expected):
    assert forbidden_command_imports(source, {"train_teacher_unet", "generate"}) == expected


# ---- the package


def test_importing_the_library_loads_no_heavy_package():
    script = (
        "import sys, vkd_gen\n"
        "assert all(hasattr(vkd_gen, name) for name in dir(vkd_gen))\n"
        "print(*(name for name in ('datasets', 'torch_fidelity', 'matplotlib', 'tyro') if name in sys.modules))\n"
        "print(*(name for name in sys.modules if name.startswith(('vkd_gen.training', 'vkd_gen.evaluation'))))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", vkd_gen.__all__)
def test_public_names_exist(name):
    assert name in dir(vkd_gen)
    assert hasattr(vkd_gen, name)


def test_what_is_no_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'vkd_gen' has no attribute 'nonsense'"):
        vkd_gen.nonsense  # noqa: B018


def test_public_names_are_those_imported():
    """`__all__` is complete: what `__init__` imports, it offers, and once."""
    assert len(set(vkd_gen.__all__)) == len(vkd_gen.__all__)
    names = imported_names((LIBRARY / "__init__.py").read_text())
    imported = {name.rsplit(".", 1)[1] for name in names if name.startswith("vkd_gen.")}
    assert imported - {"__version__"} == set(vkd_gen.__all__)


def test_names_the_design_promises():
    promised = (
        "FrozenTeacher ProjectedStudent distillation_losses OrthogonalProjector LinearProjector FeatureNormalizer "
        "calibrate build_student pair_layers FeatureCapture"
    )
    assert set(promised.split()) <= set(vkd_gen.__all__)
