"""``narrowboat report``."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from report_kit import (
    bench_document,
    generate_document,
    plan_document,
    profile_document,
    rename_task,
    run_document,
    task_document,
    train_document,
    train_plan_document,
    write,
)

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """What an HTML file is made of."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of one record of each kind, made once."""
    from narrowboat.report.records.find import load_all
    from narrowboat.report.write import write_report

    folder = tmp_path_factory.mktemp("runs")
    made = (run_document, train_document, train_plan_document, plan_document, profile_document)
    for number, document in enumerate((*made, bench_document, generate_document, task_document)):
        write(folder, f"{number}.json", document())
    return write_report(load_all([folder]), folder / "out").page


def test_the_page_needs_nothing_else(reported: Path) -> None:
    page = Page(reported)
    addresses = [a.get(key) or "" for _, a in page.tags for key in ("src", "srcset", "href", "action") if key in a]
    assert addresses
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in addresses)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert "url(" not in reported.read_text(encoding="utf-8")


def test_it_says_what_to_notice(reported: Path) -> None:
    text = Page(reported).text
    assert "The budget held: 79.0 MiB of 80.0 MiB at the highest." in text
    assert "Prediction 6% too long: 106 ms per pass predicted, 100 ms measured." in text
    assert "5 of 19 jobs missed their deadline: 5 times overload." in text
    assert "No promise was broken" in text
    assert "1.30 times its time" in text


def test_every_picture_has_words_and_lies_beside_it(reported: Path) -> None:
    images = Page(reported).all("img")
    pictures = list(reported.parent.glob("*.png"))
    assert len(images) == len(pictures) >= 15
    assert all(len(image["alt"] or "") > 20 for image in images)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert {path.suffix for path in reported.parent.iterdir()} == {".png", ".html"}


def test_tables_have_captions_and_headers(reported: Path) -> None:
    page = Page(reported)
    assert len(page.all("caption")) == len(page.all("table")) > 5
    assert {th.get("scope") for th in page.all("th")} == {"col", "row"}


def test_it_fits_a_phone_and_both_lights(reported: Path) -> None:
    page = Page(reported)
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert len(page.all("source")) == len(page.all("img"))
    assert "light dark" in reported.read_text(encoding="utf-8")


def contrast(one: str, other: str) -> float:
    """Of two colours, as the Web Content Accessibility Guidelines 2.1 define it."""

    def light(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_its_ground(reported: Path) -> None:
    told = re.findall(r"--(\S+): light-dark\((#\w{6}), (#\w{6})\)", reported.read_text(encoding="utf-8"))
    colours = {name: pair for name, *pair in told}
    for ground in ("page", "panel", "good-wash", "note-wash", "bad-wash"):
        for side in (0, 1):
            assert contrast(colours["text"][side], colours[ground][side]) >= 7
    for name in ("faint", "strong", "good", "bad"):
        assert all(contrast(colours[name][side], colours["panel"][side]) >= 4.5 for side in (0, 1))


def test_the_command_writes_and_says_it(narrowboat: Any, tmp_path: Path) -> None:
    run = write(tmp_path, "r.json", run_document(memory=[], blocks=[]))
    finished = narrowboat("report", run, "--out", tmp_path / "out")
    assert finished.code == 0, finished.err
    assert "The budget held" in finished.out
    assert (tmp_path / "out" / "report.html").is_file()


def test_json_has_the_findings(narrowboat: Any, tmp_path: Path) -> None:
    run = write(tmp_path, "r.json", run_document(memory=[], blocks=[], peak_bytes=(80 << 20) + 4096))
    told = narrowboat("report", run, "--out", tmp_path / "out", "--json").json()
    assert told["runs"][0]["kind"] == "run"
    assert told["runs"][0]["findings"][0]["tone"] == "bad"
    assert "passed by 4.00 KiB" in told["runs"][0]["findings"][0]["text"]
    assert all(Path(picture).is_file() for picture in told["pictures"])


def test_hostile_names_are_inert(narrowboat: Any, tmp_path: Path) -> None:
    trace = write(tmp_path, "t.json", rename_task(task_document(0.5), "words", SCRIPT))
    block = {**run_document()["blocks"][0], "name": SCRIPT}
    about = {"command": SCRIPT, "processor": "\ud800"}
    run = write(tmp_path, "r.json", run_document(model=SCRIPT, weights=SCRIPT, blocks=[block], about=about))
    assert narrowboat("report", trace, run, "--out", tmp_path / "out").code == 0
    page = Page(tmp_path / "out" / "report.html")
    assert not page.all("script")
    assert SCRIPT in page.text
    assert not [a for _, a in page.tags for key in a if key.startswith("on")]
    assert "default-src 'none'" in (page.all("meta")[2]["content"] or "")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"foreign": 1}'])
def test_what_is_no_record_is_one_line_and_nothing_is_written(narrowboat: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    finished = narrowboat("report", tmp_path / "r.json", "--out", tmp_path / "out")
    assert finished.code == 2
    assert len(finished.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_folder_should_be(narrowboat: Any, tmp_path: Path) -> None:
    run = write(tmp_path, "r.json", run_document())
    finished = narrowboat("report", run, "--out", run)
    assert finished.code == 2
    assert "cannot write to" in finished.err


def test_without_matplotlib_the_extra_is_named(
    narrowboat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    finished = narrowboat("report", write(tmp_path, "r.json", run_document()), "--out", tmp_path / "out")
    assert finished.code == 2
    assert "narrowboat[plot]" in finished.err
    assert not (tmp_path / "out").exists()


def test_what_run_writes_holds_what_a_report_needs(narrowboat: Any, tiny: Path) -> None:
    arguments = ("run", "tiny_model:factory", "--weights", "tiny.safetensors", "--budget", "11MiB", "--passes", 4)
    finished = narrowboat(*arguments, "--trace", "trace.json", "--json")
    told = finished.json()
    assert len(told["predicted_ms"]) == 4
    assert told["about"]["torch"]
    assert told["memory"] and all(len(point) == 2 for point in told["memory"])
    measured = [row["compute_ms"] for row in told["blocks"]]
    assert sum(row["bytes"] for row in told["blocks"]) == told["weight_bytes"]
    assert all(time is not None for time in measured)
    Path("run.json").write_text(finished.out)
    reported = narrowboat("report", "run.json", "trace.json", "--out", "out", "--json").json()
    assert [run["kind"] for run in reported["runs"]] == ["run", "trace"]
    assert len(reported["pictures"]) == 5
