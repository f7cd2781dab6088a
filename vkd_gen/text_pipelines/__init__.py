"""Text-to-image pipelines as teachers: which are known, where their parts lie, and how each is loaded."""

from vkd_gen.text_pipelines.load import check_parts, load_text_pipeline, pipeline_without_weights
from vkd_gen.text_pipelines.lora import find_lora
from vkd_gen.text_pipelines.save import save_pipeline
from vkd_gen.text_pipelines.source import PIPELINES, TextSource, check_source, find_source, is_text_pipeline

__all__ = [
    "PIPELINES",
    "TextSource",
    "check_parts",
    "check_source",
    "find_lora",
    "find_source",
    "is_text_pipeline",
    "load_text_pipeline",
    "pipeline_without_weights",
    "save_pipeline",
]
