"""The sections on performance: from the newest measured run."""

import pytest

from profiling.readme_table import BEGIN, END, HEADLINES, ROOT, main, replaced, section, with_layers
from profiling.results import ResultsError, Row, Run
from profiling.timing import Timing
from tests.profiling.sample_run import sample_run


def modelled(fraction=0.66):
    row = Row("relu forward 8x8 float32", "relu", "forward", "float32", [8, 8], False, 600, 900)
    row.model = {"gpu": "H200", "bytes": 906, "fraction": fraction, "limit": "issue", "launches": [{}]}
    return Run("modelled", {"commit": "abc"}, rows=[row])


def measured(date, us=2.0):
    row = Row("relu forward 8x8 float32", "relu", "forward", "float32", [8, 8], False, 3_000_000, 3_000_000)
    row.timings = {"ours": Timing(us, us, us, 9), "torch": Timing(3.0, 3.0, 3.0, 9), "copy": Timing(1.0, 1.0, 1.0, 9)}
    facts = {"gpu": "GPU X", "driver": "1", "cuda": "13.0", "cupy": "14", "torch": "2.1", "commit": "abc"}
    return Run("measured", facts | {"date": date}, 3000.0, [row])


def test_the_newest_measured_run_with_its_prediction(tmp_path):
    modelled().save(tmp_path / "modelled.json")
    measured("2026-01-01T00:00:00Z", us=9.0).save(tmp_path / "z-older" / "bench.json")
    measured("2026-02-01T00:00:00Z").save(tmp_path / "a-newer" / "bench.json")
    text = section(tmp_path)
    assert "Measured on GPU X: driver 1, CUDA 13.0, CuPy 14,\nPyTorch 2.1, commit abc, 2026-02-01." in text
    assert "| | µs | of copy | modelled | x PyTorch |" in text
    # 2 us, where a copy takes 1 and PyTorch 3.
    assert "| relu forward, 8x8 float32 | 2.0 | 0.50 | 0.66 | 1.50 |" in text


def test_emulated_runs_are_never_published(tmp_path):
    emulated = measured("2026-03-01T00:00:00Z")
    emulated.kind = "emulated"
    emulated.save(tmp_path / "run" / "bench.json")
    with pytest.raises(ResultsError, match="holds no measured run"):
        section(tmp_path)


def test_wrong_results_are_named(tmp_path):
    run = measured("2026-01-01T00:00:00Z")
    run.rows.append(Row("max_pool", "max_pool", "forward", "float32", [8], False, 1, 1, correct=False))
    run.save(tmp_path / "run" / "bench.json")
    assert section(tmp_path).endswith("Wrong, and therefore not timed: max_pool.")


def test_every_case_has_a_line(tmp_path):
    sample_run().save(tmp_path / "run" / "bench.json")
    lines = [line for line in section(tmp_path).splitlines() if line.startswith("| ") and "bfloat16" in line]
    assert len(lines) == len({(row.op, row.direction, row.channels_last) for row in sample_run().rows})


def test_the_readme_has_the_headlines_alone(tmp_path):
    sample_run().save(tmp_path / "run" / "bench.json")
    lines = [line for line in section(tmp_path, headlines=True).splitlines() if "bfloat16" in line]
    assert [tuple(line.split(",")[0].removeprefix("| ").split()) for line in lines] == list(HEADLINES)
    assert len(HEADLINES) == 7
    assert set(lines) <= set(section(tmp_path).splitlines())


def test_both_pages_and_the_picture_are_written(tmp_path, capsys):
    sample_run().save(tmp_path / "run" / "bench.json")
    pages = [tmp_path / "README.md", tmp_path / "page.md"]
    for page in pages:
        page.write_text(f"{BEGIN}\n{END}\n", encoding="utf-8")
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for picture in pictures:
        options = ["--results", tmp_path, "--readme", pages[0], "--page", pages[1], "--picture", picture]
        assert main([str(option) for option in options]) == 0
    assert capsys.readouterr().out.count("rewritten") == 2
    assert ["lp_pool" in page.read_text(encoding="utf-8") for page in pages] == [False, True]
    one, two = (picture.read_text(encoding="utf-8") for picture in pictures)
    assert one == two
    for op, direction in HEADLINES:
        assert f"{op} {direction}" in one
    assert "lp_pool" not in one


def test_only_the_section_changes():
    text = f"# Title\n\n{BEGIN}\nold\n{END}\n\nmore\n"
    assert replaced(text, "new") == f"# Title\n\n{BEGIN}\nnew\n{END}\n\nmore\n"
    with pytest.raises(ResultsError, match="the page needs the lines"):
        replaced("# Title\n", "new")


def test_a_file_of_another_version_is_one_line(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bench.json").write_text('{"schema": 7}')
    assert main(["--results", str(tmp_path)]) == 2
    assert "has version 7 of the results, this is version 2" in capsys.readouterr().err


@pytest.mark.parametrize(("page", "headlines"), [("README.md", True), ("docs/performance.md", False)])
def test_the_pages_are_up_to_date(page, headlines):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert replaced(text, section(ROOT / "profiling" / "results", headlines)) == text, "run make results"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readmes_name_the_layers_of_the_catalogue(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert with_layers(text) == text, "run make results"
    assert with_layers(text.replace("`LPPool1d`, ", "")) == text
