"""Splits of data sets, small."""

from clustr_jax.settings import DataSettings


def split_config(name="digits", **changes):
    """The data section of a config."""
    settings = dict(name=name, dir="", train_size=0, test_size=0, val_size=0.0, augment="none")
    return DataSettings.of(settings | changes)


def rows(*splits):
    """Images and labels of these splits together, sorted: equal lists are equal sets of examples."""
    return sorted((s.images[i].tobytes(), int(s.labels[i])) for s in splits for i in range(len(s)))
