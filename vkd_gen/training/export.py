"""The end of a run: a stock diffusers pipeline folder with a model card, and its upload."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import HfApi, ModelCard, ModelCardData

from vkd_gen.files import whole_file, whole_folder
from vkd_gen.provenance import environment
from vkd_gen.sampling import stock_pipeline


def export_pipeline(unet: ModelMixin, noise_scheduler: SchedulerMixin, folder: Path, card: str) -> None:
    """Save a pipeline folder and its model card; it appears under its name only once it is complete.

    `DiffusionPipeline.from_pretrained` loads it without this package; a class-conditional one is loaded by
    `ClassConditionalDDIMPipeline.from_pretrained`, and its UNet alone by diffusers' own `UNet2DModel`.
    """
    with whole_folder(folder) as temporary:
        stock_pipeline(unet, noise_scheduler).save_pretrained(temporary, safe_serialization=True)
        write_model_card(temporary, card)


def write_model_card(folder: Path, card: str) -> None:
    """Write (or replace) the card of an exported pipeline."""
    with whole_file(folder / "README.md") as temporary:
        ModelCard(card).save(temporary)


UNCONDITIONAL_USE = """from diffusers import DiffusionPipeline

images = DiffusionPipeline.from_pretrained("THIS_FOLDER")(batch_size=16).images"""

CLASS_CONDITIONAL_USE = """from diffusers import UNet2DModel
from vkd_gen.pipelines import ClassConditionalDDIMPipeline

pipeline = ClassConditionalDDIMPipeline.from_pretrained("THIS_FOLDER")
images = pipeline(class_labels=[0, 1], guidance_scale=3.0).images  # guidance_scale 1: none

unet = UNet2DModel.from_pretrained("THIS_FOLDER", subfolder="unet")  # needs diffusers alone"""


def model_card(title: str, facts: Mapping[str, Any], results: str, data: str, *, num_classes: int | None = None) -> str:
    """Model card, Markdown with the hub's metadata.

    Args:
        title: heading.
        facts: what the reader should know, a table row each.
        results: Markdown, such as the table of results.
        data: the training set's name or id.
        num_classes: of a class-conditional model.
    """
    kind = "unconditional" if num_classes is None else "class-conditional"
    metadata = ModelCardData(library_name="diffusers", tags=["vkd-gen", f"{kind}-image-generation"])
    if num_classes is not None:
        facts = {**facts, "classes": f"0 to {num_classes - 1}; {num_classes} for no class"}
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    versions = ", ".join(f"{name} {version}" for name, version in environment().items())
    return f"""---
{metadata.to_yaml()}
---
# {title}

| | |
|---|---|
{rows}

{results}

Trained on {data} with

```
{command_line()}
```

```python
{UNCONDITIONAL_USE if num_classes is None else CLASS_CONDITIONAL_USE}
```

Made with {versions}.
"""


def command_line() -> str:
    """The command that this process was started with."""
    return shlex.join(["accelerate", "launch", f"recipes/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def upload(folder: Path, repository: str | None) -> str:
    """Upload an exported pipeline to the Hugging Face hub.

    Args:
        folder: the pipeline's.
        repository: id; by default the name of the run's folder.

    Returns:
        The repository's address.

    Raises:
        ValueError: if the hub cannot be reached or refuses.
    """
    try:
        url = HfApi().create_repo(repository or folder.parent.resolve().name, exist_ok=True)
        HfApi().upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload from vkd-gen")
    except Exception as error:  # network, authentication and naming errors each have a class of their own
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the pipeline is in {folder}, but uploading it failed: {reason}") from error
    return str(url)
