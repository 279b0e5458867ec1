"""All of the page as one HTML file, which loads nothing: styles, scripts and numbers lie in it.

A content security policy lets the browser run the page's own script, named by its digest, and fetch nothing at all:
whatever a run's texts hold, and should an `escape` be forgotten, no other script runs.
"""

import base64
import hashlib
import json
from html import escape
from pathlib import Path

from tools.reporting import charts, compare, stores, summary, tables
from tools.reporting.charts import Chart, Section
from tools.reporting.neighbours import Answers, Sample
from tools.reporting.read import RunLog
from tools.reporting.series import clock, last_value, thin
from utils import plural

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("numbers.js", "draw.js", "page.js")
# What every report begins with, those of earlier versions too: tools/report.py knows a report by it.
OPENING = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
)
DATASET_HEAD = [
    "run",
    "dataset",
    "task",
    "tuples",
    "held out",
    "negatives",
    "query tokens, median",
    "passage tokens, median",
    "cut",
    "checksum of tuples",
]


def page(runs: list[RunLog], sample: Sample | None = None, answers: list[Answers] | None = None) -> str:
    """The page of these runs.

    Args:
        sample, answers: from `neighbours`; None if no model was to be loaded.
    """
    datasets = stores.datasets_of(runs)
    sections = [section for section in all_sections(runs, datasets) if section.charts or section.note]
    tiles = "".join(tables.tile_html(tile, runs) for tile in summary.tiles(runs))
    parts = [_top(runs), _controls(runs), f'<div class="tiles">{tiles}</div>']
    drawn: list[Chart] = []
    for section in sections:
        parts.append(_section(section, len(drawn)))
        drawn += section.charts
    parts += [
        _results(runs),
        _neighbours(runs, sample, answers),
        _data(runs, datasets),
        _configuration(runs),
        _manifest(runs),
        _thinned(runs),
    ]
    return _document(" and ".join(run.name for run in runs), "".join(parts), embedded(runs, drawn))


def all_sections(runs: list[RunLog], datasets: list[stores.Dataset]) -> list[Section]:
    """Every section of charts, in the order of the page; some may be empty."""
    return [
        charts.loss_section(runs),
        charts.evaluation_section(runs, main=True),
        charts.matryoshka_section(runs),
        charts.measure_section(runs),
        charts.optimiser_section(runs),
        charts.evaluation_section(runs, main=False),
        charts.dataset_section(runs),
        stores.length_section(runs, datasets),
    ]


def embedded(runs: list[RunLog], drawn: list[Chart]) -> dict:
    """The numbers that the page holds as JSON: what its script draws, exactly as logged."""
    listed = []
    for chart in drawn:
        series = []
        for one in chart.series:
            xs = [x for x, _ in one.points]
            ys = [y for _, y in one.points]
            series.append({"run": one.run, "heldOut": one.held_out, "label": one.label, "x": xs, "y": ys})
        listed.append(
            {
                "title": chart.title,
                "unit": chart.unit,
                "x": chart.x,
                "fromZero": chart.from_zero,
                "log": chart.may_be_log,
                "noisy": chart.is_noisy,
                "bars": chart.bars,
                "limit": chart.limit,
                "series": series,
            }
        )
    return {"runs": [_run_facts(run) for run in runs], "charts": listed}


def _run_facts(run: RunLog) -> dict:
    """What the axes of steps, epochs and time need of a run."""
    times = thin(clock(run.timings), charts.POINTS)
    return {
        "name": run.name,
        "stepsPerEpoch": run.steps_per_epoch,
        "lastStep": run.last_step,
        "clock": {"step": [step for step, _ in times], "seconds": [seconds for _, seconds in times]},
    }


def as_script_data(value) -> str:
    """JSON that can stand in a script element: no `<`, so that no text in it ends the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


# ------------------------------------------------------------------------------------------ parts of the page


def _top(runs: list[RunLog]) -> str:
    """What runs these are; and what people should know of how they were read."""
    single = len(runs) == 1
    names = "".join(f"<li>{tables.dot(index)}{escape(run.name)}</li>" for index, run in enumerate(runs))
    title = escape(runs[0].name) if single else f'<ul class="names">{names}</ul>'
    kicker = "Training run" if single else f"{len(runs)} training runs"
    marks: dict[str, str] = {}  # facts -> the marks of the runs of which they are true
    notes = ""
    for index, run in enumerate(runs):
        mark = "" if single else tables.dot(index)
        marks[_facts(run)] = marks.get(_facts(run), "") + mark
        notes += "".join(f'<p class="note">{mark}{escape(note)}</p>' for note in run.notes)
    facts = "".join(f"<li>{mark}{escape(words)}</li>" for words, mark in marks.items())
    return f'<header><p class="kicker">{kicker}</p><h1>{title}</h1><ul class="facts">{facts}</ul>{notes}</header>'


def _facts(run: RunLog) -> str:
    """One line about a run: model, datasets and tasks, precision, processes, hardware."""
    tasks = charts.tasks_of(run)
    facts = [str(run.configuration.get("model_path", ""))]
    if tasks:
        facts.append(f"{plural(len(tasks), 'dataset')}: {', '.join(charts.task_names([run]))}")
    if run.configuration.get("use_lora"):
        facts.append("LoRA")
    if run.configuration.get("use_mrl"):
        facts.append("Matryoshka")
    processes = run.manifest.get("num_processes")
    if isinstance(processes, int):
        facts.append("1 process" if processes == 1 else f"{processes} processes")
    if run.manifest.get("mixed_precision") not in (None, "no"):
        facts.append(str(run.manifest["mixed_precision"]))
    facts.append(str(run.manifest.get("hardware", "")))
    return " · ".join(fact for fact in facts if fact)


def _controls(runs: list[RunLog]) -> str:
    """Which runs are shown, the axis of steps, epochs or time of training, the scale of losses, smoothing."""
    groups = []
    if len(runs) > 1:
        buttons = ""
        for index, run in enumerate(runs):
            words = tables.dot(index) + escape(run.name)
            buttons += f'<button type="button" class="run" data-run="{index}" aria-pressed="true">{words}</button>'
        groups.append(f'<div class="control" role="group" aria-label="Runs">{buttons}</div>')
    axes = [("step", "Step"), ("epoch", "Epoch")]
    if all(clock(run.timings) for run in runs):
        axes.append(("time", "Time"))
    groups.append(_choice("x", "Axis", axes))
    groups.append(_choice("scale", "Losses", [("linear", "Linear"), ("log", "Log")]))
    groups.append(_choice("smooth", "Smoothing", [("0", "Off"), ("0.6", "Some"), ("0.9", "Strong")]))
    return f'<nav class="controls" aria-label="Charts">{"".join(groups)}</nav>'


def _choice(name: str, label: str, options: list[tuple[str, str]]) -> str:
    """Buttons of which one is pressed, the first to begin with."""
    buttons = ""
    for place, (value, words) in enumerate(options):
        pressed = "true" if place == 0 else "false"
        facts = f'data-key="{name}" data-value="{value}" aria-pressed="{pressed}"'
        buttons += f'<button type="button" {facts}>{words}</button>'
    choice = f'<div class="choice">{buttons}</div>'
    return f'<div class="control" role="group" aria-label="{label}"><span>{label}</span>{choice}</div>'


def _section(section: Section, first: int) -> str:
    """A heading and its charts, numbered from `first`; one that is closed has a line to open it."""
    figures = "".join(_figure(chart, first + place) for place, chart in enumerate(section.charts))
    count = len(section.charts)
    columns = {1: 1, 2: 2, 4: 2}.get(count, 3)
    grid = f'{_note(section.note)}<div class="grid columns-{columns}">{figures}</div>'
    if section.closed:
        title = f"{escape(section.title)} <small>{plural(count, 'chart')}</small>"
        return f"<details><summary><h2>{title}</h2></summary>{grid}</details>"
    return f"<section><h2>{escape(section.title)}</h2>{grid}</section>"


def _figure(chart: Chart, number: int) -> str:
    """A chart's frame, with its last values: the script draws into it."""
    last = ""
    for series in chart.series:
        value = "" if chart.bars else summary.show(last_value(series.points))
        last += f'<span class="value">{tables.dot(series.run, series.held_out)}<b>{value}</b></span>'
    unit = f" <small>{escape(chart.unit)}</small>" if chart.unit not in ("", "%") else ""
    note = f'<p class="faint">{escape(chart.note)}</p>' if chart.note else ""
    return (
        f'<figure class="chart" data-chart="{number}"><figcaption><h3>{escape(chart.title)}{unit}</h3>{note}'
        f'<p class="values">{last}<span class="at"></span></p></figcaption><div class="plot"></div></figure>'
    )


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _block(title: str, content: str, note: str = "") -> str:
    """A heading and what stands below it; nothing if that is empty."""
    if not content and not note:
        return ""
    return f"<section><h2>{title}</h2>{_note(note)}{content}</section>"


def _results(runs: list[RunLog]) -> str:
    table = tables.results_table(runs)
    note = "The main metric of each task of results.json, by dimensions kept." if table else ""
    return _block("Results", table, note)


def _neighbours(runs: list[RunLog], sample: Sample | None, answers: list[Answers] | None) -> str:
    if sample is None or answers is None:
        note = "Left out: no model was to be loaded. --neighbours 8 asks each run's last model with held-out queries."
        return _block("Nearest neighbours", "", note)
    cards = tables.neighbour_cards(runs, sample, answers)
    return _block("Nearest neighbours", cards, f"Among {sample.words}, by cosine.")


def _data(runs: list[RunLog], datasets: list[stores.Dataset]) -> str:
    if not datasets:
        return ""
    rows = stores.dataset_rows(runs, datasets)
    first = 0 if len(runs) > 1 else 1  # of a single run its name is left out
    numbers = {column - first for column in range(3, 9)}
    return _block("Data", tables.plain_table(DATASET_HEAD[first:], [row[first:] for row in rows], numbers))


def _thinned(runs: list[RunLog]) -> str:
    """Says so where lines have more points than are drawn."""
    most = max(len(run.trained) for run in runs)
    if most <= charts.FEWER_POINTS:
        return ""
    points = f"{charts.POINTS:,} points ({charts.FEWER_POINTS} in charts of single datasets)"
    text = f"Of lines with more than {points} the lowest and the highest of each stretch are drawn: no peak is lost."
    return f"<section>{_note(text)}</section>"


def _configuration(runs: list[RunLog]) -> str:
    groups = compare.configuration_groups([run.configuration for run in runs])
    return _keys("Configuration", groups, runs, "not the default" if len(runs) == 1 else "the runs differ")


def _manifest(runs: list[RunLog]) -> str:
    rows = compare.manifest_rows([run.manifest for run in runs])
    return _keys("Manifest", [("", rows)] if rows else [], runs, "the runs differ")


def _keys(title: str, groups: list[tuple[str, list[compare.Row]]], runs: list[RunLog], marked: str) -> str:
    """A table of keys, and a button that leaves only those which stand out."""
    if not groups:
        return ""
    count = sum(row.stands_out for _, rows in groups for row in rows)
    total = sum(len(rows) for _, rows in groups)
    button = ""
    if count:
        words = f"Only the {count} of {total} that are marked: {marked}"
        button = f'<button type="button" class="only" aria-pressed="false">{words}</button>'
    head = f'<div class="head"><h2>{title}</h2>{button}</div>'
    return f'<section class="keys">{head}{tables.key_table(groups, runs)}</section>'


def _document(title: str, body: str, data: dict) -> str:
    """Everything in its place: policy, style, body, numbers, script."""
    style = (ASSETS / "page.css").read_text(encoding="utf-8")
    code = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'(() => {{\n"use strict";\n{code}\n}})();'
    return (
        f"{OPENING} style-src '{digest(style)}'; script-src '{digest(script)}'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        '<noscript><p class="note">The charts are drawn by a script, which is switched off here; the tables are whole.'
        f"</p></noscript>{body}</main>"
        f'<script type="application/json" id="data">{as_script_data(data)}</script><script>{script}</script>'
        "</body></html>\n"
    )


def digest(text: str) -> str:
    """How a content security policy names a script or style: sha256-..."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
