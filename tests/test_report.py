"""The HTML page: self-contained, complete, and of several runs at once."""

import json
import re

import torch

from vkd_gen.evaluation.figures import draw_curves
from vkd_gen.evaluation.report import load_outcome, merge_rows, save_results, write_report
from vkd_gen.pictures import sample_grid

ROWS = {"teacher": {"parameters": 10, "fid": 1.25, "ms_per_image": 3.0}, "student": {"parameters": 5, "fid": 2.5}}


def make_run(folder, fid=2.5, seed=0):
    rows = {name: dict(row) for name, row in ROWS.items()}
    rows["student"]["fid"] = fid
    rows["teacher"]["ms_per_image"] += seed  # as each run measures it anew
    generator = torch.Generator().manual_seed(seed)
    samples = {
        "teacher": torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8),
        "student": torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=generator),
    }
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss/total": 1 / step, "loss/denoising": 1 / step} for step in (10, 20, 30)]
    lines += [{"step": 30, "score/fid": fid, "score/kid": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_results(folder, {"rows": rows, "protocol": {"extractor": "inception-v3-compat", "note": "<b>&"}}, samples)
    return folder


def test_a_page_holds_the_tables_the_pictures_and_the_protocol(tmp_path):
    page = (make_run(tmp_path / "run") / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []  # nothing to fetch
    assert page.count("data:image/png;base64,") == 2
    for text in ("<td>2.50</td>", "<td>1.25</td>", "&lt;b&gt;&amp;", "inception-v3-compat"):
        assert text in page
    assert "<b>" not in page


def test_several_runs_share_their_teacher(tmp_path):
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", fid=3.75, seed=1)]
    rows = merge_rows([load_outcome(run) for run in runs])
    assert list(rows) == ["teacher", "first: student", "second: student"]
    write_report(runs, tmp_path / "both" / "report.html")
    page = (tmp_path / "both/report.html").read_text()
    for text in ("first: student", "second: student", "<td>3.75</td>"):
        assert text in page


def test_unlike_teachers_are_kept_apart(tmp_path):
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second")]
    results = json.loads((runs[1] / "results.json").read_text())
    results["rows"]["teacher"]["fid"] = 9
    (runs[1] / "results.json").write_text(json.dumps(results))
    rows = merge_rows([load_outcome(run) for run in runs])
    assert rows["teacher"]["fid"] == 1.25
    assert rows["second: teacher"]["fid"] == 9


def test_curves_have_a_panel_per_loss_and_score(tmp_path):
    lines = load_outcome(make_run(tmp_path / "run")).metrics
    panels = {axis.get_title(): axis for axis in draw_curves({"run": lines}, {"fid": 1.25}).axes if axis.get_visible()}
    assert list(panels) == ["denoising loss", "FID"]  # no total beside its parts, no KID
    curve, target = panels["FID"].get_lines()
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([30], [2.5])
    assert (target.get_label(), list(target.get_ydata())) == ("teacher", [1.25, 1.25])
    more = [line | {"loss/output": 2.0, "loss/feature": 1.0} for line in lines]
    assert len([axis for axis in draw_curves({"run": more}, {}).axes if axis.get_visible()]) == 4
    assert draw_curves({"run": [{"step": 1, "learning_rate": 0.1}]}, {}) is None


def test_samples_survive_the_round_trip(tmp_path):
    outcome = load_outcome(make_run(tmp_path / "run"))
    assert torch.equal(outcome.samples["teacher"], torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8))
    assert [line["step"] for line in outcome.metrics] == [10, 20, 30, 30]


def test_runs_of_one_name_and_of_unlike_networks_are_all_on_the_page(tmp_path):
    runs = [make_run(tmp_path / "x/run", fid=3.25), make_run(tmp_path / "y/run", fid=4.75, seed=1)]
    results = json.loads((runs[1] / "results.json").read_text())
    results["rows"]["student"]["fid_digits"] = 6.125
    (runs[1] / "results.json").write_text(json.dumps(results))
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for text in ("x/run: student", "y/run: student", "<td>3.25</td>", "<td>4.75</td>", "<td>6.12</td>", "FID (digits)"):
        assert text in page


def test_samples_of_unlike_sizes_stand_side_by_side():
    black = sample_grid({"small": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)})
    both = sample_grid({name: torch.zeros(2, 1, side, side, dtype=torch.uint8) for name, side in (("a", 8), ("b", 28))})
    assert both.width == 2 * 56 + 3 * 2
    assert both.height > black.height


def test_metrics_without_curves_make_no_picture(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1, "learning_rate": 0.1}\n{"learning_rate": 0.1}\n')
    write_report([run], run / "report.html")
    assert "Curves" not in (run / "report.html").read_text()
