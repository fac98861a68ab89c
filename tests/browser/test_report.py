"""The report in a real browser: runs nothing from outside, asks for nothing, works by hand and by key."""

import base64
import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latteflow.tasks.report.page import html, render
from latteflow.tasks.report.preview import Answered, Row
from latteflow.tasks.report.rank import Place, Ranked

spec = importlib.util.spec_from_file_location(
    "report_data", Path(__file__).parents[1] / "tasks" / "report" / "test_page.py"
)
assert spec and spec.loader
data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(data)


def hostile_preview() -> str:
    """A preview whose every text means harm."""
    harm = f"{data.SCRIPT}</script></style>{data.ATTRIBUTE} \u202egpj.exe\u200b {'wide' * 2500}"
    pixel = "data:image/png;base64," + base64.b64encode(data.picture(random.Random(0))).decode()
    answers = [Answered(kind, harm, harm, (harm,), detail, (1, 2)) for kind in ("image", "group", "class")
               for detail in ("", harm)]  # fmt: skip
    rows = [Row(harm, harm, pixel, (pixel,) * 4, tuple(answers))] * 2
    return html("preview.html.j2", domain=harm, rows=rows, describer=harm, pack=harm)


def hostile_ranking() -> str:
    """A page of `rank` whose every text means harm."""
    harm = f"{data.SCRIPT}</script></style>{data.ATTRIBUTE} \u202egpj.exe\u200b {'wide' * 2500}"
    pixel = "data:image/png;base64," + base64.b64encode(data.picture(random.Random(0))).decode()
    places = [Place(number, harm, -0.5, pixel) for number in range(1, 30)]
    ranked = Ranked(harm, harm, [harm], [harm], np.zeros(1))
    return html("rank.html.j2", domain=harm, ranked=ranked, rows={"Most": places, "Least": places}, count=29)


PREVIEW, RANKING = "hostile preview", "hostile ranking"


REPORTS = {
    "two methods": lambda: data.two_methods(data.make_report()),
    "labelled": lambda: data.make_report(),
    "few": lambda: data.make_report(3, 18, n_seen=18),
    "unlabelled": lambda: data.make_report(n_test=0),
    "twenty-eight": lambda: data.make_report(28, 1000),
    "many": lambda: data.make_report(100, 1000),
    "hostile": lambda: data.hostile_report(),
}


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reports")
    pages = {name: render(make()) for name, make in REPORTS.items()}
    pages |= {PREVIEW: hostile_preview(), RANKING: hostile_ranking()}
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in pages}


def background(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize("name", [*REPORTS, PREVIEW, RANKING])
def test_opens_without_a_request_or_a_complaint(open_tab: Any, urls: dict[str, str], name: str) -> None:
    tab = open_tab(urls[name])
    tab.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    tab.page.wait_for_load_state("networkidle")
    assert [url for url in tab.requests if not url.startswith("data:")] == [urls[name]]
    assert tab.complaints == []
    assert tab.page.locator("h1").is_visible()
    assert tab.page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_hostile_text_is_read_not_run(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["hostile"]).page
    assert page.evaluate("window.pwned") is None
    assert page.locator("script").count() == 1 and page.locator("img[onerror]").count() == 0
    assert data.SCRIPT in page.locator(".eyebrow").inner_text()
    assert "holiday[U+202E]gpj.exe" in page.locator("h1").inner_text()


def test_a_hostile_preview_is_read_not_run(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls[PREVIEW]).page
    assert page.evaluate("window.pwned") is None
    assert page.locator("script").count() == 1 and page.locator("img[onerror]").count() == 0
    said = page.locator("dd .text").first.inner_text()
    assert data.SCRIPT in said and "[U+202E]gpj.exe[U+200B]" in said


@pytest.mark.parametrize("width", [360, 1280])
def test_a_hostile_ranking_is_read_not_run_and_fits(open_tab: Any, urls: dict[str, str], width: int) -> None:
    page = open_tab(urls[RANKING], viewport={"width": width, "height": 800}).page
    assert page.evaluate("window.pwned") is None
    assert page.locator("script").count() == 1 and page.locator("img[onerror]").count() == 0
    assert "[U+202E]gpj.exe[U+200B]" in page.locator("h1").inner_text()
    assert page.locator(".ranked img").count() == 58
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator(".ranked p").first.inner_text().startswith("1 · −0.500")


def test_policy_stops_a_script_that_got_in(open_tab: Any, urls: dict[str, str]) -> None:
    tab = open_tab(urls["labelled"])
    tab.page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.pwned = 3";
        document.body.append(script);
        const image = "<img src='https://example.invalid/x.png' onerror='window.pwned = 4'>";
        document.body.insertAdjacentHTML("beforeend", image);
    }""")
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate("window.pwned") is None
    assert tab.blocked == ["https://example.invalid/x.png csp"]
    assert any("Content Security Policy" in complaint for complaint in tab.complaints)


@pytest.mark.parametrize("name", [*REPORTS, PREVIEW])
@pytest.mark.parametrize("width", [320, 390, 820])
def test_never_wider_than_the_screen(open_tab: Any, urls: dict[str, str], name: str, width: int) -> None:
    page = open_tab(urls[name], viewport={"width": width, "height": 800}).page
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


MENU_CUT = """() => {
    const room = document.querySelector("nav").getBoundingClientRect();
    return [...document.querySelectorAll("nav a")].filter(link => {
        const box = link.getBoundingClientRect();
        return box.left < room.left - 9 || box.right > Math.min(room.right, innerWidth) || box.bottom > room.bottom + 1;
    }).map(link => link.textContent);
}"""


@pytest.mark.parametrize("width", [390, 900, 1400])
def test_every_section_stands_in_the_menu(open_tab: Any, urls: dict[str, str], width: int) -> None:
    window = {"width": width, "height": 900}
    page = open_tab(urls["labelled"], viewport=window, reduced_motion="reduce").page
    assert page.locator("nav a").count() == 17 and page.evaluate(MENU_CUT) == []
    page.locator("nav a", has_text="Confusion").click()
    title, top = (page.locator(each).bounding_box() for each in ("#confusion-title", ".top"))
    assert top["y"] + top["height"] < title["y"] < 200, "the heading is not under the menu"


@pytest.mark.parametrize(("name", "cells"), [("few", 9), ("labelled", 100), ("twenty-eight", 0)])
def test_a_confusion_matrix_is_whole_on_a_phone(open_tab: Any, urls: dict[str, str], name: str, cells: int) -> None:
    page = open_tab(urls[name], viewport={"width": 390, "height": 800}).page
    panel = page.locator("#confusion .panel-after")
    assert panel.locator("tbody td:visible").count() == cells
    for box in (panel.locator(".scroll" if cells else "figure"), panel.locator("table" if cells else "img")):
        assert box.evaluate("e => e.getBoundingClientRect().right <= innerWidth && e.scrollWidth <= e.clientWidth + 1")
    assert panel.locator("img:visible").count() == (0 if cells else 1)


def test_a_matrix_of_many_classes_has_its_numbers_where_there_is_room(open_tab: Any, urls: dict[str, str]) -> None:
    panel = open_tab(urls["twenty-eight"], viewport={"width": 1400, "height": 900}).page.locator(".panel-after")
    assert panel.locator("tbody td:visible").count() == 28**2 and panel.locator("img:visible").count() == 0


@pytest.mark.parametrize("name", ["few", "labelled", "two methods", "twenty-eight"])
def test_a_phone_need_not_scroll_for_ever(open_tab: Any, urls: dict[str, str], name: str) -> None:
    page = open_tab(urls[name], viewport={"width": 390, "height": 800}).page
    assert page.evaluate("document.documentElement.scrollHeight") < 19_000  # with a wide font, as DejaVu
    cards = page.locator("#examples .cards").first
    assert cards.evaluate("row => row.scrollWidth > row.clientWidth && row.offsetHeight < 800")
    width = cards.locator(".card").first.evaluate("card => card.offsetWidth")
    assert 250 < width < 358


def test_a_map_of_few_images_has_a_frame_and_marks_to_see(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["few"], viewport={"width": 1400, "height": 900}).page
    assert page.locator("#atlas svg").evaluate("map => getComputedStyle(map).borderTopWidth") == "1px"
    sizes = page.locator("#atlas path:has(title)").evaluate_all("all => all.map(m => m.getBoundingClientRect().width)")
    assert min(sizes) > 9
    inside = """() => {
        const frame = document.querySelector("#atlas svg").getBoundingClientRect();
        return [...document.querySelectorAll("#atlas path:has(title)")].every(mark => {
            const box = mark.getBoundingClientRect();
            return box.left > frame.left && box.right < frame.right && box.top > frame.top && box.bottom < frame.bottom;
        });
    }"""
    assert page.evaluate(inside)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate(inside) and page.locator("#atlas svg").evaluate("e => e.getBoundingClientRect().right") <= 390


def test_the_headline_says_first_that_these_images_are_known(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["few"]).page
    assert page.locator(".verdict").inner_text().startswith("On the images it was adapted to: ")
    note = page.locator(".verdict + .note")
    assert note.inner_text() == (
        "Mind that the 18 labelled images are those that the models were adapted to; of new ones nothing is known."
    )
    assert page.locator(".verdict + .note").count() == 1 and page.get_by_text("Top-5", exact=True).count() == 0


def test_phone_plots_do_not_cover_the_numbers(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["labelled"], viewport={"width": 390, "height": 800}).page
    covered = page.evaluate("""() => [...document.querySelectorAll("tbody .plot-cell")].filter(cell => {
        const top = cell.querySelector("svg").getBoundingClientRect().top;
        return [...cell.parentElement.children].some(other => {
            if (other === cell) return false;
            const range = document.createRange();
            range.selectNodeContents(other);
            return range.getBoundingClientRect().bottom > top;
        });
    }).length""")
    assert covered == 0


def test_theme_follows_the_system_until_someone_chooses(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["labelled"]).page
    button = page.locator("#theme")
    light = background(page)
    assert button.inner_text() == "Dark", "what a click brings"
    page.emulate_media(color_scheme="dark")
    from playwright.sync_api import expect

    expect(button).to_have_text("Light")  # looked at from outside: the page's policy lets no waiting script in
    dark = background(page)
    assert dark != light
    button.click()
    assert background(page) == light and button.inner_text() == "Dark"
    page.reload()
    assert background(page) == light, "the choice is kept"
    button.focus()
    page.keyboard.press("Enter")
    assert background(page) == dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_take_the_colours_of_the_theme(open_tab: Any, urls: dict[str, str], scheme: str) -> None:
    page = open_tab(urls["labelled"], color_scheme=scheme).page
    accent = page.evaluate("getComputedStyle(document.querySelector('.chart .stroke-accent')).stroke")
    text = page.evaluate("getComputedStyle(document.querySelector('.chart text')).fill")
    assert accent == {"light": "rgb(28, 105, 173)", "dark": "rgb(114, 180, 238)"}[scheme]
    assert text == {"light": "rgb(106, 97, 88)", "dark": "rgb(168, 158, 146)"}[scheme]


def test_by_key_alone(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["labelled"]).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0, "hidden without focus only"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "summary"
    page.locator("#matrix-after").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".panel-before").is_visible() and not page.locator(".panel-after").is_visible()
    summary = page.locator("details.text summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("details.text").first.get_attribute("open") is not None
    assert page.locator("details.text p bdi").first.is_visible()


def shown(page: Any) -> list[str]:
    """The paths of the cards of texts that can be seen."""
    return [each.inner_text() for each in page.locator("#captions .card:visible .path").all()]


def test_look_through_the_texts(open_tab: Any, urls: dict[str, str]) -> None:
    tab = open_tab(urls["labelled"])
    page = tab.page
    output, more = page.locator("#texts output"), page.locator("#more")
    assert output.inner_text() == "30 of 30" and shown(page) == [f"incoming/{i}.png" for i in range(12)]
    assert more.inner_text() == "Show 12 more"
    more.focus()
    page.keyboard.press("Enter")
    assert len(shown(page)) == 24 and more.inner_text() == "Show 6 more"
    assert page.evaluate("document.activeElement.querySelector('.path').textContent") == "incoming/12.png"
    more.click()
    assert len(shown(page)) == 30 and more.is_hidden()
    page.locator("[data-by=flags]").select_option("refusal")
    assert output.inner_text() == "10 of 30" and shown(page) == [f"incoming/{i}.png" for i in range(0, 30, 3)]
    page.locator("[data-by=label]").select_option("dress")
    assert shown(page) == [f"incoming/{i}.png" for i in (3,)]
    page.locator("[data-by=flags]").select_option("any")
    assert shown(page) == [f"incoming/{i}.png" for i in (3, 13, 23)]
    page.locator("[data-by=kind]").select_option("group")
    assert shown(page) == [f"incoming/{i}.png" for i in (13,)]
    page.locator("[data-by=kind]").select_option("any")
    page.locator("[data-by=state]").select_option("used")
    assert shown(page) == [f"incoming/{i}.png" for i in (13, 23)]
    page.get_by_role("searchbox", name="Search").fill("  NUMBER 23 ")
    assert shown(page) == ["incoming/23.png"] and output.inner_text() == "1 of 30"
    page.get_by_role("searchbox", name="Search").fill("no such text")
    assert shown(page) == [] and output.inner_text() == "0 of 30" and more.is_hidden()
    for name in ("flags", "label", "state"):
        page.locator(f"[data-by={name}]").select_option("")
    page.get_by_role("searchbox", name="Search").fill("")
    assert len(shown(page)) == 12 and tab.complaints == []


def test_hostile_texts_are_looked_through_like_others(open_tab: Any, urls: dict[str, str]) -> None:
    tab = open_tab(urls["hostile"])
    page = tab.page
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    cards = page.locator("#captions .card")
    assert cards.count() == 9 and all(card.is_visible() for card in cards.all())
    first = cards.first.inner_text()
    for text in (data.SCRIPT, data.ATTRIBUTE, data.TEMPLATE, "holiday[U+202E]gpj.exe", "pass[U+200B]word"):
        assert text in first
    assert "8,000 more characters are in the store." in first and "longlong" in first
    assert len(cards.first.locator(".text p bdi").last.inner_text()) <= 2001
    assert page.locator("#captions script, #captions img:not([src^='data:']), #captions [onerror]").count() == 0
    page.get_by_role("searchbox", name="Search").fill("</script>")
    assert len(shown(page)) == 9
    for name in ("flags", "label"):
        select = page.locator(f"[data-by={name}]")
        for value in [option.get_attribute("value") for option in select.locator("option").all()]:
            select.select_option(value)
            assert shown(page) != []
        select.select_option("")
    page.get_by_role("searchbox", name="Search").fill("<img src=x onerror='window.pwned = 2'>")
    assert page.evaluate("window.pwned") is None and tab.complaints == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [urls["hostile"]]


def test_choose_a_method(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["two methods"]).page
    shown = lambda: [block.get_attribute("data-method") for block in page.locator("[data-method]:visible").all()]  # noqa: E731
    assert shown() == ["0", "0"]
    page.locator("#confusion [data-choose]").select_option("CLAMP")
    assert shown() == ["1", "1"] and page.locator("#classes [data-choose]").input_value() == "1"
    page.locator("label[for='1-matrix-change']").click()
    assert page.locator("#confusion .panel-change:visible").count() == 1
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert shown() == ["0", "1", "0", "1"]
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert shown() == ["1", "1"]


def test_the_map_says_what_its_marks_are(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["labelled"]).page
    said = page.locator("#atlas path title").all_text_contents()
    assert len(said) == 50 and "prototype of dress" in said and "gain 3" in said
    assert page.locator("#atlas svg").get_attribute("role") == "img"


def test_find_a_class(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["many"]).page
    page.locator("#classes details.all > summary").click()
    page.locator("#classes input[type=search]").fill("Species 04")
    rows = page.locator("#accuracy-all tbody tr")
    assert sum(rows.nth(i).is_visible() for i in range(rows.count())) == 10
    assert page.locator("#classes output").inner_text() == "10 of 100"


def test_without_script_everything_is_there(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["many"], java_script_enabled=False).page
    assert page.locator("#theme").is_hidden() and page.locator(".filter").first.is_hidden()
    assert page.locator("#captions .card:visible").count() == 30 and page.locator("#more").is_hidden()
    assert page.locator(".verdict").is_visible() and page.locator("#scatter-title").count() == 1
    page.locator("label[for=matrix-change]").click()
    assert page.locator(".panel-change").is_visible()


def test_prints_light_and_whole(open_tab: Any, urls: dict[str, str]) -> None:
    page = open_tab(urls["labelled"], color_scheme="dark").page
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("details:not([open])").count() == 0
    assert all(page.locator(f".panel-{view}").is_visible() for view in ("after", "before", "change"))
    assert page.locator("nav").is_hidden()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
