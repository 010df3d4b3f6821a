"""Lists of names in messages."""

from __future__ import annotations

from px_hf.errors import listed


def test_listed_names_the_first_and_says_how_many_more() -> None:
    assert listed([]) == ""
    assert listed("abc") == "a, b, c"
    assert listed(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert listed({f"layer{i}": None for i in range(10)}, 3, "; ") == "layer0; layer1; layer2 and 7 more"
