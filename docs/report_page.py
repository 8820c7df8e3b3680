"""Train two tiny models with diagnostics, write the report about them, and take the pictures of diagnostics.md.

    python docs/report_page.py                        # about a minute on one core; needs Chromium or Chrome
    python docs/report_page.py --output_dir DIRECTORY --max_steps 6

The text is the source of a module of Python's standard library, one token a byte.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


sys.path.append(str(Path(__file__).parents[1] / "tests"))
from browser import Browser, find_browser  # noqa: E402

from poet_peft import POETCallback, POETConfig, poet_optimizer  # noqa: E402
from poet_peft.report import write_report  # noqa: E402


LENGTH = 64
RUNS = {
    "fold-every-20": ({"block_size": 16, "merge_interval": 20}, {"lr": 3e-3, "poet_lr": 1e-2}),
    "twice-the-rate": ({"block_size": 16, "merge_interval": 20}, {"lr": 3e-3, "poet_lr": 2e-2}),
}
# Name of the picture: width, height, whether dark.
PICTURES = {"report_wide": (1400, 2050, False), "report_phone": (390, 1500, True)}


def text():
    source = [byte for byte in Path(argparse.__file__).read_bytes() if byte < 128]
    rows = [source[i : i + LENGTH] for i in range(0, len(source) - LENGTH, LENGTH)]
    return [{"input_ids": row, "labels": row} for row in rows]


def train(output_dir, max_steps, config, rates):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_attention_heads=4, **sizes))
    model = get_peft_model(model, POETConfig.for_pretraining("paper", **config))
    trainer = Trainer(
        model,
        TrainingArguments(
            str(output_dir),
            max_steps=max_steps,
            per_device_train_batch_size=8,
            logging_steps=max(1, max_steps // 60),
            eval_strategy="steps",
            eval_steps=max(1, max_steps // 6),
            save_steps=max_steps,
            lr_scheduler_type="cosine",
            include_num_input_tokens_seen="all",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=text()[:-16],
        eval_dataset=text()[-16:],
        optimizer_cls_and_kwargs=poet_optimizer(**rates),
    )
    POETCallback(diagnostics_every=max(1, max_steps // 24), exact_diagnostics=True).attach(trainer)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    trainer.save_model()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).with_name("figures"))
    parser.add_argument("--max_steps", type=int, default=60)
    args = parser.parse_args()
    browser = find_browser()
    if browser is None:
        sys.exit("no Chromium or Chrome on the PATH: install one, for example with apt-get install chromium.")
    with tempfile.TemporaryDirectory() as directory:
        for name, settings in RUNS.items():
            train(Path(directory, name), args.max_steps, *settings)
        page = write_report([Path(directory, name) for name in RUNS], Path(directory, "report.html"))
        with Browser(browser) as opened:
            for name, (width, height, dark) in PICTURES.items():
                picture = args.output_dir / f"{name}.png"
                opened.look(page, width, dark, picture)
                whole = Image.open(picture)
                top = whole.crop((0, 0, whole.width, min(height, whole.height)))
                top.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(picture, optimize=True)


if __name__ == "__main__":
    main()
