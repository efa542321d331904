"""The report's page and the files next to it.

    runs' folders → runs → figures and tables → one HTML page, PNGs in a folder next to it

The page contains everything it shows and fetches nothing.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import Any

from ds_roberta.errors import UserError
from ds_roberta.files import atomic_path, created_parents, errors_of_the_disk, replaced_folder
from ds_roberta.options import options_of
from ds_roberta.process import logger
from ds_roberta.report import error_analysis
from ds_roberta.report.plots import LINES, METRICS, Metric, best, describe, draw, png, show
from ds_roberta.report.runs import Run, flatten, read_runs
from ds_roberta.training.settings import RunConfig

SETTINGS: dict[str, tuple[tuple[str | int, ...], ...]] = {  # by name: places in config.json, older versions' last
    "model": (("run", "model_name"),),
    "layers": (("run", "model", "num_hidden_layers"),),
    "hidden size": (("run", "model", "hidden_size"),),
    "precision": (("precision",),),
    "ZeRO stage": (("deepspeed", "zero_optimization", "stage"),),
    "train_batch_size": (("batches", -1, "train_batch_size"), ("batch", "train_batch_size")),
    "micro-batch": (("batches", -1, "micro_batch_size"), ("batch", "micro_batch_size")),
    "processes": (("batches", -1, "world_size"), ("batch", "world_size")),
    "peak learning rate": (
        ("deepspeed", "optimizer", "params", "adam_lr"),
        ("deepspeed", "optimizer", "params", "lr"),
    ),
    "peak rate of Muon": (("deepspeed", "optimizer", "params", "muon_lr"),),
    **{each.name: (("run", *each.place),) for each in options_of(RunConfig) if each.name != "output_dir"},
    "device": (("device",),),
    "compiled": (("compiled",),),
    "commit": (("commit",),),
}
COUNTS = ("global_step", "consumed_samples", "consumed_tokens", "skipped_steps", "skipped_samples", "loss_spikes")
OWN_PLACES = {"run.output_dir"}  # which differ between any two runs
NOTHING = "–"
PLOTS_SUFFIX = "_plots"

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --faint: #5d646d; --ground: #fff; --line: #d5d9de; --row: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --faint: #a3abb5; --ground: #16181b; --line: #3a3f46; --row: #1f2226; }
}
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h1, h3, p, li { overflow-wrap: anywhere; }
p, figcaption { color: var(--faint); font-size: .9rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  box-sizing: border-box; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; min-width: 6rem; max-width: 22rem; }
tbody tr:nth-child(odd) { background: var(--row); }
tbody th { font-weight: normal; color: var(--faint); overflow-wrap: break-word; }
tr.differs td { font-weight: 600; }
"""


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Write the page of runs to `output`, and its plots, if any, as PNGs into the folder `STEM_plots` next to it.

    Raises:
        UserError: a run cannot be read, the output cannot be written, or matplotlib is not installed. Nothing is then
            written.
    """
    runs = read_runs(folders)
    if output.is_dir():
        raise UserError(f"the output {str(output)!r} is a folder: give a file, such as report.html")
    plots = {metric: png(draw(runs, metric)) for metric in METRICS if any(map(metric.of, runs))}
    folder = output.with_name(output.stem + PLOTS_SUFFIX)
    with errors_of_the_disk(output), created_parents(output), ExitStack() as on_failure:
        if not folder.exists():
            on_failure.callback(shutil.rmtree, folder, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(output) as temporary:
            temporary.write_text(page(runs, plots), encoding="utf-8", errors="backslashreplace")
            if plots or folder.exists():
                with replaced_folder(folder, _holds_plots_alone, "a report's plots") as partial:
                    for metric, image in plots.items():
                        (partial / f"{metric.column}.png").write_bytes(image)
        on_failure.pop_all()
    logger.info(f"wrote {output}" + (f", and its plots into {folder}" if plots else ""))


def page(runs: Sequence[Run], plots: dict[Metric, bytes]) -> str:
    """The HTML document, with `plots` (PNG images by their metric) in it."""
    names = ", ".join(run.name for run in runs)
    pretraining = [run for run in runs if run.rows]
    parts = [
        f"<h1>{escape(names)}</h1>",
        *(f"<p>{escape(run.name)}: {escape(warning)}.</p>" for run in runs for warning in run.warnings),
        *(_pretraining(pretraining, plots) if pretraining else ()),
        *_results(runs),
    ]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(names)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}{error_analysis.STYLE}</style>
</head>
<body>
{chr(10).join(filter(None, parts))}
</body>
</html>
"""


def _pretraining(runs: Sequence[Run], plots: dict[Metric, bytes]) -> list[str]:
    return [
        "<h2>Metrics</h2>",
        '<div class="plots">',
        *(_figure(runs, metric, image) for metric, image in plots.items()),
        "</div>",
        _missing_everywhere(runs, plots),
        "<h2>Last and best values</h2>",
        _table(runs, _values(runs, list(plots))),
        "<h2>Settings</h2>",
        "<p>Differences between the runs are in bold.</p>" if len(runs) > 1 else "",
        _table(runs, _settings(runs), mark_differences=True),
    ]


def _figure(runs: Sequence[Run], metric: Metric, image: bytes) -> str:
    lacking = [run.name for run in runs if metric.is_expected(run) and metric.of(run) is None]
    caption = f"<figcaption>Not recorded by {escape(', '.join(lacking))}.</figcaption>" if lacking else ""
    source = base64.b64encode(image).decode()
    text = escape(describe(runs, metric))
    return f'<figure><img src="data:image/png;base64,{source}" alt="{text}">{caption}</figure>'


def _missing_everywhere(runs: Sequence[Run], plots: dict[Metric, bytes]) -> str:
    missing = [metric for metric in METRICS if metric not in plots and any(map(metric.is_expected, runs))]
    if not missing:
        return ""
    return f"<p>Not recorded: {', '.join(f'{metric.title} ({metric.column})' for metric in missing)}.</p>"


def _values(runs: Sequence[Run], metrics: Sequence[Metric]) -> dict[str, list[str]]:
    rows = {}
    for count in COUNTS:
        latest = [run.series(count) for run in runs]
        if any(latest):
            rows[count] = [f"{series.values[-1]:,.0f}" if series else NOTHING for series in latest]
    for column, (title, _) in LINES.items():
        found = [run.series(column) for run in runs]
        if any(found):
            rows[title] = [f"{series.values[-1]:.4f}" if series else NOTHING for series in found]
    of_steps = [metric for metric in metrics if metric.over == "step"]
    return rows | {metric.title: [_last_and_best(metric, run) for run in runs] for metric in of_steps}


def _last_and_best(metric: Metric, run: Run) -> str:
    series = metric.of(run)
    if series is None:
        return NOTHING
    last = show(metric, series.values[-1])
    top = best(metric, series)
    return last if top is None else f"{last} (best: {show(metric, top[1])} at step {top[0]:,})"


def _settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    found = [run.setting("versions") for run in runs]
    versions = sorted({name for of_run in found if isinstance(of_run, dict) for name in of_run})
    places = SETTINGS | {f"{name} (version)": (("versions", name),) for name in versions}
    shown = {name: [_first(run, paths) for run in runs] for name, paths in places.items()}
    return shown | _other_differences(runs, {".".join(map(str, path)) for paths in places.values() for path in paths})


def _other_differences(runs: Sequence[Run], shown: set[str]) -> dict[str, list[str]]:
    """The runs' other settings, by their place in `config.json`, where they differ."""
    settings = [flatten({part: run.setting(part) or {} for part in ("run", "deepspeed")}) for run in runs]
    names = dict.fromkeys(name for of_run in settings for name in of_run)
    rows = {name: [_text(of_run.get(name)) for of_run in settings] for name in names}
    return {name: cells for name, cells in rows.items() if len(set(cells)) > 1 and name not in shown | OWN_PLACES}


def _first(run: Run, paths: Sequence[tuple[str | int, ...]]) -> str:
    return _text(next((value for path in paths if (value := run.setting(*path)) is not None), None))


def _results(runs: Sequence[Run]) -> list[str]:
    parts = []
    for file in dict.fromkeys(file for run in runs for file in run.results):
        having = [run for run in runs if file in run.results]
        keys = dict.fromkeys(key for run in having for key in run.results[file])
        rows = {key: [_text(run.results[file].get(key)) for run in having] for key in keys}
        parts += [f"<h2>{escape(file)}</h2>", _table(having, rows)]
        for run in (run for run in having if file in run.error_analyses):
            parts += [f"<h3>{escape(run.name)}: errors on the validation examples</h3>"]
            parts += error_analysis.as_html(run.error_analyses[file])
    return parts


def _text(value: Any) -> str:
    if value is None:
        return NOTHING
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(runs: Sequence[Run], rows: dict[str, list[str]], mark_differences: bool = False) -> str:
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    lines = []
    for name, cells in rows.items():
        mark = ' class="differs"' if mark_differences and len(set(cells)) > 1 else ""
        data = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr{mark}><th scope="row">{escape(name)}</th>{data}</tr>')
    body = "\n".join(lines)
    return f'<div class="table"><table><thead><tr><td></td>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _holds_plots_alone(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= {f"{metric.column}.png" for metric in METRICS}
