"""What nights came to: kept in order, told with their gaps, harmless as a page."""

from dataclasses import replace
from pathlib import Path

from latteflow.storage.artifacts import ArtifactStore
from latteflow.storage.objects import ObjectStore
from latteflow.tasks.core.domain import Domain
from latteflow.tasks.ship.nights import Night, missed, nights, remember, write_page

FIRST = Night("2027-03-27T01:30:02+00:00", "Promoted", "better", 12.0, images=300, new=300, made=("tune",), champion=1)
SUMMER = replace(FIRST, at="2027-03-28T00:30:01+00:00", state="Unchanged", new=0, made=())


def test_nights_are_kept_in_their_order_and_only_the_newest_are_read(tmp_path: Path) -> None:
    store = ArtifactStore(ObjectStore(str(tmp_path)))
    assert nights(store, "birds") == []
    for night in (FIRST, SUMMER):
        remember(store, "birds", night)
    assert nights(store, "birds") == [FIRST, SUMMER]
    assert nights(store, "birds", newest=1) == [SUMMER]


def test_nights_without_a_word_are_counted_and_a_change_of_the_clock_is_none() -> None:
    late = replace(FIRST, at="2027-03-31T06:45:00+00:00")  # two were silent, and this one was late
    twice = replace(late, at="2027-03-31T09:00:00+00:00")
    assert missed([FIRST, SUMMER, late, twice]) == [0, 0, 2, 0]
    assert missed([]) == []


def test_the_page_tells_gaps_and_nothing_in_it_is_run(domain: Domain, tmp_path: Path) -> None:
    bad = replace(FIRST, at="2027-03-30T00:30:01+00:00", state="Failed", why="<script>alert(1)</script>")
    page = write_page(domain, [FIRST, SUMMER, bad], tmp_path / "nights.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "no word of 1 before it" in page
    assert page.index("2027-03-30 00:30") < page.index("2027-03-28 00:30")
