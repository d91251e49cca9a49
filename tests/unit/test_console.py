"""Console: tables, units, and progress that is plain text where nobody watches."""

import io
import os
import sys
import threading

import pytest

from earthshine import console


def test_table_aligns_numbers_right_and_text_left():
    assert console.table(["name", "n"], [["a", 1], ["long", 200], ["", "-1.5e3"]]) == (
        "name       n\n----  ------\na          1\nlong     200\n      -1.5e3"
    )


def test_table_without_rows():
    assert console.table(["a", "bc"], []) == "a  bc\n-  --"


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB"), (3 << 40, "3.0 TiB")]
)
def test_human_bytes(n, text):
    assert console.human_bytes(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(7, "7"), (999, "999"), (1234, "1.23k"), (692_036_928, "692.04M"), (999_996, "1.00M"), (2e12, "2.00T")],
)
def test_human_count(n, text):
    assert console.human_count(n) == text


@pytest.mark.parametrize(
    ("s", "text"), [(0.25, "0.25s"), (9.4, "9.4s"), (59.6, "1m00s"), (61, "1m01s"), (7500, "2h05m"), (90000, "1d01h")]
)
def test_human_seconds(s, text):
    assert console.human_seconds(s) == text


def test_one_thing_is_singular():
    assert [console.counted(n, "file") for n in (0, 1, 2, 1024)] == ["0 files", "1 file", "2 files", "1,024 files"]


def test_log_is_one_plain_line_on_stderr(capsys):
    console.log("half [red]done[/red] 1/2")
    captured = capsys.readouterr()
    assert captured.err == "half [red]done[/red] 1/2\n"
    assert captured.out == ""


def test_plain_progress_is_quiet_until_its_interval(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress("copying", 4096, "B") as bar:
        bar.advance(1024)
        now[0] += console.PLAIN_LINE_SECONDS
        bar.advance(1024, "file b")
        now[0] += 1
        bar.advance(2048)
    assert capsys.readouterr().err.splitlines() == [
        "copying:  50%  2.0 KiB/4.0 KiB  eta 10s  file b",
        "copying: 4.0 KiB/4.0 KiB in 11s  file b",
    ]


def test_progress_ends_its_line_when_the_work_fails(capsys):
    with pytest.raises(RuntimeError, match="broken"), console.progress("work", 0, "rows") as bar:
        bar.advance(3)
        raise RuntimeError("broken")
    assert capsys.readouterr().err.startswith("work: 3 rows in")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_is_drawn_and_its_thread_ends(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    before = threading.active_count()
    with console.progress("converting", 10, "tensors") as bar:
        bar.advance(10, "[last]")
        console.log("a line [above] the bar")
    assert threading.active_count() == before
    assert "converting" in screen.getvalue()
    assert "10/10 tensors" in screen.getvalue()
    assert "[last]" in screen.getvalue()
    assert "a line [above] the bar" in screen.getvalue()
    assert "\x1b[3" not in screen.getvalue(), "NO_COLOR must be honoured"


def test_a_log_that_nobody_reads_any_more_ends_nothing(monkeypatch):
    """stderr is a pipe whose reader has gone, as after `2>&1 | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in range(3):
            console.log("unread")
        with console.progress("work", 2) as bar:
            bar.advance(2)
        monkeypatch.undo()
        stream.write("nothing is left to fail at the exit")


def test_a_lost_terminal_ends_nothing(monkeypatch):
    class Lost(io.StringIO):
        def isatty(self):
            return True

        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Lost())
    console.log("unread")
    with console.progress("work", 2) as bar:
        bar.advance(2)


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_process_without_stderr_logs_nothing(monkeypatch, stream):
    if stream:
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    console.log("unread")
    with console.progress("work", 2) as bar:
        bar.advance(2)


EVIL = "a\x1b]0;owned\x07\x1b[2J\rb\x9bm\u202ec\u2028d\udcff"
SHOWN = "a\\x1b]0;owned\\x07\\x1b[2J\\rb\\x9bm\\u202ec\\u2028d\\udcff"


def test_what_a_terminal_would_obey_is_spelled_out():
    assert console.printable(EVIL) == SHOWN
    assert (
        console.printable("lines\nand\ttabs, \u00fc \u4f60 \U0001f319") == "lines\nand\ttabs, \u00fc \u4f60 \U0001f319"
    )
    assert console.printable("a\nb\tc", one_line=True) == "a\\nb\\tc"


@pytest.mark.parametrize("tty", [True, False])
def test_log_lines_and_progress_titles_are_printable(monkeypatch, tty):
    err = io.StringIO()
    monkeypatch.setattr(err, "isatty", lambda: tty)
    monkeypatch.setattr(sys, "stderr", err)
    console.log(EVIL)
    with console.progress(EVIL + "\n2026 forged", 1):
        pass
    text = err.getvalue()
    assert SHOWN in text and "\x1b]0" not in text and "\x1b[2J" not in text and "\x07" not in text
    assert not any(line.startswith("2026") for line in text.splitlines())


def test_results_are_printable_on_a_terminal_and_whole_elsewhere(monkeypatch):
    for tty, want in ((True, SHOWN), (False, EVIL)):
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda tty=tty: tty)
        monkeypatch.setattr(sys, "stdout", out)
        with console.printable_stdout():
            print(EVIL)
            sys.stdout.flush()
        assert out.getvalue() == want + "\n" and sys.stdout is out
