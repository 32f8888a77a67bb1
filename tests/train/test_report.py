"""The report says what the numbers say, also when a claim fails, and draws every figure."""

import json
import re
import struct

import demo_results
import matplotlib.pyplot as plt
import pytest
from demo_results import needles, results, write_folder
from rich.console import Console

from train import figures, report
from train.ladder import ASKED, rungs


def size_of_png(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("demo") / "run", seeds=2)
    report.write(folder)
    return folder


def test_every_figure_is_drawn_and_shown(folder):
    text = (folder / "report.md").read_text()
    shown = set(re.findall(r"\(figures/(\w+)\.png\)", text))
    drawn = {path.stem for path in (folder / "figures").iterdir()}
    expected = {"training", "ladder", "positions", "layers", "sweep", "cost", "selection"}
    assert shown == drawn == expected
    for path in (folder / "figures").iterdir():
        width, height = size_of_png(path)
        assert 600 < width < 2600, path
        assert 300 < height < 1600, path


def test_many_layers_take_more_rows_not_a_wider_page(monkeypatch):
    monkeypatch.setattr(demo_results, "LAYERS", 5)
    figure = figures.positions(results())
    shown = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]
    plt.close(figure)
    assert [title for title in shown if title] == [f"Layer {layer}" for layer in range(5)]
    assert figure.get_size_inches()[0] < 13


def test_lessons_are_named(tmp_path):
    data = results()
    data["corpus"]["lessons"] = [
        {"kind": "loop", "length": 32},
        {"kind": "text", "length": 128},
        {"kind": "text", "length": 64},
    ]
    text = report.write(write_folder(tmp_path / "run", data=data)).read_text()
    assert "such documents of 64, 128 bytes, from short to long, fill rows of 128" in text
    assert "after lessons in looking up that are made up (loop)" in text


def test_the_report_says_what_does_not_hold(folder):
    text = (folder / "report.md").read_text()
    assert "1 of 12 do not hold" in text
    assert "- ... and within the 0.01 nat that is asked for at full scale" in text


def test_numbers_come_from_the_results(folder):
    text = (folder / "report.md").read_text()
    # Sparse: 2.210 and 2.214 of the two seeds; its gap to the control is 0.05 in both.
    assert "**2.212 ± 0.002 nats/byte**" in text
    assert "the gap is **0.050 ± 0.000** (standard error over rows: 0.010, 0.010)" in text
    assert "8 keys of up to 128** (6.2%" in text
    assert "Public domain." in text
    assert "321 s in all (text 1; dense 300)" in text
    # Measured: dense 1e-6 t, DSA 1e-7 t + 1.2e-6 min(t, 512): cheaper from 1024 on.
    assert "DSA is the cheaper one from 1024 keys on; at 16384 keys the ratio is 7.3" in text
    for stage in ("dense", "warmup", "sparse", "control"):
        assert f"`seed-0/{stage}/checkpoints`" in text


def test_other_numbers_make_another_report(tmp_path):
    data = results()
    for point in data["cost"]["measured"]:
        point["sparse"] = 1.0
    data["runs"][0]["ladder"]["warmed"]["cross_entropy"] = 2.62
    folder = write_folder(tmp_path / "run", data=data)
    text = report.write(folder).read_text()
    assert "DSA is nowhere the cheaper one" in text
    assert "- The warmed-up indexer loses at most 0.1 nat to the oracle" in text
    assert "2 of 12 do not hold" in text


def test_an_unfinished_run_has_no_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="has not finished"):
        report.write(tmp_path)


def test_terminal_tables():
    data = results(seeds=3)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(data))
    console.print(report.verdict_table(report.check(data)))
    console.print(report.sample_text(data["sample"]))
    text = console.export_text()
    assert "In the [beginning] was" in text  # brackets are text, not markup
    assert "3 seeds: mean ± half the range" in text
    assert "2.214" in text  # the sparse model
    assert "±0.004" in text
    assert "…" not in text
    assert text.count("yes") == 11
    assert text.count("NO") == 1


def test_results_are_json(tmp_path):
    data = results()
    assert json.loads(json.dumps(data)) == data


def test_needles_get_a_section_with_every_model_and_length(tmp_path):
    data = results() | {"implementations": {"dense_attention": "mosaic", "top": "xla (too wide)"}}
    data["runs"][0]["needles"] = needles()
    folder = write_folder(tmp_path / "run", data=data)
    text = report.write(folder).read_text()
    assert "## Retrieval" in text
    assert "Needles, and quotations if the model has learnt to look them up, make distant" in text
    assert "`dense_attention` mosaic; `top` xla (too wide)" in text
    cell = r"\| (\d\.\d+ ± \d\.\d+) "
    rows = re.findall(rf"^\| ([\w -]+) {cell}{cell}\|$", text, re.MULTILINE)
    # Four documents, 0.02 above, 0.02 below and twice at the mean: 0.02 sqrt(2 / 3 / 4).
    assert ("warmed-up indexer", "0.950 ± 0.008", "0.950 ± 0.008") in rows
    assert [row[0] for row in rows] == [rung.title for rung in rungs(ASKED)]
    assert "4 documents, so 12 answers, of each length" in text
    assert size_of_png(folder / "figures" / "needles.png")[0] > 600
    console = Console(width=80, record=True)
    console.print(report.needle_table(data))
    shown = console.export_text()
    assert "sparse-trained" in shown
    assert "…" not in shown
