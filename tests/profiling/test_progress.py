"""The progress line."""

import io

from profiling.timing import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_time_left_from_what_was_needed_so_far():
    now = [0.0]
    stream = Terminal()
    progress = Progress(10, stream, lambda: now[0])
    progress.show(0, "first")
    now[0] = 30.0
    progress.show(4, "fifth")
    first, second = stream.getvalue().split("\r")[1:]
    assert first == f"[{' ' * 24}] 0/10   ?:?? left  first"
    assert second.rstrip() == f"[{'=' * 9}{' ' * 15}] 4/10   0:45 left  fifth"
    progress.end()
    assert stream.getvalue().endswith(" \r")


def test_a_file_gets_a_line_now_and_then():
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(100, stream, lambda: now[0])
    for done in range(30):
        now[0] = done
        progress.show(done, f"case {done}")
    progress.end()
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["0", "10", "20"]
