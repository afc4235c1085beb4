"""What every stage is given."""

import dataclasses

from ml_collections import ConfigDict

from clustr_jax import data, models
from clustr_jax.data.remarks import Remarks
from clustr_jax.runtime.profiling import Profiler
from clustr_jax.runtime.progress import Progress
from clustr_jax.runtime.streams import stage_key
from clustr_jax.settings import Settings
from clustr_jax.storage.workdir import Workdir
from clustr_jax.training.placement import Placement


@dataclasses.dataclass
class Run:
    """What every stage needs."""

    config: ConfigDict  # as it is kept in config.json
    settings: Settings  # the same as frozen dataclasses
    workdir: Workdir
    progress: Progress
    net: models.Net
    train_split: data.Split
    val_split: data.Split
    test_split: data.Split
    source: "Run | None" = None  # the same for the data set of at_pretrain's first stage
    profiler: Profiler = dataclasses.field(default_factory=lambda: Profiler(None))
    placement: Placement = Placement()  # of the training images
    remarks: Remarks = Remarks()  # on the images; results keep them

    def key(self, stage: str):
        """A stream of randomness for each stage."""
        return stage_key(self.settings.seed, stage)
