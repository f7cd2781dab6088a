"""eval/cost.py: published counts from configurations alone, and measured costs."""

import json

import pytest
import torch

from tests.conftest import tiny_condition_unet, tiny_unet
from vkd_gen.evaluation.cost import LiveBytes, count_parameters, forward_costs


def rows_of(run_eval, tmp_path, *flags):
    run_eval("cost", *flags, "--output", tmp_path / "new/cost.json")
    return json.loads((tmp_path / "new/cost.json").read_text())["rows"]


def test_published_students_are_counted_from_configurations_alone(tmp_path, run_eval, capsys):
    rows = rows_of(run_eval, tmp_path, "stable-diffusion-1", "--students", "bk-small", "bk-tiny")
    counts = {name: row["parameters"] for name, row in rows.items()}
    assert counts == {"stable-diffusion-1": 859_520_964, "bk-small": 482_346_884, "bk-tiny": 323_384_964}
    assert {name: row["published_parameters"] for name, row in rows.items()} == counts
    shown = capsys.readouterr().out
    assert "(37.6%)" in shown
    assert "3,278.81" in shown  # MiB of float32 weights


def test_an_sdxl_unet_is_counted_without_its_memory(tmp_path, run_eval):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = rows_of(run_eval, tmp_path, "stable-diffusion-xl", "--sample_size", 32)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert rows["stable-diffusion-xl"]["parameters"] == 2_567_463_684
    assert grown * 1024 < 1e9  # its float32 weights are 10.3 GB


def test_folders_files_and_runs_name_the_same_unet(tmp_path, run_eval, checkpoint):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/pipeline").symlink_to(checkpoint)
    models = [checkpoint, checkpoint / "unet", checkpoint / "unet/config.json", tmp_path / "run"]
    rows = rows_of(run_eval, tmp_path, *models)
    assert list(rows) == [str(model) for model in models]
    assert len({(row["parameters"], row["macs"]) for row in rows.values()}) == 1


def test_measured_costs_grow_with_the_model(tmp_path, run_eval, checkpoint):
    wide = tiny_unet((32, 64))
    wide.save_pretrained(tmp_path / "wide")
    rows = rows_of(run_eval, tmp_path, tmp_path / "wide", checkpoint, "--measure", "--batch_size", 4)
    first, second = rows.values()
    for column in ("peak_memory_bytes", "parameters", "macs"):
        assert first[column] > second[column] > 0
    assert first["ms_per_image_and_step"] > 0  # of models this small the machine's other work decides
    assert first["peak_memory_bytes"] > 4 * first["parameters"]


@pytest.mark.parametrize("make", [tiny_unet, tiny_condition_unet, lambda: tiny_unet(num_class_embeds=3)])
def test_forward_costs_of_every_kind_of_unet(make):
    costs = forward_costs({"x": make().eval()}, batch_size=2, repeats=1)["x"]
    assert costs["peak_memory_bytes"] > 4 * count_parameters(make())


def test_memory_of_activations_grows_with_the_batch():
    unet = tiny_unet().eval()
    weights = 4 * count_parameters(unet)
    peaks = [
        forward_costs({"x": unet}, batch_size=size, repeats=1)["x"]["peak_memory_bytes"] - weights for size in (8, 16)
    ]
    assert peaks[1] / peaks[0] == pytest.approx(2, rel=0.1)


def test_live_bytes_known_value():
    """Chains free what comes before them, views take nothing, and what is written in place is not new."""
    with LiveBytes() as live:
        x = torch.zeros(1000)
        for _ in range(5):
            x = x.view(10, 100) + 1
            x.mul_(2)
    assert live.peak == 2 * 4000


def test_live_bytes_alive_now_known_value():
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        torch.zeros(5000)
        assert (live.alive, live.peak) == (4000, 24000)
        for _ in range(3):
            kept = kept + 1
        assert (live.alive, live.peak) == (4000, 24000)
        del kept
        assert live.alive == 0


def test_live_bytes_sees_what_a_graph_keeps():
    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        x = weight
        for _ in range(3):
            x = (x * 2).exp()  # exp keeps its result, multiplication by a number nothing
    assert live.peak == 4 * 4000
