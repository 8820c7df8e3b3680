"""What is uploaded to the Hub, and that nothing is unless asked for. The Hub is `fake_hub.FakeHub`."""

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import ModelCard


WORKER = Path(__file__).parent / "workers" / "hub_run.py"
PRETRAIN = Path(__file__).parents[1] / "examples" / "pretrain.py"
CARD = "README.md"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
PLAIN = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
GIT = {".gitattributes"}  # the Hub makes this file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The fake Hub after `workers/hub_run.py`, with the directory that the worker wrote to."""
    directory = tmp_path_factory.mktemp("hub")
    with FakeHub() as hub:
        hub.directory = directory
        hub.run = lambda *arguments: subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=hub.environment(directory / "home"),
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=600,
        )
        finished = hub.run(WORKER, directory)
        assert finished.returncode == 0, finished.stderr[-4000:]
        yield hub


def card(hub, repo_id):
    return ModelCard(hub.repos[repo_id][CARD].decode())


def snippet(hub, repo_id):
    return re.search(r"```python\n(.*?)```", card(hub, repo_id).text, re.DOTALL)[1]


def test_the_fake_hub_knows_every_request(hub):
    assert not hub.unknown


def test_nothing_is_uploaded_by_default(hub):
    assert hub.writes("adapter")  # what the next line would look like if something were
    assert hub.writes("defaults") == []


def test_an_adapter_uploads_its_two_files_and_the_card(hub):
    assert set(hub.repos["someone/adapter"]) == ADAPTER | {CARD}


def test_the_uploaded_adapter_is_the_saved_one(hub):
    saved = {name: (hub.directory / "adapter" / name).read_bytes() for name in ADAPTER}
    assert {name: hub.repos["someone/adapter"][name] for name in ADAPTER} == saved


def test_the_uploaded_configuration_names_the_method(hub):
    assert json.loads(hub.repos["someone/adapter"]["adapter_config.json"])["peft_type"] == "POET"


def test_a_second_push_keeps_the_card(hub):
    pushes = [paths for repo_id, _, paths in hub.commits if repo_id == "someone/adapter"]
    assert len(pushes) >= 2 and CARD in pushes[0]  # PEFT's own card, before ours
    assert hub.writes("adapter-again")
    assert "import poet_peft" in card(hub, "someone/adapter").text
    assert card(hub, "someone/adapter").data.eval_results[0].metric_value == 0.8125


def test_an_adapter_loads_from_the_hub(hub):
    outputs = torch.load(hub.directory / "logits.pt")
    assert torch.equal(outputs["loaded"], outputs["pushed"])


def test_a_merged_model_uploads_plain_files(hub):
    assert set(hub.repos["someone/merged"]) == PLAIN | TOKENIZER | {CARD}


def test_the_uploaded_merged_weights_are_the_saved_ones(hub):
    saved = (hub.directory / "merged" / "model.safetensors").read_bytes()
    assert hub.repos["someone/merged"]["model.safetensors"] == saved


def test_trainer_uploads_the_adapter_and_no_checkpoint(hub):
    assert set(hub.repos["someone/trained"]) - GIT == ADAPTER | {CARD, "training_args.bin"}


def test_trainer_uploads_the_trained_adapter(hub):
    saved = (hub.directory / "trained" / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    assert hub.repos["someone/trained"]["adapter_model.safetensors"] == saved


def test_trainer_uploads_during_training_too(hub):
    messages = Counter(message for repo_id, message, _ in hub.commits if repo_id == "someone/trained")
    assert messages["End of training"] == 1
    assert any(message.startswith("Training in progress") for message in messages)


def test_trainer_uploads_our_card(hub):
    assert snippet(hub, "someone/trained").startswith("import poet_peft")
    assert card(hub, "someone/trained").data.eval_results[0].metric_value == 0.8125


def test_the_pretraining_example_uploads_what_it_wrote(hub):
    extras = {CARD, "metrics.json", "training_args.bin"}
    uploaded = {name: content for name, content in hub.repos["someone/pretrained"].items() if name not in GIT}
    assert set(uploaded) == PLAIN | TOKENIZER | extras
    assert uploaded == {name: (hub.directory / "pretrained" / name).read_bytes() for name in uploaded}


def test_the_pretraining_example_uploads_its_own_evaluation(hub):
    metrics = json.loads(hub.repos["someone/pretrained"]["metrics.json"])
    results = {result.metric_type: result.metric_value for result in card(hub, "someone/pretrained").data.eval_results}
    assert results == {"loss": metrics["eval_loss"], "perplexity": metrics["eval_perplexity"]}


@pytest.mark.parametrize(
    ("name", "metric"), [("finetuned", "eval_loss"), ("classified", "eval_accuracy")], ids=["finetune", "classify"]
)
def test_the_other_examples_upload_their_adapter_with_a_card(hub, name, metric):
    uploaded = hub.repos[f"someone/{name}"]
    directory = hub.directory / name
    assert set(uploaded) - GIT == ADAPTER | TOKENIZER | {CARD, "metrics.json", "training_args.bin"}
    assert all(uploaded[file] == (directory / file).read_bytes() for file in ADAPTER | {CARD})
    result = card(hub, f"someone/{name}").data.eval_results[0]
    assert result.metric_value == json.loads((directory / "metrics.json").read_text())[metric]


def test_the_pretraining_example_refuses_uploads_of_parts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--push_to_hub", "--hub_strategy", "every_save"])
    with pytest.raises(SystemExit, match="--hub_strategy every_save"):
        runpy.run_path(str(PRETRAIN), run_name="__main__")


# Importing poet_peft fails until the last one.
RUN_SNIPPETS = """
import json
import sys
sys.modules["poet_peft"] = None
*without, last = json.loads(sys.argv[1])
for snippet in without:
    exec(snippet, {})
    print("END")
del sys.modules["poet_peft"]
exec(last, {})
"""


@pytest.fixture(scope="module")
def printed(hub):
    """What the snippets of the cards print in a new process, by repository."""
    names = ["someone/merged", "someone/pretrained", "someone/adapter"]
    finished = hub.run("-c", RUN_SNIPPETS, json.dumps([snippet(hub, repo_id) for repo_id in names]))
    assert finished.returncode == 0, finished.stderr[-4000:]
    return dict(zip(names, finished.stdout.split("END"), strict=True))


def test_the_snippet_of_an_adapter_card_runs_as_written(printed):
    assert printed["someone/adapter"].strip()


@pytest.mark.parametrize("repo_id", ["someone/merged", "someone/pretrained"])
def test_the_snippet_of_a_merged_card_runs_without_the_package(printed, repo_id):
    assert printed[repo_id].strip()
