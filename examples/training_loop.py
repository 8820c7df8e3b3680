"""A plain PyTorch training loop with folds that can be killed and resumed at any step, ending in the same bits.

    python examples/training_loop.py --output_dir run                   # 40 steps, a checkpoint every 10
    python examples/training_loop.py --output_dir run --stop_after 25   # dies at step 25 ...
    python examples/training_loop.py --output_dir run                   # ... goes on from step 20 to the end

The pattern: everything that training changes is in the adapter (`save_pretrained`: rotations, permutations, folded
weights and, with `train_rest`, all else) or in the optimizer's state, and the batches of a step follow from the step's
number. The folds happen in `optimizer.step()`. A checkpoint is written beside its place and renamed into it, so that
one that is there is complete, and it knows the flags that it was made with.
It prints the loss of every step, and at the end a hash of the model.
"""

import argparse
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from poet_peft import POETCheckpointError, POETConfig, poet_param_groups, verify_checkpoint


SIZES = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
TEXT = torch.tensor(list(" ".join(map(str, range(2000))).encode()))  # one token a byte
CLIP = 1.0


def batch(step, accumulation):
    """The tokens of an optimizer step, at places in the text that follow from the step's number."""
    starts = torch.randint(len(TEXT) - 32, (accumulation * 4,), generator=torch.Generator().manual_seed(step))
    return torch.stack([TEXT[i : i + 32] for i in starts]).chunk(accumulation)


def save(output_dir, step, flags, model, optimizer, scheduler):
    path, unfinished = output_dir / f"step-{step}", output_dir / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, unfinished / "training.pt")
    (unfinished / "flags.json").write_text(json.dumps(flags))
    os.replace(unfinished, path)


def load(path, flags, model, optimizer, scheduler):
    """Load a checkpoint of this run into what was made for it; refuse that of another run."""
    verify_checkpoint(path)
    made_with = json.loads((path / "flags.json").read_text())
    if made_with != flags:
        raise POETCheckpointError(f"{path} is of a run with {made_with}, not {flags}: choose another --output_dir")
    model.load_adapter(path, "default", is_trainable=True)  # into the parameters that the optimizer holds
    state = torch.load(path / "training.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("loop-output"))
    parser.add_argument("--max_steps", type=positive, default=40)
    parser.add_argument("--save_steps", type=positive, default=10)
    parser.add_argument("--merge_interval", type=positive, default=4)
    parser.add_argument("--accumulation", type=positive, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop_after", type=int, default=0, help="end the process here, as if it was killed")
    args = parser.parse_args()
    flags = {name: getattr(args, name) for name in ("max_steps", "merge_interval", "accumulation", "seed")}

    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))
    config = POETConfig.for_pretraining(block_size=16, merge_interval=args.merge_interval, seed=args.seed)
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW(poet_param_groups(model, lr=5e-3, poet_lr=4e-3, weight_decay=0.01))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.max_steps)

    done = 0
    names = [path.name.removeprefix("step-") for path in args.output_dir.glob("step-*")]
    if steps := [int(name) for name in names if name.isdecimal()]:
        done = max(steps)
        try:
            load(args.output_dir / f"step-{done}", flags, model, optimizer, scheduler)
        except (OSError, ValueError, POETCheckpointError) as error:
            raise SystemExit(f"training_loop.py: {error}") from None
    model.train()
    for step in range(done + 1, args.max_steps + 1):
        total = 0.0
        for input_ids in batch(step, args.accumulation):
            loss = model(input_ids=input_ids, labels=input_ids).loss / args.accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        print(f"step {step} loss {total!r}", flush=True)
        if step % args.save_steps == 0 or step == args.max_steps:
            save(args.output_dir, step, flags, model, optimizer, scheduler)
        if step == args.stop_after:
            os._exit(1)

    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.detach().numpy().tobytes())
    print(f"model {digest.hexdigest()}")


if __name__ == "__main__":
    main()
