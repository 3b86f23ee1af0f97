import csv

from peft_heads.benchmark.report.tables import Cell, Column, Table, TableRow, to_csv, to_latex, to_markdown, to_text


TABLE = Table(
    "VTAB_1K",
    [Column("cifar", "natural"), Column("dtd", "natural"), Column("mean of tasks", "", 2)],
    [
        TableRow("ours", "lora r=8", {"cifar": Cell(72.04, 0.25), "mean of tasks": Cell(None)}),
        TableRow("published", "A|B & 5%_†", {"cifar": Cell(70.0), "dtd": Cell(71.26), "mean of tasks": Cell(70.635)}),
    ],
    ["seeds 0, 1", "– means *missing*"],
)


def test_markdown():
    assert to_markdown(TABLE) == (
        "### VTAB_1K\n"
        "\n"
        "|  | cifar | dtd | mean of tasks |\n"
        "| :-- | --: | --: | --: |\n"
        "| **ours** |  |  |  |\n"
        "| lora r=8 | 72.0 ± 0.2 | – | – |\n"
        "| **published** |  |  |  |\n"
        "| A\\|B & 5%\\_† | 70.0 | 71.3 | 70.64 |\n"
        "\n"
        "- seeds 0, 1\n"
        "- – means \\*missing\\*\n"
    )


def test_csv_keeps_all_digits():
    header, ours, published = csv.reader(to_csv(TABLE).splitlines())
    assert header == ["section", "label", "cifar", "cifar std", "dtd", "mean of tasks"]
    assert ours == ["ours", "lora r=8", "72.04", "0.25", "", ""]
    assert published == ["published", "A|B & 5%_†", "70.0", "", "71.26", "70.635"]


def test_latex():
    lines = to_latex(TABLE).splitlines()
    assert r"\begin{tabular}{lccc}" in lines and r"\caption{VTAB\_1K}" in lines
    assert r" & \multicolumn{2}{c}{natural} & \multicolumn{1}{c}{} \\" in lines
    assert r" & \rotatebox{90}{cifar} & \rotatebox{90}{dtd} & \rotatebox{90}{mean of tasks} \\" in lines
    assert r"lora r=8 & 72.0 $\pm$ 0.2 & -- & -- \\" in lines
    assert r"A|B \& 5\%\_$\dagger$ & 70.0 & 71.3 & 70.64 \\" in lines
    assert [line for line in lines if "multicolumn{4}" in line] == [
        r"\multicolumn{4}{l}{\emph{ours}} \\",
        r"\multicolumn{4}{l}{\emph{published}} \\",
    ]
    assert r"\par\raggedright seeds 0, 1" in lines
    groups = [line for line in to_latex(Table("t", [Column("a")], [], [])).splitlines() if "multicolumn" in line]
    assert groups == []


def test_plain_text():
    rows = [
        TableRow("ours", "lora r=8 scale=1", {"a": Cell(51.25, 1.0)}),
        TableRow("ours", "lora r=8 scale=10", {"a": Cell(7.0), "b": Cell(3.0)}),
        TableRow("published", "LoRA (HEAT, Table 1)", {"b": Cell(4.04)}),
    ]
    text = to_text(Table("t", [Column("a"), Column("b"), Column("c")], rows, ["a note"]), [Column("a"), Column("b")])
    assert text.splitlines() == [
        "t",
        "                               a    b",
        "",
        "ours: lora r=8",
        "scale=1               51.2 ± 1.0    –",
        "scale=10                     7.0  3.0",
        "",
        "published:",
        "LoRA (HEAT, Table 1)           –  4.0",
    ]
