"""One sweep at a time in a folder."""

import pytest

from dera_peft import DeRaError
from dera_peft.evaluate.lock import hold


def test_two_sweeps_are_not_in_one_folder_at_once(tmp_path):
    with hold(tmp_path), pytest.raises(DeRaError, match="another sweep is writing there"), hold(tmp_path):
        pass
    with hold(tmp_path):  # it was freed
        pass
