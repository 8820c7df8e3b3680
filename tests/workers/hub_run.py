"""Pushes tiny models to the Hub that `HF_ENDPOINT` names, in stages that it announces there; see `tests/test_hub.py`.

python tests/workers/hub_run.py DIRECTORY
"""

import copy
import json
import os
import runpy
import sys
import urllib.request
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from models import METRICS, bert_classifier, llama, logits, poet_config, tokenizer, tokens
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from poet_peft import create_model_card, poet_param_groups, set_model_card


TESTS = Path(__file__).parents[1]
EXAMPLES = TESTS.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # as running one of them does
directory = Path(sys.argv[1])
base_dir = directory / "base"
metrics = METRICS | {"base_model": str(base_dir)}


def stage(name):
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/mark/{name}")


def save_base():
    llama().save_pretrained(base_dir)
    tokenizer().save_pretrained(base_dir)


def adapter():
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), poet_config())


def make_trainer(name, **settings):
    model = adapter()
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(batch=8)]
    arguments = TrainingArguments(
        output_dir=str(directory / name),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        **settings,
    )
    optimizer = torch.optim.AdamW(poet_param_groups(model, lr=0.0, poet_lr=1e-3))
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))


def example(script, name, *flags):
    sys.argv = [script, *map(str, flags), "--disable_tqdm", "True", "--output_dir", str(directory / name)]
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def pretrain(name, *flags):
    config, text = directory / "config.json", directory / "text.jsonl"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config.write_text(json.dumps({"model_type": "llama", **sizes}))
    text.write_text(
        "\n".join(json.dumps({"text": path.read_text()}) for path in (Path(__file__), TESTS / "fake_hub.py"))
    )
    model = ["--model_config", config, "--vocab_size", 260, "--block_size", 8, "--merge_interval", 1]
    data = ["--data", text, "--seq_length", 32, "--max_eval_sequences", 4]
    example("pretrain.py", name, *model, *data, "--max_steps", 2, *flags)


def finetune(name, *flags):
    rows = [{"question": f"What is {i} plus 1?", "answer": f"It is {i + 1}."} for i in range(8)]
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--data", directory / "rows.jsonl", "--num_test_rows", 4]
    example("finetune.py", name, *data, "--model", base_dir, "--block_size", 8, "--max_steps", 2, *flags)


def classify(name, *flags):
    bert_classifier().save_pretrained(directory / "bert")
    tokenizer().save_pretrained(directory / "bert")
    (directory / "rows.tsv").write_text("good\t2\nbad\t0\nfine\t1\nworse\t0\n")
    data = [flag for name in ("--data", "--test_data") for flag in (name, str(directory / "rows.tsv"))]
    example("classify.py", name, *data, "--model", str(directory / "bert"), "--block_size", "8", *flags)


save_base()

stage("defaults")
make_trainer("kept-local", save_strategy="steps", save_steps=1).train()
pretrain("pretrain-local")
finetune("finetune-local")
classify("classify-local")

stage("adapter")
model = adapter()
model.save_pretrained(directory / "adapter")
model.push_to_hub("someone/adapter")
create_model_card(metrics, "someone/adapter", "adapter").push_to_hub("someone/adapter")

stage("adapter-again")
model.push_to_hub("someone/adapter")

stage("load")
loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_dir), "someone/adapter")
torch.save({"pushed": logits(model), "loaded": logits(loaded)}, directory / "logits.pt")

stage("merged")
merged = copy.deepcopy(model).merge_and_unload()
merged.save_pretrained(directory / "merged")
merged.push_to_hub("someone/merged")
tokenizer().push_to_hub("someone/merged")
create_model_card(metrics, "someone/merged", "merged").push_to_hub("someone/merged")

stage("trainer")
trainer = make_trainer("trained", push_to_hub=True, save_strategy="steps", save_steps=1)
set_model_card(trainer, create_model_card(metrics, trainer.hub_model_id, "adapter"))
trainer.train()
trainer.push_to_hub()

stage("pretrain")
pretrain("pretrained", "--push_to_hub", "--hub_model_id", "someone/pretrained")

stage("finetune")
finetune("finetuned", "--push_to_hub", "--hub_model_id", "someone/finetuned")

stage("classify")
classify("classified", "--push_to_hub", "--hub_model_id", "someone/classified")
