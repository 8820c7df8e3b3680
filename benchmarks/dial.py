"""What an adapter's scale trades: the loss of the task against that of unrelated prose, at scales from 0 to 1.

    python -m benchmarks.finetune_run --data gsm8k/train.jsonl --test_data gsm8k/test.jsonl --method poet \
        --max_steps 20 --output_dir best-adapter
    python -m benchmarks.dial --adapter best-adapter --data gsm8k/train.jsonl --test_data gsm8k/test.jsonl \
        --out benchmarks/results/dial.json

The texts are those of `finetune_run`. Writes the file after every scale.
"""

import argparse

from peft.helpers import rescale_adapter_scale

from benchmarks.harness.adapter_losses import AdapterLosses


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    AdapterLosses.add_arguments(parser)
    parser.add_argument("--scales", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    args = parser.parse_args()

    losses = AdapterLosses(args)
    model = losses.load_adapter()
    for scale in args.scales:
        with rescale_adapter_scale(model, scale):
            losses.add(model, scale=scale)


if __name__ == "__main__":
    main()
