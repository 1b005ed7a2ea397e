"""The report: one page with embedded pictures and escaped text that lists missed goals."""

import json
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.demo.report.funnel import statuses, steps
from jobs.demo.report.numbers import Demo
from jobs.demo.report.report import WrittenReport, write_report
from jobs.demo.report.report_pictures import samples, training_images
from retrieval.clip.encoder import Encoder
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

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    return write_demo(folder / "run", write_clip(folder / "clip"))


@pytest.fixture(scope="module")
def report(demo: Demo) -> WrittenReport:
    return write_report(demo)


@pytest.fixture(scope="module")
def page(report: WrittenReport) -> Page:
    return Page(report.path.read_text())


def test_the_json_has_every_number_under_its_name(demo: Demo, report: WrittenReport) -> None:
    numbers = json.loads((report.path.parent / "report.json").read_text())
    assert numbers["filter_rows_unaccounted"] == 0
    assert numbers["download_urls_without_status"] == 0
    assert numbers["neighbor_leaks"] == 0
    for k in (1, 5, 10):
        assert numbers[f"text_recall_at_{k}"] == pytest.approx(sorted_recall(demo, k))
    assert (numbers["style_accuracy_retrieval"], numbers["style_accuracy_retrieval_low"]) == (0.9, 0.85)
    assert numbers["style_gain_over_suffix_retrieval"] == pytest.approx(0.6)
    assert numbers["seconds"]["train"] == 1.5
    nested = [name for name, value in numbers.items() if isinstance(value, dict | list)]
    assert sorted(nested) == ["goals", "seconds"]


def sorted_recall(demo: Demo, k: int) -> float:
    """Text-to-image recall on the held-out pictures, by sorting the similarities of each caption."""
    with demo.world.open("held_out.parquet") as file:
        gallery = pq.read_table(file).to_pydict()
    encoder = Encoder(demo.clip)
    folder = demo.world.local_path("")
    images = encoder.encode_images([Image.open(folder / path).convert("RGB") for path in gallery["path"]])
    best = np.argsort(-encoder.encode_texts(gallery["caption"]) @ images.T, axis=1)[:, :k]
    return float(np.mean([row in best[row] for row in range(len(best))]))


def test_the_page_loads_nothing_from_the_network(page: Page) -> None:
    assert not [tag for tag in ("script", "link", "iframe", "object", "base") if page.all(tag)]
    assert all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert all((link["href"] or "").startswith("#") for link in page.all("a"))
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_html_in_captions_is_escaped(report: WrittenReport, page: Page) -> None:
    assert "<script" not in report.path.read_text()
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert any(image["alt"] == HOSTILE for image in page.all("img"))


def test_every_picture_has_an_alternative_text(page: Page) -> None:
    images = page.all("img")
    assert len(images) == len(PROMPTS) * len(STYLES) + len(PROMPTS) * (1 + K) + 4 * (1 + K)
    assert all(image["alt"] for image in images)


def test_the_page_lists_styles_prompts_and_reasons(page: Page) -> None:
    for words in (*STYLES, *PROMPTS, "not_found", "bad_url"):
        assert words in page.text


def test_the_prompt_is_shown_among_the_neighbors_only_if_it_is_in_the_context(demo: Demo, page: Page) -> None:
    assert page.text.count("the prompt itself") == len(PROMPTS)
    path = "runs/tiny/sample/deep_red/0000-00.json"
    before = demo.root.read_json(path)
    demo.root.write_json(path, before | {"mode": "neighbors"})
    assert not samples(demo, 1)[0].prompt_in_context
    demo.root.write_json(path, before)
    assert samples(demo, 1)[0].prompt_in_context


def test_a_missed_goal_is_on_the_page_and_in_the_result(demo: Demo, report: WrittenReport) -> None:
    path = "runs/tiny/evaluate/evaluation.json"
    before = demo.root.read_json(path)
    changed = demo.root.read_json(path)
    changed["modes"]["retrieval"]["accuracy"] = [0.3, 0.2, 0.4]
    demo.root.write_json(path, changed)
    missed = write_report(demo)
    demo.root.write_json(path, before)
    assert not missed.all_met
    assert {goal.name for goal in missed.goals if not goal.met} - {
        goal.name for goal in report.goals if not goal.met
    } == {"style_accuracy_retrieval"}
    marks = [span for span in Page(missed.path.read_text()).all("span") if span.get("aria-label") == "missed"]
    assert len(marks) == sum(not goal.met for goal in missed.goals)


def test_the_stronger_baseline_with_its_interval_comes_first(demo: Demo, report: WrittenReport) -> None:
    text = report.path.read_text()
    assert text.index("above the stronger of two baselines") < text.index("classified as the database’s style")
    assert "above 0" in text
    path = "runs/tiny/evaluate/evaluation.json"
    before = demo.root.read_json(path)
    changed = demo.root.read_json(path)
    changed["effect"]["suffix_retrieval"] = [0.01, -0.005, 0.03]
    demo.root.write_json(path, changed)
    text = write_report(demo).path.read_text()
    demo.root.write_json(path, before)
    assert "0.010 (-0.005 to 0.030), not distinguishable from 0" in text


def test_each_judge_has_its_own_stronger_baseline(demo: Demo) -> None:
    path = "runs/tiny/evaluate/evaluation.json"
    before, changed = demo.root.read_json(path), demo.root.read_json(path)
    changed["effect_pixels"]["suffix"] = [0.02, 0.01, 0.04]
    demo.root.write_json(path, changed)
    try:
        text = _text(demo)
    finally:
        demo.root.write_json(path, before)
    first = "larger accuracy, the style named in the prompt, with neighbors of the training database: 0.600"
    pixels = "By the judge on pixels, the stronger baseline is the style named in the prompt: 0.020 (0.010 to 0.040)"
    assert text.index(first) < text.index(pixels)


def test_the_page_states_which_pictures_the_style_descriptor_compares_with(demo: Demo) -> None:
    path = "runs/tiny/evaluate/evaluation.json"
    before, earlier = demo.root.read_json(path), demo.root.read_json(path)
    assert "compares with 200 real pictures that are in no database and did not train it" in _text(demo)
    del earlier["judges"]["descriptor"]["gallery_rows"]
    demo.root.write_json(path, earlier)
    try:
        assert "compares with the real pictures that trained it, which are in no database" in _text(demo)
    finally:
        demo.root.write_json(path, before)


def _text(demo: Demo) -> str:
    """The report with single spaces."""
    return " ".join(write_report(demo).path.read_text().split())


def test_an_evaluation_of_a_version_without_the_style_descriptor_is_reported(demo: Demo) -> None:
    path = "runs/tiny/evaluate/evaluation.json"
    before, earlier = demo.root.read_json(path), demo.root.read_json(path)
    del earlier["judges"]["descriptor"]
    for values in [*earlier["modes"].values(), *(v for row in earlier["styles"] for v in row["modes"].values())]:
        del values["accuracy_nearest"], values["content_and_style"]
    demo.root.write_json(path, earlier)
    try:
        written = write_report(demo)
    finally:
        demo.root.write_json(path, before)
    assert "style_descriptor_retrieval" not in {goal.name for goal in written.goals}
    assert "Style descriptor" not in written.path.read_text()


def test_the_funnel_counts_the_rows_of_the_tables(demo: Demo) -> None:
    filtered, downloaded, embedded, joined = steps(demo.root)
    assert (filtered.train, filtered.database, filtered.reasons) == (6, 5, (("bad_url", 1),))
    assert (downloaded.train, downloaded.database, downloaded.reasons) == (5, 5, (("not_found", 1),))
    assert (embedded.train, embedded.database, embedded.lost) == (5, 5, 0)
    assert (joined.train, joined.database) == (5, len(DATABASE))
    assert [(status.word, status.train, status.database) for status in statuses(demo.root)] == [
        ("stored", 5, 5),
        ("not_found", 1, 0),
    ]


def test_training_images_have_the_neighbors_of_the_table_in_its_order(demo: Demo) -> None:
    for example in training_images(demo, 5):
        similarities = [neighbor.similarity for neighbor in example.neighbors]
        assert len(similarities) == K
        assert similarities == sorted(similarities, reverse=True)
        assert all("/d" in neighbor.url for neighbor in example.neighbors)
        assert "/t" in example.picture.url
