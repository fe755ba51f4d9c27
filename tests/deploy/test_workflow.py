"""The workflow of the code host runs the same commands as people do, on the oldest supported Python."""

import json
import os
import re
import tomllib

from tests.deploy.files import DEPLOY, ROOT, document, instructions

_REQUIRED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
OLDEST = _REQUIRED.removeprefix(">=")
CPU_INDEX = dict(
    argument.split("=", 1)
    for name, argument in instructions(DEPLOY / "Dockerfile")
    if name == "ARG" and "=" in argument
)["TORCH_INDEX_URL"]


def test_the_workflow_calls_what_ci_and_people_run_and_nothing_else() -> None:
    workflow = document(ROOT / ".github/workflows/ci.yml")
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert workflow["env"] == {"PIP_EXTRA_INDEX_URL": CPU_INDEX}
    jobs = workflow["jobs"]
    assert {name: job["steps"][2]["run"] for name, job in jobs.items()} == {
        "run": ".ci/run",
        "coverage": "make coverage",
    }
    assert os.access(ROOT / ".ci/run", os.X_OK)
    for job in jobs.values():
        checkout, python, run, *reports = job["steps"]
        assert checkout["uses"].startswith("actions/checkout@")
        assert python["uses"].startswith("actions/setup-python@")
        assert python["with"] == {"python-version": OLDEST}
        assert run["timeout-minutes"] < job["timeout-minutes"]
        assert all(report["uses"].startswith("actions/upload-artifact@") for report in reports)


def test_advisories_are_looked_for_against_every_lock_of_what_runs() -> None:
    workflow = document(ROOT / ".github/workflows/advisories.yml")
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make audit"]
    [command] = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip-audit" in line]
    assert re.search(r"pip-audit==\d+\.\d+\.\d+ ", command)
    assert re.findall(r"--requirement deploy/locks/(\w+)\.txt", command) == ["server", "cuda"]


def test_the_container_for_development_has_that_python_and_sets_up() -> None:
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    assert re.search(rf":{re.escape(OLDEST)}\b", container["image"])
    assert container["containerEnv"] == {"PIP_EXTRA_INDEX_URL": CPU_INDEX}
    assert container["postCreateCommand"] == "make setup"


def test_a_report_of_a_bug_has_what_is_needed_to_see_it() -> None:
    for name, ids in (("bug", {"version", "banner", "command", "error"}), ("feature", {"task", "today"})):
        form = document(ROOT / f".github/ISSUE_TEMPLATE/{name}.yml")
        assert form["name"]
        assert form["description"]
        required = {field["id"] for field in form["body"] if field.get("validations", {}).get("required")}
        assert required == ids
        assert "`weft --version`" in str(form["body"])
