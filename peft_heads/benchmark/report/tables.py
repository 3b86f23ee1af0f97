"""A table of means and deviations as Markdown, CSV, LaTeX and plain text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby


MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A column: its name, the heading above all columns of its `group`, and its decimals."""

    name: str
    group: str = ""
    decimals: int = 1


@dataclass(frozen=True)
class Cell:
    """A mean, and its standard deviation where there is one; a missing mean is shown as a dash."""

    mean: float | None
    std: float | None = None

    def text(self, decimals: int) -> str:
        if self.mean is None:
            return MISSING
        return f"{self.mean:.{decimals}f}" + ("" if self.std is None else f" ± {self.std:.{decimals}f}")


@dataclass(frozen=True)
class TableRow:
    """A labelled row of `{column name: cell}` in a section of the table; a missing cell is shown as a dash."""

    section: str
    label: str
    cells: dict[str, Cell]

    def texts(self, columns: Iterable[Column]) -> list[str]:
        return [self.cells.get(column.name, Cell(None)).text(column.decimals) for column in columns]


@dataclass(frozen=True)
class Table:
    """Rows, and the notes below them."""

    title: str
    columns: list[Column]
    rows: list[TableRow]
    notes: list[str]


def to_markdown(table: Table) -> str:
    """A pipe table under its title, section names in bold, notes as a list."""
    lines = [f"### {table.title}", ""]
    lines.append(_pipes(["", *(column.name for column in table.columns)]))
    lines.append(_pipes([":--", *("--:" for _ in table.columns)]))
    for section, rows in groupby(table.rows, key=lambda row: row.section):
        lines.append(_pipes([f"**{_escape_markdown(section)}**", *("" for _ in table.columns)]))
        lines += [_pipes([_escape_markdown(row.label), *row.texts(table.columns)]) for row in rows]
    lines += ["", *(f"- {_escape_markdown(note)}" for note in table.notes)]
    return "\n".join(lines).rstrip() + "\n"


def to_text(table: Table, columns: list[Column]) -> str:
    """Some columns, aligned, for a terminal; no notes. Words with which all labels of a section begin are in its title."""
    sections = []
    for section, rows in groupby(table.rows, key=lambda row: row.section):
        rows = list(rows)
        words = [row.label.split(" ") for row in rows]
        same = [len(set(place)) == 1 for place in zip(*words, strict=False)]
        common = words[0][: (*same, False).index(False)] if len(rows) > 1 else []
        labels = [" ".join(label[len(common) :]) or "–" for label in words]
        sections.append((" ".join([f"{section}:", *common]), labels, [row.texts(columns) for row in rows]))
    width = max([len(label) for _, labels, _ in sections for label in labels], default=0)
    widths = [
        max([len(column.name), *(len(texts[i]) for _, _, rows in sections for texts in rows)])
        for i, column in enumerate(columns)
    ]

    def line(label: str, texts: list[str]) -> str:
        return "  ".join(
            [label.ljust(width), *(text.rjust(w) for text, w in zip(texts, widths, strict=True))]
        ).rstrip()

    lines = [table.title, line("", [column.name for column in columns])]
    for title, labels, rows in sections:
        lines += ["", title, *(line(label, texts) for label, texts in zip(labels, rows, strict=True))]
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """Unrounded means, and a column `… std` beside every column that has deviations; empty where there is none."""
    with_std = {
        name
        for row in table.rows
        for name, cell in row.cells.items()
        if cell.mean is not None and cell.std is not None
    }
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = ["section", "label"]
    for column in table.columns:
        header += [column.name] + ([f"{column.name} std"] if column.name in with_std else [])
    writer.writerow(header)
    for row in table.rows:
        values: list[object] = [row.section, row.label]
        for column in table.columns:
            cell = row.cells.get(column.name, Cell(None))
            values += [cell.mean] + ([cell.std] if column.name in with_std else [])
        writer.writerow(["" if value is None else value for value in values])
    return buffer.getvalue()


def to_latex(table: Table) -> str:
    r"""A `table*` that needs booktabs and graphicx; column names turned by 90 degrees, notes below."""
    groups = [(name, len(list(columns))) for name, columns in groupby(table.columns, key=lambda column: column.group)]
    width = len(table.columns) + 1
    lines = [
        r"\begin{table*}",
        r"\centering\tiny\setlength{\tabcolsep}{2pt}",
        rf"\caption{{{_escape_latex(table.title)}}}",
        rf"\begin{{tabular}}{{l{'c' * len(table.columns)}}}",
        r"\toprule",
    ]
    if any(name for name, _ in groups):
        heads = (rf"\multicolumn{{{span}}}{{c}}{{{_escape_latex(name)}}}" for name, span in groups)
        lines.append(" & ".join(["", *heads]) + r" \\")
    names = (rf"\rotatebox{{90}}{{{_escape_latex(column.name)}}}" for column in table.columns)
    lines.append(" & ".join(["", *names]) + r" \\")
    for section, rows in groupby(table.rows, key=lambda row: row.section):
        lines += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_escape_latex(section)}}}}} \\"]
        lines += [" & ".join(map(_escape_latex, [row.label, *row.texts(table.columns)])) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\raggedright {_escape_latex(note)}" for note in table.notes]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def _pipes(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape_markdown(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*").replace("_", r"\_")


_LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "×": r"$\times$",
}


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text)
