"""A run's page in a real browser: it draws every line that it has numbers of, fetches nothing, and answers a pointer.

    python -m pytest tests/tools/test_report_browser.py

Needs Chromium (apt-get install --no-install-recommends chromium), and is skipped without one.
"""

import json
import socket
from pathlib import Path

import pytest
import run_folders
from browser import Browser, Page, find
from test_report import HARM, harmful_run

from tools.reporting.page import ASSETS, page
from tools.reporting.read import open_runs
from tools.reporting.summary import show

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find() is None, reason="no Chromium here: apt-get install --no-install-recommends chromium"),
]
FIGURE = "[...document.querySelectorAll('figure.chart')].find(one => one.querySelector('h3').textContent === {})"


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The page of two runs, in a file."""
    folder = tmp_path_factory.mktemp("report")
    runs = [run_folders.write_run(folder / "first"), run_folders.write_run(folder / "second", scale=0.5, steps=60)]
    return write(folder / "report.html", page(open_runs(runs)))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def draw_all(opened: Page) -> None:
    """As before printing: what is closed is opened, what is out of sight is drawn."""
    opened.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    opened.settle()


def distinct_colours(png: Path) -> int:
    from PIL import Image  # comes with matplotlib

    with Image.open(png) as image:
        return len(image.convert("RGB").getcolors(1 << 24))


def values_in(opened: Page, title: str) -> list[str]:
    """What stands above a chart."""
    return opened.evaluate(
        f"[...{FIGURE.format(json.dumps(title))}.querySelectorAll('.value b')].map(b => b.textContent)"
    )


def test_every_line_is_drawn_with_every_point_and_nothing_is_fetched(browser, report):
    opened = browser.open(report)
    draw_all(opened)
    data = opened.evaluate("JSON.parse(document.getElementById('data').textContent)")
    lines = opened.evaluate(
        "[...document.querySelectorAll('figure.chart')].map(one => [...one.querySelectorAll('path.line')]"
        ".map(path => (path.getAttribute('d').match(/[ML]/g) || []).length))"
    )
    assert len(lines) == len(data["charts"]) > 15
    for chart, found in zip(data["charts"], lines, strict=True):
        assert found == [sum(y is not None for y in series["y"]) for series in chart["series"]], chart["title"]
    gaps = opened.evaluate(f"{FIGURE.format(json.dumps('Gradient norm'))}.querySelector('path.line').getAttribute('d')")
    assert gaps.count("M") == 2  # the update that was left out
    assert opened.requests == [report.as_uri()]
    assert opened.errors == []


def test_a_pointer_reads_all_charts_at_one_step(browser, report):
    opened = browser.open(report)
    title = "retrieval · in-batch loss"
    first = [run_folders.training_line(step)["losses"] for step in range(10, 101, 10)]
    assert values_in(opened, title)[0] == show(
        (first[-1]["pairs"]["in_batch"] + first[-1]["more_pairs"]["in_batch"]) / 2
    )
    left, right, y = opened.evaluate(
        f"(box => [box.left, box.right, (box.top + box.bottom) / 2])({FIGURE.format(json.dumps(title))}"
        ".querySelector('.grid-line').getBoundingClientRect())"
    )
    opened.ask("Input.dispatchMouseEvent", type="mouseMoved", x=left + 0.4 * (right - left) + 1, y=y + 20)
    opened.settle()
    at = opened.evaluate(f"{FIGURE.format(json.dumps(title))}.querySelector('.at').textContent")
    assert at == "step 40"
    at_40 = first[3]
    assert values_in(opened, title)[0] == show((at_40["pairs"]["in_batch"] + at_40["more_pairs"]["in_batch"]) / 2)
    assert values_in(opened, "clustering · hard-negative loss")[0] == show(at_40["topics"]["hard"])
    opened.ask("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    opened.settle()
    assert values_in(opened, "clustering · hard-negative loss")[0] == show(first[-1]["topics"]["hard"])
    assert opened.errors == []


def test_controls_change_what_is_drawn(browser, report):
    opened = browser.open(report)
    draw_all(opened)
    figure = FIGURE.format(json.dumps("retrieval · in-batch loss"))
    path = f"{figure}.querySelector('path.line').getAttribute('d')"

    def press(key: str, value: str) -> None:
        opened.evaluate(f'document.querySelector(\'[data-key="{key}"][data-value="{value}"]\').click()')

    linear = opened.evaluate(path)
    press("scale", "log")
    logarithmic = opened.evaluate(path)
    assert logarithmic != linear
    press("smooth", "0.9")
    assert opened.evaluate(path) != logarithmic
    assert opened.evaluate(f"{figure}.querySelectorAll('path.raw').length") == 2  # the numbers themselves, thin
    press("smooth", "0")
    press("scale", "linear")
    assert opened.evaluate(path) == linear
    press("x", "epoch")
    assert opened.evaluate(f"{figure}.querySelector('.name').textContent") == "epoch"
    opened.evaluate("document.querySelector('button[data-run=\"0\"]').click()")
    assert opened.evaluate(f"{figure}.querySelectorAll('path.line').length") == 2  # trained and held out, of one run
    assert opened.evaluate("document.querySelectorAll('tr.quiet').length") > 5
    opened.evaluate("document.querySelector('button.only').click()")
    assert opened.evaluate("document.querySelector('tr.quiet').offsetHeight") == 0
    assert opened.evaluate("document.querySelector('tr.differs').offsetHeight") > 0
    assert opened.errors == []


def test_over_the_time_of_training_the_slower_run_is_longer(browser, tmp_path):
    """The second has 60 steps to the first's 100, and takes 24 minutes to its 10."""
    folders = [run_folders.write_run(tmp_path / "fast"), run_folders.write_run(tmp_path / "slow", steps=60, pace=240.0)]
    opened = browser.open(write(tmp_path / "report.html", page(open_runs(folders))))
    title = "Learning rate"
    figure = FIGURE.format(json.dumps(title))
    opened.evaluate(f"{figure}.scrollIntoView()")
    opened.settle()

    def ends() -> list[float]:
        """Where the two lines end, as a share of the axis."""
        return opened.evaluate(
            f"(one => {{ const axis = one.querySelector('line.axis'); const left = Number(axis.getAttribute('x1'));"
            "return [...one.querySelectorAll('path.line')].map(path => (Number(path.getAttribute('d').split(/[ML,]/)"
            f".at(-2)) - left) / (Number(axis.getAttribute('x2')) - left)); }})({figure})"
        )

    assert ends() == pytest.approx([1, 0.6], abs=0.01)
    opened.evaluate('document.querySelector(\'[data-key="x"][data-value="time"]\').click()')
    assert opened.evaluate(f"{figure}.querySelector('.name').textContent") == "minutes of training"
    assert ends() == pytest.approx([10 / 24, 1], abs=0.01)
    opened.evaluate(f"{figure}.querySelector('svg').dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowLeft'}}))")
    assert opened.evaluate(f"{figure}.querySelector('.at').textContent") == "24 minutes"
    assert values_in(opened, title) == ["–", show(1e-3 * (1 - 60 / 200))]  # the fast one was over long before
    assert opened.errors == []


def test_times_between_log_lines_lie_between_theirs(browser, report):
    opened = browser.open(report)
    code = (ASSETS / "numbers.js").read_text()
    asked = "[5, 10, 15, 25].map(step => interpolated([0, 10, 20], [0, 60, 90], step))"
    assert opened.evaluate(f"(() => {{ {code}\nreturn {asked}; }})()") == [30, 60, 75, 105]
    assert opened.evaluate(f"(() => {{ {code}\nreturn [7199, 7200].map(one => unitOfTime(one).name); }})()") == [
        "minutes", "hours",
    ]  # fmt: skip


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)], ids=["light", "dark", "phone"])
def test_the_page_fits_and_is_not_blank(browser, report, tmp_path, width, dark):
    opened = browser.open(report, width=width, dark=dark)
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").partition(",")[0])
    assert (red < 40) == dark
    assert distinct_colours(opened.screenshot(tmp_path / "page.png")) > 50
    for run in (0, 1):
        assert opened.evaluate(f"document.querySelectorAll('svg .run-{run} path.line').length") > 0
    assert opened.errors == []


def test_texts_of_a_run_do_no_harm(browser, tmp_path):
    runs = open_runs([harmful_run(tmp_path / "harm"), run_folders.write_run(tmp_path / "other")], [HARM, "other"])
    opened = browser.open(write(tmp_path / "report.html", page(runs)))
    draw_all(opened)
    assert opened.evaluate("document.querySelectorAll('path.line').length") > 20
    assert opened.evaluate("document.querySelectorAll('img').length") == 0
    assert HARM in opened.evaluate("document.title")
    assert opened.evaluate("typeof window.hurt") == "undefined"
    assert opened.requests == [(tmp_path / "report.html").as_uri()]
    assert opened.errors == []


def test_what_is_not_the_page_s_own_would_not_run_nor_be_fetched(browser, tmp_path):
    text = page(open_runs([run_folders.write_run(tmp_path / "first")]))
    with socket.create_server(("127.0.0.1", 0)) as server:
        image = f"<img src='http://127.0.0.1:{server.getsockname()[1]}/x.png'>"
        opened = browser.open(write(tmp_path / "report.html", text.replace("</main>", f"{HARM}{image}</main>")))
        assert opened.evaluate("document.querySelectorAll('img').length") == 2
        assert opened.evaluate("typeof window.hurt") == "undefined"
        assert opened.evaluate("document.querySelectorAll('path.line').length") > 5  # the page's own script did run
        assert len(opened.errors) >= 3  # the browser says what it refused: a script, a handler, two images
        assert opened.requests == [(tmp_path / "report.html").as_uri()]
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody has knocked


def test_the_browser_writes_numbers_as_python_does(browser, report):
    opened = browser.open(report)
    numbers = [
        0,
        1,
        -1,
        0.5,
        0.50244,
        12345.6,
        999.96,
        1e-7,
        6e-4,
        0.00123,
        27.93,
        100,
        1000,
        1e6,
        3.0000001,
        0.1 + 0.2,
    ]
    code = (ASSETS / "numbers.js").read_text()
    shown = opened.evaluate(f"(() => {{ {code}\nreturn {json.dumps(numbers)}.map(one => show(one, '')); }})()")
    assert shown == [show(number) for number in numbers]
