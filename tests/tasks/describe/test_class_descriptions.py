"""Zero-shot with what a language model says of the classes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from chatserver import Ask, ChatServer, Reply, answer
from latteflow.flows.pipeline import run_plainly
from latteflow.models.texts.screening import describes_class
from latteflow.models.towers import clip
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.core.errors import ConfigError
from latteflow.tasks.core.stage import open_store
from latteflow.tasks.tune.models import read_tuned

SAID = {
    "red": "its colour is that of ripe tomatoes and fire engines",
    "green": "#include <iostream> int main() { return 0; }",
    "blue": "sky",
}


def about(ask: Ask) -> Reply:
    """A caption for pictures, and an answer for each class."""
    if ask.images:
        return answer("a shape in the middle of a white picture")
    return answer(next(text for name, text in SAID.items() if f"a {name}" in ask.prompt))


@pytest.fixture
def described(domain: Domain, tmp_path: Path) -> Iterator[Domain]:
    server = ChatServer()
    server.script = about
    file = tmp_path / "domain.yaml"
    text = file.read_text().replace(
        "{kind: sidecar, texts: texts.csv}", f"{{kind: openai, url: '{server.url}', model: m}}"
    )
    file.write_text(text.replace("method: [latteclip]", "method: [class_descriptions]"))
    yield Domain.load(file)
    server.close()


@pytest.mark.slow
def test_a_description_stands_behind_its_class_sentence_unless_it_is_none(described: Domain) -> None:
    results = {each.label: each for each in run_plainly(described)}
    model = clip.load(described.clip)
    expected = model.text_features([f"a red shape. {SAID['red']}", "a green shape.", "a blue shape."])
    tuned = read_tuned(open_store(described).open(results["tune"].ref), "class_descriptions", None)
    np.testing.assert_allclose(tuned.prototypes, expected, atol=1e-6)
    assert results["select"].counts["models"] == 1
    page = (Path(described.output) / "shapes" / "report.html").read_text()
    assert "zero-shot with class descriptions" in page


def test_it_needs_answers_about_classes(tmp_path: Path) -> None:
    (tmp_path / "domain.yaml").write_text("name: x\nsource: a\nclasses: [a, b]\nmethod: class_descriptions\n")
    with pytest.raises(ConfigError, match="class_descriptions needs a language model that is asked about classes"):
        Domain.load(tmp_path / "domain.yaml")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (SAID["red"], True),
        ("a long, thin fish with silver sides; it has a forked tail.", True),
        ("ein kleiner Vogel mit rotem Bauch", True),
        (SAID["green"], False),
        ("std::cout << a long and thin fish", False),
        ("sky", False),
        ("", False),
        ("I'm sorry, but I cannot describe that.", False),
        (12 * "red ", False),
    ],
)
def test_what_is_a_description(text: str, is_one: bool) -> None:
    assert describes_class(text) == is_one
