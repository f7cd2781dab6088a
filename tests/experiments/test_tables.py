"""Tables and figures of methods over seeds: the numbers in them, their order, and what is missing."""

import pytest

from figures import OPEN, draw_differences
from tables import Comparison, markdown_page, tables_of
from vkd_gen.evaluation.labels import label_of

DISTANCES = {  # arm -> by seed
    "denoising": (0.0140, 0.0160, 0.0150),
    "output": (0.0100, 0.0110, 0.0120),
    "fitnet": (0.0090, 0.0095, 0.0100),
}
REFERENCE = {
    "rows": {"teacher": {"fid_digits": 5.0, "teacher_distance": 0.0}, "held-out images": {"fid_digits": 1.0}},
    "protocol": {"sampler": "DDIM"},
}


def record(arm, seed, start="inherited", **changes):
    distance = DISTANCES[arm][seed]
    scores = {"teacher_distance": distance, "fid_digits": 1000 * distance, "fid_training_digits": 3.0, "kid_std": 1.0}
    head = {"arm": arm, "start": start, "seed": seed, "steps": 20, "seconds": 10.0 * (seed + 1), "threads": 1}
    return {**head, "student": scores, **changes}


def comparison(records=None, **changes):
    records = [record(arm, seed) for arm in DISTANCES for seed in range(3)] if records is None else records
    common = {"arms": list(DISTANCES), "starts": ["inherited"], "control": "output", "num_seeds": 3}
    return Comparison(records, **{**common, "reference": REFERENCE, **changes})


def cells(table, name):
    return {heading: column[table.names.index(name)] for heading, column in table.columns}


def test_means_spreads_and_differences_by_hand():
    scores, differences = tables_of(comparison()).values()
    assert cells(scores, "output") == {
        "runs": "3 of 3",
        "distance to the teacher": "0.01100 ± 0.00100",
        "FID (digits)": "11.00 ± 1.00",
        "share of the gap": "40%",  # of 15 - 5, 4 are closed
        "steps": "20",
    }
    assert cells(scores, "teacher")["FID (digits)"] == "5.00"
    assert cells(scores, "held-out images")["distance to the teacher"] == "-"
    # fitnet: -1.0, -1.5, -2.0, deviation 0.5, t_2 = 4.3027: 4.3027 * 0.5 / sqrt(3) = 1.242
    assert cells(differences, "fitnet")["FID (digits)"] == "-1.50 ± 1.24* (3/3)"
    assert cells(differences, "denoising")["FID (digits)"] == "+4.00 ± 2.48* (0/3)"
    assert differences.names == ["denoising", "fitnet"]


def test_scores_of_prompts_are_shown_and_not_compared():
    records = [record(arm, seed) for arm in DISTANCES for seed in range(3)]
    for found in records:
        found["student"] |= {"guidance_gap_ratio": 0.9, "prompt_rank": 1.5}
    shown = comparison(records)
    scores, differences = tables_of(shown).values()
    assert cells(scores, "output")[label_of("guidance_gap_ratio")] == "0.9000 ± 0.0000"
    assert cells(scores, "output")[label_of("prompt_rank")] == "1.500 ± 0.000"
    assert label_of("prompt_rank") not in dict(differences.columns)
    assert "of the guidance gap ratio 1 is best" in markdown_page(shown)


def test_what_is_missing_is_shown_as_missing():
    records = [record("output", 0), record("output", 1), record("fitnet", 1), record("denoising", 2)]
    scores, differences = tables_of(comparison(records)).values()
    assert cells(scores, "fitnet")["runs"] == "1 of 3"
    assert cells(scores, "fitnet")["FID (digits)"] == "9.50"
    assert cells(scores, "fitnet")["share of the gap"] == "-"  # no seed in common with denoising
    assert cells(differences, "fitnet")["FID (digits)"] == "-1.50 (1/1)"
    assert cells(differences, "denoising")["FID (digits)"] == "-"
    scores, _ = tables_of(comparison([record("output", 0)], reference={})).values()
    assert cells(scores, "fitnet")["steps"] == "-"
    assert len(scores.names) == 3
    scores, _ = tables_of(comparison(arms=["output", "fitnet"])).values()
    assert "share of the gap" not in dict(scores.columns)  # there is nothing to measure it from


def test_markdown_has_a_heading_per_start_and_the_protocol_whatever_the_order_of_records():
    records = [record(arm, seed, start) for arm in DISTANCES for seed in range(2) for start in ("inherited", "random")]
    text = markdown_page(comparison(records, starts=["random", "inherited"]))
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        f"### {words}, {start} weights"
        for start in ("random", "inherited")
        for words in ("Scores", "Differences to output")
    ]
    assert "- sampler: DDIM" in text
    assert "- threads per run: 1" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {7, 4}
    assert markdown_page(comparison(records[::-1], starts=["random", "inherited"])) == text


def test_scores_stand_with_the_least_noisy_first():
    row = {"kid_digits": 1.0, "fid_digits": 1.0, "fid_held_out_digits": 1.0, "denoising_error": 1.0, "recall": 1.0}
    row |= {"teacher_distance": 1.0, "kid_std_digits": 1.0, "fid": 1.0}
    one = comparison([record("output", 0, student=row)])
    assert one.shown_scores == ["teacher_distance", "denoising_error", "fid", "fid_digits", "kid_digits"]
    assert one.frechet_distance == "fid"


def test_panels_are_sorted_by_the_distance_and_show_intervals_and_seeds():
    figure = draw_differences(comparison())
    distance, frechet = figure.axes
    assert [label.get_text() for label in distance.get_yticklabels()] == ["fitnet", "denoising"]
    assert [axis.get_title() for axis in (distance, frechet)] == [
        "distance to the teacher, inherited weights",
        "FID (digits), inherited weights",
    ]
    means = [line.get_xdata()[0] for line in frechet.lines if line.get_marker() == "o"]
    assert means == pytest.approx([-1.5, 4.0])
    bars = [line.get_xdata() for line in frechet.lines if line.get_linewidth() == 2]
    assert bars[0] == pytest.approx([-2.742, -0.258], abs=1e-3)
    seeds = [line.get_xdata() for line in frechet.lines if line.get_marker() == "|"]
    assert seeds[0] == pytest.approx([-1.0, -1.5, -2.0])


def test_an_interval_beyond_the_panel_ends_in_an_arrow():
    records = [record(arm, seed) for arm in ("output", "fitnet") for seed in range(2)]  # t_1 is 12.7
    axis = draw_differences(comparison(records)).axes[1]
    assert {line.get_marker() for line in axis.lines} >= {"<", ">"}
    assert {line.get_color() for line in axis.lines if line.get_linewidth() == 2} == {OPEN}  # it includes zero
    low, high = axis.get_xlim()
    assert all(low <= x <= high for line in axis.lines if line.get_linewidth() == 2 for x in line.get_xdata())


def test_nothing_to_compare_is_no_figure():
    assert draw_differences(comparison([record("output", 0)])) is None
    assert draw_differences(comparison([])) is None
