"""The log of a run: the terminal and log.jsonl."""

import json

from nanorecur.run_log import RunLog


def run_log(folder, iter_num=0, is_first=True, **options):
    config = dict(out_dir=str(folder), eval_only=False, wandb_log=False, max_iters=10)
    return RunLog({**config, **options}, iter_num, is_first)


def lines(folder):
    path = folder / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_entry_is_a_line_of_json_and_its_text_is_printed(tmp_path, capsys):
    log = run_log(tmp_path)
    for number in range(2):
        log.write({"iter": number, "loss": 0.5}, f"iter {number}")
        log.step_done()
    log.close()
    assert lines(tmp_path) == [{"iter": 0, "loss": 0.5}, {"iter": 1, "loss": 0.5}]
    assert capsys.readouterr().out == "iter 0\niter 1\n"


def test_a_run_that_goes_on_cuts_what_it_will_write_again(tmp_path):
    log = run_log(tmp_path)
    for number in range(5):
        log.write({"iter": number}, "")
    run_log(tmp_path, iter_num=3).write({"iter": 3, "again": True}, "")
    assert lines(tmp_path) == [{"iter": 0}, {"iter": 1}, {"iter": 2}, {"iter": 3, "again": True}]


def test_other_processes_write_and_print_nothing(tmp_path, capsys):
    log = run_log(tmp_path, is_first=False)
    log.write({"iter": 0}, "text")
    log.print("text")
    assert lines(tmp_path) == []
    assert capsys.readouterr().out == ""


def test_eval_only_prints_and_writes_nothing(tmp_path, capsys):
    run_log(tmp_path, eval_only=True).write({"iter": 0}, "text")
    assert lines(tmp_path) == []
    assert capsys.readouterr().out == "text\n"


def test_on_a_terminal_text_is_written_above_a_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    log = run_log(tmp_path, iter_num=3)
    assert (log.bar.n, log.bar.total) == (3, 10)
    log.print("text")
    log.step_done()
    assert log.bar.n == 4
    log.close()
    assert "text\n" in capsys.readouterr().out
