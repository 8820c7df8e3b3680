"""The commands. What they do is in the modules beside this one; here are their flags and what they print."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .. import POETCheckpointError, POETFoldError, POETReferenceError, __version__
from . import Refused


app = typer.Typer(
    name="poet-peft",
    help="Look at, compare and merge what POET has trained. `poet-peft COMMAND --help` has an example of each.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables; angles in radians")]
Rows = Annotated[int, typer.Option("--rows", min=0, help="sides of layers to show, the furthest first; 0 = all")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Never returns: exits with 0, with 1 for a finding, and with 2 for an error.

    Args:
        arguments: without the name of the command; None = those of the process.
    """
    try:
        app(args=arguments, prog_name="poet-peft")
    except (POETCheckpointError, POETFoldError, POETReferenceError, Refused, OSError) as error:
        print(f"poet-peft: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _print_version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


@app.command(short_help="write one HTML page about training runs")
def report(
    runs: Annotated[list[Path], typer.Argument(help="directories of runs, shown side by side")],
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about one or more training runs.

    Example: poet-peft report runs/poet runs/adamw --output report.html
    """
    for run in runs:
        if not run.is_dir():
            raise Refused(f"{run} is no directory: pass the output_dir of a run, or the directory of an adapter.")
    from ..report import write_report

    print(write_report(runs, output))


@app.command(short_help="say what lies in a directory, and whether it is whole")
def inspect(
    path: Annotated[Path, typer.Argument(help="directory of an adapter, a checkpoint or a merged model")],
    rows: Rows = 10,
    as_json: Json = False,
) -> None:
    """Say what lies in a directory: settings, sizes, angles, training data, and whether it is whole.

    Reads files only, no base model. Exits with 1 if a file is damaged.

    Example: poet-peft inspect run/checkpoint-400
    """
    from .inspection import inspect

    about = inspect(path)
    if as_json:
        _print_json(about)
    else:
        _print_inspection(about, rows)
    if about["problem"]:
        raise typer.Exit(1)


@app.command(short_help="merge an adapter into its base model")
def merge(
    adapter: Annotated[Path, typer.Argument(help="directory of the adapter or checkpoint")],
    out: Annotated[Path, typer.Argument(help="new directory for the model")],
    base: Annotated[str | None, typer.Option(help="base model; else the one that the adapter names")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; else the base model's")] = None,
    scale: Annotated[
        float, typer.Option(help="turn every plane by so many times its angle: 0 = the base model, 1 = as trained")
    ] = 1.0,
    push_to_hub: Annotated[str | None, typer.Option(help="user/name of a repository to upload the model to")] = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model: a plain transformers model, with tokenizer and card.

    The merged model must give the adapter's logits on random tokens, or nothing is written. Needs memory for the
    model, the adapter's file and a layer.

    Example: poet-peft merge run/checkpoint-400 merged --base HuggingFaceTB/SmolLM2-135M --dtype bfloat16
    """
    from .merging import merge

    progress = not as_json and sys.stderr.isatty()
    result = merge(adapter, out, base, dtype, push_to_hub, progress, scale)
    if as_json:
        _print_json(result)
        return
    print(f"{result['path']}: {result['base_model']} with {result['num_layers']} rotated layers merged")
    if scale != 1:
        beside = result["num_unscaled_values"]
        rest = f"; {beside:,} values beside the rotations as they are" if beside else ""
        print(f"turned by {scale:g} times their angles{rest}")
    print(f"{result['num_parameters']:,} parameters in {result['dtype']}, {_size(result['bytes'])}")
    print(
        f"logits: {result['relative_error']:.1e} of their size from the adapter's ({result['tolerance']:.0e} allowed)"
    )
    if push_to_hub:
        print(f"uploaded to {push_to_hub}")


@app.command(short_help="say where and how far two adapters turn a model apart")
def diff(
    one: Annotated[Path, typer.Argument(help="directory of an adapter or checkpoint")],
    other: Annotated[
        Path | None, typer.Argument(help="another; left out: the base model, which turns nothing")
    ] = None,
    rows: Rows = 10,
    as_json: Json = False,
) -> None:
    """Say where and how far two adapters turn a model apart, the furthest first.

    Example: poet-peft diff run/checkpoint-200 run/checkpoint-400
    """
    from .difference import diff

    result = diff(one, other)
    if as_json:
        _print_json(result)
        return
    print(f"{one} against {other or 'its base model'}")
    since = "" if result["weight"] is None else ", of the rotations not yet folded"
    print(f"largest angle {_angle(result['largest'])}, root mean square {_angle(result['rms'])}{since}")
    if result["weight"] is not None:
        print(f"weights R W P: at most {result['weight']:.3g} of their norm apart")
    _print_angles(result["layers"], rows)


@app.command(short_help="check this installation: the start of a bug report")
def doctor(
    with_compile: Annotated[bool, typer.Option("--compile", help="also try torch.compile, up to a minute")] = False,
    as_json: Json = False,
) -> None:
    """Check this installation: versions, devices, conflicts, and a self-test of one layer in a few seconds.

    The first thing to put into a bug report. Exits with 1 if something is wrong.

    Example: poet-peft doctor --json
    """
    from .doctor import doctor

    about = doctor(with_compile)
    if as_json:
        _print_json(about)
    else:
        _print_doctor(about)
    if not about["healthy"]:
        raise typer.Exit(1)


# What is printed


def _print_inspection(about: dict[str, Any], rows: int) -> None:
    print(f"{about['path']}: {about['kind']}, {'whole' if not about['problem'] else 'DAMAGED'}")
    if about["problem"]:
        print(about["problem"])
    settings = about.get("settings") or {}
    state = about.get("state") or {}
    training = about.get("training") or {}
    trained_on = about.get("trained_on") or {}
    lines: dict[str, Any] = {
        "base model": about.get("base_model"),
        "architecture": about.get("architecture"),
        "dtype": about.get("dtype"),
        "size": _size(about["bytes"]),
        "adapter file": _size(about["adapter_bytes"]) if about.get("adapter_bytes") else None,
        "parameters": f"{about['num_parameters']:,}" if about.get("num_parameters") else None,
        "other values": f"{about['num_other_values']:,}" if about.get("num_other_values") else None,
        **{key: value for key, value in settings.items() if value not in (None, {}, [])},
        "steps, folds, reinitialisations": (
            f"{state['num_steps']:,}, {state['num_folds']:,}, {state['num_reinits']:,}" if state else None
        ),
        "trainer": f"step {training['step']:,} of {training['max_steps']:,}" if training.get("max_steps") else None,
        "last loss": _number(training.get("loss")),
        "last evaluation loss": _number(training.get("eval_loss")),
        "largest drift of a fold": _number(training.get("largest_drift_of_a_logged_fold")),
        **{key.replace("_", " "): _flat(value) for key, value in trained_on.items() if value},
    }
    _print_lines({key: value for key, value in lines.items() if value is not None})
    if about.get("layers"):
        since = ", turned since the last fold by" if state.get("num_folds") else ""
        print(f"{about['num_layers']} rotated layers{since}")
        _print_angles(sorted(about["layers"], key=lambda entry: entry["largest"], reverse=True), rows)


def _print_angles(layers: list[dict[str, Any]], rows: int) -> None:
    table = Table("layer", "side", box=None, pad_edge=False)
    by_weight = any("weight" in entry for entry in layers)
    with_blocks = any("num_blocks" in entry for entry in layers)
    for column in (["blocks"] if with_blocks else []) + ["largest", "rms"] + (["weight"] if by_weight else []):
        table.add_column(column, justify="right")
    shown = layers[: rows or None]
    for entry in shown:
        cells = [entry["layer"], entry["side"]]
        if with_blocks:
            cells.append(f"{entry['num_blocks']} x {entry['block_sizes'][0]}")
        cells += [_angle(entry["largest"]), _angle(entry["rms"])]
        if by_weight:
            cells.append(f"{entry['weight']:.3g}" if "weight" in entry else "")
        table.add_row(*cells)
    _console().print(table)
    if len(shown) < len(layers):
        print(f"... and {len(layers) - len(shown)} more sides, none further (--rows 0 shows all)")


def _print_doctor(about: dict[str, Any]) -> None:
    _print_lines(about["versions"])
    devices = about["devices"]
    print()
    _print_lines({key: _flat(value) for key, value in devices.items() if value})
    print()
    _print_lines({**about["checks"], **about["engines"]})
    print()
    for conflict in about["conflicts"]:
        print(f"conflict: {conflict}")
    print("everything needed works" if about["healthy"] else "something is wrong, see above", end="")
    print(f" ({about['seconds']} s)")


def _print_lines(lines: dict[str, Any]) -> None:
    table = Table("", "", box=None, pad_edge=False, show_header=False)
    for key, value in lines.items():
        table.add_row(key, str(value))
    _console().print(table)


def _console() -> Console:
    # Written to a file, a table is as wide as it needs to be.
    return Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)


def _print_json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=2, default=sorted))


def _plain(value: Any) -> Any:
    """NaN and infinity are not JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _angle(radians: float) -> str:
    return f"{math.degrees(radians):.3g}°"


def _number(value: Any) -> str | None:
    return None if value is None else f"{value:.4g}"


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes} bytes"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else _number(value) if isinstance(value, float) else str(value)
