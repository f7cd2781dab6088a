"""Scores in a pipeline's model card, where the hub and a reader look for them."""

import math
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vkd_gen.evaluation.compare import markdown_table
from vkd_gen.files import whole_file
from vkd_gen.text import markdown_text, printable

BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"


PROTOCOL = ("num_images", "num_inference_steps", "sampler", "guidance_scale", "precision")
"""What stands with each score in the hub's metadata: a score says little without."""


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
    path = folder / "README.md"
    card = (
        ModelCard.load(path)
        if path.exists()
        else ModelCard(f"---\nlibrary_name: diffusers\n---\n# {markdown_text(folder.name)}\n")
    )
    row = results["rows"][name]
    protocol = {**results["protocol"], **results.get("sources", {}).get(name, {})}
    place = folder.resolve()
    title = printable(card.data.model_name or (place.parent.name if place.name == "pipeline" else place.name))
    data = printable(Path(data).name)
    earlier = card.data.eval_results or []
    replaced = [result for result in earlier if result.metric_type in row and result.dataset_type == data]
    size, largest = _size(protocol), max((_size(result.metric_args) for result in replaced), default=(0, 0))
    if largest > size:
        of = [f"{images:,} images in {steps} steps" for images, steps in (largest, size)]
        return f"{path} keeps its scores of {of[0]}; these are of {of[1]}"
    metadata = {key: value for key, value in card.data.to_dict().items() if key not in ("model-index", "model_name")}
    card.data = ModelCardData(
        **metadata,
        model_name=title,
        eval_results=[
            *(result for result in earlier if result not in replaced),
            *(
                EvalResult(
                    task_type="unconditional-image-generation",
                    dataset_type=data,
                    dataset_name=data,
                    metric_type=metric,
                    metric_value=value,
                    metric_args={key: protocol[key] for key in PROTOCOL if protocol.get(key) is not None},
                )
                for metric, value in row.items()
                if math.isfinite(value)  # which the hub takes alone
            ),
        ],
    )
    table = markdown_table({"rows": {title: row}, "protocol": protocol})
    section = f"{BEGIN}\n## Scores\n\n{table}\n{END}"
    text = card.text
    if BEGIN in text and END in text:
        text = re.sub(f"{BEGIN}.*?{END}", lambda _: section, text, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    card.text = text
    with whole_file(path) as temporary:  # a link, as in the hub's cache, is replaced and not written through
        card.save(temporary)
    return str(path)


def _size(protocol: Any) -> tuple[int, int]:
    """Images and steps of a score; none where the card does not say."""
    found = protocol if isinstance(protocol, dict) else {}
    images, steps = (found.get(key) for key in ("num_images", "num_inference_steps"))
    return images if isinstance(images, int) else 0, steps if isinstance(steps, int) else 0
