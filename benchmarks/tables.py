"""Writes what README.md, docs/ and benchmarks/README.md say about results, and the plots, from benchmarks/results/.

python -m benchmarks.tables           # rewrite the pages and the plots
python -m benchmarks.tables --check   # fail if one of them is not what the results say
"""

import json
import re
import sys
from pathlib import Path

from benchmarks.report import (
    adapter_sizes,
    breakdown,
    diagnostics,
    dial,
    drift,
    families,
    figures,
    figures_plots,
    finetune,
    layer,
    lora_conversion,
    merge_memory,
    model,
    performance,
    plots,
    quality,
    quality_plot,
    quality_runs,
    requantization,
    scaling,
    series,
    step_profile,
)


BENCHMARKS = Path(__file__).parent
SECTIONS = {"layer": layer, "model": model, "scaling": scaling}


def results(command, directory):
    """The result files of a command, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob(f"{command}-*.json"))}


def section(command, directory):
    module = SECTIONS[command]
    found = results(command, directory)
    if not found:
        return f"Not measured yet: run `{module.COMMAND}`.\n"
    return "\n\n".join(f"### `{name}.json`\n\n{module.section(result)}" for name, result in found.items()) + "\n"


def filled_in(text, sections):
    """The text with every section between its markers."""
    for name, content in sections.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        text, count = re.subn(
            f"{begin}.*{end}", lambda _, c=content, b=begin, e=end: f"{b}\n{c}{e}", text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"expected {begin} ... {end} once, found it {count} times")
    return text


def pages(benchmarks):
    """The text that each page should have, by path."""
    root = BENCHMARKS.parent
    texts = {
        root / "README.md": {"summary": finetune.summary(), "pretraining": quality.summary()},
        root / "docs" / "results.md": {
            "finetune": finetune.section(),
            "adapter-sizes": adapter_sizes.section(),
            "dial": dial.section(),
            "lora-conversion": lora_conversion.section(),
            "requantization": requantization.section(),
        },
        root / "docs" / "families.md": {"families": families.section()},
        root / "docs" / "method.md": {"drift": drift.section()},
        root / "docs" / "performance.md": {
            "performance": performance.section(),
            "step-profile": step_profile.section(),
            "series": series.section(),
        },
        root / "docs" / "command-line.md": {"merge-memory": merge_memory.section()},
        root / "docs" / "diagnostics.md": {"diagnostics": diagnostics.section()},
        root / "docs" / "pretraining-results.md": {"quality": quality.section()},
        root / "docs" / "training-figures.md": {"figures": figures.section()},
        benchmarks / "README.md": {command: section(command, benchmarks / "results") for command in SECTIONS}
        | {"breakdown": breakdown.section()},
    }
    return {path: filled_in(path.read_text(), sections) for path, sections in texts.items()}


def plotted(benchmarks):
    """The result that each plot should show, by path."""
    folder = BENCHMARKS.parent / "docs" / "figures"
    of_training = {folder / name: result for name, result in figures_plots.shown().items()}
    of_quality = {
        folder / quality_plot.plot_name(*key): quality_plot.shown(results)
        for key, results in quality_runs.read().items()
    }
    return (
        of_training
        | of_quality
        | {
            benchmarks / "plots" / module.plot_name(result): result
            for command, module in SECTIONS.items()
            for result in results(command, benchmarks / "results").values()
        }
    )


def outdated(benchmarks):
    texts = [path for path, text in pages(benchmarks).items() if path.read_text() != text]
    return texts + [path for path, result in plotted(benchmarks).items() if not plots.is_current(path, result)]


def rewrite(benchmarks):
    for path, text in pages(benchmarks).items():
        path.write_text(text)
    for path, result in plotted(benchmarks).items():
        if not plots.is_current(path, result):
            plots.draw(result, path)


def main():
    if "--check" not in sys.argv:
        rewrite(BENCHMARKS)
    elif found := outdated(BENCHMARKS):
        sys.exit(f"not what the results say: {', '.join(map(str, found))}. Run this without --check.")


if __name__ == "__main__":
    main()
