"""TensorBoard event files: what metrics.jsonl holds, once, also after a kill."""

import json
import os
import struct
import subprocess
import sys

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.layout_pb2 import Layout

from clustr_jax.report import figures

# Two processes: the first is killed after three epochs, of which the second takes the last one again.
SCRIPT = """
import os, sys
from clustr_jax.storage.workdir import Workdir
place = Workdir(sys.argv[1])
place.rewind("2_train", int(sys.argv[2]))
for epoch in map(int, sys.argv[3].split(",")):
    place.log({"stage": "2_train", "epoch": epoch, "step": 10 * epoch, "loss": epoch + float(sys.argv[4])})
if sys.argv[5] == "killed":
    os._exit(9)
"""


def run(folder, *arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", SCRIPT, str(folder), *arguments], env=environment).returncode


def values(folder):
    """(step, value) of the folder's event files (TFRecord: length, crc, data, crc)."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(event.step, value) for value in event.summary.value]
            content = content[16 + length :]
    return found


def scalars(folder):
    """(tag, step, value) of every scalar."""
    found = [(v.tag, step, v.simple_value) for step, v in values(folder)]
    return [scalar for scalar in found if scalar[0] != "custom_scalars__config__"]


def test_event_files_say_what_metrics_say(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert run(tmp_path, "-1", "1,2,3", "0.0", "killed") == 9
    assert run(tmp_path, "20", "3,4", "0.5", "ends") == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == [1.0, 2.0, 3.5, 4.5]
    expected = [(name, r["step"], r[name]) for r in records for name in ("epoch", "loss")]
    assert scalars(tmp_path / "tensorboard" / "2_train") == expected


def test_curves_that_belong_together_are_in_one_chart(tmp_path):
    """Of names that the trainings write: those that the report's curves are made of."""
    (tmp_path / "metrics.jsonl").touch()
    assert run(tmp_path, "-1", "1", "0.0", "ends") == 0
    (told,) = [v for _, v in values(tmp_path / "tensorboard" / "2_train") if v.tag.startswith("custom")]
    layout = Layout.FromString(told.tensor.string_val[0])
    charts = [list(chart.multiline.tag) for category in layout.category for chart in category.chart]
    assert ["^val_accuracy$", "^paper_accuracy$", "^quick_accuracy$"] in charts
    named = {tag.strip("^$") for chart in charts for tag in chart}
    assert named == figures._ACCURACIES.keys() | figures._LOSSES.keys()
