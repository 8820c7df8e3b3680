"""Model cards: what they say, what they refuse, and that the committed ones are what the command makes."""

import copy
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from models import METRICS, llama, poet_config, tokenizer, wrap
from peft import get_peft_model
from transformers import LlamaForSequenceClassification

from poet_peft import create_model_card, set_model_card
from poet_peft.model_card import INSTALL, json_config


ROOT = Path(__file__).parents[1]
CLASSIFIER = METRICS | {"task": "text-classification", "labels": ["bad", "good"]}
FROM_SCRATCH = METRICS | {"base_model": None}
MEASURED = {
    "train_tokens": 1234567,
    "train_seconds": 98.7,
    "peak_memory_mb": 1081.09,
    "hardware": "an abacus",
    "adapter_bytes": 45678,
}


def card(metrics=METRICS, kind="adapter", repo_id="someone/model", **kwargs):
    """The card as a reader of the file gets it."""
    return ModelCard(str(create_model_card(metrics, repo_id, kind, **kwargs)))


def without(path):
    metrics = copy.deepcopy(METRICS)
    *parents, key = re.findall(r"\w+", path)
    values = metrics
    for parent in parents:
        values = values[int(parent) if parent.isdigit() else parent]
    del values[key]
    return metrics


def rows(text, heading):
    """The tables of a section, {first cell: the other cells}."""
    section = re.split(r"^##+ ", text.split(f"# {heading}\n")[1], flags=re.MULTILINE)[0]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return {first: others for first, *others in cells}


def test_metadata_of_an_adapter():
    data = card(license="mit", language="en").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("someone/base", "peft", "text-generation")
    assert (data.datasets, data.license, data.language) == (["someone/words"], "mit", "en")
    assert "poet" in data.tags


def test_metadata_of_a_merged_model():
    assert card(kind="merged").data.library_name == "transformers"


def test_model_index_round_trip():
    index = yaml.safe_load(card().content.split("---")[1])["model-index"]
    name, (result,) = model_index_to_eval_results(index)
    assert name == "model"
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.8125)
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == (
        "someone/others",
        "Other words",
        "test",
    )


def test_metadata_states_neither_licence_nor_language_on_its_own():
    assert card().data.license is None and card().data.language is None


def test_data_without_a_hub_id_is_not_linked():
    metrics = without("data.id")
    del metrics["evaluation"][0]["data"]["id"]
    data = card(metrics).data
    assert data.datasets is None
    assert data.eval_results[0].dataset_type == "other-words"


def test_evaluation_table():
    assert rows(card().text, "Evaluation")["Next-word accuracy"] == ["0.8125", "0.25", "Other words, test", "16 words"]


def test_evaluation_table_has_no_column_for_what_was_not_measured():
    assert rows(card(without("evaluation[0].before")).text, "Evaluation")["metric"] == ["value", "data", "size"]


@pytest.mark.parametrize("before", [None, math.nan], ids=str)
def test_null_before_is_not_measured(before):
    result = METRICS["evaluation"][0]
    metrics = METRICS | {"evaluation": [result, result | {"name": "Loss", "before": before}]}
    assert rows(card(metrics).text, "Evaluation")["Loss"][1] == "not measured"


def test_evaluation_table_has_no_column_for_nulls():
    metrics = METRICS | {"evaluation": [METRICS["evaluation"][0] | {"before": None}]}
    assert rows(card(metrics).text, "Evaluation")["metric"] == ["value", "data", "size"]


def test_training_table():
    table = rows(card(METRICS | MEASURED).text, "Training")
    assert table["parameters"] == ["123,456"] and table["trained"] == ["7,890"]
    assert table["training tokens"] == ["1,234,567"] and table["training time"] == ["99 s"]
    assert table["peak memory"] == ["1,081 MB"] and table["adapter file"] == ["45,678 bytes"]


@pytest.mark.parametrize("value", [None, math.nan], ids=str)
def test_what_was_not_measured_is_said(value):
    assert rows(card(METRICS | {"peak_memory_mb": value}).text, "Training")["peak memory"] == ["not measured"]


def test_hyperparameters_are_those_that_a_reader_needs():
    table = rows(card().text, "Hyperparameters")
    assert table["poet_lr"] == ["0.0002"] and table["learning_rate"] == ["0.0"]
    assert "/secret" not in card().content


@pytest.mark.parametrize(("max_steps", "shown"), [(3, "max_steps"), (-1, "num_train_epochs")])
def test_only_the_training_length_that_counted_is_shown(max_steps, shown):
    metrics = METRICS | {"settings": METRICS["settings"] | {"max_steps": max_steps}}
    assert {"max_steps", "num_train_epochs"} & set(rows(card(metrics).text, "Hyperparameters")) == {shown}


def test_configuration_is_shown():
    table = rows(card().text, "POETConfig")
    assert table["block_size"] == ["16"] and table["target_modules"] == ["all-linear"]


def test_modules_are_shown_in_the_same_order_whatever_that_of_the_file_is():
    metrics = METRICS | {"config": METRICS["config"] | {"target_modules": ["v", "q", "k"]}}
    assert rows(card(metrics).text, "POETConfig")["target_modules"] == ["k, q, v"]


def test_json_config_sorts_sets():
    assert json_config(poet_config(target_modules=["b", "c", "a"]))["target_modules"] == ["a", "b", "c"]


def test_limits_of_the_run_come_first():
    limits = card(METRICS | {"limits": ["Knows eleven words."]}).text.split("## Limits\n\n")[1]
    assert limits.startswith("- Knows eleven words.\n- Evaluated on")


def test_card_of_an_adapter_whose_weights_changed_says_so():
    changed = METRICS | {"config": METRICS["config"] | {"merge_interval": 4}}
    assert "training changed them" in card(changed).text and "training changed them" not in card().text


def test_versions_are_listed():
    assert "- torch 2.0\n" in card().text and "- poet_peft 0.1" in card().text


@pytest.mark.parametrize(
    "path",
    [
        "task",
        "base_model",
        "data.source",
        "config",
        "settings",
        "parameters.trained",
        "versions.torch",
        "evaluation",
        "evaluation[0].value",
        "evaluation[0].data.name",
    ],
)
def test_missing_key_is_named(path):
    with pytest.raises(ValueError, match=f"no '{re.escape(path)}': write "):
        card(without(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "adamw"}, "method='adamw'"),
        ({"task": "image-classification"}, "task='image-classification'"),
        ({"task": "text-classification"}, "no 'labels'"),
        ({"config": {"peft_type": "LORA"}}, "peft_type='LORA'"),
        ({"base_model": None}, "kind='merged'"),
        ({"evaluation": []}, "evaluation is empty"),
        ({"evaluation": {}}, "evaluation={} is no list; write a list of results"),
        ({"evaluation": None}, "evaluation=None is no list"),
        ({"evaluation": ["good"]}, r"no 'evaluation\[0\].metric': write"),
        ({"evaluation": [METRICS["evaluation"][0] | {"value": math.nan}]}, r"evaluation\[0\].value=nan is no finite"),
        ({"evaluation": [METRICS["evaluation"][0] | {"value": True}]}, r"evaluation\[0\].value=True is no finite"),
        ({"evaluation": [METRICS["evaluation"][0] | {"before": "0.2"}]}, r"evaluation\[0\].before='0.2' is no number"),
        ({"data": None}, "data=None is no object; write an object with the name"),
        ({"data": METRICS["data"] | {"name": None}}, "data.name=None is no text; write what the training data"),
        ({"data": METRICS["data"] | {"source": " "}}, "data.source=' ' is no text"),
        ({"data": METRICS["data"] | {"id": 5}}, "data.id=5 is no text"),
        ({"task": ["text-generation"]}, r"task=\['text-generation'\] is no text"),
        ({"config": None}, r"config=None is no object; write json_config\(config\)"),
        ({"settings": [1]}, r"settings=\[1\] is no object"),
        ({"parameters": {"model": None, "trained": 1}}, "parameters.model=None is no finite number"),
        ({"versions": METRICS["versions"] | {"torch": 2.0}}, "versions.torch=2.0 is no text"),
        ({"base_model": 5}, "base_model=5 is no text"),
        ({"labels": "good"}, "labels='good' is no list of texts or integers"),
        ({"limits": "One sentence."}, "limits='One sentence.' is no list of texts; write a list of sentences"),
        ({"train_tokens": "many"}, "train_tokens='many' is no number; write the number of tokens"),
        ({"hardware": 2}, r"hardware=2 is no text; write what hardware\(\) returns"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_metrics_that_no_card_can_be_made_of_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        card(METRICS | change)


@pytest.mark.parametrize(
    "metrics", [None, "metrics.json", Path("metrics.json"), [METRICS]], ids=lambda m: type(m).__name__
)
def test_what_is_not_the_object_of_a_run_is_refused(metrics):
    with pytest.raises(TypeError, match=r"not the object that a run wrote.*pass json\.loads"):
        create_model_card(metrics, "someone/model", "adapter")


@pytest.mark.parametrize("repo_id", [None, "", "/", 5])
def test_place_that_names_no_model_is_refused(repo_id):
    with pytest.raises(ValueError, match=f"repo_id={repo_id!r} does not name a model; pass 'user/name'"):
        create_model_card(METRICS, repo_id, "adapter")


def test_place_may_be_a_path():
    assert str(create_model_card(METRICS, Path("runs/first"), "adapter")) == str(
        create_model_card(METRICS, "runs/first", "adapter")
    )


@pytest.mark.parametrize("key", ["labels", "limits", "train_tokens", "hardware", "example_input"])
def test_null_of_an_optional_key_is_as_if_it_were_not_there(key):
    assert str(card(METRICS | {key: None})) == str(card(METRICS))


def test_installation_is_that_of_a_checkout():
    """Nobody has published a package of this name: it could be anybody's."""
    assert f"({INSTALL}), then:" in card().text
    assert not re.search(r"pip install (?!\.)", card().text)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='lora'"):
        card(kind="lora")


def test_a_model_from_random_weights_has_no_base_model():
    made = card(FROM_SCRATCH, "merged")
    assert made.data.base_model is None
    assert "from random weights" in made.text and "None" not in made.text


def snippet(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def run_as_written(code, capsys):
    exec(compile(code, "<snippet>", "exec"), {})
    return capsys.readouterr().out.strip()


@pytest.fixture
def base(tmp_path):
    """A base model on disk, with its tokenizer."""
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_snippet_of_an_adapter_starts_with_the_import():
    assert snippet(card().text).startswith("import poet_peft")


def test_snippet_of_an_adapter_runs_as_written(base, tmp_path, capsys):
    wrap(llama()).save_pretrained(tmp_path / "adapter")
    text = card(METRICS | {"base_model": str(base)}, repo_id=str(tmp_path / "adapter")).text
    assert run_as_written(snippet(text), capsys)


def test_snippet_of_a_merged_model_does_not_mention_the_package():
    assert not re.search(r"\b(poet_)?peft", snippet(card(kind="merged").text))


def test_snippet_of_a_merged_model_runs_as_written(base, capsys):
    assert run_as_written(snippet(card(kind="merged", repo_id=str(base)).text), capsys)


def test_snippet_feeds_the_example_input():
    made = card(METRICS | {"example_input": 'to "a" \n'})
    assert r'tokenizer("to \"a\" \n", return_tensors="pt")' in snippet(made.text)


def test_snippet_of_a_classifier_prints_a_label(base, tmp_path, capsys):
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification.from_pretrained(base, num_labels=2)
    get_peft_model(classifier, poet_config(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    text = card(CLASSIFIER | {"base_model": str(base)}, repo_id=str(tmp_path / "adapter")).text
    assert run_as_written(snippet(text), capsys) in ("bad", "good")


def test_labels_may_be_integers():
    assert "id2label={0: 3, 1: 5}" in snippet(card(CLASSIFIER | {"labels": [3, 5]}).text)


def test_saving_the_model_again_keeps_the_text(tmp_path):
    made = create_model_card(METRICS, "someone/model", "adapter")
    made.save(tmp_path / "README.md")
    wrap(llama()).save_pretrained(tmp_path)
    kept = ModelCard.load(tmp_path / "README.md")
    assert kept.text.strip() == made.text.strip()
    assert kept.data.eval_results == made.data.eval_results


def test_saving_the_card_after_the_model_keeps_all_of_it(tmp_path):
    wrap(llama()).save_pretrained(tmp_path)
    create_model_card(METRICS, "someone/model", "adapter").save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").content == card().content


class FakeTrainer:
    """The two attributes of a Trainer that `set_model_card` reads."""

    def __init__(self, output_dir, is_main):
        self.args = type("Arguments", (), {"output_dir": str(output_dir)})
        self.is_world_process_zero = lambda: is_main


def test_trainer_adds_its_tags_to_the_card(tmp_path):
    trainer = FakeTrainer(tmp_path, is_main=True)
    set_model_card(trainer, create_model_card(METRICS, "someone/model", "adapter"))
    trainer.create_model_card(model_name="model", tags=["trl", "poet"])
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["poet", "poet-peft", "trl"]


def test_only_the_main_process_writes_the_card(tmp_path):
    trainer = FakeTrainer(tmp_path, is_main=False)
    set_model_card(trainer, create_model_card(METRICS, "someone/model", "adapter"))
    trainer.create_model_card(model_name="model")
    assert not list(tmp_path.iterdir())


def test_committed_cards_are_what_the_results_say(monkeypatch):
    script = str(ROOT / "benchmarks" / "cards.py")
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    runpy.run_path(script, run_name="__main__")
