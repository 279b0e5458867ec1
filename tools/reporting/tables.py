"""The page's tables and cards as HTML. Every text that a run gives goes through `escape`."""

from html import escape

from tools.reporting.compare import Row
from tools.reporting.evaluation import main_metrics, results
from tools.reporting.neighbours import Answers, Sample
from tools.reporting.read import RunLog
from tools.reporting.summary import Tile, show

COLOURS = 6  # of runs, as in assets/draw.js; of more, the marks are squares and the lines dashed


def dot(run: int, held_out: bool = False) -> str:
    """A run's mark; -1 stands for all runs."""
    words = ["dot", "run-all" if run < 0 else f"run-{run % COLOURS}"]
    if run >= COLOURS:
        words.append("again")
    if held_out:
        words.append("held-out")
    return f'<i class="{" ".join(words)}"></i>'


def tile_html(tile: Tile, runs: list[RunLog]) -> str:
    """A number with its label; of several runs one below the other."""
    lines = []
    for index, value in enumerate(tile.values):
        mark = dot(index) if len(runs) > 1 else ""
        number, unit = value or ("–", "")
        lines.append(f"<dd>{mark}{escape(number)} <small>{escape(unit)}</small></dd>")
    return f'<dl class="tile"><dt>{escape(tile.label)}</dt>{"".join(lines)}</dl>'


def plain_table(head: list[str], rows: list[list[str]], numbers: set[int]) -> str:
    """A table of texts.

    Args:
        numbers: the columns that stand at the right.
    """
    body = "".join(_cells(row, "td", numbers) for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead>{_cells(head, "th", numbers)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cells(row: list[str], tag: str, numbers: set[int]) -> str:
    cells = ""
    for column, text in enumerate(row):
        kind = ' class="num"' if column in numbers else ""
        cells += f"<{tag}{kind}>{escape(text)}</{tag}>"
    return f"<tr>{cells}</tr>"


def run_heads(runs: list[RunLog]) -> str:
    """The head cells that name the runs."""
    if len(runs) == 1:
        return "<th>this run</th>"
    return "".join(f"<th>{dot(index)}{escape(run.name)}</th>" for index, run in enumerate(runs))


def key_table(groups: list[tuple[str, list[Row]]], runs: list[RunLog]) -> str:
    """Keys and values of each run; what stands out is marked, and can be shown alone."""
    single = len(runs) == 1
    last = "<th>default</th>" if single and any(row.default for _, rows in groups for row in rows) else ""
    parts = [f"<thead><tr><th>key</th>{run_heads(runs)}{last}</tr></thead>"]
    columns = 1 + len(runs) + bool(last)
    for group, rows in groups:
        lines = [_key_row(row, last) for row in rows]
        quiet = "" if any(row.stands_out for row in rows) else ' class="quiet"'
        heading = f'<tr class="heading"><th colspan="{columns}">{escape(group)}</th></tr>' if group else ""
        parts.append(f"<tbody{quiet}>{heading}{''.join(lines)}</tbody>")
    return f'<div class="scroll" tabindex="0"><table class="keys">{"".join(parts)}</table></div>'


def _key_row(row: Row, last: str) -> str:
    kind = "differs" if row.stands_out else "quiet"
    title = f' title="{escape(row.effect)}"' if row.effect else ""
    cells = "".join(f"<td>{escape(value)}</td>" for value in row.values)
    if last:
        cells += f'<td class="faint">{escape(row.default)}</td>'
    return f'<tr class="{kind}"><th scope="row"{title}>{escape(row.key)}</th>{cells}</tr>'


def results_table(runs: list[RunLog]) -> str:
    """The main metric of each task of the runs' results.json: a column for each run and number of dimensions; or ""."""
    found = [results(run) for run in runs]
    main = main_metrics([key for one in found for key in one])
    if not main:
        return ""
    columns = []  # (run, dimensions)
    for index, values in enumerate(found):
        dimensions = {dimension for _, dimension, _ in values}
        columns += [(index, dimension) for dimension in sorted(dimensions)]
    head = "<tr><th>task</th><th>metric</th>"
    for index, dimension in columns:
        name = ""
        if len(runs) > 1:
            name = f"{dot(index)}{escape(runs[index].name)} · "
        head += f'<th class="num">{name}{dimension}</th>'
    head += "</tr>"
    body = ""
    for name, metric in main.items():
        body += f"<tr><td>{escape(name)}</td><td>{escape(metric)}</td>"
        for index, dimension in columns:
            value = found[index].get((name, dimension, metric))
            body += f'<td class="num">{show(value)}</td>'
        body += "</tr>"
    table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def neighbour_cards(runs: list[RunLog], sample: Sample, answers: list[Answers]) -> str:
    """A card for each query, and in it what each run's model finds."""
    parts = []
    for answer in answers:
        if answer.found is None:
            parts.append(f'<p class="note">{escape(runs[answer.run].name)}: {escape(answer.reason)}.</p>')
    for place, query in enumerate(sample.queries):
        columns = [_found(answer, sample, place, runs) for answer in answers if answer.found is not None]
        if columns:
            instruction, _, asked = query.rpartition("\nQuery: ")
            said = f'<p class="faint clip">{escape(instruction)}</p>' if instruction else ""
            parts.append(
                f'<article class="card"><h3>{escape(asked)}</h3>{said}<div class="columns">{"".join(columns)}</div>'
                "</article>"
            )
    return "".join(parts)


def _found(answer: Answers, sample: Sample, place: int, runs: list[RunLog]) -> str:
    items = []
    for passage, cosine in answer.found[place]:
        is_right = passage == sample.right[place]
        mark = '<b class="right">✓ its positive</b>' if is_right else ""
        items.append(
            f'<li><span class="num">{cosine:.3f}</span><div><p class="clip">{escape(sample.passages[passage])}</p>'
            f"{mark}</div></li>"
        )
    rank = answer.ranks[place]
    if rank is not None and rank > len(items):
        items.append(f'<li><span class="num">…</span><p class="faint">its positive is number {rank:,}</p></li>')
    head = f"<h4>{dot(answer.run)}{escape(runs[answer.run].name)} · {escape(answer.model)}</h4>"
    return f"<section>{head}<ol>{''.join(items)}</ol></section>"
