"""Samples beneath their prompts: in a figure, in a folder of results, in the page."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import one_line
from vkd_gen.evaluation.prompt_grid import draw_prompt_grid
from vkd_gen.evaluation.report import load_outcome, save_results, write_report

PROMPTS = ["a red cat", "$x_1$ and \\frac", "", *(f"number {number}, " + "and so on " * 30 for number in range(9))]


@pytest.fixture
def samples():
    return {name: torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8) for name in ("teacher", "student")}


def test_each_sample_stands_beneath_its_prompt(samples):
    axes = draw_prompt_grid(samples, PROMPTS, columns=5).axes
    assert len(axes) == 5 * 3 * 2  # columns, bands, models
    for number, prompt in enumerate(PROMPTS):
        band, column = divmod(number, 5)
        for row, name in enumerate(samples):
            axis = axes[(2 * band + row) * 5 + column]
            shown = np.asarray(axis.images[0].get_array())
            assert np.array_equal(shown, samples[name][number].permute(1, 2, 0).numpy())
            title = axis.get_title().replace("\n", " ").replace("\\$", "$")
            assert title == "" if row else title.startswith(prompt[:20].strip() or "(empty)")
            assert len(title) < 100
            if column == 0:
                assert axis.get_ylabel() == name
    assert [bool(axis.images) for axis in axes[-3:]] == [False] * 3


def test_results_of_prompts_are_shown_by_prompt(samples, tmp_path, caplog):
    results = {"rows": {"student": {"prompt_rank": 1.5}}, "protocol": {}, "sources": {}, "prompts": PROMPTS}
    save_results(tmp_path / "run", results, samples)
    assert not caplog.records
    assert Image.open(tmp_path / "run/samples.png").width > 8 * 100
    page = (tmp_path / "run/report.html").read_text()
    assert "samples by prompt" in page
    assert "rank of the right prompt" in page
    save_results(tmp_path / "other", {**results, "prompts": PROMPTS[::-1]}, samples)
    write_report([tmp_path / "run", tmp_path / "other"], tmp_path / "both.html")
    assert "samples by prompt" not in (tmp_path / "both.html").read_text()  # they are of other prompts


def test_prompts_that_are_no_texts_are_damage(samples, tmp_path):
    save_results(tmp_path, {"rows": {"x": {"fid": 1.0}}, "protocol": {}, "sources": {}, "prompts": [1]}, {})
    with one_line("its prompts are no texts"):
        load_outcome(tmp_path)
