"""What others read of the package beside its code: version and citation."""

import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

import dera_peft
import dera_peft.evaluate

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_the_projects():
    assert dera_peft.__version__ == PROJECT["version"]


def test_the_version_needs_no_torch():
    program = "import sys, dera_peft; dera_peft.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_what_there_is_can_be_seen_and_importing_says_nothing():
    assert {"DeRaModel", "DeRaError", "__version__"} <= {*dir(dera_peft)}
    assert {"sweep", "score", "SweepConfig", "SweepResult"} <= {*dir(dera_peft.evaluate)}
    program = "from dera_peft import DeRaModel; from dera_peft.evaluate import sweep"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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


def test_hooks_and_workflow_run_what_the_makefile_runs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in hooks] == ["local"]  # nothing is downloaded
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(VENV)", ".venv")
    for hook in hooks[0]["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].removesuffix(" --force-exclude") in lint or hook["id"] == "ruff-format"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert commands == [".ci/run", "make docs"]
