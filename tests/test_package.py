"""What others read of the package beside its code: version and citation."""

import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

import dera_peft

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_the_projects():
    assert dera_peft.__version__ == PROJECT["version"]


def test_the_version_needs_no_torch():
    program = "import sys, dera_peft; dera_peft.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["message"]
    assert citation["authors"]
    (paper,) = citation["references"]
    assert paper["title"] == "Decoding-time Realignment of Language Models"
    assert len(paper["authors"]) == 10
    assert {"type": "other", "value": "arXiv:2402.02992"} in paper["identifiers"]
