"""Texts of `metrics.json` are shown as they are: nothing in them is taken for Markdown, HTML, YAML or code."""

import ast
import copy
import functools
import re

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from models import METRICS

from poet_peft import create_model_card


TEXTS = {
    "pipes": "a | b || c",
    "escaped-pipe": r"a \| b \\| c",
    "backticks": "`a` and ``b`` and a lone `",
    "fence": "```\nprint()\n```",
    "tilde-fence": "~~~ python",
    "lines": "a\nb\r\nc",
    "paragraphs": "a\n\nb",
    "heading": "a\n# b",
    "starts-as-heading": "# a",
    "underlines": "===",
    "rule": "---",
    "stars": "***",
    "bullet": "- a",
    "plus": "+ a",
    "number": "1. a",
    "parenthesis": "12) a",
    "quote": "> a",
    "task": "[ ] a",
    "indented": "\t    a",
    "tags": "<b>a</b> <br> </td>",
    "script": "<script>alert(1)</script>",
    "comment": "<!-- a",
    "autolink": "<https://example.org>",
    "entities": "&lt;b&gt; &amp; &#124; AT&T",
    "link": "[a](https://example.org)",
    "reference": "[a]: https://example.org",
    "image": "![a](https://example.org/a.png)",
    "emphasis": "*a* **b** _c_ __d__ snake_case a_ _b",
    "struck": "~~a~~ ~b~",
    "escapes": r"\*a\* \n \_",
    "ends-in-a-backslash": "a \\",
    "template": "{{ 7 * 7 }} {% if x %} {# a #}",
    "front-matter": "a: b\n---\nc: d",
    "alphabet": "\u00e4\u00f6\u00fc \u4e2d\u6587 \U0001f600",
}
each_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


def metrics_of(text):
    """Every text that a card shows is this one."""
    metrics = copy.deepcopy(METRICS)
    data = {"name": text, "source": text, "config": text, "split": text}
    result = metrics["evaluation"][0] | {"name": text, "size": text, "metric": text, "data": data}
    metrics |= {"base_model": text, "data": data, "evaluation": [result], "hardware": text, "limits": [text]}
    metrics["settings"]["optim"] = text
    metrics["config"] |= {"target_modules": text}
    metrics["versions"] |= {"torch": text}
    return metrics


def card(text):
    """The card as a reader of the file gets it."""
    return ModelCard(str(create_model_card(metrics_of(text), "someone/" + text.replace("/", " "), "adapter")))


@functools.cache
def parsed(text):
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card(text).text)


def kinds(tokens):
    return [token.type for token in tokens]


def shown(inline):
    parts = {"softbreak": " ", "hardbreak": "\n"}
    texts = ("text", "text_special", "code_inline")
    return "".join(parts.get(t.type, t.content if t.type in texts else "") for t in inline.children)


@each_text
def test_text_is_shown_as_it_is(text):
    line = " ".join(text.split())
    found = [shown(token) for token in parsed(text) if token.type == "inline"]
    assert found[0] == " ".join(text.replace("/", " ").split())  # the name
    assert found.count(line) >= 7  # result, its size and source, hardware, optimizer, targets, limit
    assert f"{line}, {line}" in found  # data of the evaluation
    assert f"Data: {line}, {line}, {line}. {line}" in found
    assert f"torch {line}" in found
    assert f"What holds for {line}, its licence included, holds here too." in found


@each_text
def test_text_is_no_markup(text):
    """Code is all that the card itself makes of a text."""
    tokens = parsed(text)
    assert kinds(tokens) == kinds(parsed("harmless"))
    for token in tokens:
        if token.type == "inline" and not token.content.startswith("A [POET]"):
            tags = {child.content for child in token.children if child.type == "html_inline"}
            assert tags <= {"<code>", "</code>"}
            assert set(kinds(token.children)) <= {"code_inline", "html_inline", "softbreak", "text", "text_special"}


def test_metadata_keep_the_texts():
    for text in TEXTS.values():
        data = card(text).data
        (result,) = data.eval_results
        assert (data.base_model, data.library_name, data.tags) == (text, "peft", ["poet", "poet-peft"])
        assert (result.metric_name, result.dataset_name, result.dataset_split) == (text, text, text)


@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
def test_snippet_holds_the_texts_as_strings(task):
    for text in TEXTS.values():
        metrics = metrics_of(text) | {"task": task, "labels": [text, "b"], "example_input": text}
        made = str(create_model_card(metrics, text, "adapter"))
        code = re.search(r"```python\n(.*?)\n```\n", made, re.DOTALL)[1]
        strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
        assert strings.count(text) == (5 if task == "text-classification" else 4)
