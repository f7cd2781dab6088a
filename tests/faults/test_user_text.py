"""Names and files of users, whatever they hold, are text in reports: never markup, formulas or tracebacks."""

import json
import re

import numpy as np
import pytest
import torch

from records import RunRecords
from tests.test_report import make_run
from vkd_gen.evaluation.card import model_card, update_model_card
from vkd_gen.evaluation.diagnostics_figure import draw_diagnostics, pick_diagnostics
from vkd_gen.evaluation.figures import draw_curves
from vkd_gen.evaluation.report import load_outcome, save_results, write_report
from vkd_gen.evaluation.tables import markdown_table, print_table
from vkd_gen.pictures import sample_grid
from vkd_gen.provenance import read_metrics
from vkd_gen.text import figure_text, html_text, markdown_text, printable
from vkd_gen.training.run_folder import RunFolder

NAMES = {
    "a broken formula": r"lr$\frac$",
    "a formula": "$x^2$",
    "hidden from legends": "_run",
    "HTML": "<script>alert(1)</script>",
    "lines": "a\nb\r# c",
    "a pipe": "a|b`c",
    "brackets": "[/red] :smile: [bold]",
    "no UTF-8": "Bilder_\udcfc",
    "right to left": "a\u202eb",
}


@pytest.mark.parametrize(
    ("function", "text", "shown"),
    [
        (printable, "Bücher é 日本", "Bücher é 日本"),
        (printable, "a\nb\udcfc\u202e\0", r"a\nb\udcfc\u202e\x00"),
        (html_text, '<b>"&\n', r"&lt;b&gt;&quot;&amp;\n"),
        (markdown_text, "runs/my_run-1 (x), 50%", "runs/my_run-1 (x), 50%"),
        (markdown_text, "a|b\n<b>*x*", r"a\|b\\n&lt;b&gt;\*x\*"),
        (figure_text, r"_a$\frac$", r" _a\$\frac\$"),
    ],
)
def test_known_values(function, text, shown):
    assert function(text) == shown


def test_a_report_takes_any_names(tmp_path):
    """Of folders, rows, samples, sources and entries of the protocol."""
    few = ("a broken formula", "hidden from legends", "no UTF-8")
    folders = [make_run(tmp_path / NAMES[name], fid=number) for number, name in enumerate(few, 2)]
    results = json.loads((folders[0] / "results.json").read_text())
    results["rows"] |= dict.fromkeys(NAMES.values(), results["rows"]["student"])
    results["protocol"] |= {name: name for name in NAMES.values()}
    results["sources"] = {name: {name: name} for name in NAMES.values()}
    samples = {name: torch.zeros(4, 1, 8, 8, dtype=torch.uint8) for name in NAMES.values()}
    save_results(folders[0], results, samples)
    write_report(folders, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in NAMES.values():
        assert page.count(html_text(name)) >= 4, name  # of a row, an entry, a source and its entry
    assert "<script" not in page
    assert load_outcome(folders[0]).samples.keys() == set(map(printable, NAMES.values()))


@pytest.mark.parametrize("name", ["_run", r"lr$\frac$", "$x^2$"])
def test_legends_show_the_name(name):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.plot([0, 1], label=figure_text(name))
    (text,) = axis.legend().get_texts()
    figure.draw_without_rendering()
    shown, is_formula = text._preprocess_math(text.get_text())
    assert (shown.strip(), bool(is_formula)) == (name, False)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_cards_and_tables_take_any_name(name, tmp_path, capsys):
    results = {"rows": {name: {"fid": 1.5, "kid": float("nan")}}, "protocol": {"reference": name}}
    print_table(results)
    shown = capsys.readouterr().out
    assert "1.50" in shown
    assert "nan" in shown
    if name.isprintable():
        assert name in shown
    lines = markdown_table(results).splitlines()
    assert len(lines) == 5
    assert len(re.findall(r"(?<!\\)\|", lines[2])) == len(re.findall(r"(?<!\\)\|", lines[0]))
    text = model_card(name, {"teacher": name, name: 1}, markdown_table(results), data=name)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    update_model_card(tmp_path, results, name, f"/data/{name}")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "<script" not in card.split("```")[0].split("---")[2]
    assert not re.search(r"^(b|# c)", card, flags=re.MULTILINE)
    assert "nan" not in card.split("---")[1]  # the hub takes numbers alone


def test_pictures_take_any_title():
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    one_line = sample_grid({"a": images}).size
    for name in NAMES.values():
        assert sample_grid({name: images}).size == one_line


TORN = {
    "torn at the end": ('{"step": 30, "loss', 1),
    "no UTF-8": ("\udcff\udcfe", 1),
    "no step": ('{"loss/total": 1}', 1),
    "a step of text": ('{"step": "7", "loss/total": 1}', 1),
    "a step of thousands of digits": ('{"step": 1' + "0" * 400 + "}", 1),
    "deep": ("[" * 100_000, 1),
    "text for a number": ('{"step": 7, "loss/total": "x"}', 1),
    "a huge number": ('{"step": 7, "loss/denoising": 1' + "0" * 400 + "}", 1),
    "null": ('{"step": 7, "loss/denoising": null}', 1),
    "nothing but NaN": ('{"step": 7, "loss/denoising": NaN}', 0),
}


@pytest.mark.parametrize(("text", "num_left_out"), TORN.values(), ids=TORN)
def test_a_bad_line_of_metrics_costs_that_line(text, num_left_out, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss/total": 0.5}}'.encode() for step in (10, 20, 30)]
    path.write_bytes(b"\n".join([lines[0], text.encode(errors="surrogateescape"), *lines[1:]]) + b"\n")
    metrics = read_metrics(path)
    assert [line["step"] for line in metrics if line["step"] != 7] == [10, 20, 30]
    notes = [record.getMessage() for record in caplog.records]
    assert len(notes) == num_left_out
    assert all("1 lines of" in note and "metrics.jsonl" in note for note in notes)
    assert draw_curves({"run": metrics}, {}) is not None
    assert draw_diagnostics(pick_diagnostics(metrics)) is None
    RunFolder(str(tmp_path)).cut_metrics(20)
    assert {line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")} <= {7, 10, 20}


def test_diagnostics_with_gaps_are_drawn():
    lines = [{"step": 1, "feature/mid_block/t0-500": 0.5}, {"step": 2, "floor/mid_block": 0.1}]
    assert draw_diagnostics(lines) is not None


RESULTS = {
    "truth": {"rows": {"x": {"fid": True}}, "protocol": {}},
    "huge": {"rows": {"x": {"fid": 10**400}}, "protocol": {}},
    "a list of sources": {"rows": {"x": {"fid": 1}}, "protocol": {}, "sources": []},
    "null": {"rows": {"x": {"fid": None}}, "protocol": {}},
    "no rows": {"rows": {}, "protocol": {}},
    "a list": [],
    "nothing": "",
    "torn": "{",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("results", RESULTS.values(), ids=RESULTS)
def test_odd_results_are_told_in_a_line(results, tmp_path):
    (tmp_path / "results.json").write_text(results if isinstance(results, str) else json.dumps(results))
    with pytest.raises(ValueError, match="cannot read the results") as raised:
        write_report([tmp_path], tmp_path / "report.html")
    assert "\n" not in str(raised.value)


def test_odd_samples_are_told_in_a_line(tmp_path):
    folder = make_run(tmp_path / "run")
    np.savez(folder / "samples.npz", x=np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="cannot read the results"):
        write_report([folder], tmp_path / "report.html")


@pytest.mark.parametrize("change", [{"student": {"fid": None}}, {"seed": True}])
def test_odd_records_are_told_in_a_line(change, tmp_path):
    record = {"flags": "f", "arm": "a", "start": "s", "reference": "r", "seed": 0, "steps": 1, "seconds": 1.0}
    record |= {"student": {"fid": 1.0}}
    content = {"format": "vkd-gen comparison of methods, 1", "references": {}, "runs": [record]}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    assert RunRecords(path).runs == [record]
    path.write_text(json.dumps({**content, "runs": [{**record, **change}]}))
    with pytest.raises(ValueError, match="is damaged: a run has no flags or no scores"):
        RunRecords(path)
