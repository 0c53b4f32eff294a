"""Charts are drawn, from what the rows say."""

import pytest

from profiling.charts import _bars, main, save_charts
from profiling.results import Run
from profiling.timing import Timing
from tests.profiling.sample_run import sample_run

pytest.importorskip("matplotlib")


def test_two_pictures(tmp_path):
    paths = save_charts(sample_run(), tmp_path / "new")
    assert [path.name for path in paths] == ["bars.png", "roofline.png"]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 10_000 < len(data) < 800_000


def test_bars_are_parts_of_the_copy():
    from matplotlib import pyplot

    run = sample_run()
    run.rows = run.rows[:1]
    row = run.rows[0]
    for name, us in {"ours": 1.0, "torch": 4.0}.items():
        row.timings[name] = Timing(us * row.floor_bytes / 3e6, 1.0, 1.0, 5)
    row.timings = {name: row.timings[name] for name in ("ours", "torch")}
    figure = _bars(pyplot, run, run.rows)
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([1.0, 0.25])
    pyplot.close(figure)


def test_nothing_to_draw(tmp_path):
    assert save_charts(Run("measured", {}), tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_a_run_from_elsewhere(tmp_path, capsys):
    run = sample_run()
    run.rows = run.rows[:3]
    run.save(tmp_path / "bench.json")
    assert main([str(tmp_path / "bench.json"), str(tmp_path / "pictures")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "pictures" / f"{name}.png") for name in ("bars", "roofline")
    ]
    assert (tmp_path / "pictures/bars.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(tmp_path / "nowhere.json"), str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err
