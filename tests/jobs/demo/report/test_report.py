"""The report: one page that holds what it shows, escapes what it quotes, and says when a goal is missed."""

import json
from html.parser import HTMLParser

import pytest

from jobs.demo.report.funnel import statuses, steps
from jobs.demo.report.numbers import Demo
from jobs.demo.report.report import Outcome, write_report_of
from jobs.demo.report.report_pictures import image_sheets, prompt_sheets
from tests.jobs.demo.demo_run import DATABASE, HOSTILE, PROMPTS, STYLES, K, write_demo
from tests.trainer.tiny_run import write_clip


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, wanted: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == wanted]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    return write_demo(folder / "run", write_clip(folder / "clip"))


@pytest.fixture(scope="module")
def outcome(demo: Demo) -> Outcome:
    return write_report_of(demo)


@pytest.fixture(scope="module")
def page(outcome: Outcome) -> Page:
    return Page(outcome.path.read_text())


def test_the_numbers_stand_flat_under_their_names(demo: Demo, outcome: Outcome) -> None:
    numbers = json.loads((outcome.path.parent / "report.json").read_text())
    assert numbers["filter_rows_unaccounted"] == 0
    assert numbers["download_urls_without_status"] == 0
    assert numbers["neighbor_leaks"] == 0
    assert 0 <= numbers["text_recall_at_10"] <= 1
    assert numbers["style_accuracy_retrieval"] == 0.9
    assert numbers["seconds"]["train"] == 1.5
    flat = [name for name, value in numbers.items() if isinstance(value, dict | list)]
    assert sorted(flat) == ["goals", "seconds"]


def test_the_page_asks_nothing_of_the_network(page: Page) -> None:
    assert not [tag for tag in ("script", "link", "iframe", "object", "base") if page.all(tag)]
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_hostile_captions_are_shown_as_the_text_they_are(outcome: Outcome, page: Page) -> None:
    assert "<script" not in outcome.path.read_text()
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert any(image["alt"] == HOSTILE for image in page.all("img"))


def test_every_picture_has_words(page: Page) -> None:
    images = page.all("img")
    assert len(images) == len(PROMPTS) * len(STYLES) + len(PROMPTS) * (1 + K) + 4 * (1 + K)
    assert all(image["alt"] for image in images)


def test_the_page_names_styles_prompts_and_reasons(page: Page) -> None:
    for words in (*STYLES, *PROMPTS, "not_found", "bad_url"):
        assert words in page.text


def test_the_prompt_stands_among_the_neighbors_only_if_the_network_got_it(demo: Demo, page: Page) -> None:
    assert page.text.count("the prompt itself") == len(PROMPTS)
    place = "runs/tiny/sample/deep_red/0000-00.json"
    before = demo.root.read_json(place)
    demo.root.write_json(place, before | {"mode": "neighbors"})
    assert not prompt_sheets(demo, 1)[0].told
    demo.root.write_json(place, before)
    assert prompt_sheets(demo, 1)[0].told


def test_a_missed_goal_is_told_on_the_page_and_to_the_caller(demo: Demo, outcome: Outcome) -> None:
    place = "runs/tiny/evaluate/evaluation.json"
    before = demo.root.read_json(place)
    demo.root.write_json(place, before | {"style_accuracy_retrieval": 0.3})
    missed = write_report_of(demo)
    demo.root.write_json(place, before)
    assert not missed.met
    assert {goal.name for goal in missed.goals if not goal.met} - {
        goal.name for goal in outcome.goals if not goal.met
    } == {"style_accuracy_retrieval"}
    marks = [one for one in Page(missed.path.read_text()).all("span") if one.get("aria-label") == "missed"]
    assert len(marks) == sum(not goal.met for goal in missed.goals)


def test_the_funnel_counts_the_rows_of_the_tables(demo: Demo) -> None:
    filtered, downloaded, embedded, joined = steps(demo.root)
    assert (filtered.train, filtered.database, filtered.reasons) == (6, 5, (("bad_url", 1),))
    assert (downloaded.train, downloaded.database, downloaded.reasons) == (5, 5, (("not_found", 1),))
    assert (embedded.train, embedded.database, embedded.lost) == (5, 5, 0)
    assert (joined.train, joined.database) == (5, len(DATABASE))
    assert [(one.word, one.train, one.database) for one in statuses(demo.root)] == [
        ("stored", 5, 5),
        ("not_found", 1, 0),
    ]


def test_a_sheet_shows_the_neighbors_of_the_table_in_their_order(demo: Demo) -> None:
    for sheet in image_sheets(demo, 5):
        similarities = [one.similarity for one in sheet.neighbors]
        assert len(similarities) == K
        assert similarities == sorted(similarities, reverse=True)
        assert all("/d" in one.url for one in sheet.neighbors)
        assert "/t" in sheet.picture.url
