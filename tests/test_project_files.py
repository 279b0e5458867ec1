"""The files beside the code: who is to be cited, and what the hosted CI runs.

python -m pytest tests/test_project_files.py
"""

import re
import tomllib

import yaml
from harness import ROOT

from export.model_card import CITATION

TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_the_citation_names_the_reports_of_the_model_card():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    titles = re.findall(r"^  title +=  *\{(.*)\},$", CITATION, flags=re.MULTILINE)
    volumes = re.findall(r"volume += \{(.*?)\}", CITATION)
    assert len(titles) == 2
    assert [report["title"] for report in citation["references"]] == titles
    assert [report["volume"] for report in citation["references"]] == volumes


def test_the_hosted_ci_runs_targets_that_exist_with_actions_that_cannot_change():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    (job,) = workflow["jobs"].values()
    targets = {run["target"] for run in job["strategy"]["matrix"]["include"]}
    assert {"test", "test-oldest"} <= targets <= TARGETS
    for step in job["steps"]:
        assert "run" in step or re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"])
