"""The command line: what each command takes. What it prints is in :mod:`flows.console`.

Commands import what they call: `--help`, and a mistake in what was typed, wait for no library.
"""

from __future__ import annotations

import functools
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latteflow.flows import console
from latteflow.flows.console import fail, failures
from latteflow.flows.errors import UsageError
from latteflow.models.errors import ModelError
from latteflow.storage.errors import DataError, StorageError
from latteflow.tasks.core.errors import ConfigError

if TYPE_CHECKING:
    from latteflow.tasks.core.domain import Domain

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
out = console.console

DomainFile = Annotated[Path, typer.Argument(metavar="DOMAIN", help="The domain's YAML file.", show_default=False)]
DomainFiles = Annotated[
    list[Path] | None, typer.Argument(metavar="DOMAIN", help="Domain files, YAML.", show_default=False)
]
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that `export` wrote.", show_default=False)]
StoreUrl = Annotated[
    str | None, typer.Option("--store", metavar="URL", help="All domains of this store, instead of domain files.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, for programs.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib import metadata

        out.print(f"latteflow {metadata.version('latteflow')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Adapt a CLIP model to a new image domain without labels.

    A domain file says where the images are and which classes there are; `latteflow init SOURCE` proposes one. Every
    command takes one, but for `gc --store`, `verify --store`, and `predict` and `serve`, which take a model.
    `latteflow plan DOMAIN` says what `latteflow run DOMAIN` would do.
    """
    console.log_to_terminal()


@app.command()
def init(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with images, a pattern, tars or tables, here or in a bucket.", show_default=False
        ),
    ],
    file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The domain file; default: its name with .yaml, here.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the domain; default: that of the folder.")] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Names with commas between; default: those of the sub-folders."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A server with OpenAI's chat API that writes the texts, such as vllm serve."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Look at images and at this machine, and propose a domain file, with comments to read and correct.

    Sub-folders become class names, and labels that only `evaluate` reads.
    """
    from latteflow.flows.begin import begin

    out.print(console.begun(begin(source, file, name=name, classes=classes, server=server, force=force)))


@app.command()
def run(
    domain: DomainFile,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STAGE",
            help="Run this stage and what depends on it. All else stays as the last run left it: the source is not "
            "listed again, and a stage that would have to run is an error.",
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="STAGE", help="As --from, and what depends on the stage does not run either.")
    ] = None,
    refresh: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE",
            help="Make this stage anew although it is cached; describe, group and pair ask for their texts again. The "
            "old artifact stays until the new one is whole. May be given more than once.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run every stage; finished work is taken from the store.

    Stages: shard, embed, describe, group, screen, pair (for pc_clip), tune, select, evaluate, report.
    """
    if start and only:
        raise UsageError("--from and --only exclude each other; give one")
    settings = _domain(domain)
    from latteflow.flows import documents
    from latteflow.flows.pipeline import repaired, run_plainly

    choice = functools.partial(run_plainly, start=start, only=only, refresh=refresh or ())
    results = repaired(choice, settings)
    if as_json:
        out.print(console.document(documents.run(settings, results)))
        return
    out.print(console.results(results))
    if results[-1].label == "report":
        from latteflow.models.judge.metrics import seen_note
        from latteflow.tasks.core.stage import open_store
        from latteflow.tasks.report.report import kept
        from latteflow.tasks.report.scores import read_scores
        from latteflow.tasks.tune.select import read_selection

        folder = Path(settings.output) / settings.name
        store, found = open_store(settings), {result.label: result for result in results}
        scores = read_scores(store.open(found["evaluate"].ref))
        if note := seen_note(scores.n_seen, scores.n_test):
            out.print(f"note     {note}")
        out.print(console.scores(scores))
        if scores.general:
            out.print(console.forgotten(scores.general))
        selection = read_selection(store.open(found["select"].ref))
        out.print(f"kept     {kept(settings, selection)}")
        out.print(f"report   {folder / 'report.html'}\nmetrics  {folder / 'metrics.json'}")
        out.print(f"next     latteflow review {console.typed(domain)}; latteflow export {console.typed(domain)} MODEL")


@app.command()
def plan(domain: DomainFile, as_json: Json = False) -> None:
    """Say what `run` would do and why: images, texts, tokens, time, cost. Nothing is run, no model is loaded.

    Times are those of earlier runs of the same stage, per image or text; tokens those of the texts written so far.
    Prices and first estimates are in the domain file, under `prices`.
    """
    settings = _domain(domain)
    from latteflow.flows import documents
    from latteflow.flows.pipeline import repaired
    from latteflow.flows.plan import plan as planned

    found = repaired(planned, settings)
    if as_json:
        out.print(console.document(documents.plan(settings, found)))
    else:
        out.print(console.plan(found))
        out.print(console.totals(settings, found))
        if any(each.reasons for each in found):
            out.print(f"next: latteflow run {console.typed(domain)}")


@app.command()
def preview(
    domain: DomainFile,
    images: Annotated[int, typer.Option(min=1, max=100, help="How many images.")] = 5,
) -> None:
    """Ask the describer about a few images, and write a page with images, questions and answers side by side.

    The images are sharded and embedded first, as by `run`. The texts are kept, so a run does not pay for them again.
    """
    settings = _domain(domain)
    from latteflow.flows.pipeline import repaired
    from latteflow.tasks.ingest.embed import embed
    from latteflow.tasks.ingest.shard import shard
    from latteflow.tasks.report.preview import preview as previewed
    from latteflow.tasks.tune.check import check_models

    def write(settings: Domain) -> Path:
        check_models(settings)
        shards = shard(settings, "train")
        return previewed(settings, shards, embed(settings, shards), images)

    out.print(f"preview  {repaired(write, settings)}")


@app.command()
def show(
    domain: DomainFile,
    image: Annotated[
        str | None, typer.Argument(help="An image: its path, its key, or the beginning of its key.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the artifacts of a domain; or follow one image from source to prediction."""
    settings = _domain(domain)
    from latteflow.flows import documents
    from latteflow.flows.upkeep import history as held
    from latteflow.tasks.report.lineage import lineage

    history = held(settings)
    followed = None if image is None else lineage(settings, history, image)
    if as_json:
        told = documents.image(settings.name, followed) if followed else documents.artifacts(history)
        out.print(console.document(told))
    else:
        out.print(console.lineage(followed) if followed else console.artifacts(history))


@app.command()
def explain(
    domain: DomainFile,
    artifact: Annotated[
        str,
        typer.Argument(help="A stage (its newest artifact), or the beginning of a fingerprint.", show_default=False),
    ],
    other: Annotated[str | None, typer.Argument(help="A second artifact of the stage.", show_default=False)] = None,
) -> None:
    """Say in words what an artifact was made from; or why two artifacts of a stage are not the same."""
    settings = _domain(domain)
    from latteflow.flows.upkeep import history as held

    history = held(settings)
    first = history.find(artifact)
    if other is None:
        out.print(console.artifact(history, first))
        return
    second = history.find(other)
    if first.stage != second.stage:
        raise DataError(
            f"{artifact!r} is of stage {first.stage} and {other!r} of {second.stage}; compare two of one stage"
        )
    out.print(console.difference(history, first, second))


@app.command()
def replay(domain: DomainFile) -> None:
    """Look again at the images in quarantine, after limits in the domain file or decoders have changed.

    The bytes that were kept are used, the source is not read. `run` then goes on with what became usable.
    """
    settings = _domain(domain)
    from latteflow.flows.pipeline import graph
    from latteflow.tasks.ingest.shard import replay as replayed

    splits = list(dict.fromkeys(step.split for step in graph(settings) if step.name == "shard"))
    out.print(console.results([replayed(settings, split) for split in splits]))


@app.command()
def verify(domain: DomainFiles = None, store: StoreUrl = None, as_json: Json = False) -> None:
    """Read every file against its digest. What is damaged is set aside, and made again by the next run.

    The exit code is 1 if anything was wrong.
    """
    settings = [_domain(path) for path in domain or ()]
    from latteflow.flows import documents
    from latteflow.flows.upkeep import histories, stores
    from latteflow.storage.upkeep import verify as check
    from latteflow.storage.upkeep import verify_captions

    found = histories(settings, store)
    objects = [stored for each in found for stored in each.inventory.objects.values()]
    total = sum(stored.bytes for stored in objects)
    wrong: list[str] = []
    with console.progress() as progress:
        bar = progress.add_task("verify", total=total)
        for each in found:
            wrong += check(each.inventory, lambda size: progress.advance(bar, size))
        for each_store in stores(found):
            wrong += verify_captions(each_store)
    if as_json:
        out.print(console.document(documents.verified(len(objects), total, wrong)))
    else:
        for line in wrong:
            out.print(console.printable(line))
        out.print(f"{len(objects)} objects, {console.size(total)}: {f'{len(wrong)} damaged' if wrong else 'all sound'}")
    if wrong:
        raise typer.Exit(1)


@app.command()
def gc(
    domain: DomainFiles = None,
    store: StoreUrl = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it, only say what would go.")] = False,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Leave alone what is younger, as it may be in use: 30m, 12h, 7d.")
    ] = "1d",
) -> None:
    """Delete what no current run needs. Texts are never deleted; their small files are merged.

    Kept are the newest complete run of each domain, what a run of the domain file would take from the store now, the
    champion and the one before it, what is younger than --older-than, and all that these were made from. A domain that
    is being run is left alone.
    """
    age = _seconds(older_than)
    settings = [_domain(path) for path in domain or ()]
    from latteflow.flows.upkeep import histories, sweep

    swept = sweep(histories(settings, store), settings, age, delete=delete)
    for name, why in swept.alone.items():
        out.print(f"{name}: {why}; nothing of it goes")
    if swept.loose:
        out.print(console.loose([one for _, one in swept.loose]))
    freed = f"{len(swept.loose)} objects, {console.size(swept.bytes)}"
    if delete:
        out.print(f"deleted {freed}; {swept.merged} small files of texts merged into others")
    else:
        out.print(f"would delete {freed}; `--delete` does it" if swept.loose else "nothing to delete")


@app.command()
def export(
    domain: DomainFile,
    folder: Annotated[Path, typer.Argument(help="Where to write the model.", show_default=False)],
    served: Annotated[
        bool, typer.Option("--champion", help="The model that is served, instead of the newest.")
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(help="Adapted by this one of the domain's; zero_shot: not adapted. Default: what `run` kept."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which of its models; default: what `run` kept.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Image tower and classifier as `model.onnx` as well.")] = False,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="For Hugging Face's CLIPModel as well, in `transformers/`.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Into a folder that holds other things than an earlier export, too.")
    ] = False,
) -> None:
    """Write a model as a folder that open_clip loads: what `run` kept, which may be zero-shot; and a card.

    The folder is new, empty, or holds an earlier export, which is replaced when the new one is whole.
    """
    settings = _domain(domain)
    from latteflow.flows.export import export, export_champion
    from latteflow.tasks.ship.export import Format

    asked: dict[Format, bool] = {"onnx": onnx, "transformers": transformers}
    formats = [name for name, wanted in asked.items() if wanted]
    if served:
        export_champion(settings, folder, formats=formats, force=force)
    else:
        verdict = export(settings, folder, method=method, seed=seed, formats=formats, force=force)
        if method is seed is None:
            out.print(f"kept     {verdict}")
    out.print(f"model    {console.printable(str(folder))}\nnext     latteflow serve {console.typed(folder)}")


@app.command()
def predict(
    model: ModelFolder,
    images: Annotated[
        str,
        typer.Argument(help="A folder, a file, a pattern, tars or tables, here or in a bucket.", show_default=False),
    ],
    table: Annotated[
        str, typer.Option("--out", metavar="FILE", help="Ends in .parquet, .csv or .jsonl.")
    ] = "predictions.parquet",
    top: Annotated[int, typer.Option(min=1, help="Classes for each image.")] = 5,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images in one forward pass.")] = 64,
) -> None:
    """Say which class each image has, by a model that `export` wrote. Needs no domain file and no store."""

    from latteflow.tasks.ship.predict import predict as predicted

    with console.progress() as progress:
        bar = progress.add_task("predict", total=None)
        found = predicted(
            model, images, table, top=top, batch=batch,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
    strange = "the model cannot say which are of none of the classes"
    if found.unknown is not None:
        strange = f"of which {found.unknown} seem to be of none of the classes"
    out.print(f"images       {found.images}, {strange}")
    if found.quarantine:
        out.print(f"quarantined  {found.quarantined}: {console.printable(found.quarantine)}")
    out.print(f"predictions  {console.printable(found.out)}")


@app.command()
def serve(
    model: ModelFolder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8000,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at. Others than this machine's own reach it by 0.0.0.0: no password is asked."
        ),
    ] = "127.0.0.1",
    max_megabytes: Annotated[int, typer.Option(min=1, max=1024, help="Of a request.")] = 32,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name by which clients call it, as in http://NAME/, beside localhost and the address it listens at. "
            "May be given more than once.",
        ),
    ] = None,
) -> None:
    """Answer images over HTTP by a model that `export` wrote: POST /predict, /health, /metrics, and a page to try it.

    On SIGHUP it reads the folder again, and goes on with the model that is there then.
    """
    from latteflow.flows.serve import Limits
    from latteflow.flows.serve import serve as served

    limits = Limits(max_bytes=max_megabytes << 20)
    ready = f"serving  {console.printable(str(model))} at "
    served(model, host, port, limits, lambda address: out.print(ready + address), allow_host or ())


@app.command()
def captions(
    domain: DomainFile,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Default: `OUTPUT/NAME/captions`.")
    ] = None,
) -> None:
    """Write the texts of the last run as Parquet that Hugging Face `datasets` reads, with a card. Nothing runs."""
    settings = _domain(domain)
    from latteflow.flows.pipeline import as_they_are
    from latteflow.tasks.ship.captions import write_captions

    if folder is None:
        folder = Path(settings.output) / settings.name / "captions"
        folder.parent.mkdir(parents=True, exist_ok=True)
    found = as_they_are(settings, "shard", "embed", "describe", "group", "screen", "pair")
    written = write_captions(settings, {each.label: each for each in found}, folder)
    out.print(f"texts    {', '.join(f'{number} of {name}' for name, number in written.items())}\nfolder   {folder}")


@app.command()
def rank(
    domain: DomainFile,
    attribute: Annotated[
        str, typer.Argument(help='Some words, such as "larger", or a sentence about the first image of two.')
    ],
    method: Annotated[
        str | None,
        typer.Option(help="The model of this method; default: pc_clip, else the first. zero_shot: the untouched CLIP."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which of its models; default: the first seed.")] = None,
    top: Annotated[int, typer.Option(min=1, max=500, help="Images at each end.")] = 24,
    page: Annotated[Path | None, typer.Option("--out", help="The page; default: `OUTPUT/NAME/rank.html`.")] = None,
) -> None:
    """Order the images by an attribute: which shows more of it, by a model that reads differences."""
    _check_page(page)
    from latteflow.flows.pipeline import repaired, run_plainly
    from latteflow.models.settings import ZERO_SHOT
    from latteflow.tasks.report.rank import rank as ranked
    from latteflow.tasks.report.rank import sentence, write_page
    from latteflow.tasks.tune.models import check_model

    sentence(attribute)  # before anything runs
    settings = _domain(domain)
    if method != ZERO_SHOT:
        check_model(settings, seed, method)
    results = {result.label: result for result in repaired(run_plainly, settings)}
    made_from = results["shard train"], results["embed train"], results["tune"]
    found = ranked(settings, *made_from, attribute, method=method, seed=seed)
    out.print(console.ranking(found.sentence, found.paths, found.values.tolist(), top))
    out.print(f"page     {write_page(settings, results['shard train'], found, top, page)}")


@app.command()
def review(
    domain: DomainFile,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The new domain file; default: NAME.reviewed.yaml beside it."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 0,
) -> None:
    """Show what the images say of the class list, on a page where names are changed, merged, taken out and added."""
    settings = _domain(domain)
    from latteflow.flows.local import serve
    from latteflow.flows.pipeline import TUNING, as_they_are
    from latteflow.flows.review import build, place_beside
    from latteflow.tasks.core.stage import open_store
    from latteflow.tasks.report.classlist import review as reviewed

    place = place_beside(domain, out_file)
    found = {each.label: each for each in as_they_are(settings, *TUNING, "select")}
    images = found["shard train"]
    said = reviewed(settings, images, found["embed train"], found["screen"], found["tune"], found["select"])
    page = build(domain, place, said, open_store(settings).open(images.ref))
    serve(page, port, lambda address: out.print(f"review   {address}"))


@app.command()
def sample(
    domain: DomainFile,
    n: Annotated[int, typer.Option("--n", min=1, max=100_000, help="Images to label.")] = 100,
    labels_file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The labels; default: NAME.labels.csv beside the domain file."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 0,
) -> None:
    """Draw images that are worth labelling, and show a page on which to label them; an earlier file is gone on with."""
    settings = _domain(domain)
    from latteflow.flows.local import serve
    from latteflow.flows.pipeline import TUNING, as_they_are
    from latteflow.flows.sample import Labels, build
    from latteflow.tasks.core.stage import open_store
    from latteflow.tasks.report.sample import sample as drawn

    labels = Labels(labels_file or domain.with_name(f"{domain.stem}.labels.csv"))
    found = {each.label: each for each in as_they_are(settings, *TUNING, "select")}
    images = found["shard train"]
    chosen = drawn(settings, images, found["embed train"], found["tune"], found["select"], n)
    page = build(settings, chosen, open_store(settings).open(images.ref), labels)
    file = console.printable(str(labels.file))
    line = f"labels   {file}; in the domain file: evaluation: {{labels: {file}}}\nsample   "
    serve(page, port, lambda address: out.print(line + address))


@app.command()
def compare(
    one: Annotated[
        str,
        typer.Argument(
            metavar="A",
            help="FILE[@FINGERPRINT][:METHOD]: a domain file; one of its evaluations, as `show` lists them, by default "
            "the newest; a method in it, by default the first.",
            show_default=False,
        ),
    ],
    other: Annotated[
        str, typer.Argument(metavar="B", help="The same, of what A is compared with.", show_default=False)
    ],
    page: Annotated[Path | None, typer.Option("--out", help="The page; default: `runs/compare.html`.")] = None,
) -> None:
    """Put two runs side by side on the images that both have: figures, classes, images, settings, lineage."""
    _check_page(page)
    from latteflow.tasks.report.compare import compare as compared
    from latteflow.tasks.report.compare import read_run, write_page

    found = compared(read_run(one), read_run(other))
    out.print(f"A        {console.printable(found.one.name)}\nB        {console.printable(found.other.name)}")
    out.print(console.comparison(found))
    out.print(f"page     {write_page(found, page or Path('runs/compare.html'))}")


@app.command()
def champion(domain: DomainFile, as_json: Json = False) -> None:
    """Show the model that the domain serves, and those before it, newest first."""
    settings = _domain(domain)
    from latteflow.flows import documents
    from latteflow.tasks.core.stage import open_store
    from latteflow.tasks.ship.promote import NO_CHAMPION, champions

    found = champions(open_store(settings), settings.name)
    if as_json:
        out.print(console.document(documents.champions(settings.name, found)))
    else:
        out.print(console.champions(found) if found else NO_CHAMPION.format(name=settings.name))


@app.command()
def nights(
    domain: DomainFile,
    page: Annotated[Path | None, typer.Option("--out", help="The page; default: `OUTPUT/NAME/nights.html`.")] = None,
    as_json: Json = False,
) -> None:
    """Show what each night of the flow `retune` came to, newest first."""
    _check_page(page)
    settings = _domain(domain)
    from latteflow.flows import documents
    from latteflow.tasks.core.stage import open_store
    from latteflow.tasks.ship.nights import nights as read_nights
    from latteflow.tasks.ship.nights import write_page

    found = read_nights(open_store(settings), settings.name)
    if as_json:
        out.print(console.document(documents.nights(settings.name, found)))
    elif found:
        out.print(console.nights(found))
        out.print(f"page     {write_page(settings, found, page)}")
    else:
        out.print(f"domain {settings.name!r} had no night yet; the flow `retune` is one (docs/operations.md)")


@app.command()
def doctor(
    domain: Annotated[
        Path | None, typer.Argument(metavar="[DOMAIN]", help="A domain file, YAML.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether this machine can do the work: versions, GPU, disks, store, model, describer, server.

    The exit code is 1 if there is a problem.
    """
    settings = _domain(domain) if domain else None
    from latteflow.flows import documents
    from latteflow.flows.doctor import examine

    found = examine(settings)
    if as_json:
        out.print(console.document(documents.examined(found)))
    else:
        out.print(console.checks(found))
    if any(check.state == "problem" for check in found):
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON schema of domain files, for editors; methods and describers of installed packages are in it."""
    from latteflow.tasks.core.schema import schema as of_files

    out.print(console.document(of_files()))


@app.command()
def promote(domain: DomainFile) -> None:
    """Serve the newest model if, without labels, it is better than zero-shot and not worse than the one served now.

    The exit code is 1 if it is not.
    """
    settings = _domain(domain)
    from latteflow.flows.pipeline import TUNING, as_they_are
    from latteflow.tasks.ship.promote import promote as promoted

    found = {each.label: each for each in as_they_are(settings, *TUNING)}
    decision = promoted(settings, *(found[name] for name in ("shard train", "embed train", "screen", "tune")))
    out.print(f"{'promoted' if decision.promote else 'not promoted'}: {decision.reason}")
    if not decision.promote:
        raise typer.Exit(1)


@app.command()
def rollback(domain: DomainFile) -> None:
    """Serve the champion before this one again. The present one is never chosen again by itself."""
    settings = _domain(domain)
    from latteflow.tasks.ship.promote import rollback as rolled_back

    rolled_back(settings)
    champion(domain)


def _domain(file: Path) -> Domain:
    """The domain of a file; what the command goes on to needs far longer to be imported than this."""
    from latteflow.tasks.core.domain import Domain

    return Domain.load(file)


def _check_page(page: Path | None) -> None:
    """A folder that is only mistyped is not made; the default one is."""
    if page is not None and not page.parent.is_dir():
        raise ConfigError(f"--out {str(page)!r}: there is no folder {str(page.parent)!r}; create it first")


def _seconds(age: str) -> float:
    match = re.fullmatch(r"(\d+)([smhd])", age)
    if match is None:
        raise UsageError(f"--older-than {age!r}: give a number and a unit, such as 30m, 12h or 7d")
    return int(match[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[match[2]]


def entry() -> None:
    """The program: a mistake of the user's or the world's is one message, not a traceback."""
    try:
        app()
    except (ConfigError, DataError, ModelError, StorageError) as error:
        fail(str(error))
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
    except KeyboardInterrupt:
        failures.print("stopped; finished parts are kept, run again to go on")
        raise SystemExit(130) from None
    except Exception as error:
        failures.print(traceback.format_exc())
        fail(
            f"{type(error).__name__}: {error}\nThis is a mistake in latteflow; please report it with the lines above. "
            "Finished parts are kept, and running again goes on from them."
        )
        raise SystemExit(70) from None


if __name__ == "__main__":
    entry()
