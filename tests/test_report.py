"""How reports are kept and shown."""

import json

import pytest

from compresso.report import Report, rows_to_csv, show_report, show_rows


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def lines(capsys):
    """What stderr shows, a list of cells per line."""
    shown = capsys.readouterr()
    assert shown.out == ""
    bare = shown.err.replace("│", "|").replace("┃", "|")
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in bare.splitlines()]


ORIGINAL = {"checkpoint": "original", "size": 2_000_000, "ppl": 9.7614, "ppl_se": 0.1234}
COMPRESSED = {
    "checkpoint": "quantize-gptq [x]",
    "size": 600_000,
    "bits_per_weight": 4.2512,
    "ppl": 9.9182,
    "ppl_se": 0.1301,
    "kl": 0.01234,
    "kl_se": 0.00056,
    "top1_agreement": 0.9512,
    "top1_agreement_se": 0.002,
}


def test_an_evaluation_is_shown_side_by_side(capsys):
    rows = [{**ORIGINAL, "continuation": "a"}, {**COMPRESSED, "continuation": "b [/]"}]
    show_report(Report(rows=rows, summary={"prompt": "p [bold]"}), "eval")
    shown = lines(capsys)
    assert ["original", "quantize-gptq [x]"] in shown
    assert ["size", "2 MB", "600 kB"] in shown
    assert ["bits per weight", "-", "4.25"] in shown
    assert ["perplexity", "9.761 ± 0.1234", "9.918 ± 0.1301"] in shown
    assert ["KL to the original (nats)", "-", "0.0123 ± 0.0006"] in shown
    assert ["same top token", "-", "95.1% ± 0.2%"] in shown
    assert not any(row[0].startswith("decode") for row in shown)
    text = [row[0] for row in shown]
    assert "prompt: p [bold]" in text and "b [/]" in text
    assert text.index("original goes on:") < text.index("quantize-gptq [x] goes on:")


def test_one_checkpoint_has_one_sample(capsys):
    show_report(Report(rows=[{**ORIGINAL, "continuation": "a"}]), "eval")
    assert sum(row[0] == "original goes on:" for row in lines(capsys)) == 1


SUMMARY = {"removed_blocks": [1], "empty": [], "bytes_after": 1500, "parameters": 53600, "x": {}}


def test_blocks_are_shown_and_linears_are_not(capsys):
    rows = [{"block": 0, "influence": 0.123456, "list": [1]}, {"block": 1}]
    show_report(Report(rows=rows, summary=SUMMARY), "prune")
    shown = lines(capsys)
    assert ["block", "influence"] in shown and ["0", "0.1235"] in shown
    assert ["removed blocks", "1"] in shown and ["empty", "none"] in shown
    assert ["bytes after", "1.5 kB"] in shown and ["parameters", "53,600"] in shown
    assert not any(row[0] == "x" for row in shown)
    show_report(Report(rows=[{"block": 0, "linear": "q"}], summary={"linears": 1}), "quantize")
    assert not any("q" in row for row in lines(capsys))


def test_a_report_is_kept_whole():
    report = Report(rows=[{"a": 1}], summary={"b": 2.5}, warnings=["c"], files={"plot": "x.png"})
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_rows_as_csv():
    assert rows_to_csv([]) == ""
    assert rows_to_csv([{"a": 1, "b": "x,y"}, {"c": 0.5}]) == 'a,b,c\n1,"x,y",\n,,0.5\n'


def test_rows_on_stdout_are_for_other_programs(capsys):
    show_rows([{"name": "a", "is": "b c"}, {"name": "d", "is": "e"}], "topic")
    assert capsys.readouterr().out == "a\tb c\nd\te\n"
