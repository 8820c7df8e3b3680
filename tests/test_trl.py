"""TRL's trainers: what they train, and that DPO's and GRPO's reference is the untouched model or an error."""

import copy
import math

import pytest
import torch
import trl
from datasets import Dataset
from models import llama, poet_config, state
from peft import get_peft_model
from test_examples import byte_tokenizer

from poet_peft import POETCallback, POETFoldError, POETReferenceError


pytestmark = pytest.mark.slow  # trl takes seconds to import

TEXTS = Dataset.from_list([{"text": f"{i} plus 1 is {i + 1}."} for i in range(8)])
PAIRS = Dataset.from_list(
    [{"prompt": f"{i} plus 1 is", "chosen": f" {i + 1}.", "rejected": f" {i + 2}!"} for i in range(8)]
)
PROMPTS = Dataset.from_list([{"prompt": f"{i} plus 1 is"} for i in range(8)])
DATA = {"SFT": TEXTS, "DPO": PAIRS, "GRPO": PROMPTS}
PERIODIC = {"merge_interval": 2}


@pytest.fixture
def base():
    """A tiny Llama that knows the bytes, sure enough of itself for probabilities to differ."""
    model = llama(vocab_size=258, eos_token_id=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def num_digits(completions, **kwargs):
    """A reward that differs within a group."""
    return [float(sum(map(len, completions)) % 7 + len(completion)) for completion in completions]


def arguments(kind, tmp_path, **overrides):
    settings = {
        "output_dir": tmp_path,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
    }
    if kind == "GRPO":
        settings |= {"beta": 0.1, "num_generations": 2, "max_completion_length": 4}
    return getattr(trl, f"{kind}Config")(**{**settings, **overrides})


def make_trainer(kind, model, tmp_path, peft_config=None, ref_model=None, callbacks=(), **overrides):
    extra = {"DPO": {"ref_model": ref_model, "eval_dataset": PAIRS}, "GRPO": {"reward_funcs": num_digits}}.get(
        kind, {}
    )
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=arguments(kind, tmp_path, **overrides),
        train_dataset=DATA[kind],
        processing_class=byte_tokenizer(),
        peft_config=peft_config,
        callbacks=list(callbacks),
        **extra,
    )


def fresh(**overrides):
    return poet_config(init_weights=True, task_type="CAUSAL_LM", **overrides)


def log_probabilities(model, batch):
    """Of the tokens of a batch, each given those before it."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])


def dpo_rewards(trainer, reference):
    """Mean implicit rewards of chosen and rejected completions: those of DPOTrainer, and those against a reference."""
    (batch,) = trainer.get_eval_dataloader()
    difference = log_probabilities(trainer.model, batch) - log_probabilities(reference, batch)
    chosen, rejected = (difference.squeeze(-1) * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)
    metrics = trainer.evaluate()
    actual = metrics["eval_rewards/chosen"], metrics["eval_rewards/rejected"]
    return actual, (trainer.args.beta * chosen.mean().item(), trainer.args.beta * rejected.mean().item())


class GRPOReference:
    """Records the reference's log-probabilities that GRPOTrainer puts into its batches."""

    def __init__(self, trainer):
        self.batches = []
        generate = trainer._generate_and_score_completions

        def recorded(inputs):
            outputs = generate(inputs)
            self.batches.append({key: value.clone() for key, value in outputs.items() if torch.is_tensor(value)})
            return outputs

        trainer._generate_and_score_completions = recorded


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_training_moves_the_rotations_and_nothing_else(kind, base, tmp_path):
    trainer = make_trainer(kind, base, tmp_path, fresh())
    before = state(trainer.model)
    trainer.train()
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    changed = {name for name in changed if ".poet_state." not in name}  # counts the steps
    assert changed == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all(".poet_R." in name or ".poet_P." in name for name in changed)


def test_sft_folds(base, tmp_path):
    callback = POETCallback()
    trainer = make_trainer("SFT", base, tmp_path, fresh(**PERIODIC), callbacks=[callback], max_steps=4)
    trainer.train()
    assert callback.last_report.num_reinits == 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_dpo_reference_is_the_untouched_model(base, tmp_path):
    untouched = copy.deepcopy(base)
    trainer = make_trainer("DPO", base, tmp_path, fresh())
    trainer.train()
    rewards, expected = dpo_rewards(trainer, untouched)
    assert rewards == pytest.approx(expected, rel=1e-4)
    assert expected[0] - expected[1] > 0.1


def test_dpo_reference_of_a_trained_adapter_is_that_adapter(base, tmp_path):
    wrapped = get_peft_model(base, poet_config(task_type="CAUSAL_LM"))
    untouched = copy.deepcopy(wrapped)
    trainer = make_trainer("DPO", wrapped, tmp_path)
    trainer.train()
    rewards, expected = dpo_rewards(trainer, untouched)
    assert rewards == pytest.approx(expected, rel=1e-4)
    assert expected[0] - expected[1] > 0.1


def test_grpo_reference_is_the_untouched_model(base, tmp_path):
    untouched = copy.deepcopy(base)
    trainer = make_trainer("GRPO", base, tmp_path, fresh())
    recorded = GRPOReference(trainer)
    trainer.train()
    for batch in recorded.batches:
        whole = {
            "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        }
        expected = log_probabilities(untouched, whole).squeeze(-1)[:, -batch["completion_ids"].shape[1] :]
        mask = batch["completion_mask"].bool()
        torch.testing.assert_close(batch["ref_per_token_logps"][mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert len(recorded.batches) == 3


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_folds_without_a_reference_are_refused_before_the_first_step(kind, base, tmp_path):
    trainer = make_trainer(kind, base, tmp_path, fresh(**PERIODIC), callbacks=[POETCallback()])
    before = state(trainer.model)
    with pytest.raises(POETReferenceError, match=r"keep_initial_weights=True.*ref_model=.*merge_interval=0"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_folds_of_an_adapter_that_is_its_own_reference_are_refused_before_the_first_step(base, tmp_path):
    wrapped = get_peft_model(base, poet_config(task_type="CAUSAL_LM", **PERIODIC))
    trainer = make_trainer("DPO", wrapped, tmp_path, callbacks=[POETCallback()])
    with pytest.raises(POETFoldError, match=r"carries the adapters \['default', 'ref'\].*merge_interval=0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_dpo_folds_beside_a_reference_model(base, tmp_path):
    untouched, callback = copy.deepcopy(base), POETCallback()
    trainer = make_trainer("DPO", base, tmp_path, fresh(**PERIODIC), copy.deepcopy(base), [callback])
    trainer.train()
    rewards, expected = dpo_rewards(trainer, untouched)
    assert callback.last_report.num_reinits == 1
    assert rewards == pytest.approx(expected, rel=1e-4)


def test_dpo_folds_with_the_initial_weights_kept(base, tmp_path):
    untouched, callback = copy.deepcopy(base), POETCallback()
    config = fresh(keep_initial_weights=True, **PERIODIC)
    trainer = make_trainer("DPO", base, tmp_path, config, callbacks=[callback])
    trainer.train()
    rewards, expected = dpo_rewards(trainer, untouched)
    assert callback.last_report.num_reinits == 1
    assert rewards == pytest.approx(expected, rel=1e-4)


def test_grpo_folds_where_no_reference_is_needed(base, tmp_path):
    callback = POETCallback()
    trainer = make_trainer("GRPO", base, tmp_path, fresh(**PERIODIC), callbacks=[callback], beta=0.0)
    trainer.train()
    assert callback.last_report.num_reinits == 1
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_original_model_is_there_again_after_training_that_did_not_come_to_a_fold(base, tmp_path):
    trainer = make_trainer("SFT", base, tmp_path, fresh(merge_interval=100), callbacks=[POETCallback()])
    trainer.train()
    with trainer.model.disable_adapter():
        trainer.model(torch.tensor([[5, 6]]))
