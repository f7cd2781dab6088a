"""Scores in a pipeline's model card, where the hub and a reader look for them."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vkd_gen.evaluation.compare import markdown_table

BEGIN, END = "<!-- scores: begin -->", "<!-- scores: end -->"


def update_model_card(folder: Path, results: dict[str, Any], name: str, data: str) -> Path:
    """Write a row of results into the card of a pipeline: as the hub's metadata, and as a table with its protocol.

    An earlier table of this function is replaced; the rest of the card stays.

    Args:
        folder: of the pipeline, or of a run that exported it to `pipeline/`.
        results: as in results.json.
        name: of the row.
        data: name of the reference.

    Returns:
        The card's path.
    """
    folder = folder if (folder / "model_index.json").exists() else folder / "pipeline"
    path = folder / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard(f"---\nlibrary_name: diffusers\n---\n# {folder.name}\n")
    row = results["rows"][name]
    protocol = {**results["protocol"], **results.get("sources", {}).get(name, {})}
    place = folder.resolve()
    title = card.data.model_name or (place.parent.name if place.name == "pipeline" else place.name)
    others = [result for result in card.data.eval_results or [] if result.metric_type not in row]
    metadata = {key: value for key, value in card.data.to_dict().items() if key not in ("model-index", "model_name")}
    data = Path(data).name
    card.data = ModelCardData(
        **metadata,
        model_name=title,
        eval_results=[
            *others,
            *(
                EvalResult(
                    task_type="unconditional-image-generation",
                    dataset_type=data,
                    dataset_name=data,
                    metric_type=metric,
                    metric_value=value,
                )
                for metric, value in row.items()
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
    temporary = path.with_name(path.name + ".tmp")
    card.save(temporary)
    os.replace(temporary, path)  # a card that is a link, as in the hub's cache, is replaced and not written through
    return path
