"""A run's diagnostics as a figure: what is read from its metrics, and what is drawn."""

import json

import pytest

from vkd_gen.evaluation.diagnostics_figure import draw_diagnostics, pick_diagnostics
from vkd_gen.provenance import read_metrics


def look(step, *, denoising=True, gain=True):
    """One look at a student of two layers, as a run writes it."""
    figures = {"gradient_ratio": 0.3, "gradient_cosine/feature-output": 0.1, "feature_weight": 0.05}
    if denoising:
        figures["gradient_cosine/feature-denoising"] = -0.2
    for number, layer in enumerate(("down_blocks.0", "mid_block"), 1):
        figures |= {f"feature/{layer}/t500-999": number / step, f"feature/{layer}/t0-499": 3 * number / step}
        figures |= {f"floor/{layer}": 0.01 * number, f"rank/student/{layer}": 4.0, f"rank/teacher/{layer}": 7.5}
        if gain:
            figures[f"gain/{layer}"] = 1.25
    return {"step": step, **figures}


def written(folder, lines):
    path = folder / "metrics.jsonl"
    texts = []
    for line in lines:
        figures = {f"diagnostics/{name}": value for name, value in line.items() if name != "step"}
        texts += [{"step": line["step"], "loss/total": 1.0}, {"step": line["step"], **figures}]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


def test_what_is_read_is_what_was_looked_at(tmp_path):
    """Training's own lines are left out, and so is the prefix."""
    lines = [look(100), look(200)]
    assert pick_diagnostics(read_metrics(written(tmp_path, lines))) == lines


def test_losses_and_floors_are_drawn_as_they_are():
    losses, gradients, timesteps, ranks = draw_diagnostics([look(100), look(200)]).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in losses.get_lines()}
    assert drawn["down_blocks.0"] == pytest.approx([0.02, 0.01])  # means over both bins of timesteps
    assert drawn["mid_block"] == pytest.approx([0.04, 0.02])
    dashed = [list(line.get_ydata()) for line in losses.get_lines() if line.get_linestyle() == "--"]
    assert dashed == [[0.01, 0.01], [0.02, 0.02]]
    assert [list(line.get_xdata()) for line in timesteps.get_lines()] == [[249.5, 749.5]] * 2  # in order of timesteps
    assert list(timesteps.get_lines()[0].get_ydata()) == pytest.approx([0.015, 0.005])
    heights = sorted(bar.get_height() for bar in ranks.patches)
    assert heights == [4.0, 4.0, 7.5, 7.5]
    assert len(gradients.get_legend().get_texts()) == 3


def test_what_a_run_does_not_have_is_not_drawn():
    """No denoising loss, and projectors without a gain."""
    figure = draw_diagnostics([look(100, denoising=False, gain=False)])
    _, gradients, _, ranks = figure.axes
    assert len(gradients.get_legend().get_texts()) == 2
    assert [label.get_text() for label in ranks.get_xticklabels()] == ["down_blocks.0", "mid_block"]


def test_a_feature_loss_without_other_terms_has_no_gradients_to_compare():
    alone = {name: value for name, value in look(100).items() if not name.startswith("gradient")}
    _, gradients, _, _ = draw_diagnostics([alone]).axes
    assert gradients.get_legend() is None


@pytest.mark.parametrize("lines", [[], [{"step": 10, "gradient/output": 1.0}]])
def test_nothing_to_draw(lines):
    assert draw_diagnostics(lines) is None


@pytest.mark.parametrize("text", ["not a line", "[1]", '{"step": 1}\n{"ste'])
def test_a_torn_line_is_left_out(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 3, "diagnostics/gain": 0.5}}\n{text}')
    assert pick_diagnostics(read_metrics(path)) == [{"step": 3, "gain": 0.5}]
