"""Files of one JSON object a line."""

import time
from pathlib import Path

from ssmpretrain.base.json_lines import drop_rows


def test_rows_after_the_checkpoint_are_dropped_and_the_others_stay_as_they_are(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    drop_rows(metrics, 3)
    kept = '{"step": 1, "a":  1.50}\n{"step": null, "b": 1}\n{"step": 2, "val": 2}\n'
    metrics.write_text(kept + '{"step": 3, "a": 4}\n{"step": 1')
    drop_rows(metrics, 3)
    assert metrics.read_text() == kept and [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    before = metrics.stat().st_mtime_ns
    time.sleep(0.01)
    drop_rows(metrics, 3)
    assert metrics.stat().st_mtime_ns == before
