"""An inspection for machines, as JSON, and for people, as a page of Markdown."""

from dataclasses import asdict, dataclass

from data.store_report import DATASETS_SHOWN, some
from tuples.inspection.checks import Found, Lengths
from tuples.inspection.evaluation import Evaluation
from tuples.inspection.look import MAX_LENGTHS, RAW, Inspection
from tuples.inspection.rules import RULES, Broken
from tuples.inspection.training import Forecast
from utils import plural

FORMAT = 1  # of the JSON: higher where a key goes or changes its meaning
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_BROKEN_SHOWN = 20  # on the screen; all of them are on the page and in the JSON


@dataclass(frozen=True)
class Report:
    """Everything that an inspection found."""

    inspections: list[Inspection]  # by name
    total: Inspection
    limits: dict[str, float]  # of all rules
    evaluation: Evaluation | None
    forecast: Forecast | None

    @property
    def broken(self) -> list[tuple[Inspection, Broken]]:
        """The rules that datasets break, dataset by dataset."""
        return [(inspection, broken) for inspection in self.inspections for broken in inspection.broken]


# ------------------------------------------------------------------------------------------------- JSON


def as_json(report: Report) -> dict:
    """The report in plain types. The keys are described in docs/inspection.md, and stay."""
    return {
        "format": FORMAT,
        "path": str(report.total.path),
        "limits": report.limits,
        "broken": [_broken_json(inspection, broken) for inspection, broken in report.broken],
        "sum": _inspection_json(report.total),
        "datasets": [_inspection_json(inspection) for inspection in report.inspections],
        "evaluation": _evaluation_json(report.evaluation),
        "training": asdict(report.forecast) if report.forecast else None,
    }


def _inspection_json(inspection: Inspection) -> dict:
    return {
        "name": inspection.name,
        "path": str(inspection.path),
        "kind": inspection.kind,
        "task": inspection.task,
        "rows": inspection.file_rows,
        "tuples": inspection.tuples,
        "texts": inspection.texts,
        "negatives": inspection.negatives,
        "negatives_per_tuple_at_most": inspection.slots,
        "unit": inspection.unit,
        "lengths": {role: _lengths_json(lengths) for role, lengths in inspection.lengths.items()},
        "longer_than": {
            str(limit): {role: None if found is None else found.share for role, found in by_role.items()}
            for limit, by_role in inspection.truncated.items()
        },
        "found": {rule.name: _found_json(inspection.found.get(rule.name)) for rule in RULES},
        "tokens_of_first_pass": inspection.tokens,
    }


def _lengths_json(lengths: Lengths) -> dict:
    summary = {"count": lengths.count, "total": lengths.total, "mean": None, "least": None, "most": None}
    if lengths.count:
        summary["mean"] = lengths.total / lengths.count
        summary["least"] = int(lengths.values[0])
        summary["most"] = int(lengths.values[-1])
    return summary | {name: lengths.quantile(share) for name, share in _QUANTILES.items()}


def _found_json(found: Found | None) -> dict | None:
    if found is None:
        return None
    return {"count": found.count, "of": found.of, "share": found.share, "first_rows": list(found.rows)}


def _broken_json(inspection: Inspection, broken: Broken) -> dict:
    facts = {"rule": broken.rule.name, "dataset": inspection.name, "path": str(inspection.path), "limit": broken.limit}
    return facts | _found_json(broken.found) | {"remedy": broken.rule.remedy}


def _evaluation_json(evaluation: Evaluation | None) -> dict | None:
    if evaluation is None:
        return None
    return {
        "path": str(evaluation.path),
        "queries": len(evaluation.queries),
        "queries_in_training": int(evaluation.queries.was_found.sum()),
        "passages": len(evaluation.passages),
        "passages_in_training": int(evaluation.passages.was_found.sum()),
    }


# -------------------------------------------------------------------------------------------- for people


def broken_line(inspection: Inspection, broken: Broken) -> str:
    """One line about a broken rule: the file, the rule, how often, in which rows, and what to do."""
    found = broken.found
    rows = ", ".join(str(row) for row in found.rows)
    where = ""
    if rows:
        noun = "row" if inspection.kind == RAW else "tuple"
        more = ", ..." if found.count > len(found.rows) else ""
        where = f" ({noun} {rows}{more}, counted from 0)"
    return (
        f"{inspection.path}: {broken.rule.name}: {found.count:,} of {found.of:,} ({found.share:.2%}, limit "
        f"{broken.limit:.2%}) {broken.rule.counts.partition(', of')[0]}{where}: {broken.rule.remedy}"
    )


def screen_lines(report: Report) -> list[str]:
    """What is printed: the largest datasets, the sum, what training will take, and the broken rules."""
    return [
        *_dataset_lines(report),
        *_undeclared_lines(report.inspections),
        *_evaluation_lines(report.evaluation),
        *_training_lines(report.forecast),
        *_broken_lines(report),
        _verdict(report),
    ]


def _dataset_lines(report: Report) -> list[str]:
    """A line for each of the largest datasets, and one for all together where there are several."""
    inspections = report.inspections
    largest = sorted(inspections, key=lambda inspection: (-inspection.tuples, inspection.name))[:DATASETS_SHOWN]
    width = max(len(inspection.name) for inspection in largest)
    lines = [_dataset_line(inspection, width) for inspection in largest]
    if len(inspections) > 1:
        lines.append(f"{plural(len(inspections), 'dataset')}: {_dataset_line(report.total, 0).strip()}")
    return lines


def _undeclared_lines(inspections: list[Inspection]) -> list[str]:
    undeclared = [inspection.name for inspection in inspections if inspection.task is None]
    if not undeclared:
        return []
    return [f"no task is declared for {some(undeclared)}: treated as retrieval; declare it with --task NAME=TASK"]


def _broken_lines(report: Report) -> list[str]:
    """A line for each broken rule; of many for the first."""
    lines = [broken_line(inspection, rule) for inspection, rule in report.broken[:_BROKEN_SHOWN]]
    others = len(report.broken) - len(lines)
    if others:
        lines.append(f"and {others:,} more, on the page and in the JSON")
    return lines


def _verdict(report: Report) -> str:
    if not report.broken:
        return "no rule is broken"
    datasets = {inspection.name for inspection, _ in report.broken}
    return f"{plural(len(report.broken), 'rule')} broken in {plural(len(datasets), 'dataset')}"


def _dataset_line(inspection: Inspection, width: int) -> str:
    median = {role: inspection.lengths[role].quantile(0.5) for role in ("queries", "positives", "negatives")}
    medians = " / ".join("-" if length is None else f"{length:,}" for length in median.values())
    task = inspection.task or "-"
    if inspection.name == "all":
        task = ""
    return (
        f"{inspection.name if width else '':{width}}  {task:14}  {inspection.tuples:>11,} tuples  "
        f"{inspection.texts:>11,} texts  {inspection.negatives:>12,} negatives  median {inspection.unit} {medians}"
    )


def _evaluation_lines(evaluation: Evaluation | None) -> list[str]:
    if evaluation is None:
        return []
    found = _evaluation_json(evaluation)
    return [
        f"{evaluation.path}: {found['queries_in_training']:,} of {found['queries']:,} queries and "
        f"{found['passages_in_training']:,} of {found['passages']:,} passages occur in the data"
    ]


def _training_lines(forecast: Forecast | None) -> list[str]:
    if forecast is None:
        return []
    line = f"{plural(forecast.steps, 'step')} ({forecast.steps_per_epoch:,} an epoch), {forecast.epochs:.2f} epochs"
    if forecast.tokens is None:
        line += "; tokens are not known: give --tokenizer_path"
    else:
        line += f", {forecast.tokens:,} tokens ({forecast.tokens_per_epoch:,} an epoch)"
    if forecast.seconds is not None:
        line += f", {forecast.seconds / 3600:,.2f} hours"
    return [line]


# ------------------------------------------------------------------------------------------------- page


def page_lines(report: Report, json_name: str, picture_name: str | None) -> list[str]:
    """The page in Markdown, beside a JSON file and a picture of these names."""
    lines = [f"# {report.total.path}", "", *_verdict_lines(report), ""]
    lines += ["## What there is", "", *_counts_table(report), ""]
    lines += ["## Lengths", "", *_lengths_table(report.total), ""]
    if picture_name is not None:
        lines += [f"![Lengths of queries, positives and negatives]({picture_name})", ""]
    lines += ["Texts longer than this many tokens, which would be cut there; ? if that is not known:", ""]
    lines += [*_longer_table(report.total), ""]
    lines += ["## Rules", "", *_rules_table(report), ""]
    training = [*_evaluation_lines(report.evaluation), *_training_lines(report.forecast)]
    if training:
        lines += ["## Evaluation and training", ""]
        lines += [f"- {line}" for line in training]
        lines.append("")
    lines.append(f"The same for machines: [{json_name}]({json_name}).")
    return lines


def _verdict_lines(report: Report) -> list[str]:
    if not report.broken:
        return ["No rule is broken."]
    return ["Broken rules:", "", *[f"- {broken_line(inspection, broken)}" for inspection, broken in report.broken]]


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _table(head: tuple[str, ...], rows: list[str]) -> list[str]:
    return [_row(*head), "|" + "---|" * len(head), *rows]


def _counts_table(report: Report) -> list[str]:
    rows = []
    for found in [*report.inspections, report.total]:
        counts = [f"{count:,}" for count in (found.file_rows, found.tuples, found.texts, found.negatives)]
        rows.append(_row(found.name, found.kind, found.task or "", *counts))
    return _table(("dataset", "kind", "task", "rows", "tuples", "texts", "negatives"), rows)


def _lengths_table(total: Inspection) -> list[str]:
    rows = []
    for role, lengths in total.lengths.items():
        facts = _lengths_json(lengths)
        mean = "" if facts["mean"] is None else f"{facts['mean']:,.1f}"
        values = ["" if facts[name] is None else f"{facts[name]:,}" for name in ("p50", "p90", "p99", "most")]
        rows.append(_row(role, f"{facts['count']:,}", f"{facts['total']:,}", mean, *values))
    return _table((f"{total.unit} of", "texts", "together", "mean", "median", "p90", "p99", "most"), rows)


def _longer_table(total: Inspection) -> list[str]:
    rows = []
    for role in total.lengths:
        by_limit = [total.truncated[limit][role] for limit in MAX_LENGTHS]
        rows.append(_row(role, *["?" if found is None else f"{found.share:.1%}" for found in by_limit]))
    return _table(("", *[f"{limit:,}" for limit in MAX_LENGTHS]), rows)


def _rules_table(report: Report) -> list[str]:
    rows = []
    for rule in RULES:
        known = [inspection for inspection in report.inspections if rule.name in inspection.found]
        share = "?"
        worst = ""
        if known:
            highest = max(known, key=lambda inspection: inspection.found[rule.name].share)
            share = f"{report.total.found[rule.name].share:.2%}"
            if highest.found[rule.name].count:
                worst = f"{highest.name}, {highest.found[rule.name].share:.2%}"
        rows.append(_row(f"`{rule.name}`", rule.counts, f"{report.limits[rule.name]:.2%}", share, worst))
    return _table(("rule", "what is counted", "limit", "in sum", "highest"), rows)
