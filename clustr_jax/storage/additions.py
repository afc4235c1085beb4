"""Settings that came after work directories were written: a config without them is one that has their value.

What a training, a checkpoint or a result is recognised by must not change because a setting was added whose
value says what was done all along.
"""

import copy
from typing import Any

# section, name -> what was done before there was the setting
ADDED = {
    ("fidelity", "running_variance"): "biased",
    ("warmup", "nesterov"): True,
    ("train", "nesterov"): True,
    ("warmup", "momentum"): 0.9,
    ("train", "momentum"): 0.9,
    ("warmup", "norm_bias_rate"): 1.0,
    ("train", "norm_bias_rate"): 1.0,
    ("warmup", "lookahead"): 0,
    ("train", "lookahead"): 0,
    ("train", "label_smoothing"): 0.0,
    ("train", "temperature"): 0.0,
    ("train", "on_collapse"): "warn",
    ("train", "probe"): 0,
    ("train", "noise"): 0.0,
    ("train", "loss"): "ce",
    ("train", "aim"): "labels",
    ("train", "ikl"): 0.0,
    ("train", "ikl_temperature"): 4.0,
    ("train", "centroids"): "learned",
    ("train", "learn_variance"): False,
    ("train", "sampler"): "uniform",
    ("data", "placement"): "auto",
    ("pretrain", "placement"): "auto",
}


# Settings that change no step of a training: whoever resumes it may choose anew.
FREE = (
    ("train", "on_collapse"),
    ("train", "probe"),
    ("data", "placement"),
    ("pretrain", "placement"),
)


def filled(content: dict) -> dict:
    """A config (as JSON values) with the settings that it does not have yet."""
    content = copy.deepcopy(content)
    for (section, name), value in ADDED.items():
        if isinstance(content.get(section), dict):
            content[section].setdefault(name, value)
    return content


def plain(content: dict) -> dict:
    """A config (as JSON values) as it was written before, if the later settings have the value of then."""
    content = copy.deepcopy(content)
    for (section, name), value in ADDED.items():
        if isinstance(content.get(section), dict):
            if (section, name) in FREE or content[section].get(name) == value:
                content[section].pop(name, None)
    return content


def fixed(section: str, values: Any):
    """A section without the settings that may be chosen anew."""
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if (section, name) not in FREE}
