"""What benchmarks.gpu found, for people: tables of its JSON, and which targets are met. Pure functions."""

import math

from benchmarks.gpu_profile import IDLE, OTHER
from benchmarks.gpu_speed import COMPILED, OURS, PUBLISHED, name_of

SIZES = ("0.6B", "4B")  # that the targets are about, measured or not
SPEED_UPS = {"heavy-tailed": 5, "MS-MARCO-like": 3, "long documents": 2}  # over the published layout
MFU = {"0.6B": 0.40, "4B": 0.50}  # of the matrix product that was measured, on real tokens
STALL = 1.0  # seconds that training stands still for a state
MEMORY = 0.10  # of the peak that was expected
SAME_LOSSES = 0.01  # relative, in bf16 on a GPU, whose sums come in any order
MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured"
GIB = 2**30


def judge(report: dict) -> list[dict]:
    """Every target with its figure: {"target", "wanted", "figure": None if there is none, "verdict"}.

    Args:
        report: what benchmarks.gpu writes.
    """
    targets = []
    others = [entry["size"] for entry in report["equality"] + report["speed"]]
    for size in dict.fromkeys([*SIZES, *others]):
        targets.append(_at_most(f"{size}: ways that are worse than padded bf16", _worse_ways(report, size), 0, "{}"))
        tables = [table for table in report["speed"] if table["size"] == size]
        full = {table["lengths"]: table for table in tables if table["kind"] == "full"}
        if size in SIZES:
            for lengths, least in SPEED_UPS.items():
                figure = speed_up(full[lengths]) if lengths in full else None
                targets.append(_at_least(f"{size}: {lengths}, over the published layout", figure, least, "{:.1f}x"))
            shares = [mfu(table, report) for table in full.values()]
            targets.append(_at_least(f"{size}: MFU, lowest", _smallest(shares), MFU[size], "{:.0%}"))
            errors = [memory_error(table) for table in tables]
            targets.append(_at_most(f"{size}: peak memory, off the expected", _largest(errors), MEMORY, "{:.0%}"))
        waits = [way["waits"] for table in tables for way in table["ways"] if _is_ours(way)]
        targets.append(_at_most(f"{size}: waits for the device in a step", _largest(waits), 0, "{}"))
    for run in report["runs"]:
        targets += _targets_of_run(run)
    if not report["runs"]:
        targets.append(_at_most("stall of a state", None, STALL, "{:.2f} s"))
        targets.append(_at_most("losses after a kill", None, SAME_LOSSES, "{:.1e} off"))
    return targets


def _targets_of_run(run: dict) -> list[dict]:
    size = run["size"]
    stalls = [state["stall_seconds"] for state in run["states"]]
    targets = [_at_most(f"{size}: stall of a state", _largest(stalls), STALL, "{:.2f} s")]
    difference = run["largest_loss_difference"]
    targets.append(_at_most(f"{size}: losses after a kill", difference, SAME_LOSSES, "{:.1e} off"))
    if run["deterministic"]:
        targets.append(_at_most(f"{size}: files that differ after a kill", int(not run["same_bits"]), 0, "{}"))
    return targets


def speed_up(table: dict) -> float | None:
    """Our faster row over the published layout's."""
    seconds = _seconds_of(table)
    ours = _smallest([seconds.get(OURS), seconds.get(COMPILED)])
    if ours is None or PUBLISHED not in seconds:
        return None
    return seconds[PUBLISHED] / ours


def mfu(table: dict, report: dict) -> float | None:
    """What our faster row makes of this machine's matrix product."""
    seconds = _smallest([way["seconds"] for way in table["ways"] if _is_ours(way)])
    if seconds is None:
        return None
    return table["flops"] / seconds / report["matmul_flops"]


def memory_error(table: dict) -> float | None:
    """How far the peak of our plain row is from what was expected, relative; None on a CPU."""
    for way in table["ways"]:
        if way["way"] == OURS and way.get("peak_bytes"):
            return abs(way["peak_bytes"] / table["expected_peak_bytes"] - 1)
    return None


def _worse_ways(report: dict, size: str) -> int | None:
    """How many ways of a size are too far from fp32."""
    for entry in report["equality"]:
        if entry["size"] == size:
            return sum(way.get("worse", False) for way in entry["ways"])
    return None


def _seconds_of(table: dict) -> dict[str, float]:
    """Way -> seconds of a step, of the ways that were measured."""
    return {way["way"]: way["seconds"] for way in table["ways"] if "seconds" in way}


def _is_ours(way: dict) -> bool:
    return way["way"] in (OURS, COMPILED) and "seconds" in way


def _smallest(numbers: list[float | None]) -> float | None:
    """Of those that there are."""
    return min((number for number in numbers if number is not None), default=None)


def _largest(numbers: list[float | None]) -> float | None:
    return max((number for number in numbers if number is not None), default=None)


def _at_least(target: str, figure: float | None, wanted: float, form: str) -> dict:
    return _judged(target, figure, f"at least {form.format(wanted)}", form, figure is not None and figure >= wanted)


def _at_most(target: str, figure: float | None, wanted: float, form: str) -> dict:
    return _judged(target, figure, f"at most {form.format(wanted)}", form, figure is not None and figure <= wanted)


def _judged(target: str, figure: float | None, wanted: str, form: str, is_met: bool) -> dict:
    if figure is None:
        return {"target": target, "wanted": wanted, "figure": None, "shown": "-", "verdict": NOT_MEASURED}
    verdict = MET if is_met else NOT_MET
    return {"target": target, "wanted": wanted, "figure": figure, "shown": form.format(figure), "verdict": verdict}


# ------------------------------------------------------------------------------------------------ tables


SPEED_COLUMNS = (
    "speed-up: over the published layout. MFU: of the bf16 matrix product above. parts: of a step; several run twice.",
    "waits: for the device, in a step. matmul to idle: shares of a step's time. loss: of the last step; the one that",
    "Sentence Transformers minimises is another.",
)


def lines_of(report: dict) -> list[str]:
    """The whole report as text."""
    machine = report["machine"]
    lines = [
        f"{machine['device']}, torch {report['versions']['torch']}, Transformers {report['versions']['transformers']}; "
        f"bf16 matrix product {report['matmul_flops'] / 1e12:,.1f} TFLOP/s{_datasheet(report)}"
    ]
    for entry in report["equality"]:
        lines += ["", *equality_lines(entry)]
    for table in report["speed"]:
        lines += ["", *speed_lines(table, report)]
    if report["speed"]:
        lines += ["", *SPEED_COLUMNS]
    for run in report["runs"]:
        lines += ["", *run_lines(run, report)]
    lines += ["", f"{'target':52}{'wanted':>22}{'figure':>14}"]
    for target in report["targets"]:
        lines.append(f"{target['target']:52}{target['wanted']:>22}{target['shown']:>14}   {target['verdict']}")
    for entry in report["left_out"]:
        lines.append(f"left out: {entry['what']}: {entry['reason']}")
    return lines


def _datasheet(report: dict) -> str:
    if report["datasheet_flops"] is None:
        return ""
    return f", the datasheet has {report['datasheet_flops'] / 1e12:,.0f}"


def equality_lines(entry: dict) -> list[str]:
    """Differences of all ways from fp32, for one size."""
    lines = [f"{entry['size']}: relative difference from fp32; training would take {entry['backend']}"]
    lines += [f"  {note}" for note in entry["notes"]]
    lines.append(f"  {'':68}{'embeddings':>12}{'gradients':>12}")
    for way in entry["ways"]:
        if "left_out" in way:
            lines.append(f"  {way['way']:68}{way['left_out']}")
            continue
        mark = "   WORSE" if way["worse"] else ""
        lines.append(f"  {way['way']:68}{way['embeddings']:12.1e}{way['gradients']:12.1e}{mark}")
    return lines


def speed_lines(table: dict, report: dict) -> list[str]:
    """One table of steps in turn."""
    limit = table["token_limit"]
    recomputed = "keeps all activations"
    if table["recompute_every"]:
        recomputed = f"recomputes one of every {table['recompute_every']} layers"
    lines = [
        f"{name_of(table)}: {table['tuples']} tuples, {table['tokens']:,} tokens a step, padding ratio "
        f"{table['padding_ratio']:.2f}; ours {recomputed}, at most {limit:,} tokens a pass, and should peak at "
        f"{table['expected_peak_bytes'] / GIB:.1f} GiB",
        f"  {'':46}{'tuples/s':>10}{'tokens/s':>11}{'speed-up':>10}{'MFU':>7}{'GiB':>7}{'parts':>7}{'waits':>7}"
        f"{'matmul':>8}{'attn':>6}{'other':>7}{'comm':>6}{'idle':>6}{'loss':>9}",
    ]
    published = _seconds_of(table).get(PUBLISHED, math.nan)
    for way in table["ways"]:
        if "left_out" in way:
            lines.append(f"  {way['way']:46}{way['left_out']}")
            continue
        seconds = way["seconds"]
        lines.append(
            f"  {way['way']:46}{table['tuples'] / seconds:10.1f}{table['tokens'] / seconds:11,.0f}"
            f"{published / seconds:9.1f}x{table['flops'] / seconds / report['matmul_flops']:7.0%}"
            f"{way['peak_bytes'] / GIB:7.1f}{way['parts']:7}{way['waits']:7}"
            f"{share(way, 'matmul'):>8}{share(way, 'attention'):>6}{share(way, OTHER):>7}"
            f"{share(way, 'communication'):>6}{share(way, IDLE):>6}{way['loss']:9.4f}"
        )
    return lines


def share(way: dict, kind: str) -> str:
    """Of a way's time, as a table has it; "-" where the profiler saw nothing."""
    return f"{way['shares'][kind]:.0%}" if way["shares"] else "-"


def run_lines(run: dict, report: dict) -> list[str]:
    """A run that was left alone, and one that was killed."""
    share = run["tokens_per_second"] * run["flops_per_token"] / report["matmul_flops"]
    lines = [
        f"run.py, {run['size']}: {run['steps']} steps of {run['tuples']} tuples, {run['step_seconds']:.3f} s each, the "
        f"first after {run['start_seconds']:.0f} s; {run['tuples_per_second']:.1f} tuples/s, "
        f"{run['tokens_per_second']:,.0f} tokens/s, MFU {share:.0%}, {run['peak_gib']:.1f} GiB"
    ]
    for state in run["states"]:
        lines.append(
            f"  state after step {state['step']}: {state['megabytes']:,.0f} MB in {state['seconds']:.1f} s; training "
            f"waited {state['waited_seconds']:.2f} s by its own words, {_stall(state)}"
        )
    for folder in run["folders"]:
        lines.append(f"  model folder and state after step {folder['step']}: {_stall(folder)}")
    same = "the same bits" if run["same_bits"] else "other bits"
    lines.append(
        f"  killed after step {run['killed_after_step']}, went on after step {run['resumed_after_step']}: losses "
        f"{run['largest_loss_difference']:.1e} off at most, {same} at the end"
        f"{', asked to be deterministic' if run['deterministic'] else ''}"
    )
    return lines


def _stall(save: dict) -> str:
    if save["stall_seconds"] is None:
        return "no step came after it"
    return f"the next step came {save['stall_seconds']:.2f} s late"
