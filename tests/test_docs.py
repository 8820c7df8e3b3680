"""README.md and docs/: every Python snippet runs, on tiny models that lie where the Hub's would."""

import ast
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import METRICS, adamw, llama, tokens, wrap
from test_examples import byte_tokenizer

import poet_peft
from poet_peft.model_card import INSTALL, create_model_card


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(
    r"<!-- given: (?P<given>[\w ]+) -->|"
    r"(?:<!-- not run: (?P<reason>.+) -->\n+)?^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def given_hub():
    """A tiny model and the data sets under the names that the snippets load from the Hub: a folder goes before it."""
    folder = Path("HuggingFaceTB/SmolLM2-135M-Instruct")
    llama(vocab_size=258, eos_token_id=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    write_dataset("openai/gsm8k", "main", [{"question": f"{i} + 1?", "answer": f"{i + 1}"} for i in range(8)])
    write_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", [{"text": f" Line {i} of it."} for i in range(8)])
    return {}


def write_dataset(name, config, rows):
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files: train.jsonl\n---\n")


def given_tokens():
    return {"batches": [tokens(seed=seed) for seed in range(4)]}


def given_base():
    llama().save_pretrained("base")
    return {"inputs": {"input_ids": tokens()}}


def given_loop():
    model = wrap(llama(), "pretraining")
    return {"model": model, "optimizer": adamw(model)}


def given_metrics():
    return {"metrics": METRICS}


def given_trained_run():
    """A run of two steps with a checkpoint after each, and the function that made its trainer."""
    from transformers import Trainer, TrainingArguments

    def make_trainer(output_dir):
        model = wrap(llama(), "periodic")
        data = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
        arguments = TrainingArguments(output_dir, max_steps=2, save_steps=1, report_to="none", use_cpu=True)
        return Trainer(model, arguments, train_dataset=data, optimizers=(adamw(model), None))

    make_trainer("run").train()
    return {"make_trainer": make_trainer}


def given_trainer():
    from transformers import Trainer, TrainingArguments

    model = wrap(llama(), "periodic")
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
    arguments = TrainingArguments("run", max_steps=1, report_to="none", use_cpu=True)
    return {"trainer": Trainer(model, arguments, train_dataset=data, optimizers=(adamw(model), None))}


@pytest.fixture
def as_in_a_new_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_snippets_run_in_order(page, as_in_a_new_process):
    namespace = {"__name__": "__main__"}
    text = page.read_text()
    for block in BLOCK.finditer(text):
        if block["given"]:
            namespace |= globals()[f"given_{block['given'].replace(' ', '_')}"]()
        elif not block["reason"]:
            line = text.count("\n", 0, block.start("code"))
            code = block["code"].replace('"num_hidden_layers": 8', '"num_hidden_layers": 1')  # runs for seconds else
            exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_every_snippet_runs():
    assert [block["reason"] for page in PAGES for block in BLOCK.finditer(page.read_text()) if block["reason"]] == []
    for page in PAGES:
        found = [block for block in BLOCK.finditer(page.read_text()) if block["code"]]
        assert len(found) == page.read_text().count("```python")


def test_api_page_has_every_public_name():
    names = re.findall(r"^::: poet_peft\.(?:callback\.)?(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(names) == poet_peft.__all__


def test_every_figure_is_shown():
    shown = {
        Path(name).name for page in PAGES for name in re.findall(r"\]\(([\w/]*figures/\w+\.png)\)", page.read_text())
    }
    assert {path.name for path in (DOCS / "figures").iterdir()} == shown


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/finetuning.md", "docs/pretraining.md"])
def test_page_says_how_to_install(page):
    assert INSTALL in " ".join((ROOT / page).read_text().split())


def test_card_of_an_adapter_says_how_to_install():
    assert INSTALL in create_model_card(METRICS, "someone/model", "adapter").text


def test_nobody_is_told_to_install_a_name_that_is_not_registered():
    texts = [path for folder in ("poet_peft", "docs", "examples", "benchmarks", "model_cards")
             for path in (ROOT / folder).rglob("*.*") if path.suffix in (".md", ".py")]  # fmt: skip
    wrong = re.compile(r"pip install (-\S+ )*poet[-_]peft")
    assert [name_of(path) for path in [ROOT / "README.md", *texts] if wrong.search(path.read_text())] == []


def messages(package):
    """The text of every string in the source, with … for what an f-string puts in."""
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_that_troubleshooting_explains_are_in_the_source():
    ours = (DOCS / "troubleshooting.md").read_text().partition("## Messages of other libraries")[0]
    explained = re.findall(r"^### `(.+)`$", ours, re.MULTILINE)
    texts = list(messages(ROOT / "poet_peft"))
    assert len(explained) > 10
    assert [message for message in explained if not any(message in text for text in texts)] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory]
    result = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


@pytest.mark.slow
def test_site_fetches_nothing_from_elsewhere(site):
    fetched = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc="?https?:|<link[^>]*\shref="?https?:""")
    assert [path.name for path in site.rglob("*.html") if fetched.search(path.read_text())] == []


@pytest.mark.slow
def test_site_has_formulas_as_mathml(site):
    method = (site / "method.html").read_text()
    assert method.count("<math ") > 50
    # A formula that was not recognised keeps its dollars.
    assert not re.search(r"\$[\\A-Za-z]", re.sub(r"<(pre|code|script).*?</\1>", "", method, flags=re.DOTALL))


@pytest.mark.slow
def test_command_line_page_has_what_the_commands_print():
    script = runpy.run_path(str(DOCS / "command_line.py"))
    written = (DOCS / "command-line.md").read_text()
    here = script["outputs"](written)
    pages = [
        {block["command"]: block["output"] for block in script["BLOCK"].finditer(page)} for page in (written, here)
    ]
    assert pages[0].keys() == pages[1].keys() and len(pages[0]) > 5
    for command in pages[0].keys() - {"poet-peft doctor"}:
        # The same lines; sizes, angles and losses may differ in their last digits from machine to machine.
        lines = [re.sub(r"[\d.,e+-]+", "0", page[command]).split() for page in pages]
        assert lines[0] == lines[1], command


@pytest.mark.slow
def test_figures_command_draws_what_the_method_page_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["figures.py", "--num_folds", "2", "--output_dir", str(tmp_path)])
    runpy.run_path(str(DOCS / "figures.py"), run_name="__main__")
    shown = re.findall(r"\]\(figures/(\w+\.png)\)", (DOCS / "method.md").read_text().replace("\n", " "))
    assert sorted(shown) == sorted(path.name for path in tmp_path.iterdir())
