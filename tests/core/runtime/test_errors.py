"""A message is one line of no more than 300 characters, whatever it is made of."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from stages.core.runtime.errors import LONGEST, InputError, some


@given(st.text() | st.lists(st.text(min_size=20)).map("\n".join))
def test_any_text_becomes_one_printable_line(text):
    line = str(InputError(text))
    assert line.isprintable()
    assert len(line) <= LONGEST
    line.encode()
    assert str(pickle.loads(pickle.dumps(InputError(text)))) == line


def test_both_ends_of_a_long_message_are_kept():
    line = str(InputError(f"file.zip: found {'x' * 1000}; allowed: this"))
    assert line.startswith("file.zip: found xxx")
    assert " ... xx" in line
    assert line.endswith("; allowed: this")


def test_many_names_are_the_first_and_their_number():
    assert some(["a", "b"]) == "a, b"
    assert some(range(30)) == "0, 1, 2, 3, ... (30)"
