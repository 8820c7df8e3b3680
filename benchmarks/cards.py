"""Writes the model cards of the runs that the READMEs show, from benchmarks/results/ into model_cards/.

python -m benchmarks.cards           # write the cards
python -m benchmarks.cards --check   # fail if a card is not what the results say
"""

import json
import sys
from pathlib import Path

from poet_peft import create_model_card


ROOT = Path(__file__).parent.parent
RESULTS, CARDS = ROOT / "benchmarks" / "results", ROOT / "model_cards"
SHOWN = {  # what was measured, the directory that the run wrote, and what is in it
    "pretrain-poet": ("examples/pretrain.py.json", "pretrain-output", "merged"),
    "finetune-poet": ("examples/finetune.py.json", "finetune-output", "adapter"),
    "classify-poet": ("examples/classify.py.json", "classify-output", "adapter"),
}


def main():
    for name, (results, directory, kind) in SHOWN.items():
        kept = json.loads((RESULTS / results).read_text("utf-8"))
        card, path = create_model_card(kept["metrics"], directory, kind), CARDS / f"{name}.md"
        if "--check" not in sys.argv:
            card.save(path)
        elif not path.is_file() or path.read_text("utf-8") != str(card):
            sys.exit(f"{path} is not what the results say: run this without --check")


if __name__ == "__main__":
    main()
