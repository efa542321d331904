"""A report opened in a real browser, from the disk and without a network."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from commands import REPOSITORY, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--enable-logging=stderr"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=500,900"),
)
# Writes what the browser made of the page into the page, from where --dump-dom prints it.
PROBE = """<pre id="probe"></pre><script>
addEventListener("load", () => {
  const images = [...document.images].map((image) => ({
    natural: image.naturalWidth, width: image.getBoundingClientRect().width,
    height: image.getBoundingClientRect().height, alt: image.alt,
  }));
  const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.getElementById("probe").textContent = JSON.stringify({ images, requests, overflow });
});
</script></body>"""


def browse(page: Path, profile: Path, *arguments: str) -> tuple[str, str]:
    """Open a page in a new, empty profile; what the browser printed, and its log."""
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", *arguments, page.as_uri()]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            output, log = process.communicate(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, log
    return output, log


def write_fine_tuning(folder: Path, labels: list[str]) -> None:
    folder.mkdir()
    (folder / "results.json").write_text('{"best": {"validation": {"accuracy": 0.5}}, "settings": []}')
    confusion = {gold: {label: number for number, label in enumerate(labels)} for gold in labels}
    worst = [
        {"place": "dev.jsonl, row 1", "text": text * 9, "gold": labels[0], "gold_probability": 0.01,
         "predicted": labels[1], "predicted_probability": 0.99, "loss": 4.6}
        for text in ("<script>alert(1)</script>", "שלום", "無空格的長文字" * 5, "x" * 30)
    ]  # fmt: skip
    content = {"unit": "examples", "labels": labels, "confusion": confusion, "worst": worst}
    (folder / "error_analysis.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    for name, precision in (("plain", "bf16"), ("<b onload=x>&'\"", "fp16")):
        (folder / name).mkdir()
        rows = [
            {
                "global_step": step,
                "loss": 9 / step,
                "eval_loss": 9 / step,
                "learning_rate": 1e-3 / step,
                "grad_norm": math.sqrt(step),
                "loss_scale": 65536.0,
                "tokens_per_second": 1000.0 + step,
                "mfu": 0.4,
                "data_wait_share": 0.01,
                "memory_gb": 1.5,
            }
            for step in range(1, 7)
        ]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {"precision": precision, "commit": "0123456789" * 4, "run": {"data_dir": "data/" * 30}}
        (folder / name / "config.json").write_text(json.dumps(config))
        write_fine_tuning(folder / name / "tuned", [f"label {number} of a long name" for number in range(20)])
        write_fine_tuning(folder / name / "intents", [f"{name}{number}" * 9 for number in range(77)])
    runs = sorted(path for path in folder.iterdir())
    run(sys.executable, REPOSITORY / "launch/report.py", *runs, "--output", "report.html", cwd=folder)
    return folder / "report.html"


def test_the_page_opens_without_an_error_and_is_painted(report, tmp_path):
    image = tmp_path / "page.png"
    _, log = browse(report, tmp_path / "profile", f"--screenshot={image}")
    assert "CONSOLE" not in log
    assert image.read_bytes().startswith(b"\x89PNG")


def test_every_plot_is_seen_and_nothing_is_fetched(report, tmp_path):
    probed = tmp_path / "probed.html"
    probed.write_text(report.read_text().replace("</body>", PROBE))
    output, log = browse(probed, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in log
    found = json.loads(unescape(re.search(r'<pre id="probe">(.*?)</pre>', output, re.DOTALL)[1]))
    plots = list((report.parent / "report_plots").iterdir())
    assert len(found["images"]) == len(plots) == 9
    for image in found["images"]:
        assert min(image["natural"], image["width"], image["height"]) > 100
        assert "from" in image["alt"]
    # The browser tells of requests to hosts, but not of those to files that are missing: these are read from the page.
    links = re.findall(r'(?:src|href)="([^"]*)"', report.read_text())
    assert [url for url in [*found["requests"], *links] if not url.startswith("data:")] == []
    assert found["overflow"] <= 0  # at 500 pixels the tables scroll, not the page
