"""Studies as archives: what was measured, and that the pages say the same."""

from __future__ import annotations

import json
import re
import statistics
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from atpo_async.study.folder import StudyFolder
from scripts import study_data
from tests.study_support import ROOT, done, plan_of

ARCHIVE = ROOT / "docs" / "data" / "study-methods.tar.xz"


def test_a_study_that_was_packed_is_read_elsewhere_and_goes_on(tmp_path: Path) -> None:
    plan, folder = plan_of(), StudyFolder(tmp_path / "here" / "study")
    ended = plan.cells()[:3]
    with folder.held(plan):
        for cell in ended:
            folder.write_result(plan, done(cell))
    (folder.run(ended[0])).mkdir()
    (folder.run(ended[0]) / "versions.json").write_text('{"python": "3.11", "platform": "mine"}')
    (folder.run(ended[0]) / "metrics.jsonl").write_text("large")
    archive = tmp_path / "study.tar.xz"
    assert study_data.main([str(folder.path), "--out", str(archive)]) == 0
    assert archive.read_bytes() == study_data.packed(folder.path)
    with tarfile.open(archive) as found:
        found.extractall(tmp_path / "there", filter="data")
    there = StudyFolder(tmp_path / "there" / "study")
    assert list(there.results(there.plan())) == ended
    with there.held(plan_of(seeds=3)):
        assert len(there.results(there.plan())) == 3
    assert json.loads((there.run(ended[0]) / "versions.json").read_text()) == {"python": "3.11"}
    assert not (there.run(ended[0]) / "metrics.jsonl").exists()


def test_what_cannot_be_packed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study_data.main([str(tmp_path), "--out", str(tmp_path / "a")]) == 2
    assert f"error: {tmp_path} is no study" in capsys.readouterr().err
    with StudyFolder(tmp_path / "s").held(plan_of()):
        pass
    assert study_data.main([str(tmp_path / "s"), "--out", str(tmp_path / "a")]) == 2
    assert "has ended; there is nothing to pack" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_the_table_of_methods_has_the_means_of_the_cells_that_come_with_it() -> None:
    cells: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    last: dict[str, int] = {}
    with tarfile.open(ARCHIVE) as archive:
        for entry in archive:
            if "/cells/" in entry.name and (file := archive.extractfile(entry)) is not None:
                data = json.load(file)
                if data["status"] == "failed":
                    continue  # no part of any mean
                at = dict(data["axes"])
                cells[at["task"], at["recipe"]].append(data)
                last[at["task"]] = min(last.get(at["task"], 1000), data["curve"][-1][0])

    def value(data: dict[str, Any], key: str) -> float:
        if key == "greedy":
            return float(data["figures"][key])
        end = last[dict(data["axes"])["task"]]
        return statistics.mean([float(level) for step, level in data["curve"] if step <= end][-3:])

    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    page = page.partition("<!-- study:methods:begin -->")[2].partition("<!-- study:methods:end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    heads = [(i, row) for i, row in enumerate(rows) if row[0] == "recipe"]
    checked = 0
    for key, (first, head) in zip(("sampled", "greedy"), heads[:2], strict=True):
        for row in rows[first + 2 : first + 2 + 30]:
            for task, text in zip(head[1:], row[1:], strict=True):
                values = [value(each, key) for each in cells[task, row[0]]]
                assert re.match(r"[\d.]+", text), (row[0], text)
                assert abs(float(text.split()[0]) - statistics.mean(values)) < 0.0051, (row[0], task, key)
                checked += 1
    assert checked >= 60
