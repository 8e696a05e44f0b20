"""Whether two machines mean the same weights, by what each knows of them."""

import shutil
from dataclasses import replace

import pytest

from dera_peft.checkpoint.identity import difference, identity, unknown
from dera_peft.checkpoint.record import Record


@pytest.fixture
def record(tiny_base, tiny_adapter) -> Record:
    return Record(str(tiny_base), {"default": str(tiny_adapter)}, {"reference": [], "aligned": ["default"]})


def test_copies_are_the_same_and_other_weights_are_not(record, tiny_adapter, top_adapter, tmp_path):
    own = identity(record)
    copied = replace(record, adapters={"dpo": shutil.copytree(tiny_adapter, tmp_path / "copy")})
    copied = replace(copied, branches={"reference": [], "aligned": ["dpo"]})
    assert identity(copied) == own
    assert None not in (own["base"], *own["branches"]["aligned"])
    assert (difference(own, own), unknown(own, own)) == (None, [])
    other = identity(replace(record, adapters={"default": str(top_adapter)}))
    assert "an adapter of its branch 'aligned' has the fingerprint" in difference(own, other)
    assert "has 1 adapters, and this one 0" in difference(
        {**own, "branches": {"aligned": []}}, {**own, "branches": {"aligned": ["x"]}}
    )
    assert "mixes 'weights'" in difference(own, {**own, "mixing": "weights"})
    assert "its base has the fingerprint" in difference(own, {**own, "base": "0"})
    assert "it has the branches ['reference', 'a']" in difference(own, {**own, "branches": {"reference": [], "a": []}})
    for nothing in (None, [], {}, {"branches": 3}):
        assert difference(own, nothing) == "it does not say which weights it has"


def test_a_base_that_is_not_here_is_told_by_its_name(record):
    """Of the hub, where this machine has no weights of it."""
    here = identity(replace(record, base="org/base"))
    assert (here["base"], here["base_id"]) == (None, "org/base")
    there = identity(record)  # a folder
    assert (difference(here, there), unknown(here, there)) == (None, ["base"])
    assert unknown(here, here) == []
    assert "its base is 'org/other', and this one 'org/base'" in difference(here, {**here, "base_id": "org/other"})
    known = identity(replace(record, base="org/base", base_fingerprint=there["base"]))  # by its dera.json
    assert (difference(known, there), unknown(known, there)) == (None, [])
