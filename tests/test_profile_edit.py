"""A correction put into a profile's text: it is read back, and what people wrote stays."""

from __future__ import annotations

import msgspec
import pytest

from edge_sdk.errors import ProfileError
from edge_sdk.profile import Correction, load_profile, parse_profile, profile_toml
from edge_sdk.profile_edit import with_correction

BOARD = load_profile("raspberry-pi-4b-2gb")
SOURCE = "measured: in a test"
FIRST = Correction(memory=1.25, time=0.5, samples=3)
SECOND = Correction(memory=0.9, time=2.0, samples=4)
TEXT = "# The one in the kitchen.\n\n" + profile_toml(BOARD).replace(
    "[sources]", "# Who says so?\n[sources]"
)


def corrected(text: str, task: str, correction: Correction) -> str:
    return with_correction(text, "kitchen.toml", task, correction, SOURCE)


def test_the_correction_is_read_back_and_all_else_stays() -> None:
    text = corrected(TEXT, "digits", FIRST)
    assert parse_profile(text, "text") == msgspec.structs.replace(
        BOARD, corrections={"digits": FIRST}, sources={**BOARD.sources, "corrections": SOURCE}
    )
    assert set(TEXT.splitlines()) <= set(text.splitlines())


def test_a_later_correction_takes_the_place_of_the_earlier() -> None:
    text = corrected(corrected(TEXT, "digits", FIRST), "birds", FIRST)
    later = corrected(text, "digits", SECOND)
    assert parse_profile(later, "text").corrections == {"digits": SECOND, "birds": FIRST}
    assert sorted(corrected(later, "digits", FIRST).split()) == sorted(text.split())
    assert later.count("Who says so?") == later.count("in the kitchen") == 1


def test_a_file_without_sources_gets_them() -> None:
    text = TEXT.partition("# Who says so?")[0]
    assert parse_profile(corrected(text, "digits", FIRST), "text").sources == {
        "corrections": SOURCE
    }


def test_a_table_in_another_form_is_written_anew() -> None:
    table = "[corrections]\ndigits = {memory = 1.0, time = 1.0, samples = 1}\n"
    text = TEXT.replace("# Who says so?", table)
    later = corrected(text, "digits", FIRST)
    assert parse_profile(later, "text").corrections == {"digits": FIRST}


def test_what_is_no_profile_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"kitchen.toml: .*missing"):
        corrected("name = 'x'", "digits", FIRST)
