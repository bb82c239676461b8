"""Table of the results of the op, block and model suites: one line per case, at most 40 lines in all."""

from __future__ import annotations

import re
from typing import Any

from benchmarks.suites import OURS, Row

_MOST_CASES = 32
_NOISE = 0.03  # relative difference of two timings of the same code above which the table shows it


def table(result: dict[str, Any]) -> str:
    """Format the ceilings, and for each case and mode the time, the floor in percent of it, and the best comparator.

    For a model the MFU takes the place of the floor: operations in matrix products per second, in percent of the
    ceiling.

    "2.10x" after a comparator means that it takes 2.1 times our time. "±" is the difference of two timings of ours.
    """
    by_case: dict[tuple[str, str], list[Row]] = {}
    for row in result["rows"]:
        by_case.setdefault((row["case"], row["dtype"]), []).append(row)
    lines = [
        _ceilings(result["ceilings"]),
        f"{'case':<46}{'forward or inference':<44}forward + backward or training step",
        *(_line(case, dtype, rows) for (case, dtype), rows in list(by_case.items())[:_MOST_CASES]),
    ]
    if more := len(by_case) - _MOST_CASES:
        lines += [f"... and {more} more cases in the file"] if more > 0 else []
    if result["skipped"]:
        lines.append(f"no time left for {len(result['skipped'])}: {', '.join(result['skipped'])[:160]}")
    return "\n".join(lines)


def _ceilings(best: dict[str, float]) -> str:
    if not best:
        return "ceilings: not measured"
    rates = f"copy {best['copy_TBs']:.2f} TB/s, bf16 product {best['gemm_TFs']:.0f} TFLOP/s"
    return f"ceilings: {rates}, exp2 {best['exp2_Ts']:.2f}e12/s"


def _line(case: str, dtype: str, rows: list[Row]) -> str:
    label = f"{case} {'bf16' if dtype == 'bfloat16' else dtype}"
    wrong = next((row["why"] for row in rows if row["impl"] == OURS and not row["ok"]), None)
    if wrong:
        return f"{label:<46}NOT TIMED: {wrong.splitlines()[0]}"
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    line = f"{label:<46}" + "".join(f"{_cell([r for r in rows if r['mode'] == mode]):<44}" for mode in modes).rstrip()
    return line + ("" if rows[0].get("deterministic", True) else "  NOT DETERMINISTIC")


def _cell(rows: list[Row]) -> str:
    timed = {row["impl"]: row for row in rows if "ms" in row}
    ours = timed.pop(OURS)
    ms = ours["ms"]["median"]
    cell = f"{ms:.3f} ms"
    if "pct_floor" in ours["achieved"]:
        cell += f" {ours['achieved']['pct_floor']:.0f}%"
    if "mfu" in ours["achieved"]:
        cell += f" MFU {100 * ours['achieved']['mfu']:.0f}%"
    if (noise := abs(ours["ms"]["repeat_median"] / ms - 1)) > _NOISE:
        cell += f" ±{100 * noise:.0f}%"
    if timed:
        name, fastest = min(timed.items(), key=lambda item: float(item[1]["ms"]["median"]))
        cell += f", {re.sub('_patch[^ ]*', '', name)} {fastest['ms']['median'] / ms:.2f}x"
    return cell
