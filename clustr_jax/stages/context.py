"""What every stage is given, and the names of the stages."""

import dataclasses

import jax
from ml_collections import ConfigDict

from clustr_jax import data, models
from clustr_jax.data.remarks import Remarks
from clustr_jax.runtime.profiling import Profiler
from clustr_jax.runtime.progress import Progress
from clustr_jax.storage.workdir import Workdir

WARMUP, TRAIN, EVALUATE, CERTIFY, REPORT = "1_warmup", "2_train", "evaluate", "certify", "report"
STAGES = (WARMUP, TRAIN, EVALUATE, CERTIFY, REPORT)  # at the end only: the place decides the randomness


@dataclasses.dataclass
class Run:
    """What every stage needs."""

    config: ConfigDict
    workdir: Workdir
    progress: Progress
    net: models.Net
    train_split: data.Split
    val_split: data.Split
    test_split: data.Split
    source: "Run | None" = None  # the same for the data set of at_pretrain's first stage
    profiler: Profiler = dataclasses.field(default_factory=lambda: Profiler(None))
    remarks: Remarks = Remarks()  # on the images; results keep them

    def key(self, stage: str):
        """A stream of randomness for each stage."""
        return stage_key(self.config.seed, stage)


def stage_key(seed: int, stage: str):
    """The stream of `stage` in a run with this seed."""
    return jax.random.fold_in(jax.random.key(seed), STAGES.index(stage))
