"""A judgement that is verified by PyTorch: the same network, exported, says what JAX has said."""

import numpy as np
import pytest

from clustr_jax.evaluation import witness
from clustr_jax.runtime.errors import UserError
from clustr_jax.verify import main, model_of
from judged import CLASSES, SHAPE, N, judged, weights

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Curved(torch.nn.Module):
    """`judged.curved` on NCHW images; `channels_last`: on NHWC ones. `shift` makes another network of it."""

    def __init__(self, channels_last=False, shift=0.0):
        super().__init__()
        a, b = (torch.from_numpy(np.array(w)) for w in weights())
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)
        self.channels_last, self.shift = channels_last, shift

    def forward(self, x):
        x = x if self.channels_last else x.movedim(1, -1)
        z = 4 * torch.tanh((x.flatten(1) - 0.5) @ self.a) @ self.b
        return z + self.shift * torch.arange(CLASSES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return judged().save(tmp_path_factory.mktemp("judged"))


def exported(module, path, shape=(1, *SHAPE[:2])):
    batch = torch.zeros(5, *shape)
    if path.suffix == ".ts":
        torch.jit.trace(module, batch).save(str(path))
    else:
        dynamic = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(module, (batch,), dynamic_shapes=dynamic), str(path))
    return str(path)


@pytest.mark.parametrize("suffix", ["pt2", "ts"])
def test_an_exported_module_says_the_same(suffix, folder, tmp_path, capsys):
    """Every image that counts as right, wrong or adversarial, and the nearest ones, from a shell."""
    file = exported(Curved(), tmp_path / f"model.{suffix}")
    assert main([str(folder), f"--model={file}"]) == 0
    told = capsys.readouterr().out
    found = witness.read(folder)[1]
    assert f"adversarial images are misclassified: {len(found.broken)} of {len(found.broken)}" in told
    assert f"images that count as right are classified correctly: {N - 2} of {N - 2}" in told
    assert f"nearest images are misclassified: {len(found.near)} of {len(found.near)}" in told
    assert told.endswith("verified\n") and "NOT" not in told


def test_layouts(folder, tmp_path, capsys):
    """NHWC where it is said; the wrong one is a line that says so."""
    file = exported(Curved(channels_last=True), tmp_path / "last.pt2", SHAPE)
    assert main([str(folder), f"--model={file}", "--layout=NHWC"]) == 0
    capsys.readouterr()
    assert main([str(folder), f"--model={file}"]) == 2
    told = capsys.readouterr().err
    assert "does not take images (" in told and "--layout=NHWC" in told and told.count("\n") == 1


def test_another_network_is_noticed(folder, tmp_path, capsys):
    file = exported(Curved(shift=3.0), tmp_path / "model.pt2")
    assert main([str(folder), f"--model={file}"]) == 1
    told = capsys.readouterr().out
    assert "FAIL  images that count as right are classified correctly" in told and "NOT verified" in told


def test_files_that_are_no_modules_are_one_line(folder, tmp_path, capsys):
    for suffix in ("pt2", "ts"):
        file = tmp_path / f"broken.{suffix}"
        file.write_bytes(b"nothing")
        assert main([str(folder), f"--model={file}"]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: model ") and told.count("\n") == 1, told
    with pytest.raises(UserError, match="no such file"):
        model_of("none.pt2")
