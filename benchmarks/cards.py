"""Writes the model cards of the runs that README.md shows, from benchmarks/results/ into model_cards/.

python benchmarks/cards.py           # write the cards
python benchmarks/cards.py --check   # fail if a card is not what the results say
"""

import json
import sys
from pathlib import Path

from poet_peft import create_model_card


ROOT = Path(__file__).parent.parent
RESULTS, CARDS = ROOT / "benchmarks" / "results" / "pretrain", ROOT / "model_cards"
SHOWN = {
    "pretrain-poet-42": ("pretrain-output", "merged")
}  # results/pretrain/NAME.json: where the run wrote its model, and what


def main():
    for name, (directory, kind) in SHOWN.items():
        metrics = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        card, path = create_model_card(metrics, directory, kind), CARDS / f"{name}.md"
        if "--check" not in sys.argv:
            card.save(path)
        elif not path.is_file() or path.read_text("utf-8") != str(card):
            sys.exit(f"{path} is not what the results say: run this without --check")


if __name__ == "__main__":
    main()
