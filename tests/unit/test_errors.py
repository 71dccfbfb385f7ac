"""The exception family: every error can be pickled, and the docstring draws all of them."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from slime_opd import errors

FAMILY = [value for value in vars(errors).values() if inspect.isclass(value)]


@pytest.mark.parametrize("error", FAMILY, ids=lambda error: error.__name__)
def test_an_error_keeps_its_type_and_message_when_it_is_pickled(error):
    restored = pickle.loads(pickle.dumps(error("--lr: found 0, expected a positive number")))
    assert type(restored) is error
    assert str(restored) == "--lr: found 0, expected a positive number"


def test_the_docstring_draws_the_family_as_it_is():
    parents: list[str] = []
    drawn = {}
    for indent, name, standard in re.findall(r"^    ([│├└─ ]*)(\w+)(?: \((\w+)\))?", errors.__doc__, re.MULTILINE):
        parents[len(indent) // 4 :] = [name]
        drawn[name] = {*parents[-2:-1], *filter(None, [standard])} or {"Exception"}
    assert drawn == {error.__name__: {base.__name__ for base in error.__bases__} for error in FAMILY}
