"""What the answers decide: a rule each, fixed before anything was measured."""

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.measuring import Row

PRESENT, WHOLE, FP8 = "present form", "torch, whole logits", "row blocks, fp8"  # of B
FLASH = "flash, deterministic"  # of C


class MissingError(Exception):
    """A rule has no answer to go by."""


def of(rows: list[Row], question: str, field: str, **values: Any) -> list[Row]:
    """A question's rows that have this field, and these values. Raises MissingError if there are none."""
    found = [row for row in rows if row["question"] == question and field in row and values.items() <= row.items()]
    if not found:
        raise MissingError(f"{question} has no answer")
    return found


def equal_bits(rows: list[Row]) -> tuple[str, bool]:
    checked = [row for row in rows if row["question"] == "G" or row.get("form") == PRESENT]
    unequal = [row["case"] for row in checked if row.get("equal_bits") is False]
    if not unequal:
        of(rows, "B", "equal_bits", form=PRESENT), of(rows, "G", "equal_bits")
    return f"unequal: {'; '.join(unequal)}" if unequal else "all equal", bool(unequal)


def other_loss(rows: list[Row]) -> tuple[str, bool]:
    present = max(of(rows, "B", "ms", form=PRESENT), key=lambda row: row["tokens"])
    # What is as exact, repeats itself, and holds no tokens x vocabulary logits.
    others = [
        row
        for row in of(rows, "B", "ms", tokens=present["tokens"])
        if row["form"] != WHOLE and row["equal_bits"] and row["relative_error"] <= 1.5 * present["relative_error"]
    ]
    best = min([*others, present], key=lambda row: row["ms"])
    saved = present["ms"] - best["ms"]
    return f"{best['case']}: {saved:.1f} ms less than {present['ms']:.1f}", saved >= 5


def slow_flash(rows: list[Row]) -> tuple[str, bool]:
    (flash,) = of(rows, "C", "backward_tflops", case=FLASH)
    return f"{flash['backward_tflops']:.0f} TFLOP/s", flash["backward_tflops"] < 200


def fp8_head(rows: list[Row]) -> tuple[str, bool]:
    bf16 = {row["product"]: row["tflops"] for row in of(rows, "A", "tflops")}
    fp8 = [row for row in of(rows, "D", "tflops") if row["product"] in bf16.keys() - {"square"}]
    best = max(((row["tflops"] / bf16[row["product"]], row["case"]) for row in fp8), default=(0.0, "none"))
    errors = [row["relative_error"] for row in rows if row.get("form") == FP8 and "relative_error" in row]
    known = f"; the head's gradient is off by {max(errors):.1%}" if errors else ""
    return f"{best[1]}: {best[0]:.2f} times{known}", best[0] > 1.5


def share(kind: str, limit: float) -> Callable[[list[Row]], tuple[str, bool]]:
    def judge(rows: list[Row]) -> tuple[str, bool]:
        row = next((row for row in of(rows, "E", "split") if row["case"].startswith("ELO")), None)
        if row is None:
            raise MissingError("E has no answer of ELO")
        return f"{row['split'][kind]:.1%} of {row['case']}", row["split"][kind] > limit

    return judge


# What is asked, who judges it, what is done if so and if not.
RULES = (
    ("two calls or a resumed run give unequal bits", equal_bits, "equal tiles before anything else", "all is well"),
    ("another loss, as exact, saves 5 ms", other_loss, "adopt it", "leave the loss as it is"),
    ("flash's deterministic backward is under 200 TFLOP/s", slow_flash, "offer FA3", "leave attention as it is"),
    ("fp8 is above 1.5 times bf16 in the head", fp8_head, "offer the fp8 head", "keep the head in bf16"),
    ("idle above 1.5%", share("idle", 0.015), "find what the GPU waits for", "nothing to gain"),
    ("copies above 4%", share("copies", 0.04), "give --gather-once", "nothing to gain"),
)


def decide(rows: list[Row]) -> list[dict[str, str]]:
    """{"rule", "found", "decision"} of each."""
    decisions = []
    for rule, judge, do, leave in RULES:
        try:
            found, holds = judge(rows)
            decision = do if holds else leave
        except MissingError as missing:
            found, decision = str(missing), "not decided"
        decisions.append({"rule": rule, "found": found, "decision": decision})
    return decisions
