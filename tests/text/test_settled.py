"""Text that later steps cannot change: incomplete characters and starts of stop strings are held back."""

from __future__ import annotations

import pytest

from sfs_triton.text.settled import SettledText

SUMS = "15,44,79,50"


def test_settled_text_holds_back_what_may_change(embedded):
    codec = embedded.text
    ids = codec.encode("Bob \u00e4\u00f6 \U0001f642 end")
    text, given = SettledText(codec), ""
    for count in range(len(ids) + 1):
        given += text.take(ids[:count], final=count == len(ids))
        assert codec.decode(ids).startswith(given)
    assert given == codec.decode(ids)


@pytest.mark.parametrize(
    ("stops", "wanted"),
    [
        (("79",), "15,44,"),
        (("44,7",), "15,"),
        (("9,50!", "44,79,50?"), "15,44,79,50"),
        (("79,50", "44"), "15,"),
        (("1",), ""),
    ],
)
@pytest.mark.parametrize("stride", [1, 3, 100])
def test_stop_strings_are_found_wherever_tokens_end(embedded, stops, wanted, stride):
    ids = embedded.text.encode(SUMS)
    text, given = SettledText(embedded.text, stops), ""
    counts = [*range(0, len(ids), stride), len(ids)]
    for count in counts:
        given += text.take(ids[:count], final=count == len(ids))
        assert wanted.startswith(given), "what a stop string cuts was given"
        if text.stopped_at is not None:
            break
    assert given == wanted
    if text.stopped_at is not None:
        upto, before = (embedded.text.decode(ids[:n]) for n in (text.stopped_at, text.stopped_at - 1))
        assert any(stop in upto for stop in stops) and not any(stop in before for stop in stops)
