"""The domain file: every mistake said at once, with its line and what was probably meant."""

from dataclasses import replace
from pathlib import Path

import pytest

from latteflow.models.errors import ModelError
from latteflow.models.methods.latteclip import LatteClipSettings
from latteflow.models.methods.method import Section
from latteflow.models.methods.registry import METHODS
from latteflow.tasks.core.domain import Domain, _section_of
from latteflow.tasks.core.errors import ConfigError

GOOD = """\
name: birds
source: images
classes: [robin, wren]
"""


def load(tmp_path: Path, text: str) -> Domain:
    (tmp_path / "domain.yaml").write_text(text, encoding="utf-8")
    return Domain.load(tmp_path / "domain.yaml")


def test_three_lines_are_enough(tmp_path: Path) -> None:
    domain = load(tmp_path, GOOD)
    assert domain.source == [str(tmp_path / "images")]
    assert domain.clip.model == "embedded"
    assert domain.prompts() == [["a photo of a robin."], ["a photo of a wren."]]


@pytest.mark.parametrize("name", ["store", "general"])
def test_a_section_of_a_package_takes_no_name_of_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {name: Section(LatteClipSettings)}
    monkeypatch.setitem(METHODS, "medoids", replace(METHODS["latteclip"], name="medoids", sections=section))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=f"method medoids: its section cannot be called '{name}'"):
        _section_of(name, LatteClipSettings)


def test_a_home_that_nobody_has_is_a_folder_of_that_name(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD.replace("images", "~nobody.here/a")).source == [str(tmp_path / "~nobody.here/a")]


@pytest.mark.parametrize("path", sorted(Path("domains").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_domains_are_valid(path: Path) -> None:
    assert Domain.load(path).name == path.stem


def test_all_mistakes_come_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            tmp_path,
            """\
name: Birds of prey
sorce: images
classes: [robin, Robin, wren]
clip:
  modle: ViT-B-32
  resize: padd
method: lattecllip
group: {size: 1}
""",
        )
    message = str(caught.value)
    for line in (
        "line 1: `name`",
        "line 2: `sorce` unknown key; did you mean `source`?",
        "line 5: `clip.modle` unknown key; did you mean `model`?",
        "line 6: `clip.resize` 'padd' is none of 'crop' or 'pad'; did you mean pad?",
        "line 7: `method.0` 'lattecllip' is none of 'latteclip', ",
        "; did you mean latteclip?",
        "line 8: `group.size` Input should be greater than or equal to 2 (found 1)",
        "`source` is missing",
    ):
        assert line in message, message


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("[robin]", "1 given, at least 2"),
        ("[robin, Robin]", "'robin', 'Robin' say the same thing"),
        ("[tree_frog, tree frog]", "say the same thing"),
        ("[robin, ' ']", "number 2 is empty"),
        ("[robin, 7]", "line 3: `classes.1` 7 is not text; put it in quotes"),
        ("classes.txt", "class list cannot be read"),
    ],
)
def test_a_bad_class_list(tmp_path: Path, classes: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"name: birds\nsource: images\nclasses: {classes}\n")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes:\n  - robin\n  - Robin\n", "line 3: `classes`: 'robin', 'Robin' say the same thing"),
        ("classes: [\n  robin]\n", "line 3: `classes`: 1 given"),
        ("classes: names.txt\n", "line 3: `classes: names.txt`: the class list cannot be read"),
        ("classes: [a, b]\ntemplates:\n  - a photo\n", "line 4: `templates`: 'a photo' needs"),
        ("classes: [a, b]\nmethod:\n  - latteclip\n  - latteclip\n", "line 4: `method`: latteclip is named more"),
        (
            "classes: [a, b]\nevaluation:\n  labels: l\n  general:\n    source: s\n    labels: l\n    classes: [x, X]",
            "line 9: `evaluation.general.classes`: 'x', 'X' say",
        ),
        (
            "classes: [a, b]\nmethod: [transduction]\nlatteclip:\n  texts_from: clamp\n",
            "line 6: `latteclip.texts_from: clamp`: no method reads texts",
        ),
        (
            "classes: [a, b]\npairs:\n  describer:\n    {kind: vllm, model: a,\n     prompts: cars}\n",
            "line 7: `pairs.describer.prompts`: prompt pack 'cars'",
        ),
    ],
)
def test_a_mistake_is_told_with_the_line_of_its_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"name: birds\nsource: images\n{text}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("steps", "unknown key; known are train, "),
        ("batch", "unknown key; did you mean `batch_size`?"),
        ("epoch", "unknown key; did you mean `epochs`?"),
    ],
)
def test_only_a_name_that_is_near_is_suggested(tmp_path: Path, key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD + f"latteclip: {{{key}: 3}}\n")
    assert f"`latteclip.{key}` {said}" in str(caught.value)


def test_odd_class_names_are_fine(tmp_path: Path) -> None:
    domain = load(tmp_path, "name: x\nsource: i\nclasses: [km/h sign, no, 'yes', späti, 自転車, 'a{}b']\n")
    assert domain.classes == ["km/h sign", "no", "yes", "späti", "自転車", "a{}b"]
    assert domain.prompts()[5] == ["a photo of a a{}b."]


def test_a_class_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeffrobin\n\n wren \n", encoding="utf-8")
    assert load(tmp_path, "name: x\nsource: i\nclasses: names.txt\n").classes == ["robin", "wren"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "not valid YAML"),
        ("name: a\nname: b\n", "not valid YAML"),
        ("- a\n", "expected `name:`"),
        (GOOD + "templates: a photo\n", "needs exactly one {}"),
        (GOOD + "describer: {kind: sidecar}\n", "line 4: `describer.texts` is missing"),
        (GOOD + "describer: {kind: vlm}\n", "`describer.kind` 'vlm' is none of tags, sidecar, vllm, openai; did you"),
        (GOOD + "pairs: {describer: {kind: tags}}\n", "`pairs.describer.kind` 'tags' is none of vllm, openai"),
        (GOOD + "describer: {kind: vllm, modle: a}\n", "did you mean `model`?"),
        (
            GOOD + "describer: {kind: vllm, model: a, prompts: cars}\n",
            "prompt pack 'cars': known are base, caltech101, ",
        ),
        (GOOD + "describer: {kind: openai, model: a, url: localhost}\n", "`describer.url`"),
        (GOOD + "group: {size: 9, view: images}\ndescriber: {kind: vllm, model: a}\n", "`describer.max_images`"),
        (GOOD + "describer: {kind: tags, texts: x.csv}\n", "goes with `kind: sidecar`"),
        (GOOD + "seeds: []\n", "`seeds`"),
    ],
)
def test_other_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "birds.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"did you mean .*birds\.yaml"):
        Domain.load(tmp_path / "bird.yaml")


def test_urls_and_parameters_pass_unchanged(tmp_path: Path) -> None:
    domain = load(tmp_path, "name: x\nsource: ['s3://bucket/a', local]\nclasses: [a, b]\nstore: s3://bucket/store\n")
    assert domain.source == ["s3://bucket/a", str(tmp_path / "local")]
    assert domain.store == "s3://bucket/store"
    assert Domain.model_validate(domain.model_dump(mode="json")) == domain


def test_a_prompt_pack_is_looked_for_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "own.yaml").write_text("name: own\nversion: 1\nimage: What?\ngroup: All?\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    domain = load(tmp_path, GOOD + "describer: {kind: vllm, model: a, prompts: packs/own.yaml}\n")
    assert domain.prompt_pack is not None and domain.prompt_pack.image == ("What?",)


def test_the_default_method_can_do_what_is_asked() -> None:
    asked = {"name": "x", "source": "a", "classes": ["a", "b"]}
    assert Domain.model_validate(asked).method == ["latteclip_plus"]
    assert Domain.model_validate({**asked, "latteclip": {"train": "all"}}).method == ["latteclip"]
    assert Domain.model_validate({**asked, "latteclip": {"train": "prototypes"}}).method == ["latteclip_plus"]
