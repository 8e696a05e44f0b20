"""The versions that results are written down with."""

import transformers
import trl

from dera_peft.versions import package_versions


def test_of_the_packages_that_a_result_depends_on():
    assert list(package_versions()) == ["dera-peft", "torch", "transformers", "peft"]
    found = package_versions("trl")
    assert (found["transformers"], found["trl"]) == (transformers.__version__, trl.__version__)
