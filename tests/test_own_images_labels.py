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


ALIKE = {
    "case": ("cat", "Cat"),
    "full width": ("cat", "\uff43\uff41\uff54"),
    "ligature": ("\ufb01n", "fin"),
    "sharp s": ("stra\u00dfe", "STRASSE"),
    "Cyrillic a": ("cat", "c\u0430t"),
    "Cyrillic capitals": ("CAT", "\u0421\u0410\u0422"),
    "Cyrillic case": ("\u043a\u043e\u0442", "\u041a\u043e\u0442"),
    "Greek o": ("dog house", "d\u03bfg house"),
    "dotless i": ("pin", "p\u0131n"),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_two_classes_that_read_alike_are_named(kind, tmp_path, rng):
    """They may be two; the user is told."""
    one, other = ALIKE[kind]
    make(tmp_path, rng, train=(6, 6, 6), test=(3, 3, 3), names=(one, other, "bird"))
    (note,) = folder.read(tmp_path).notes
    assert "read alike" in note and ascii(one) in note and ascii(other) in note and "bird" not in note
    assert note.isascii() and "\n" not in note and len(note) < 500


def test_classes_that_do_not_read_alike_are_no_note(tmp_path, rng):
    make(tmp_path, rng, train=(3, 3, 3), test=(3, 3, 3), names=("cat", "cats", "c at"))
    assert folder.read(tmp_path).notes == ()


def test_letters_of_both_cases_are_one_note(tmp_path, rng):
    names = [c for letter in "abcdefgh" for c in (letter, letter.upper())]
    make(tmp_path, rng, train=[2] * 16, test=[1] * 16, names=names)
    (note,) = folder.read(tmp_path).notes
    assert "'A' and 'a'" in note and "5 more" in note and len(note) < 500


@pytest.mark.parametrize("other", ["Tea", "tea ", "\uff54ea", "te\u0430"])
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
