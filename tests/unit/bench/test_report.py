import json
import os
import py_compile

from bench.report import Report, modules, summary


def test_summary_takes_the_nearest_rank():
    assert summary(range(1, 101)) == {"p50": 50.5, "p99": 99, "min": 1, "max": 100, "n": 100}
    assert summary([3]) == {"p50": 3, "p99": 3, "min": 3, "max": 3, "n": 1}


def test_goals_decide_the_exit_status(tmp_path, capsys):
    report = Report("x", "X beside Y", tmp_path)
    report.row("fast", [1, 2, 3], "ms", peer=[10, 10], ratio_at_most=0.5)
    report.row("plain", [1234], "s")
    assert report.finish() == 0
    assert "0.20 ×" in (out := capsys.readouterr().out)
    assert "≤ 0.5 ×" in out
    assert "MET" in out
    report.row("slow", [3], "s", at_most=2)
    assert report.finish() == 1
    assert "MISSED" in capsys.readouterr().out
    document = json.loads((tmp_path / "x.json").read_text())
    assert [row.get("met") for row in document["rows"]] == [True, None, False]


def test_throughput_has_a_lower_bound(tmp_path):
    report = Report("x", "X", tmp_path)
    report.row("direct", [9], "Gbit/s", peer=[10], ratio_at_least=0.95)
    assert not report.rows[0]["met"]


def test_ratios_of_rounds_count_and_what_is_absent_is_no_miss(tmp_path, capsys):
    report = Report("x", "X", tmp_path)
    rounds = [1.02, 1.0, 1.04, 1.03, 9.0]  # somebody else's load fell on one
    report.row("ours", [20], "µs", peer=[10], ratio_at_most=1.05, ratios=rounds)
    report.absent("theirs", "there is no such kernel")
    assert report.finish() == 0
    out = capsys.readouterr().out
    assert "1.030 × (1.020…1.040)" in out
    assert "not measured: there is no such kernel" in out


def test_a_report_says_if_a_start_compiles_what_it_measures(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("x = 1\n")
    assert modules(tmp_path) == "1 of 1 modules not compiled"
    py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    assert modules(tmp_path) == "modules compiled"
    os.utime(source, (1, 1))
    assert modules(tmp_path) == "1 of 1 modules not compiled"
