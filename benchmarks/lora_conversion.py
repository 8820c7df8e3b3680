"""What an adapter loses when it is converted to LoRA: the part of its change that each rank keeps, and the loss.

    python -m benchmarks.finetune_run --data gsm8k/train.jsonl --test_data gsm8k/test.jsonl --method poet \
        --max_steps 20 --output_dir best-adapter
    python -m benchmarks.lora_conversion --adapter best-adapter --data gsm8k/train.jsonl \
        --test_data gsm8k/test.jsonl --out benchmarks/results/lora-conversion.json

The texts are those of `finetune_run`. Every rank is converted, saved and loaded as a user would. Writes the file after
every rank.
"""

import argparse
import tempfile

import torch
from peft import PeftModel, save_as_lora

from benchmarks.harness.adapter_losses import AdapterLosses
from poet_peft.layer import poet_layers


def kept_shares(model, ranks):
    """Of the squares of all singular values of `R W P - W` in all layers, the share of the largest of each rank."""
    squares = [torch.linalg.svdvals(layer.get_delta_weight("default")).square() for _, layer in poet_layers(model)]
    total = sum(s.sum() for s in squares)
    return {rank: float(sum(s[:rank].sum() for s in squares) / total) for rank in ranks}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    AdapterLosses.add_arguments(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64, 192])
    args = parser.parse_args()

    losses = AdapterLosses(args)
    model = losses.load_adapter()
    parameters = sum(p.numel() for name, p in model.named_parameters() if "poet_" in name)
    losses.add(losses.base_model(), kind="base")
    losses.add(model, kind="poet", parameters=parameters)
    shares = kept_shares(model, args.ranks)
    for rank in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            save_as_lora(folder, model, rank=rank)
            lora = PeftModel.from_pretrained(losses.base_model(), folder).eval()
        parameters = sum(p.numel() for name, p in lora.named_parameters() if "lora_" in name)
        losses.add(lora, kind="lora", rank=rank, parameters=parameters, kept=shares[rank])


if __name__ == "__main__":
    main()
