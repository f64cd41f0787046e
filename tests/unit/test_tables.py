"""Tables of the configuration: what is read, and that what is refused is named and, where it may be secret, not shown."""

from __future__ import annotations

import pytest

from weightcache.errors import ConfigError
from weightcache.tables import Unshown, read_flag, read_table, read_usd


def refuse(value: object) -> None:
    raise Unshown("expected something else")


READERS = {"usd": read_usd, "flag": read_flag, "key": refuse}


def test_values_are_read_by_their_keys() -> None:
    assert read_table({"usd": 1, "flag": True}, "a.b", "the file", READERS) == {"usd": 1.0, "flag": True}


@pytest.mark.parametrize(
    ("given", "name", "says"),
    [
        (5, "a.b", "setting 'a.b' in the file: expected a table"),
        ({"fleg": 1}, "a.b", "unknown setting 'a.b.fleg' in the file (did you mean 'flag'?)"),
        ({"fleg": 1}, "", "unknown setting 'fleg' in the file (did you mean 'flag'?)"),
        ({"usd": "1"}, "a.b", "setting 'a.b.usd' in the file is '1': expected a number of USD"),
        ({"key": "HUSH"}, "a.b", "setting 'a.b.key' in the file: expected something else"),
    ],
)
def test_refusal_names_setting_and_source(given: object, name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_table(given, name, "the file", READERS)
    assert str(caught.value) == says
    assert caught.value.facts["source"] == "the file"
    assert str(caught.value.facts["setting"]) in says
