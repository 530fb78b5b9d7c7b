"""Tests of the workflow files: schema, audit, and the fourteen rules of a measuring runner."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; omegaconf brings it")

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONS = sorted((ROOT / ".github" / "actions").glob("*/action.yml"))
TEXTS = {path.stem: path.read_text(encoding="utf-8") for path in WORKFLOWS}
PARSED = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
JOBS = {f"{name}/{id}": job for name, one in PARSED.items() for id, job in one["jobs"].items()}
GPU_JOBS = {name: job for name, job in JOBS.items() if "self-hosted" in str(job.get("runs-on"))}
# The commit of each action, with its release.
PINS = {
    "actions/checkout": "08c6903cd8c0fde910a37f88322edcfb5dd907a8 # v5.0.0",
    "actions/setup-python": "e797f83bcb11b83ae66e0230d6156d7c80228e7c # v6.0.0",
    "actions/upload-artifact": "330a01c490aca151604b8cf639adc76d48f6c5d4 # v5.0.0",
    "actions/download-artifact": "018cc2cf5baa6db3ef3c5f8a56943fffe632ef53 # v6.0.0",
    "actions/upload-pages-artifact": "7b1f4a764d45c48632c6b24a0339c27f5614fb0b # v4.0.0",
    "actions/cache": "0057852bfaa89a56745cba8c7296529d2fc39830 # v4.3.0",
    "actions/deploy-pages": "d6db90164ac5ed86f2b6aed7e0febac5b3c0c03e # v4.0.5",
}


def triggers(name: str) -> dict:
    """Return the events of a workflow. YAML 1.1 reads the key `on` as true."""
    events = PARSED[name][True]
    return events if isinstance(events, dict) else dict.fromkeys([events] if isinstance(events, str) else events)


def steps(job: dict) -> list[dict]:
    return job.get("steps", [])


def tool(name: str) -> str:
    """Return the path of an installed tool, or skip the test with the reason."""
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if not path:
        pytest.skip(f"{name} is not installed")
    return path


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


# --- external tools


@pytest.mark.parametrize(
    "schema, paths",
    [("vendor.github-workflows", WORKFLOWS), ("vendor.github-actions", ACTIONS)],
    ids=["workflows", "action"],
)
def test_files_match_the_published_schema(schema, paths):
    done = run(tool("check-jsonschema"), "--builtin-schema", schema, *map(str, paths))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok -- validation done" in done.stdout


def test_schema_rejects_an_invalid_workflow(tmp_path):
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(TEXTS["perf"].replace("runs-on", "run-on"))
    assert run(tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", str(wrong)).returncode != 0


def test_audit_has_no_findings():
    done = run(tool("zizmor"), "--offline", "--no-progress", "--format", "json", *map(str, [*WORKFLOWS, *ACTIONS]))
    assert json.loads(done.stdout) == [], done.stdout
    assert done.returncode == 0, done.stderr


def test_ignored_findings_of_the_audit():
    """Each has its reason beside it; a further one is a decision for this test."""
    ignored = {name: re.findall(r"zizmor: ignore\[([a-z,-]+)\]", text) for name, text in TEXTS.items()}
    assert {name: rules for name, rules in ignored.items() if rules} == {
        "perf": ["dangerous-triggers", "self-repository"],
        "tests": ["self-repository"],
    }


def test_audit_detects_an_unpinned_action(tmp_path):
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(TEXTS["perf"].replace("08c6903cd8c0fde910a37f88322edcfb5dd907a8", "v5"))
    done = run(tool("zizmor"), "--offline", "--no-progress", "--format", "json", str(wrong))
    assert "unpinned-uses" in {one["ident"] for one in json.loads(done.stdout)}


def test_actionlint_has_no_findings():
    # The fork that is installed from a wheel requires a limit for a cache that no workflow uses.
    ignored = ("-ignore", "no explicit cache access limit")
    command = (tool("actionlint"), "-no-color", "-config-file", ".github/actionlint.yaml", *ignored)
    done = run(*command, *map(str, WORKFLOWS))
    assert done.returncode == 0, done.stdout + done.stderr


# --- security


def test_there_are_jobs_on_gpus():
    assert set(GPU_JOBS) == {"perf/measure", "canary/canary"}


def test_rule_1_outsiders_cannot_start_a_gpu_job():
    for name in {one.partition("/")[0] for one in GPU_JOBS}:
        assert set(triggers(name)) <= {"schedule", "workflow_dispatch", "push", "issue_comment"}
        assert (triggers(name).get("push") or {"branches": ["main"]})["branches"] == ["main"]
    assert not [name for name in PARSED if set(triggers(name)) & {"pull_request_target", "workflow_run"}]
    assert "pull_request" in triggers("tests")


def test_rule_2_comments_are_checked_before_a_machine_starts():
    condition = JOBS["perf/resolve"]["if"]
    assert '["OWNER", "MEMBER", "COLLABORATOR"]' in condition
    assert "github.event.issue.pull_request" in condition
    (checkout,) = [step for step in steps(JOBS["perf/measure"]) if "checkout" in step.get("uses", "")]
    assert checkout["with"]["ref"] == "${{ needs.resolve.outputs.sha }}"
    assert "refs/pull/" not in "".join(
        step.get("run", "") + str(step.get("with")) for step in steps(JOBS["perf/measure"])
    )


@pytest.mark.parametrize("name", GPU_JOBS)
def test_rule_3_gpu_jobs_have_a_read_only_token_and_no_secret(name):
    job = GPU_JOBS[name]
    assert job["permissions"] == {"contents": "read"}
    text = json.dumps(job)
    assert "secrets." not in text
    assert "github.token" not in text
    assert "id-token" not in text


def test_a_reviewed_commit_is_not_published_as_main():
    """A called workflow has the event of its caller, which does not identify the measured commit."""
    for name in ("publish-report/render", "publish-report/pages", "publish-report/comment"):
        assert "github.event" not in json.dumps(JOBS[name])
    assert JOBS["perf/publish"]["with"]["pages"] == "${{ needs.resolve.outputs.promote == 'true' }}"


@pytest.mark.parametrize("name", TEXTS)
def test_default_permissions_are_none_or_read_only(name):
    assert PARSED[name]["permissions"] in ({}, {"contents": "read"})
    assert "secrets." not in TEXTS[name]


def test_jobs_with_write_permissions():
    writing = {
        name: {key for key, right in job.get("permissions", {}).items() if right == "write"}
        for name, job in JOBS.items()
    }
    assert {name: rights for name, rights in writing.items() if rights} == {
        "perf/promote": {"contents"},
        "perf/answer": {"pull-requests"},
        "perf/publish": {"pages", "id-token", "pull-requests"},
        "publish-report/pages": {"pages", "id-token"},
        "publish-report/comment": {"pull-requests"},
        "canary/promote": {"contents"},
    }
    assert not set(GPU_JOBS) & {name for name, rights in writing.items() if rights}


def uses(path: Path) -> list[str]:
    return re.findall(r"uses: (\S+(?: # \S+)?)", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [*WORKFLOWS, *ACTIONS], ids=lambda path: path.stem)
def test_rule_13_every_action_is_pinned_by_commit(path):
    for use in uses(path):
        if use.startswith("./"):
            assert (ROOT / use.split()[0]).exists()
            continue
        action, _, pin = use.partition("@")
        assert PINS[action] == pin


@pytest.mark.parametrize("name", JOBS)
def test_every_checkout_forgets_its_token(name):
    for step in steps(JOBS[name]):
        if "actions/checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def all_steps() -> list[tuple[str, dict]]:
    pairs = [(name, step) for name, job in JOBS.items() for step in steps(job)]
    for path in ACTIONS:
        action = yaml.safe_load(path.read_text(encoding="utf-8"))
        pairs += [(path.parent.name, step) for step in action["runs"]["steps"]]
    return pairs


INTERPRETER = r"(?:bash|python3|\.ci/venv/bin/python)"
BESIDE_ACTION = r"(?:\$GITHUB_ACTION_PATH/\.\./\.\./\.\./)?"
RUNS = [(name, step["run"]) for name, step in all_steps() if "run" in step]


@pytest.mark.parametrize("name, line", RUNS)
def test_every_run_is_one_line_that_calls_a_script(name, line):
    assert "\n" not in line.strip()
    assert "${{" not in line  # foreign text would become part of the command
    match = re.fullmatch(
        rf'{INTERPRETER} "?{BESIDE_ACTION}(\.(?:ci|github)/[a-z/.-]+)"?(?: [a-z0-9-]+| "\$[A-Z]+")*', line.strip()
    )
    assert match, line
    assert (ROOT / match[1]).is_file()


def test_event_fields_are_used_only_in_conditions():
    for _, step in all_steps():
        assert "github.event." not in json.dumps({key: value for key, value in step.items() if key != "if"})
    for job in JOBS.values():
        assert "github.event." not in json.dumps(
            {key: value for key, value in job.items() if key not in ("if", "steps")}
        )


# --- measurement


@pytest.mark.parametrize("name", GPU_JOBS)
def test_rules_5_and_7_machine_is_checked_first(name):
    job = GPU_JOBS[name]
    assert job["runs-on"] == ["self-hosted", "gpu", "${{ matrix.label }}"]
    assert steps(job)[1]["run"] == "python3 .github/scripts/gpu.py check"
    runs = [step.get("run", "") for step in steps(job)]
    lock, unlock = (runs.index(f"python3 .github/scripts/gpu.py {command}") for command in ("lock", "unlock"))
    (measuring,) = [number for number, line in enumerate(runs) if line.startswith(".ci/venv/bin/python")]
    assert lock < measuring < unlock
    assert steps(job)[unlock]["if"] == "always()"


@pytest.mark.parametrize("name", GPU_JOBS)
def test_rule_6_one_measurement_per_gpu_without_cancellation(name):
    concurrency = {"group": "gpu-${{ matrix.label }}", "cancel-in-progress": False, "queue": "max"}
    assert GPU_JOBS[name]["concurrency"] == concurrency
    assert GPU_JOBS[name]["strategy"]["fail-fast"] is False
    assert list(GPU_JOBS[name]["strategy"]["matrix"]) == ["label"]  # all sets of a label are one job
    assert not PARSED[name.partition("/")[0]].get("concurrency", {}).get("cancel-in-progress")


def test_rule_8_only_hosted_jobs_of_main_write_baselines():
    writers = [name for name, step in all_steps() if "perf-data push" in step.get("run", "")]
    assert sorted(writers) == ["canary/promote", "perf/promote"]
    for name in writers:
        assert "github.ref == 'refs/heads/main'" in JOBS[name]["if"]
        assert JOBS[name]["concurrency"] == {"group": "perf-data", "cancel-in-progress": False, "queue": "max"}
    measuring = (ROOT / ".github" / "scripts" / "measure.py").read_text()
    assert "--benchmark-autosave" not in measuring
    assert "--benchmark-save" not in measuring


@pytest.mark.parametrize("name", GPU_JOBS)
def test_rule_9_measurements_are_always_uploaded(name):
    (upload,) = [step for step in steps(GPU_JOBS[name]) if "upload-artifact" in step.get("uses", "")]
    assert upload["if"] == "always()"
    assert upload["with"]["retention-days"] >= 90


def test_artifacts_of_machines_keep_a_folder_for_each_label():
    """By default the action unpacks a single match without a folder; each artifact has the folder of its label."""
    downloads = [step["with"] for _, step in all_steps() if "download-artifact" in step.get("uses", "")]
    several = [arguments for arguments in downloads if "pattern" in arguments]
    assert len(several) == 3 and all(arguments.get("merge-multiple") is True for arguments in several)


def test_rule_10_forks_queue_nothing_and_schedules_match_the_script():
    import resolve

    crons = [trigger["cron"] for trigger in triggers("perf")["schedule"]]
    assert crons == list(resolve.SCHEDULES)
    for name in ("perf/resolve", "canary/resolve", "publish-report/render"):
        assert "github.repository_owner == vars.PERF_OWNER" in JOBS[name]["if"]


def test_dispatch_offers_every_set():
    from perf.configurations.sets import SETS

    assert set(triggers("perf")["workflow_dispatch"]["inputs"]["set"]["options"]) == set(SETS)


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if "uses" not in job])
def test_rule_11_every_job_has_a_timeout(name):
    assert JOBS[name]["timeout-minutes"]


def test_rule_12_no_job_continues_after_an_error():
    for text in (*TEXTS.values(), *(path.read_text() for path in ACTIONS)):
        assert "continue-on-error" not in text
        assert "|| true" not in text
    assert any("cron" in trigger for trigger in triggers("canary")["schedule"])
    measuring = [step for name in GPU_JOBS for step in steps(GPU_JOBS[name]) if "venv" in step.get("run", "")]
    assert len(measuring) == 2
    assert not any("if" in step for step in measuring)


@pytest.mark.parametrize("number", range(1, 15))
def test_every_rule_is_marked_in_a_workflow(number):
    rules = re.compile(rf"#.*\b[Rr]ules? (?:\d+, )*(?:\d+ and )?{number}\b")
    assert [name for name in ("perf", "publish-report", "canary") if rules.search(TEXTS[name])], number


def test_environments_of_tests_yml_exist_in_tox():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    known = {section.removeprefix("testenv:") for section in parser.sections()}
    everything = parser["tox"]["labels"]
    for job in ("tests/lint", "tests/torch"):
        for environment in JOBS[job]["strategy"]["matrix"]["environment"]:
            assert environment in known or re.search(rf"\b{environment}\b", everything)


def test_scripts_need_no_installed_package():
    """Scripts run on hosted machines before any installation: standard library, each other, and pure modules of perf.

    gpu_session.py is a maintainer's, and installs what it needs.
    """
    scripts = [path for path in (ROOT / ".github" / "scripts").glob("*.py") if path.stem != "gpu_session"]
    allowed = {*sys.stdlib_module_names, "perf", *(path.stem for path in scripts)}
    for path in scripts:
        imported = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert set(imported) <= allowed, path.name
        assert "shell=True" not in path.read_text()
        assert importlib.util.spec_from_file_location(path.stem, path) is not None
