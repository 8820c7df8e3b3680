"""`write_report`: one page about runs, from whatever a run has left, and what a browser makes of it."""

import html.parser
import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path

import models
import pytest
from browser import NAMES, Browser, find_browser
from test_trainer import trainer_of

from poet_peft import POETCallback
from poet_peft.report import write_report
from poet_peft.report.charts import _QUANTILES, sections
from poet_peft.report.run import Run, read_run
from poet_peft.report.svg import heat_map, line_chart
from poet_peft.report.verdict import verdict


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A whole run, one that ended after half of its steps, and an adapter alone."""
    directory = tmp_path_factory.mktemp("runs")
    for name, num_steps in (("whole", 6), ("broken", 12)):
        callback = POETCallback(diagnostics_every=2, exact_diagnostics=True)
        settings = {"max_steps": num_steps, "save_strategy": "steps", "save_steps": 3, "eval_strategy": "epoch"}
        trainer = trainer_of(models.wrap(models.llama(), "periodic"), directory / name, callback, **settings)
        trainer.train()
        trainer.save_model()
    for path in [directory / "broken" / "checkpoint-9", directory / "broken" / "checkpoint-12"]:
        shutil.rmtree(path)
    lines = (directory / "broken" / "poet_diagnostics.jsonl").read_text().splitlines()
    (directory / "broken" / "poet_diagnostics.jsonl").write_text("\n".join(lines[:3]) + '\n{"step": 8, "su')
    shutil.copytree(directory / "whole" / "checkpoint-3", directory / "adapter")
    (directory / "adapter" / "trainer_state.json").unlink()
    return directory


def page(runs, *names):
    return write_report([runs / name for name in names], runs / "report.html").read_text("utf-8")


class Tags(html.parser.HTMLParser):
    EMPTY = {"meta", "br", "hr", "img", "link", "input"}

    def __init__(self):
        super().__init__()
        self.open, self.problems = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(tag)


@pytest.mark.parametrize("names", [["whole"], ["broken"], ["adapter"], ["whole", "broken"]], ids="-".join)
def test_page_is_well_formed(runs, names):
    tags = Tags()
    tags.feed(page(runs, *names))
    assert not tags.problems and not tags.open


def test_page_fetches_nothing(runs):
    text = page(runs, "whole", "broken")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:)|url\(|@import|<script[^>]+src""", text)


def test_run_that_ended_early_says_so(runs):
    assert "all of its 6 steps" in page(runs, "whole")
    assert "all of its 12 steps" not in page(runs, "broken")


def test_both_runs_are_in_one_chart(runs):
    text = page(runs, "whole", "broken")
    chart = text[text.index("Training loss") :]
    assert chart[: chart.index("</svg>")].count("<polyline") + chart[: chart.index("</svg>")].count("<path") >= 2


HEADINGS = [
    "Training loss", "Learning rates", "Gradient norm", "Largest angle (degrees)", "Phases of whole",
    "Bound on the change of singular values", "Largest angle of a fold (degrees)", "Singular values of whole",
    "Change of the spectrum since the first measurement", "SVD entropy", "Hyperspherical energy",
    "Peak memory so far (MB)", "Steps a second", "Adapter", "Versions",
]  # fmt: skip


def test_page_has_everything_that_a_run_leaves(runs):
    text = page(runs, "whole")
    assert [heading for heading in HEADINGS if heading not in text] == []
    assert "per device train batch size" in text and "block size" in text


def test_angles_are_by_number_and_kind_of_layer(runs):
    text = page(runs, "whole")
    assert re.search(r"<title>0 q_proj: [\d.]+°</title>", text) and re.search(r"<title>1 down_proj: ", text)


def test_folder_without_a_run_is_refused_by_name(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        write_report([tmp_path], tmp_path / "report.html")


def test_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="runs is empty"):
        write_report([], tmp_path / "report.html")


# What a chart or a sentence says, of made-up numbers


def line(step, *layers, **numbers):
    return {"step": step, "summary": {}, "layers": list(layers), **numbers}


def layer(name="model.layers.0.q_proj", angle=0.1, drift=1e-7, error=1e-7, **numbers):
    side = {"side": "R", "max_angle": angle, "orthogonality_error": error}
    return {"name": name, "adapter": "default", "spectral_drift": drift, "sides": [side], **numbers}


def bad(run):
    return [sentence.text for sentence in verdict(run) if sentence.kind == "bad"]


def titles(*runs):
    return [chart.title for charts in sections(list(runs)).values() for chart in charts]


OUT_OF_RANGE = {
    "drift": (layer(drift=0.02), "singular values may change by 2 %", "shorten merge_interval"),
    "angle": (layer(angle=math.pi * 0.75), "turned by 135 degrees", "shorten merge_interval"),
    "orthogonality": (layer(error=0.06), "0.06 from orthogonal", "adaptive_terms=True"),
    "not finite": (layer(drift=None), "not finite", "an earlier checkpoint"),
}


@pytest.mark.parametrize(("broken", "says", "remedy"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_first_layer_out_of_range_is_named_with_its_step_and_a_remedy(broken, says, remedy):
    broken = {**broken, "name": "model.layers.3.up_proj"}
    run = Run("run", diagnostics=[line(1, layer()), line(2, layer(), broken), line(3, broken)])
    run.config = {"max_drift": 0.01}
    (text,) = bad(run)
    assert says in text and "model.layers.3.up_proj" in text and "at step 2" in text and remedy in text


def test_run_in_range_is_praised():
    run = Run("run", diagnostics=[line(step, layer(rms_singular_value=1.0)) for step in (1, 2)])
    assert [sentence.kind for sentence in verdict(run)] == ["note", "good", "good"]
    assert "singular values by at most 0.001 %" in verdict(run)[-1].text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"rms_singular_value": 2.0}, {"rms_singular_value": 2.4}),
        ({"singular_values": [1.0, 2.0]}, {"singular_values": [1.2, 2.0]}),
    ],
    ids=["root mean square", "exact"],
)
def test_spectrum_that_moved_is_told_by_how_much(before, after):
    run = Run("run", diagnostics=[line(1, layer(**before)), line(9, layer(**after))])
    (text,) = bad(run)
    assert "changed by 20 %" in text and "from step 1 to 9" in text


def test_spectrum_is_compared_with_the_first_measurement_in_every_step():
    lines = [line(step, layer(rms_singular_value=value)) for step, value in [(1, 2.0), (2, 2.4), (3, 2.2)]]
    run = Run("run", diagnostics=lines)
    assert [change for _, change in run.spectral_change()] == pytest.approx([0.0, 0.2, 0.1])
    assert "changed by 20 %" in bad(run)[0]


def test_last_step_and_settings_are_those_of_the_last_start():
    lines = [line(step, settings={"seed": step}) for step in (2, 8)]
    run = Run("run", log=[{"step": 4, "loss": 1.0}], diagnostics=lines)
    assert run.last_step == 8 and run.described("settings") == {"seed": 8}


def test_runs_of_one_name_are_numbered_and_what_is_missing_is_said(runs, tmp_path):
    text = write_report([runs / "adapter", runs / "adapter"], tmp_path / "new" / "report.html").read_text("utf-8")
    assert "adapter (1)" in text and "adapter (2)" in text
    assert "Not found here: trainer_state.json, poet_diagnostics.jsonl." in text


def test_loss_that_rose_and_loss_that_broke_are_told():
    assert "did not fall" in bad(Run("run", log=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}]))[0]
    assert "not finite at step 2" in bad(Run("run", log=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}]))[0]


def test_rotations_folded_after_every_step_have_no_charts_of_angles():
    summary = {"max_angle": 0.0, "rms_angle": 0.0, "trace": 1.0}
    run = Run("run", diagnostics=[line(step, layer(angle=0.0)) | {"summary": summary} for step in (1, 2)])
    run.log = [{"step": 1, "loss": 2.0, "poet/max_rotation_angle": 0.01}]
    assert "Largest angle of a fold (degrees)" in titles(run)
    assert not any("angle" in title.lower() and "fold" not in title for title in titles(run))
    assert any("folded into the weights after every step" in sentence.text for sentence in verdict(run))


@pytest.mark.parametrize(
    ("interval", "folded", "step", "kind", "says"),
    [
        (1, 0.01, 2, "note", "after every step"),
        (4, 0.01, 2, "note", "right after folds"),
        (4, 0.0, 1, "note", "before the first step"),
        (0, None, 2, "bad", "turned nothing"),
    ],
)
def test_rotations_that_were_the_identity_are_told_with_the_reason(interval, folded, step, kind, says):
    log = [] if folded is None else [{"step": step, "poet/max_rotation_angle": folded}]
    run = Run("run", log=log, diagnostics=[line(step, layer(angle=0.0))], config={"merge_interval": interval})
    last = verdict(run)[-1]
    assert last.kind == kind and says in last.text


def test_newest_checkpoint_and_the_results_of_trainer_are_read(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(f'{{"max_steps": {step}}}')
    (tmp_path / "all_results.json").write_text('{"eval_loss": 1.0}')
    run = read_run(tmp_path)
    assert run.max_steps == 10 and run.metrics == {"eval_loss": 1.0}


def test_loss_of_trainer_comes_before_that_of_an_own_loop():
    assert Run("run", log=[{"step": 1, "loss": 2.0}], diagnostics=[line(1, loss=3.0)]).losses() == [(1.0, 2.0)]


def test_page_has_the_last_peak_of_memory_and_no_markup_of_names_or_settings(tmp_path):
    folder = tmp_path / "<b>run"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"target_modules": "<i>q_proj"}')
    rows = [json.dumps(line(step, peak_memory=peak)) for step, peak in [(1, 1e6), (2, 3e6)]]
    (folder / "poet_diagnostics.jsonl").write_text("\n".join(rows))
    text = write_report([folder], tmp_path / "report.html").read_text("utf-8")
    assert "<b>" not in text and "<i>" not in text and "&lt;b&gt;run" in text and "&lt;i&gt;q_proj" in text
    assert re.search(r"peak memory \(MB\)</td><td>3<", text)


def chart_of(run, title):
    return next(chart for charts in sections([run]).values() for chart in charts if chart.title == title)


def test_perplexity_and_memory_are_drawn_in_their_units():
    run = Run("run", log=[{"step": step, "eval_loss": loss} for step, loss in [(1, 1.0), (2, math.log(2))]])
    run.diagnostics = [line(step, peak_memory=1e8 * step) for step in (1, 2)]
    for title, points in {
        "Perplexity of the evaluation": [(1.0, math.e), (2.0, 2.0)],
        "Peak memory so far (MB)": [(1.0, 100.0), (2.0, 200.0)],
    }.items():
        assert chart_of(run, title).svg == line_chart(title, [("run", points)])


def test_singular_values_are_drawn_as_means_over_the_layers():
    spectra = [[1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 6.0, 7.0]]
    run = Run("run", diagnostics=[line(1, *(layer(singular_values=values) for values in spectra))])
    means = [(name, [(1.0, value)]) for name, value in zip(_QUANTILES, [2.0, 3.0, 4.0, 5.0, 6.0], strict=True)]
    title = "Singular values of run"
    assert chart_of(run, title).svg == line_chart(title, means, log=True)


def test_map_has_the_degrees_of_the_last_measurement_by_number_of_the_layer():
    names = [f"model.layers.{number}.q_proj" for number in (10, 9)]
    lines = [line(step, *(layer(name, angle) for name in names)) for step, angle in [(1, 0.1), (2, math.pi / 4)]]
    run = Run("run", diagnostics=[row | {"summary": {"max_angle": 1.0}} for row in lines])
    svg = chart_of(run, "Largest angle by layer, output side R").svg
    assert re.findall("<title>(.*?)</title>", svg) == ["9 q_proj: 45°", "10 q_proj: 45°"]


def test_cells_of_a_map_have_their_own_value_and_larger_ones_are_darker():
    values = {("0", "a"): 1.0, ("0", "b"): 2.0, ("1", "a"): 3.0, ("1", "b"): 4.0}
    cells = re.findall(
        r'fill-opacity="([\d.]+)"><title>(.*?)</title>', heat_map("map", "°", ["0", "1"], ["a", "b"], values)
    )
    assert [title for _, title in cells] == ["0 a: 1°", "0 b: 2°", "1 a: 3°", "1 b: 4°"]
    assert [opacity for opacity, _ in cells] == sorted({opacity for opacity, _ in cells})


def test_points_that_are_not_finite_are_left_out():
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    assert line_chart("chart", [("run", points)]) == line_chart("chart", [("run", [points[0], points[3]])])


def test_probes_are_drawn_where_they_were_measured():
    lines = [{"step": step, "summary": {"probe_cosine": value}} for step, value in [(1, 0.9), (2, None)]]
    assert "Vector probing" in titles(Run("run", diagnostics=lines))
    assert "Vector probing" not in titles(Run("run", diagnostics=lines[1:]))


def test_own_loop_has_its_loss_and_rates_drawn():
    run = Run("run", diagnostics=[line(step, loss=3.0 - step, learning_rates={"poet": 0.1}) for step in (1, 2)])
    assert titles(run) == ["Training loss", "Learning rates"]
    assert "fell: 2.000 at first, 1.000 at last" in verdict(run)[1].text


def test_one_run_keeps_its_colour_where_the_other_has_nothing():
    runs = [Run("one"), Run("two", log=[{"step": 1, "grad_norm": 1.0}, {"step": 2, "grad_norm": 2.0}])]
    (chart,) = sections(runs)["Training"]
    assert chart.legend == [(1, "two")] and 'class="line c1"' in chart.svg and 'class="line c0"' not in chart.svg


def test_phases_are_counted_by_their_angle():
    side = {"side": "R", "max_angle": 1.0, "angle_histogram": [0] * 15 + [8], "orthogonality_error": 0.0}
    wide = {**side, "side": "P", "max_angle": 2.0}  # whose last bin is twice as far
    run = Run("run", diagnostics=[line(1, layer() | {"sides": [side, wide]}) | {"summary": {"max_angle": 2.0}}])
    chart = next(chart for chart in sections([run])["Rotations since the last fold"] if "Phases" in chart.title)
    R, P = re.findall(r'points="([^"]+)"', chart.svg)
    highest = [
        max(x for x, y in corners_of(points) if y == min(y for _, y in corners_of(points))) for points in (R, P)
    ]
    left, right = (f(x for x, _ in corners_of(R)) for f in (min, max))
    assert [(x - left) / (right - left) for x in highest] == pytest.approx([0.5, 1.0], abs=0.05)


def corners_of(points):
    return [tuple(map(float, point.split(","))) for point in points.split()]


def ticks_of(svg):
    return [float(text) for text in re.findall(r'text-anchor="end">([\d.e-]+)</text>', svg)][:-1]


@pytest.mark.parametrize("values", [[0.0, 1.0], [4.601, 4.602], [3.0, 3.0], [0.0, 0.0], [-2.0, 5.0], [11.0, 9999.0]])
def test_ticks_are_round_different_and_enclose_the_values(values):
    ticks = ticks_of(line_chart("chart", [("run", list(enumerate(values)))]))
    assert 3 <= len(ticks) <= 7 and ticks == sorted(set(ticks))
    assert ticks[0] <= min(values) and ticks[-1] >= max(values)


def test_numbers_far_from_1_share_a_power_of_ten():
    assert "×1e6<" in line_chart("chart", [("run", [(0, 2.5e6), (1, 4e6)])])
    assert "×1e-5<" in line_chart("chart", [("run", [(0, 2e-5), (1, 4e-5)])])


def test_logarithmic_axis_leaves_out_zeros_and_has_equal_decades():
    svg = line_chart("chart", [("run", [(0, 1e-6), (1, 1e-4), (2, 1e-2), (3, 0.0)])], log=True)
    heights = [y for _, y in corners_of(re.search(r'<polyline[^>]+points="([^"]+)"', svg)[1])]
    assert len(heights) == 3 and heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


@pytest.mark.parametrize(
    ("values", "texts"), [([0.2, 20.0], ["0.1", "1", "10", "100"]), ([1e-4, 0.1], ["1e-4", "1e-3", "1e-2", "1e-1"])]
)
def test_logarithmic_axis_has_plain_numbers_or_powers_of_ten(values, texts):
    svg = line_chart("chart", [("run", list(enumerate(values)))], log=True)
    assert re.findall(r'text-anchor="end">([^<]+)</text>', svg)[:-1] == texts


def test_long_series_keep_their_spike():
    points = [(float(step), 1.0) for step in range(10_000)]
    points[5_003] = (5_003.0, 9.0)
    corners = corners_of(re.search(r'<polyline[^>]+points="([^"]+)"', line_chart("chart", [("run", points)]))[1])
    heights = [y for _, y in corners]
    assert len(corners) <= 400 and heights.count(min(heights)) == 1 and min(heights) < max(heights) - 100


def test_names_of_runs_and_layers_cannot_break_the_page():
    name = "<script>alert(1)</script>"
    assert "<script" not in line_chart(name, [(name, [(0, 1.0), (1, 2.0)])])
    assert "<script" not in heat_map(name, "", [name], [name], {(name, name): 1.0})


# In a browser

LOOKS = list(itertools.product([1400, 390], [False, True]))


@pytest.fixture(scope="module")
def looks(runs, tmp_path_factory):
    """The page of two runs as a browser shows it, by width and darkness.

    REPORT_PICTURES names a folder to keep the screenshots in.
    """
    browser = find_browser()
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH")
    pictures = Path(os.environ.get("REPORT_PICTURES") or tmp_path_factory.mktemp("pictures"))
    pictures.mkdir(parents=True, exist_ok=True)
    path = write_report([runs / "whole", runs / "broken"], pictures / "report.html")
    with Browser(browser) as opened:
        return {
            (width, dark): opened.look(path, width, dark, pictures / f"{width}-{'dark' if dark else 'light'}.png")
            for width, dark in LOOKS
        }


at_every_width = pytest.mark.parametrize(("width", "dark"), LOOKS)


@at_every_width
def test_browser_reports_no_error(looks, width, dark):
    assert looks[width, dark].errors == []


@at_every_width
def test_every_picture_is_there_and_readable(looks, width, dark):
    pictures = looks[width, dark].measured["pictures"]
    assert len(pictures) > 15
    for picture in pictures:
        left, top, right, bottom = picture["box"]
        assert right - left > 250 and bottom - top > 50 and picture["shapes"] and picture["texts"], picture
        # Text of 12 pixels, as far as the picture is not drawn smaller.
        assert picture["scale"] > 0.85, picture


@at_every_width
def test_nothing_is_cut_off(looks, width, dark):
    measured = looks[width, dark].measured
    assert measured["scrolls_by"] == 0 and measured["outside"] == []
    assert all(picture["box"][2] <= width for picture in measured["pictures"])


def brightness(color):
    return sum(map(float, re.findall(r"[\d.]+", color)[:3]))


@at_every_width
def test_ink_stands_out_from_the_page(looks, width, dark):
    measured = looks[width, dark].measured
    assert (brightness(measured["background"]) < 200) == dark
    for ink in [measured["ink"], *measured["text_ink"]]:
        assert abs(brightness(ink) - brightness(measured["background"])) > 250


def test_browser_would_report_errors(looks, tmp_path):
    page = tmp_path / "broken.html"
    page.write_text("<!doctype html><img src='nowhere.png'><script>undefined_name()</script>")
    with Browser(find_browser()) as opened:
        assert len(opened.look(page, 390).errors) >= 2
