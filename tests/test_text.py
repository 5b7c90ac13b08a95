"""name(key=value, ...): the values that can be written, and the text that is written for them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise import text as texts


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("lenet", "lenet", {}),
        (" lenet ( ) ", "lenet", {}),
        ("multi-mnist(train=3000)", "multi-mnist", {"train": 3000}),
        ("a(sizes=(3000, 500, 1000), canvas=(28, 36))", "a",
         {"sizes": (3000, 500, 1000), "canvas": (28, 36)}),
        ("a( b = 1e-3 ,c=-2,)", "a", {"b": 0.001, "c": -2}),
        ("a(b=TRUE, c=False, d=none)", "a", {"b": True, "c": False, "d": None}),
        ("a(b=small, c=loss+, d=l2)", "a", {"b": "small", "c": "loss+", "d": "l2"}),
        ("a(b='x, y)', c=\"(\")", "a", {"b": "x, y)", "c": "("}),
        (r"a(b='don\'t, c=1', c=2)", "a", {"b": "don't, c=1", "c": 2}),
        ("a(cache=/home/o'brien/data, b=x=y)", "a", {"cache": "/home/o'brien/data", "b": "x=y"}),
        ("a(b=((1, 2), [3, (4,)]), c={'k': 5})", "a", {"b": ((1, 2), [3, (4,)]), "c": {"k": 5}}),
        ("a(b=)", "a", {"b": ""}),
        ("a(b=7x, c=1if, d=0_, e=1/2)", "a", {"b": "7x", "c": "1if", "d": "0_", "e": "1/2"}),
    ],
)  # fmt: skip
def test_read(text, name, values):
    found = texts.read(text)
    assert found == (name, values)
    assert [type(value) for value in found[1].values()] == [type(v) for v in values.values()]
    assert texts.read(texts.show(*found)) == found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "cannot read ''; write name or name(key=value, ...)."),
        ("two words", "cannot read 'two words'"),
        ("a(b=1", "cannot read 'a(b=1'"),
        ("a b=1)", "cannot read"),
        ("a(b=1)c", "cannot read"),
        ("(b=1)", "cannot read"),
        ("a(3000)", "write a(3000=...), a value for a name."),
        ("a(b=1, (2, 3))", "write a((2, 3)=...), a value for a name."),
        ("a(b=1, b=1)", "b is given twice."),
        ("a(b=(1, 2)", "a(b=(1, 2): ')' is missing at the end."),
        ("a(b=[1, (2])", "a(b=[1, (2]): ']' closes nothing."),
        ("a(b=1), c=2)", "a(b=1), c=2): ')' closes nothing."),
        ("a(b='x, c=1)", "a(b='x, c=1): \"'\" is missing at the end."),
    ],
)
def test_what_cannot_be_read(text, sentence):
    with pytest.raises(ValueError) as caught:
        texts.read(text)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "a"),
        ({"d": None, "c": True, "b": 0.5}, "a(b=0.5, c=true, d=none)"),
        ({"b": (28, 36), "c": "small"}, "a(b=(28, 36), c=small)"),
        ({"b": "12", "c": "none", "d": "x, y"}, "a(b='12', c='none', d='x, y')"),
        ({"b": ",\\", "c": 2}, r"a(b=',\\', c=2)"),
        ({"b": "", "c": "(", "d": "Bag"}, "a(b='', c='(', d=Bag)"),
    ],
)
def test_canonical_text(values, text):
    assert texts.show("a", values) == text
    assert texts.read(text) == ("a", values)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)  # fmt: skip


@given(st.from_regex(r"[A-Za-z0-9-]+", fullmatch=True),
       st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), VALUES, max_size=4))  # fmt: skip
def test_the_canonical_text_reads_back(name, values):
    text = texts.show(name, values)
    assert texts.read(text) == (name, values)
    assert texts.show(*texts.read(text)) == text
