"""What the parts of a text pipeline cost."""

import pytest

from tests.text_pipelines import tiny_pipeline
from vkd_gen.evaluation.pipeline_cost import WHOLE, pipeline_costs
from vkd_gen.models import Model


def test_parts_of_a_pipeline(monkeypatch):
    """By a clock that goes on by one second at each look: each call takes one, whatever it is of."""
    looks = iter(range(10**6))
    monkeypatch.setattr("vkd_gen.evaluation.pipeline_cost.time.perf_counter", lambda: float(next(looks)))
    model = Model(tiny_pipeline("sdxl"))
    sampling = {"num_inference_steps": 3, "guidance_scale": 4.0, "repeats": 1}
    costs = pipeline_costs({"tiny": model}, ["red", "blue"], **sampling)["tiny"]

    assert costs["UNet"]["calls"] == 3
    assert costs["UNet"]["ms_per_call"] == pytest.approx(1000)
    assert costs["UNet"]["ms_per_image"] == pytest.approx(1500)
    assert costs["VAE decoder"]["calls"] == 1
    parts = ("text_encoder", "text_encoder_2", "unet")
    counts = [sum(p.numel() for p in getattr(model.pipeline, part).parameters()) for part in parts]
    assert [costs[name]["parameters"] for name in ("text encoder", "second text encoder", "UNet")] == counts
    assert costs[WHOLE]["parameters"] == sum(counts) + sum(p.numel() for p in model.pipeline.vae.decoder.parameters())
    assert all(not module._forward_hooks for module in model.pipeline.unet.modules())
