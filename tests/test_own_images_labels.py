"""Own images: labels of any form, and names of classes, in data and in messages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustr_jax.data import folder
from clustr_jax.runtime.errors import cut, listed, shown
from own_images import COMPOSED, DECOMPOSED, SIZE, arrays, make, refused, write

# Labels


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64, np.uint64, ">i4"])
def test_labels_of_any_type_are_read(dtype, tmp_path, rng):
    np.savez(tmp_path / "a.npz", **arrays(rng, y_train=(np.arange(12) % 3).astype(dtype)))
    np.testing.assert_array_equal(folder.read(tmp_path / "a.npz").train.labels, np.arange(12) % 3)


@pytest.mark.parametrize("value", [2**32, 2**32 + 1, 2**63 - 1, 2**31, 2**64 - 1, 2**53, -(2**32), -1, 3])
@pytest.mark.parametrize("name", ["y_train", "y_test", "y_val"])
def test_labels_are_checked_before_they_are_narrowed(name, value, tmp_path, rng):
    made = arrays(rng)
    made |= {"x_val": made["x_test"], "y_val": made["y_test"]}
    labels = made[name].astype(np.uint64 if value >= 2**63 else np.int64)
    labels[labels == 0] = value
    if name == "y_train" and value == 3:
        labels = np.arange(12) % 4 + (np.arange(12) % 4 > 0)  # a gap at 1
    np.savez(tmp_path / "a.npz", **(made | {name: labels}))
    assert name in refused(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("labels", "hint"),
    [
        (np.zeros((12, 1), int), ".ravel()"),
        (np.eye(12, dtype=int), ".argmax(1)"),
        (np.zeros(12), ".astype(np.int64)"),
        (np.zeros(12, bool), "whole numbers"),
    ],
)
def test_labels_in_another_form_are_refused_with_what_to_do(labels, hint, tmp_path, rng):
    np.savez(tmp_path / "a.npz", **arrays(rng, y_train=labels))
    assert hint in refused(tmp_path / "a.npz")


# Names


@pytest.mark.parametrize("first", [COMPOSED, DECOMPOSED])
@pytest.mark.parametrize("second", [COMPOSED, DECOMPOSED])
def test_classes_are_compared_in_one_unicode_form(first, second, tmp_path, rng):
    for split, name in (("train", first), ("test", second)):
        for other in (name, "tea"):
            write(tmp_path / split / other / "0.png", rng.integers(0, 256, SIZE, np.uint8))
    found = folder.read(tmp_path)
    assert found.class_names == (COMPOSED, "tea") and found.test.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("one", "other"), [(COMPOSED, DECOMPOSED), ("tea", "tea "), ("tea", "te\u200ba"), ("a b", "a\u00a0b")]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_two_names_that_look_alike_are_refused(split, one, other, tmp_path, rng):
    make(tmp_path, rng, names=(one, "x"))
    write(tmp_path / split / other / "0.png", np.zeros(SIZE, np.uint8))
    message = refused(tmp_path)
    assert "two folders called" in message and "merge them" in message


@pytest.mark.parametrize("other", ["Tea", "tea "])
def test_an_unknown_class_that_looks_like_a_known_one(other, tmp_path, rng):
    make(tmp_path, rng, names=("tea", "x"))
    (tmp_path / "test" / "tea").rename(tmp_path / "test" / other)
    assert "but 'tea': rename one" in refused(tmp_path)


# Words


@given(text=st.text(max_size=400), at_most=st.integers(20, 120))
def test_a_name_in_a_message_is_printable_and_short(text, at_most):
    assert shown(text, at_most).isprintable() and len(shown(text, at_most)) <= at_most
    assert len(cut(text, at_most)) <= at_most
    assert len(text) > at_most or not text.isprintable() or shown(text, at_most) == text


def test_a_list_in_a_message_counts_the_rest():
    assert listed("abcde") == "a, b, c and 2 more" and listed("ab") == "a, b" and listed([]) == ""
