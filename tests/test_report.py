"""`write_report`: one page about runs, from whatever a run has left."""

import html.parser
import re
import shutil

import models
import pytest
from test_trainer import trainer_of

from poet_peft import POETCallback
from poet_peft.report import write_report


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A whole run, one that ended after half of its steps, and an adapter alone."""
    directory = tmp_path_factory.mktemp("runs")
    for name, num_steps in (("whole", 6), ("broken", 12)):
        callback = POETCallback(diagnostics_every=2, exact_diagnostics=True)
        settings = {"max_steps": num_steps, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
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


def test_layer_that_turned_furthest_is_on_the_page(runs):
    assert "self_attn" in page(runs, "whole") or "q_proj" in page(runs, "whole")


def test_folder_without_a_run_is_refused_by_name(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        write_report([tmp_path], tmp_path / "report.html")


def test_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="runs is empty"):
        write_report([], tmp_path / "report.html")
