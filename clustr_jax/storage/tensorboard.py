"""metrics.jsonl once more, as TensorBoard event files: `tensorboard --logdir runs`."""

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

# A killed process loses what it had not flushed; the next one writes all again.
_FLUSH_SECONDS = 10
# The tab "custom scalars": what belongs together in one chart. Names are patterns.
LAYOUT = {
    "accuracy": {
        "by the paper's protocol and by a sound one (quick)": [
            "Multiline",
            ["^val_accuracy$", "^paper_accuracy$", "^quick_accuracy$"],
        ],
        "one step and many: far apart is catastrophic overfitting": [
            "Multiline",
            ["^single_step_accuracy$", "^multi_step_accuracy$"],
        ],
        "training": ["Multiline", ["^accuracy$", "^adversarial_accuracy$", "^certified$"]],
    },
    "loss": {"the whole and its parts": ["Multiline", ["^loss$", "^magnet$", "^natural$", "^consistency$"]]},
}


class Events:
    """One folder of event files per stage under `root`, one scalar per number of a record.

    A new process writes the stage's folder again from `records` (those of metrics.jsonl): a resumed run
    leaves one curve, without gaps or steps that were taken twice.
    """

    def __init__(self, root: pathlib.Path, records: Callable[[], list[dict]]):
        self._root, self._records = root, records
        self._writers: dict[str, Any] = {}

    def add(self, record: dict) -> None:
        """Write a record that is the last one of metrics.jsonl."""
        stage = record["stage"]
        if stage in self._writers:
            self._write(record)
            return
        from tensorboardX import SummaryWriter  # here, for it imports PyTorch where that is installed

        shutil.rmtree(self._root / stage, ignore_errors=True)
        self._writers[stage] = SummaryWriter(str(self._root / stage), flush_secs=_FLUSH_SECONDS)
        self._writers[stage].add_custom_scalars(LAYOUT)
        for earlier in self._records():
            if earlier["stage"] == stage:
                self._write(earlier)

    def _write(self, record):
        for name, value in record.items():
            # no held-out images, no accuracy; alarms are words
            if name not in ("stage", "step") and isinstance(value, (int, float)):
                self._writers[record["stage"]].add_scalar(name, value, record["step"])
