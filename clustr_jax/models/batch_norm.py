"""Batch norm as PyTorch counts."""

import flax.linen as nn
from jaxtyping import Array, Float

from clustr_jax.runtime import mesh


class BatchNorm(nn.BatchNorm):
    """Batch norm whose running variance is that of PyTorch: of the unbiased variance, sum / (n - 1).

    The batch itself is divided by its biased one in both. flax averages the biased one.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "B ..."], use_running_average: bool | None = None, *, mask: Array | None = None
    ):
        before = self.get_variable("batch_stats", "var")
        outputs = super().__call__(x, use_running_average, mask=mask)
        if not (self.use_running_average or use_running_average or self.is_initializing()):
            after, count = self.get_variable("batch_stats", "var"), mesh.whole(x.size // x.shape[-1])
            # (1 - momentum) v n / (n - 1) instead of (1 - momentum) v
            more = (after - self.momentum * before) / max(count - 1, 1)
            self.put_variable("batch_stats", "var", after + more)
        return outputs
