import errno
import json
import math
import os
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ds_roberta.errors import UserError
from ds_roberta.report.page import page, write_report
from ds_roberta.report.plots import METRICS, best, describe, draw
from ds_roberta.report.runs import flatten, read_runs

pytest.importorskip("matplotlib")
REPOSITORY = Path(__file__).parents[2]
BY_COLUMN = {metric.column: metric for metric in METRICS}
HOSTILE = "<script>alert('x')<&\" $_a$"


def write_run(folder, rows, tail="", **config):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    (folder / "config.json").write_text(json.dumps({"precision": "bf16", **config}))
    return folder


def steps(count, **metrics):
    """Rows of steps from 1 on; each metric is a function of the step."""
    return [{"global_step": step} | {k: f(step) for k, f in metrics.items()} for step in range(1, count + 1)]


def lines(figure):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]


class Cells(HTMLParser):
    """A page's table rows, its images' attributes and its tags."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.images, self.tags, self._in_cell = [], [], set(), False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "img":
            self.images.append(dict(attributes))
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self._in_cell = False

    def row(self, name):
        return next(row[1:] for row in self.rows if row[0] == name)


def test_the_plotted_numbers_are_those_of_the_metrics(tmp_path):
    a = write_run(tmp_path / "a", [{"global_step": 0, "eval_loss": 9.0}, *steps(3, loss=lambda s: 8 - s / 3)])
    b = write_run(tmp_path / "b", steps(40, loss=lambda s: 9 - s / 7))
    figure = draw(read_runs([a, b]), BY_COLUMN["loss"])
    assert lines(figure) == [
        ([1, 2, 3], [8 - s / 3 for s in (1, 2, 3)]),
        (list(range(1, 41)), [9 - s / 7 for s in range(1, 41)]),
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert lines(draw(read_runs([a, b]), BY_COLUMN["eval_loss"])) == [([0], [9.0])]


def test_a_run_keeps_its_colour_where_another_lacks_the_metric(tmp_path):
    a = write_run(tmp_path / "a", steps(3, loss=float))
    b = write_run(tmp_path / "b", steps(3, loss=float, mfu=lambda s: s / 10))
    runs = read_runs([a, b])
    loss, mfu = draw(runs, BY_COLUMN["loss"]), draw(runs, BY_COLUMN["mfu"])
    assert mfu.axes[0].lines[0].get_color() == loss.axes[0].lines[1].get_color()


def test_what_counts_know_is_dashed_lines_in_the_plot_of_the_held_out_loss(tmp_path):
    rows = [
        {"global_step": 0, "eval_loss": 9.0, "unigram_loss": 7.0, "neighbour_loss": 5.5},
        *steps(2, eval_loss=float),
    ]
    other = [*rows[:2], {**rows[2], "neighbour_loss": 5.0}]  # evaluated otherwise since it was resumed
    rts = steps(2, eval_loss=lambda s: 0.1 * s)
    folders = [write_run(tmp_path / name, of) for name, of in (("a", rows), ("b", rows), ("c", other), ("rts", rts))]
    runs = read_runs(folders)
    figure = draw(runs[:3], BY_COLUMN["eval_loss"])
    assert lines(figure)[3:] == [([0, 1], [loss, loss]) for loss in (7.0, 5.5, 5.0)]
    assert all(line.is_dashed() for line in figure.axes[0].lines[3:])
    labels = ["Unigram line 7.000", "Neighbour line 5.500 of a, b", "Neighbour line 5.000 of c"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c", *labels]
    assert all(f" {label}." in describe(runs[:3], BY_COLUMN["eval_loss"]) for label in labels)
    assert len(lines(draw(runs[3:], BY_COLUMN["eval_loss"]))) == 1
    cells = Cells(page(runs[1:], {}))
    assert (cells.row("Unigram line"), cells.row("Neighbour line")) == (
        ["7.0000", "7.0000", "–"],
        ["5.5000", "5.0000", "–"],
    )


def test_a_value_that_was_not_finite_is_a_gap(tmp_path):
    losses = {1: 3.0, 2: None, 3: 2.0}
    runs = read_runs([write_run(tmp_path / "a", steps(3, loss=losses.get))])
    [(xs, ys)] = lines(draw(runs, BY_COLUMN["loss"]))
    assert xs == [1, 2, 3]
    assert (ys[0], math.isnan(ys[1]), ys[2]) == (3.0, True, 2.0)
    assert best(BY_COLUMN["loss"], runs[0].series("loss")) == (3, 2.0)
    assert "between 2 and 3" in describe(runs, BY_COLUMN["loss"])


def test_the_loss_scale_is_shown_of_fp16_alone(tmp_path):
    rows = steps(2, loss=float, loss_scale=lambda s: 65536.0 / s)
    runs = read_runs([write_run(tmp_path / "bf16", rows), write_run(tmp_path / "fp16", rows, precision="fp16")])
    assert lines(draw(runs, BY_COLUMN["loss_scale"])) == [([1, 2], [65536.0, 32768.0])]
    assert "Loss scale" not in page(runs[:1], {})
    assert BY_COLUMN["loss_scale"].of(runs[0]) is None


def test_what_varies_by_decades_has_a_logarithmic_axis(tmp_path):
    wild = write_run(tmp_path / "wild", steps(4, grad_norm=lambda s: 10.0**s))
    calm = write_run(tmp_path / "calm", steps(4, grad_norm=float))
    zero = write_run(tmp_path / "zero", steps(4, grad_norm=lambda s: 10.0**s - 10))
    scales = [draw(read_runs([run]), BY_COLUMN["grad_norm"]).axes[0].get_yscale() for run in (wild, calm, zero)]
    assert scales == ["log", "linear", "linear"]


def test_the_page_shows_values_settings_and_results(tmp_path, caplog):
    caplog.set_level("INFO", "ds_roberta")
    config = {"batches": [{"train_batch_size": 64}], "versions": {"torch": "2.13"}}
    config["run"] = {"seed": 0, "objective": "rts"}
    a = write_run(
        tmp_path / "a", steps(3, loss=lambda s: abs(s - 2) + 0.5, consumed_tokens=lambda s: 1000 * s), **config
    )
    b = write_run(
        tmp_path / "b",
        steps(2, loss=float, mfu=lambda s: s / 10),
        **(config | {"run": {"seed": 7, "objective": "rts"}}),
    )
    (a / "results.json").write_text(json.dumps({"mnli": {"accuracy": 0.75, "runs": [1, 2]}}))
    (a / "rte").mkdir()
    tuned = {"learning_rate": 1e-5, "median": 0.625, "runs": [{"epochs": [{"accuracy": 0.375}]}]}
    (a / "rte/results.json").write_text(json.dumps({"settings": [tuned], "best": {"test": {"accuracy": 0.875}}}))
    (b / "deep").mkdir()
    (b / "deep/evaluation_best.json").write_text(json.dumps({"perplexity": 3.5}))
    output = tmp_path / "new/report.html"
    write_report([a, b], output)
    assert f"wrote {output}, and its plots into {tmp_path / 'new/report_plots'}" in caplog.text
    text = output.read_text()
    cells = Cells(text)
    assert cells.row("Loss") == ["1.5 (best: 0.5 at step 2)", "2 (best: 1 at step 1)"]
    assert cells.row("Model FLOPs utilisation") == ["–", "20.0% (best: 20.0% at step 2)"]
    assert cells.row("consumed_tokens") == ["3,000", "–"]
    assert cells.row("train_batch_size") == ["64", "64"]
    assert cells.row("seed") == ["0", "7"]
    assert cells.row("objective") == ["rts", "rts"]
    assert text.count('<tr class="differs">') == 1
    assert cells.row("torch (version)") == ["2.13", "2.13"]
    assert cells.row("mnli.accuracy") == ["0.75"]
    assert cells.row("mnli.runs.1") == ["2"]
    assert (cells.row("settings.0.median"), cells.row("best.test.accuracy")) == (["0.625"], ["0.875"])
    assert "0.375" not in text  # a fine-tuning's epochs
    assert cells.row("perplexity") == ["3.5"]
    assert "Not recorded by a." in text
    assert "Held-out loss (eval_loss)" in text.split("Not recorded: ")[1]
    images = {path.name: path.read_bytes() for path in (tmp_path / "new/report_plots").iterdir()}
    assert images.keys() == {"loss.png", "mfu.png"}
    assert all(image.startswith(b"\x89PNG") for image in images.values())
    assert [image["alt"].split(".")[0] for image in cells.images] == ["Loss by step", "Model FLOPs utilisation by step"]


def test_folders_of_fine_tuned_models_are_shown_alone_and_beside_runs(tmp_path):
    run = write_run(tmp_path / "run", steps(2, loss=float, unigram_loss=lambda s: 7.0))
    for name, accuracy in (("rte", 0.625), ("again", 0.875)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "roberta"}')
        (tmp_path / name / "results.json").write_text(json.dumps({"best": {"test": {"accuracy": accuracy}}}))
    worst = {"place": "dev, row 1", "text": "a", "gold": "x", "predicted": "y", "loss": 2.5}
    (tmp_path / "rte/error_analysis.json").write_text(json.dumps({"worst": [worst]}))
    write_report([tmp_path / "rte", tmp_path / "again"], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert Cells(text).row("best.test.accuracy") == ["0.625", "0.875"]
    assert Cells(text).row("2.5000") == ["x", "y", "a", "dev, row 1"]
    assert not any(part in text for part in ("<h2>Metrics", "<h2>Settings", "Not recorded", "roberta"))
    assert not (tmp_path / "r_plots").exists()
    write_report([tmp_path / "rte", run], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    cells = Cells(text)
    assert (cells.row("Loss"), cells.row("best.test.accuracy")) == (["2 (best: 1 at step 1)"], ["0.625"])
    assert "Not recorded by" not in text


def test_a_second_report_replaces_the_first(tmp_path):
    run = write_run(tmp_path / "a", steps(2, loss=float, mfu=float))
    other = write_run(tmp_path / "b", steps(2, loss=float))
    write_report([run], tmp_path / "r.html")
    write_report([other], tmp_path / "r.html")
    assert [path.name for path in (tmp_path / "r_plots").iterdir()] == ["loss.png"]
    assert "<h1>b</h1>" in (tmp_path / "r.html").read_text()


def test_a_page_that_the_disk_refuses_leaves_no_plots(tmp_path, monkeypatch):
    run, replace = write_run(tmp_path / "a", steps(2, loss=float)), os.replace

    def refuse(source, target):
        if Path(target).name == "r.html":
            assert (tmp_path / "new/r_plots").is_dir()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="No space left"):
        write_report([run], tmp_path / "new/r.html")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_names_and_values_are_text_and_never_markup(tmp_path):
    name = HOSTILE.replace("/", "")
    run = write_run(tmp_path / name, steps(2, loss=float), tail='{"br', run={"seed": HOSTILE})
    (run / "evaluation<b>.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    write_report([run], tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    cells = Cells(text)
    assert "script" not in cells.tags
    assert "b" not in cells.tags
    assert cells.row(HOSTILE) == [HOSTILE]
    assert cells.row("seed") == [HOSTILE]
    assert name in cells.images[0]["alt"]


@pytest.mark.parametrize("name", ["_hidden", "$x^{$", "n" * 300])
def test_every_name_has_its_line_in_the_legend(tmp_path, name):
    folder = write_run(tmp_path / name[:200], steps(2, loss=float))
    figure = draw(read_runs([folder]), BY_COLUMN["loss"])
    figure.canvas.draw()
    [text] = figure.legends[0].get_texts()
    assert text.get_text()[:6] == name[:6]
    assert text.get_window_extent().x1 <= figure.bbox.x1


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / parent / "tiny", steps(1, loss=float)) for parent in "ab"]
    assert [run.name for run in read_runs(folders)] == [str(folder) for folder in folders]
    with pytest.raises(UserError, match="given 2 times"):
        read_runs([folders[0], tmp_path / "b/../a/tiny"])


def test_a_broken_last_line_is_left_out_and_reported(tmp_path, caplog):
    run = write_run(tmp_path / "a", steps(2, loss=float), tail='{"global_step": 3, "lo')
    [read] = read_runs([run])
    assert read.series("loss").steps == (1, 2)
    assert "last line of metrics.jsonl (3)" in caplog.text
    write_report([run], tmp_path / "r.html")
    assert "last line of metrics.jsonl (3)" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("line", ["{", "[1]", "\n", '{"loss": 1}', '{"global_step": 2, "loss": "x"}', "\udcff"])
def test_a_line_broken_elsewhere_is_an_error_with_its_number(tmp_path, line):
    run = write_run(tmp_path / "a", steps(1, loss=float))
    with (run / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line.rstrip("\n") + '\n{"global_step": 3}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
        read_runs([run])


def test_folders_that_cannot_be_shown_are_refused(tmp_path):
    for folder, problem in (
        (tmp_path / "missing", "not the folder of a run"),
        (write_run(tmp_path / "empty", []), "no whole row"),
        (write_run(tmp_path / "torn", [], tail='{"glo'), "no whole row"),
    ):
        with pytest.raises(UserError, match=problem):
            write_report([folder], tmp_path / "r.html")
    run = write_run(tmp_path / "a", steps(1, loss=float))
    (run / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json' is not JSON"):
        read_runs([run])
    (run / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        read_runs([run])
    assert not (tmp_path / "r.html").exists()


def test_every_setting_that_differs_is_shown(tmp_path):
    settings = {"masking": {"copies": None}, "model": {"hidden_dropout_prob": 0.1}, "seed": 3}
    a = write_run(tmp_path / "a", steps(1, loss=float), run={**settings, "output_dir": "a"})
    settings |= {"masking": {"copies": 10}, "model": {"hidden_dropout_prob": 0.3}, "output_dir": "b"}
    b = write_run(tmp_path / "b", steps(1, loss=float), run=settings, deepspeed={"gradient_clipping": 1.0})
    write_report([a, b], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    cells = Cells(text)
    assert cells.row("masking_copies") == ["–", "10"]
    assert cells.row("run.model.hidden_dropout_prob") == ["0.1", "0.3"]
    assert cells.row("deepspeed.gradient_clipping") == ["–", "1"]
    assert "output_dir" not in text
    assert "run.seed" not in text


def test_what_only_some_objectives_have_is_not_missed_elsewhere(tmp_path):
    pairs = write_run(tmp_path / "pairs", steps(2, loss=float, mlm_loss=float, nsp_loss=float))
    plain = write_run(tmp_path / "plain", steps(2, loss=float))
    write_report([pairs, plain], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert any("next sentence prediction by step" in image["alt"] for image in Cells(text).images)
    assert "Not recorded by plain" not in text
    assert "eval_detection_f1" not in text


def test_results_of_another_form_are_listed_as_they_are(tmp_path):
    run = write_run(tmp_path / "a", steps(1, loss=float))
    (run / "evaluation.json").write_text('{"by_position": {"a": 1}}')
    (run / "results.json").write_text('{"best": 1, "settings": {"a": 7}}')
    write_report([run], tmp_path / "report.html")
    assert Cells((tmp_path / "report.html").read_text()).row("settings.a") == ["7"]


@pytest.mark.parametrize(
    "ranges",
    [
        [{"first": 0, "last": 9, "loss": "a"}],
        [{"first": None, "last": 9, "loss": 1.0}],
        [{"first": [], "last": [], "loss": None}],
        [{"first": 10**400, "last": 9, "loss": 1.0}],
        *([{"first": 0, "last": 9, "loss": never_finite}] for never_finite in (None, math.inf)),
    ],
)
def test_files_of_another_form_do_not_end_the_report(tmp_path, ranges):
    rows = [{"global_step": 1, "loss": 1.0, "grad_norm": math.inf, "mfu": math.nan}]
    run = write_run(tmp_path / "a", rows, versions=3, run={"seed": []}, deepspeed="\ud800")
    (run / "evaluation.json").write_text(json.dumps({"by_position": ranges, "\ud800": "\ud800"}))
    (run / "results.json").write_text("[" * 900 + "7" + "]" * 900)
    write_report([run], tmp_path / "report.html")
    cells = Cells((tmp_path / "report.html").read_text())
    assert cells.row(".".join(["0"] * 900)) == ["7"]
    assert cells.row("\\ud800") == ["\\ud800"]
    assert not any("by position" in image["alt"] for image in cells.images)


def test_an_output_that_cannot_be_written_leaves_nothing(tmp_path):
    run = write_run(tmp_path / "a", steps(1, loss=float))
    (tmp_path / "file").write_text("")
    (tmp_path / "mine_plots").mkdir()
    (tmp_path / "mine_plots/thesis.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for output in (tmp_path, tmp_path / "file/r.html", tmp_path / "mine.html"):
        with pytest.raises(UserError):
            write_report([run], output)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib_the_report_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"ds_roberta\[plot\]"):
        write_report([write_run(tmp_path / "a", steps(1, loss=float))], tmp_path / "r.html")


def test_flat_keys_join_names_and_indexes():
    assert flatten({"a": {"b": [1, {"c": None}]}, "d": "x"}) == {"a.b.0": 1, "a.b.1.c": None, "d": "x"}


def test_the_command_ends_with_2_and_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "missing")])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(REPOSITORY / "launch/report.py"), run_name="__main__")
    error = capfd.readouterr().err
    assert (leaving.value.code, error.count("\n")) == (2, 1)
    assert error.startswith("error: ")


def test_the_held_out_loss_by_position_is_drawn_and_not_listed(tmp_path):
    ranges = [
        {"first": 0, "last": 63, "masked_tokens": 9, "loss": 5.0},
        {"first": 64, "last": 127, "masked_tokens": 9, "loss": 3.5},
        {"first": 128, "last": 191, "masked_tokens": 0, "loss": None},
    ]
    a, b = (write_run(tmp_path / name, steps(3, loss=float)) for name in "ab")
    (a / "evaluation.json").write_text(json.dumps({"loss": 4.25, "by_position": ranges}))
    write_report([a, b], tmp_path / "report.html")
    cells = Cells(text := (tmp_path / "report.html").read_text())
    assert "Held-out loss by position. a: from 5 at position 31 to 3.5 at position 95" in cells.images[1]["alt"]
    assert "Not recorded by b." in text
    assert cells.row("loss") == ["4.25"]
    assert "masked_tokens" not in text
    (a / "evaluation_best.json").write_text(json.dumps({"loss": 4.0, "by_position": ranges[:1]}))
    (a / ".tuned.partial").mkdir()
    (a / ".tuned.partial/results.json").write_text("{}")
    (run,) = read_runs([a])
    assert list(run.results) == ["evaluation.json", "evaluation_best.json"]
    assert run.warnings == ("the loss by position is that of evaluation.json; not drawn: evaluation_best.json",)
    (axes,) = draw([run], BY_COLUMN["loss_by_position"]).axes
    assert (axes.get_xlabel(), list(axes.lines[0].get_ydata())) == ("position", [5.0, 3.5])
