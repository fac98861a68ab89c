"""preview and prices: what a user sees of a language model before paying for it."""

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from chatserver import Ask, ChatServer, Reply, answer
from conftest import draw_folder
from latteflow.flows import console
from latteflow.flows.pipeline import run_plainly
from latteflow.flows.plan import Planned, Tokens, cost, plan
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.describe.describe import write_range
from latteflow.tasks.ingest.embed import embed
from latteflow.tasks.ingest.shard import shard
from latteflow.tasks.report.preview import preview

pytestmark = pytest.mark.slow

COUNT = 18
HOSTILE = "<script>pwned=1</script><img src=x onerror=pwned=2> \u202egpj.exe \u200b" + "word " * 2000


@pytest.fixture
def server() -> Iterator[ChatServer]:
    found = ChatServer()
    yield found
    found.close()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """A folder with pictures, shards and features."""
    folder = tmp_path_factory.mktemp("embedded")
    draw_folder(folder / "train", COUNT)
    domain = load(folder, tiny_clip, "http://127.0.0.1:1/v1")
    embed(domain, shard(domain, "train"))
    return folder


def load(folder: Path, tiny_clip: Path, url: str, prices: str = "{}") -> Domain:
    path = folder / "domain.yaml"
    path.write_text(
        "name: shapes\nsource: train\nclasses: [red, green, blue]\n"
        f"clip: {{model: {tiny_clip}, resize: pad, centre: false}}\n"
        f"describer: {{kind: openai, model: m, url: {url}, patience_s: 1}}\nprices: {prices}\nshard: {{images: 5}}\n"
        f"store: store\noutput: {folder}/runs\nlatteclip: {{epochs: 1}}\nseeds: [0]\n"
    )
    return Domain.load(path)


@pytest.fixture
def folder(embedded: Path, tmp_path: Path) -> Path:
    shutil.copytree(embedded, tmp_path, dirs_exist_ok=True)
    return tmp_path


def texts(planned: list[Planned]) -> dict[str, Planned]:
    return {each.label: each for each in planned if each.unit == "texts"}


def test_a_preview_shows_questions_and_answers_and_is_paid_once(
    folder: Path, tiny_clip: Path, server: ChatServer
) -> None:
    domain = load(folder, tiny_clip, server.url)
    shards = shard(domain, "train")
    page = preview(domain, shards, embed(domain, shards), count=4).read_text()
    assert page.count('class="shown"') == 4 and page.count('class="member"') == 16
    classes = {line.split("CLIP sees: <bdi>")[1] for line in page.splitlines() if "CLIP sees" in line}
    asked = len(server.asked)
    assert asked == 4 + 4 + 2 * len(classes)  # images, groups, and two questions about each class
    assert page.count("about: Describe the main subject") == 4
    preview(domain, shards, embed(domain, shards), count=4)
    assert len(server.asked) == asked
    run_plainly(domain)
    assert len(server.asked) == COUNT + COUNT + 2 * 3


@pytest.mark.parametrize("describer", ["kind: tags", "kind: sidecar, texts: texts.csv"])
def test_a_preview_without_questions_says_who_wrote_the_texts(folder: Path, tiny_clip: Path, describer: str) -> None:
    file = folder / "domain.yaml"
    load(folder, tiny_clip, "http://127.0.0.1:1/v1")
    file.write_text(re.sub("describer: .*", f"describer: {{{describer}}}", file.read_text()))
    (folder / "texts.csv").write_text("path,text\ntrain/000.png,a red shape\n")
    domain = Domain.load(file)
    shards = shard(domain, "train")
    page = preview(domain, shards, embed(domain, shards), count=3).read_text()
    name = describer.split(",")[0].removeprefix("kind: ")
    assert f"Texts by <bdi>{name}</bdi>; no language model is asked." in page
    assert "3 images, and their texts" in page and "no questions" not in page


def test_hostile_answers_are_text(folder: Path, tiny_clip: Path, server: ChatServer) -> None:
    def script(ask: Ask) -> Reply:
        return answer(HOSTILE) if ask.images else Reply({"error": {"message": HOSTILE}}, 400)

    server.script = script
    domain = load(folder, tiny_clip, server.url)
    shards = shard(domain, "train")
    page = preview(domain, shards, embed(domain, shards)).read_text()

    class Tags(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found.append(tag)
            assert not [name for name, _ in attrs if name.startswith("on")]

    parser = Tags()
    parser.found = []
    parser.feed(page)
    assert parser.found.count("script") == 1
    assert "\u202e" not in page and "\u200b" not in page and "[U+202E]" in page
    assert "no text: " in page and len(page) < 200_000


def test_a_plan_reckons_with_estimates_and_then_with_what_was_measured(
    folder: Path, tiny_clip: Path, server: ChatServer
) -> None:
    domain = load(folder, tiny_clip, server.url)
    assert all(each.tokens is None for each in texts(plan(domain)).values())
    assert "tokens: unknown; `latteflow preview`" in console.totals(domain, plan(domain))
    assert "cost: unknown" in console.totals(domain, plan(domain))

    prices = (
        "{million_prompt_tokens: 2, million_output_tokens: 10, gpu_hour: 3.6, prompt_tokens: 1000, texts_per_second: 2}"
    )
    domain = load(folder, tiny_clip, server.url, prices)
    planned = plan(domain)
    each = texts(planned)
    assert each["describe"].work == each["group"].work == COUNT
    assert each["describe"].tokens == Tokens(COUNT * 1000, COUNT * 77)  # as long as an answer may be
    assert each["describe"].seconds == COUNT / 2
    expected = 2 * COUNT * (1000 * 2 / 1e6 + 77 * 10 / 1e6 + 3.6 / 3600 / 2)
    assert cost(domain, planned) == pytest.approx(expected)
    said = console.totals(domain, planned)
    assert f"cost: about {expected:.3g} USD ({1000 * expected / COUNT:.3g} for 1,000 images)" in said

    shards = shard(domain, "train")
    preview(domain, shards, embed(domain, shards), count=6)
    each = texts(plan(domain))
    assert each["describe"].work == COUNT - 6
    assert each["describe"].tokens == Tokens((COUNT - 6) * 11, (COUNT - 6) * 5)  # what the server counts
    run_plainly(domain)
    assert cost(domain, plan(domain)) is None and "nothing to do" in console.totals(domain, plan(domain))


def test_ranges_of_shards_together_are_all_texts(folder: Path, tiny_clip: Path, server: ChatServer) -> None:
    domain = load(folder, tiny_clip, server.url)
    shards = shard(domain, "train")
    features = embed(domain, shards)
    found = [write_range(domain, shards, features, first, first + 2) for first in (0, 2)]
    assert [each["class"] for each in found] == [6, 0]
    assert sum(each["image"] for each in found) == sum(each["group"] for each in found) == COUNT
    assert len(server.asked) == 2 * COUNT + 6
    write_range(domain, shards, features)
    server.close()  # what waited needs no model
    run_plainly(domain)
    assert len(server.asked) == 2 * COUNT + 6
