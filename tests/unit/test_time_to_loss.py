"""`benchmarks.time_to_loss`: what its table says of several seeds."""

import argparse

import pytest

report = pytest.importorskip("benchmarks.time_to_loss_report")  # it needs matplotlib


def curve(*points):
    return report.Curve([report.Point(*point) for point in points], {}, "0123abc")


def test_a_row_has_the_means_over_its_seeds_and_is_compared_by_them(corpus):
    options = argparse.Namespace(data_dir=corpus.folder, model="nano", max_seq_length=32)
    rows = {
        "ours": [curve((50, 1e6, 6.0), (100, 2e6, 4.0)), None, curve((100, 2e6, 5.5), (300, 6e6, 4.5))],
        "the Trainer, longest": [curve((400, 1e6, 6.5), (800, 2e6, 5.5))],
    }
    ours, trainer = report.report(options, rows)[-2:]
    assert ours == "| ours | 200 | 4.0 | 4.000, missing, 4.500 | not in 800 s, 4.0 times ours | 100 s of its 800 |"
    assert trainer.startswith("| the Trainer, longest | 800 | 2.0 | 5.500 |")
    rows["the Trainer, longest"] = [curve((400, 1e6, 4.4), (800, 2e6, 4.2))]
    assert report.report(options, rows)[-2].endswith("| 400 s, 2.0 times ours | not in 200 s |")
