"""Model cards: what a run says of its pipeline, and scores where the hub and a reader look for them."""

import contextlib
import math
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vkd_gen.evaluation.tables import markdown_table
from vkd_gen.hub import hub_folder, hub_revision, split_revision
from vkd_gen.models import save_card
from vkd_gen.provenance import environment, only_warns
from vkd_gen.text import markdown_text, printable

BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"
PROTOCOL = ("num_images", "num_inference_steps", "sampler", "guidance_scale", "precision")
"""What stands with each score in the hub's metadata: a score says little without."""
UNCONDITIONAL_USE = """from diffusers import DiffusionPipeline

images = DiffusionPipeline.from_pretrained("THIS_FOLDER")(batch_size=16).images"""
CLASS_CONDITIONAL_USE = """from diffusers import UNet2DModel
from vkd_gen.pipelines import ClassConditionalDDIMPipeline

pipeline = ClassConditionalDDIMPipeline.from_pretrained("THIS_FOLDER")
images = pipeline(class_labels=[0, 1], guidance_scale=3.0).images  # guidance_scale 1: none

unet = UNet2DModel.from_pretrained("THIS_FOLDER", subfolder="unet")  # needs diffusers alone"""

CLASSES_OF_LATENTS_USE = """from diffusers import CLASS

pipeline = CLASS.from_pretrained("THIS_FOLDER")
images = pipeline(class_labels=[0, 1], guidance_scale=1, num_inference_steps=25).images  # guidance_scale 1: none"""
TEXT_USE = """from diffusers import CLASS

pipeline = CLASS.from_pretrained("THIS_FOLDER")
images = pipeline(["a prompt", "another one"], num_inference_steps=25).images"""
WITHOUT_SAFETY_CHECKER = """The teacher's safety checker, feature extractor and image encoder, where it has some,
are left out: whoever wants them hands them to `from_pretrained`, as in `safety_checker=...`."""


def card_origin(teacher: str) -> dict[str, Any]:
    """What the metadata of a student's card have from its teacher: `base_model` of the hub, and its card's licence.

    Args:
        teacher: folder, file or hub id; empty for none. A card of the hub is read where it is in the cache here.
    """
    path, found = Path(teacher), {}
    if not teacher:
        return {}
    place = next((place for place in (path, path / "pipeline") if (place / "README.md").is_file()), None)
    if not path.exists() and hub_revision(teacher) is not None:
        found["base_model"] = split_revision(teacher)[0]
        with contextlib.suppress(ValueError):
            place = hub_folder(teacher, ["README.md"])
    if place is not None:
        with only_warns(f"the licence in {place / 'README.md'}", "the student's card names none"):
            entries = ModelCard.load(place / "README.md").data.to_dict()
            found |= {name: entries[name] for name in ("license", "license_name", "license_link") if entries.get(name)}
    return found


def model_card(
    title: str,
    facts: Mapping[str, Any],
    results: str,
    *,
    data: str,
    num_classes: int | None = None,
    stock_pipeline: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> str:
    """The card of a pipeline that this process has trained, Markdown with the hub's metadata.

    Args:
        title: heading.
        facts: what the reader should know, a table row each.
        results: Markdown, such as the table of results.
        data: the training set's name or id.
        num_classes: of a class-conditional model.
        stock_pipeline: class of the pipeline, of a model of latents: it takes prompts, or with `num_classes` classes.
        origin: further metadata, from `card_origin`.
    """
    kind = "unconditional" if num_classes is None else "class-conditional"
    use = UNCONDITIONAL_USE if num_classes is None else CLASS_CONDITIONAL_USE
    if stock_pipeline is not None:
        use = (TEXT_USE if num_classes is None else CLASSES_OF_LATENTS_USE).replace("CLASS", stock_pipeline)
    tag: dict[str, Any] = {"tags": ["vkd-gen", f"{kind}-image-generation"]}
    if stock_pipeline is not None and num_classes is None:
        tag = {"tags": ["vkd-gen"], "pipeline_tag": "text-to-image"}
        results = f"{results}\n\n{WITHOUT_SAFETY_CHECKER}" if results else WITHOUT_SAFETY_CHECKER
    metadata = ModelCardData(library_name="diffusers", **tag, **(origin or {}))
    if num_classes is not None:
        facts = {**facts, "classes": f"0 to {num_classes - 1}; {num_classes} for no class"}
    rows = "\n".join(f"| {markdown_text(name)} | {markdown_text(value)} |" for name, value in facts.items())
    versions = ", ".join(f"{name} {version}" for name, version in environment().items())
    command = shlex.join(["accelerate", "launch", f"recipes/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return f"""---
{metadata.to_yaml()}
---
# {markdown_text(title)}

| | |
|---|---|
{rows}

{results}

Trained on {markdown_text(data)} with

```
{printable(command)}
```

```python
{use}
```

Made with {versions}.
"""


def update_model_card(folder: Path, results: dict[str, Any], name: str, data: str) -> str:
    """Write a row of results into the card of a pipeline: as the hub's metadata, and as a table with its protocol.

    An earlier table of this function, and earlier scores against the same data, are replaced, unless they are of more
    images, or of as many in more steps: then nothing is written. The rest of the card stays.

    Args:
        folder: of the pipeline, or of a run that exported it to `pipeline/`.
        results: as in results.json.
        name: of the row.
        data: name of the reference.

    Returns:
        What became of the card, in a line.
    """
    folder = folder if (folder / "model_index.json").exists() else folder / "pipeline"
    path, place = folder / "README.md", folder.resolve()
    empty = f"---\nlibrary_name: diffusers\n---\n# {markdown_text(folder.name)}\n"
    card = ModelCard.load(path) if path.exists() else ModelCard(empty)
    row = results["rows"][name]
    protocol = {**results["protocol"], **results.get("sources", {}).get(name, {})}
    title = printable(card.data.model_name or (place.parent.name if place.name == "pipeline" else place.name))
    data = printable(Path(data).name)
    earlier = card.data.eval_results or []
    replaced = [result for result in earlier if result.metric_type in row and result.dataset_type == data]
    size, largest = _size(protocol), max((_size(result.metric_args) for result in replaced), default=(0, 0))
    if largest > size:
        of = [f"{images:,} images in {steps} steps" for images, steps in (largest, size)]
        return f"{path} keeps its scores of {of[0]}; these are of {of[1]}"
    metadata = {key: value for key, value in card.data.to_dict().items() if key not in ("model-index", "model_name")}
    kept = [result for result in earlier if result not in replaced]
    kept += _for_the_hub(row, data, protocol, metadata)
    card.data = ModelCardData(**metadata, model_name=title, eval_results=kept)
    section = f"{BEGIN}\n## Scores\n\n{markdown_table({'rows': {title: row}, 'protocol': protocol})}\n{END}"
    if BEGIN in card.text and END in card.text:
        card.text = re.sub(f"{BEGIN}.*?{END}", lambda _: section, card.text, flags=re.DOTALL)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    save_card(folder, str(card))
    return str(path)


def _for_the_hub(
    row: Mapping[str, float], data: str, protocol: Mapping[str, Any], metadata: Mapping[str, Any]
) -> list[EvalResult]:
    told = {key: protocol[key] for key in PROTOCOL if protocol.get(key) is not None}
    of_data: dict[str, Any] = {
        "task_type": metadata.get("pipeline_tag") or "unconditional-image-generation",
        "dataset_type": data,
        "dataset_name": data,
    }
    return [
        EvalResult(**of_data, metric_type=metric, metric_value=value, metric_args=told)
        for metric, value in row.items()
        if math.isfinite(value)  # which the hub takes alone
    ]


def _size(protocol: Any) -> tuple[int, int]:
    """Images and steps of a score; none where the card does not say."""
    found = protocol if isinstance(protocol, dict) else {}
    images, steps = (found.get(key) for key in ("num_images", "num_inference_steps"))
    return images if isinstance(images, int) else 0, steps if isinstance(steps, int) else 0
