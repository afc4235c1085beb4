"""TensorBoard event files: what metrics.jsonl holds, once, also after a kill."""

import json
import os
import struct
import subprocess
import sys

from tensorboardX.proto.event_pb2 import Event

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


def scalars(folder):
    """(tag, step, value) of every scalar in the folder's event files (TFRecord: length, crc, data, crc)."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            content = content[16 + length :]
    return found


def test_event_files_say_what_metrics_say(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert run(tmp_path, "-1", "1,2,3", "0.0", "killed") == 9
    assert run(tmp_path, "20", "3,4", "0.5", "ends") == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == [1.0, 2.0, 3.5, 4.5]
    expected = [(name, r["step"], r[name]) for r in records for name in ("epoch", "loss")]
    assert scalars(tmp_path / "tensorboard" / "2_train") == expected
