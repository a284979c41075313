"""What follows from the measured rows: ratios, the project's bars, and the hours of the paper's Figure 3."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.published import FIGURE_3, TABLE_1
from eval.tables import table

Row = dict[str, Any]

GIGABYTES = (10, 50, 100, 150, 200)
ALIGNMENT_GIGABYTES = 1


def find(rows: Iterable[Row], method: str, dtype: str) -> Row | None:
    """This project's row."""
    wanted = {"method": method, "dtype": dtype, "implementation": "elo"}
    return next((row for row in rows if wanted.items() <= {name: row[name] for name in wanted}.items()), None)


def pairs(rows: list[Row]) -> Iterator[tuple[str, Row, Row]]:
    """Rows to be set beside each other: ours and the other implementation of a method, ELO and our other methods."""
    for row in rows:
        if row["implementation"] != "elo":
            ours = find(rows, row["method"], row["dtype"])
            yield f"{row['dtype']} {row['method']} elo/{row['implementation']}", ours, row
    for row in rows:
        elo = find(rows, "elo", row["dtype"])
        if elo and row["method"] != "elo" and row["implementation"] == "elo":
            yield f"{row['dtype']} elo/{row['method']}", elo, row


def ratios(rows: list[Row]) -> dict[str, float]:
    """{"tokens_per_second fp32 elo elo/transformers": ..., "memory_bytes bf16 elo/full": ..., ...}."""
    return {
        f"{figure} {name}": a[figure] / b[figure]
        for name, a, b in pairs(rows)
        for figure in ("tokens_per_second", "memory_bytes")
    }


def bars(rows: list[Row], tokenization: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the project asks of itself, of those that the rows tell of: [{"bar", "figure", "least" or "most"}]."""
    found: list[dict[str, Any]] = []

    def add(bar: str, figure: float, least: float | None = None, most: float | None = None) -> None:
        passes = figure >= least if least is not None else figure <= most
        limit = {"least": least} if least is not None else {"most": most}
        found.append({"bar": bar, "figure": figure, **limit, "passes": passes})

    for name, a, b in pairs(rows):
        faster, memory = (a[figure] / b[figure] for figure in ("tokens_per_second", "memory_bytes"))
        method, implementation = b["method"], b["implementation"]
        if implementation != "elo":
            add(f"{name}: tokens/s", faster, least=2.0 if method == "elo" else 1.2)
            if method == "elo":
                add(f"{name}: peak memory", memory, most=0.5)
        elif method == "full":
            add(f"{name}: tokens/s, by count of FLOPs", faster, least=b["flops_per_token"] / a["flops_per_token"])
            add(f"{name}: peak memory", memory, most=1 / 3)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        elo = find(rows, "elo", dtype)
        if elo and dtype == "fp32":
            add(f"{dtype} elo: share of the matmul peak", elo["peak_share"], least=0.8)
        waiting = [row["parts"]["data"] for row in rows if row["dtype"] == dtype and row["implementation"] == "elo"]
        add(f"{dtype}: waiting for data, share of the time", max(waiting), most=0.01)
    for part in tokenization:
        add(f"tokenizing {part['file']}: MB/s a core, elo/tiktoken", part["ratio"], least=0.9)
        if part["processes"] > 1:
            add(
                f"tokenizing {part['file']}: {part['processes']} processes over 1, a process",
                part["scaling"] / part["processes"],
                least=0.9,
            )
    return found


def figure3(rows: list[Row], dtype: str, bytes_per_token: float) -> dict[str, Any]:
    """Hours of each method over gigabytes of text at the measured tokens/s, as eval.figures.plot draws them.

    As in the paper, ELO is followed by full training on one gigabyte, which counts among its gigabytes. The paper's
    hours are of other hardware and another model; they are extended in proportion from 10 GB of full training, with
    the ratios of its Figure 3.
    """
    speeds = {method: find(rows, method, dtype)["tokens_per_second"] for method in ("elo", "full", "lora")}
    per_gb = {method: 1e9 / bytes_per_token / speed / 3600 for method, speed in speeds.items()}
    hours = {method: [gigabytes * each for gigabytes in GIGABYTES] for method, each in per_gb.items()}
    alignment = ALIGNMENT_GIGABYTES * per_gb["full"]
    hours["elo"] = [per_gb["elo"] * (size - ALIGNMENT_GIGABYTES) + alignment for size in GIGABYTES]

    (*_, full_10), (*_, elo_9), (*_, alignment_1) = TABLE_1["Llama-3.1-8B"]
    faster = {method: [ratios.get(size) for size in GIGABYTES] for method, ratios in FIGURE_3.items()}
    full = [full_10 * size / 10 for size in GIGABYTES]
    elo = [hours / ratio if ratio else None for hours, ratio in zip(full, faster["full"], strict=True)]
    elo[0] = elo_9 + alignment_1
    lora = [hours * ratio if ratio else None for hours, ratio in zip(elo, faster["lora"], strict=True)]
    return {
        "dtype": dtype,
        "bytes_per_token": bytes_per_token,
        "gigabytes": list(GIGABYTES),
        "hours": hours,
        "paper": {"elo": elo, "full": full, "lora": lora},
        "faster_than": {
            method: [other / elo for other, elo in zip(hours[method], hours["elo"], strict=True)]
            for method in ("full", "lora")
        },
        "paper_faster_than": faster,
    }


# ---- as text


def rows_text(rows: list[Row]) -> str:
    head = ["method", "implementation", "dtype", "tokens/s", "slowest", "fastest", "memory GB", "of peak"]
    lines = [[*head, "data", "forward", "backward", "optimizer"]]
    for row in rows:
        rates = [f"{row[name]:.1f}" for name in ("tokens_per_second", "slowest", "fastest")]
        parts = [f"{row['parts'][name]:.1%}" for name in ("data", "forward", "backward", "optimizer")]
        memory = f"{row['memory_bytes'] / 1e9:.3f}"
        names = [row["method"], row["implementation"], row["dtype"]]
        lines.append([*names, *rates, memory, f"{row['peak_share']:.1%}", *parts])
    return table(lines, names=3)


def bars_text(found: list[dict[str, Any]]) -> str:
    lines = [["bar", "figure", "asked", ""]]
    for bar in found:
        asked = f">= {bar['least']:.2f}" if "least" in bar else f"<= {bar['most']:.2f}"
        verdict = "passes" if bar["passes"] else "falls short"
        lines.append(
            [bar["bar"], f"{bar['figure']:.4f}" if "data" in bar["bar"] else f"{bar['figure']:.2f}", asked, verdict]
        )
    return table(lines)


def figure3_text(figure: dict[str, Any]) -> str:
    sizes = figure["gigabytes"]
    lines = [["hours", *(f"{size} GB" for size in sizes)]]
    for label, hours in (("", figure["hours"]), (", paper", figure["paper"])):
        lines += [[method + label, *(number(value) for value in values)] for method, values in hours.items()]
    for label, faster in (("", figure["faster_than"]), (", paper", figure["paper_faster_than"])):
        lines += [[f"{method}/elo{label}", *(number(value) for value in values)] for method, values in faster.items()]
    return table(lines)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def tokenization_text(parts: list[dict[str, Any]]) -> str:
    lines = [["tokenizing", "MB", "elo MB/s", "tiktoken MB/s", "elo/tiktoken", "processes", "times faster"]]
    for part in parts:
        figures = [part["bytes"] / 1e6, part["elo_mb_per_second"], part["tiktoken_mb_per_second"], part["ratio"]]
        lines.append(
            [part["file"], *(f"{figure:.2f}" for figure in figures), str(part["processes"]), number(part["scaling"])]
        )
    return table(lines)
