"""The command line: `latteflow run DOMAIN`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from models.clip import ModelError
from storage.errors import DataError, StorageError
from tasks.domain import ConfigError, Domain
from tasks.stage import StageResult

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
failures = Console(stderr=True)

DomainFile = Annotated[Path, typer.Argument(help="The domain's YAML file.", show_default=False)]


@app.callback()
def main() -> None:
    """Adapt a CLIP model to a new image domain without labels."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=failures, show_path=False)]
    )
    logging.getLogger("latteflow").setLevel(logging.INFO)


@app.command()
def run(domain: DomainFile) -> None:
    """Run every stage; finished work is taken from the store."""
    from flows.adapt import repaired, run_plainly

    settings = Domain.load(domain)
    results = repaired(run_plainly, settings)
    console.print(_stages(results))
    folder = Path(settings.output) / settings.name
    console.print(_scores(json.loads((folder / "metrics.json").read_text())))
    console.print(f"report   {folder / 'report.html'}\nmetrics  {folder / 'metrics.json'}", soft_wrap=True)


@app.command()
def export(
    domain: DomainFile,
    folder: Annotated[Path, typer.Argument(help="Where to write the model.", show_default=False)],
    seed: Annotated[int | None, typer.Option(help="Which of the adapted models; default: the first seed.")] = None,
) -> None:
    """Write the adapted model as a folder that open_clip loads."""
    from flows.adapt import repaired, run_plainly
    from tasks.tune import export_tuned

    settings = Domain.load(domain)
    results = {result.label: result for result in repaired(run_plainly, settings)}
    export_tuned(settings, results["tune"], settings.seeds[0] if seed is None else seed, folder)
    console.print(f"model    {folder}", soft_wrap=True)


def _stages(results: list[StageResult]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "", "seconds", "artifact", "counts"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for result in results:
        counts = ", ".join(f"{number} {name}" for name, number in result.counts.items() if number)
        state = "[green]cached[/]" if result.cached else "done"
        table.add_row(result.label, state, f"{result.seconds:.1f}", result.ref.fingerprint[:12], counts)
    return table


def _scores(metrics: dict[str, Any]) -> Table | str:
    if not metrics["n_test"]:
        free = metrics["label_free"]
        return f"no labels: {1 - free['agreement']:.1%} of the images changed class; accuracy is unknown"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (f"on {metrics['n_test']} test images", "top-1", "95 % interval", "gain over the better zero-shot"):
        table.add_column(column, justify="left" if column.startswith("on") else "right")
    scores = {**metrics["zero_shot"]["methods"], **metrics["methods"]}
    for name, score in scores.items():
        gain = ""
        if "gain" in score:
            low, high = score["gain_interval"]
            gain = f"{100 * score['gain']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        low, high = score["interval"]
        table.add_row(name.replace("_", " "), f"{100 * score['top1']:.1f}", f"{100 * low:.1f} - {100 * high:.1f}", gain)
    return table


def entry() -> None:
    """The program: a mistake of the user's or the world's is one message, not a traceback."""
    try:
        app()
    except (ConfigError, DataError, ModelError, StorageError) as error:
        failures.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        failures.print("stopped; finished parts are kept, run again to go on")
        raise SystemExit(130) from None


if __name__ == "__main__":
    entry()
