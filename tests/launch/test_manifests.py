"""The manifests of launch/: known fields, agreeing numbers, what restarts, what ends.

`schemas.json` names its sources. The whole schemas are 4 MB, so it has what the
manifests use: the schema of a property that they did not set may have to be added.
"""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml

import qlora_jax

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCHEMAS = json.loads(Path(__file__).with_name("schemas.json").read_text())["schemas"]
SERVICE, JOB = yaml.safe_load_all((LAUNCH / "kubernetes/job.yaml").read_text())
JOBSET = yaml.safe_load((LAUNCH / "kubernetes/jobset.yaml").read_text())
TASK = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
# Name -> the specification of the Job, and what its pods are called.
JOBS = {
    "Job": (JOB["spec"], "{job}-{index}.{subdomain}"),
    "JobSet": (
        JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"],
        "{jobset}-{job}-0-{index}.{subdomain}",
    ),
}


def problems(schema, value, where):
    """What a value has that its schema does not allow."""
    if "type" in schema and type(value) is not TYPES[schema["type"]]:
        return [f"{where}: {value!r} is not of type {schema['type']}"]
    if value not in schema.get("enum", [value]):
        return [f"{where}: {value!r} is not one of {schema['enum']}"]
    inner = []
    if isinstance(value, dict) and ("properties" in schema or "values" in schema):
        known = schema.get("properties", dict.fromkeys(value, schema.get("values")))
        inner = [(known[k], value[k], f"{where}.{k}") for k in value if k in known]
    elif isinstance(value, list):
        items = schema.get("items", {})
        inner = [(items, item, f"{where}[{n}]") for n, item in enumerate(value)]
    found = [problem for each in inner for problem in problems(*each)]
    if "properties" in schema:
        found += [f"{where}: unknown {k}" for k in value if k not in known]
        missing = set(schema.get("required", ())) - set(value)
        found += [f"{where}: missing {k}" for k in missing]
    return found


@pytest.mark.parametrize(
    ("kind", "manifest"),
    [("Service", SERVICE), ("Job", JOB), ("JobSet", JOBSET), ("SkyPilot", TASK)],
)
def test_fields_are_those_of_the_published_schema(kind, manifest):
    assert not problems(SCHEMAS[kind], manifest, kind)
    if kind != "SkyPilot":
        assert manifest["kind"] == kind


@pytest.mark.parametrize(
    "damage",
    [
        lambda spec: spec.update(podFailurePolicies={}),
        lambda spec: spec.update(completions="2"),
        lambda spec: spec["podFailurePolicy"]["rules"][0].pop("action"),
        lambda spec: spec["podFailurePolicy"].update(rules={}),
    ],
    ids=["unknown", "type", "missing", "list"],
)
def test_a_wrong_field_is_found(damage):
    manifest = json.loads(json.dumps(JOB))
    damage(manifest["spec"])
    assert len(problems(SCHEMAS["Job"], manifest, "Job")) == 1


# --- Processes ---


def container(spec):
    (found,) = spec["template"]["spec"]["containers"]
    return found


def mesh_options(spec):
    args = container(spec)["args"]
    return dict(zip(args[::2], args[1::2], strict=True))


@pytest.mark.parametrize("kind", JOBS)
def test_every_pod_gets_its_index_and_the_address_of_pod_0(kind):
    spec, name = JOBS[kind]
    options = mesh_options(spec)
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert options["--mesh.processes"] == str(spec["completions"])
    # Kubernetes sets the variable in pods of an indexed Job, and expands it in args.
    assert options["--mesh.process"] == "$(JOB_COMPLETION_INDEX)"
    if kind == "Job":
        subdomain = spec["template"]["spec"]["subdomain"]
        assert SERVICE["metadata"]["name"] == subdomain
        assert SERVICE["spec"]["clusterIP"] == "None"
        selected = SERVICE["spec"]["selector"]["batch.kubernetes.io/job-name"]
        assert selected == JOB["metadata"]["name"]
        names = {"job": JOB["metadata"]["name"]}
    else:
        subdomain = JOBSET["spec"]["network"]["subdomain"]
        (job,) = JOBSET["spec"]["replicatedJobs"]
        assert job["replicas"] == 1
        names = {"jobset": JOBSET["metadata"]["name"], "job": job["name"]}
    host, port = options["--mesh.coordinator"].split(":")
    assert host == name.format(index=0, subdomain=subdomain, **names)
    assert [p["containerPort"] for p in container(spec)["ports"]] == [int(port)]


def test_both_kinds_run_the_same_container():
    own = {"args"}
    ours, theirs = (container(spec) for spec, _ in JOBS.values())
    assert {k: v for k, v in ours.items() if k not in own} == {
        k: v for k, v in theirs.items() if k not in own
    }
    # The program is the first process of the container, which gets the signals.
    assert ours["command"][:2] == ["qlora-jax", "train"]


def test_mesh_options_of_the_launchers_exist():
    """Of every file in launch/, and of `[mesh]` in the run file."""
    section = typing.get_type_hints(qlora_jax.RunConfig)["mesh"]
    known = {field.name for field in dataclasses.fields(section)}
    files = [path for path in LAUNCH.rglob("*") if path.suffix in (".py", ".yaml")]
    assert len(files) >= 4
    for path in files:
        used = set(re.findall(r"--mesh\.(\w+)", path.read_text()))
        assert used == {"coordinator", "processes", "process"}, path
        assert used <= known


# --- Failures ---


def job_decision(spec, status, disrupted):
    """What the Job does with a failed pod, and its message, as its controller."""
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        matched = ""
        if codes := rule.get("onExitCodes"):
            assert codes["operator"] == "In"
            assert codes["containerName"] == container(spec)["name"]
            if status in codes["values"]:
                matched = f"Container train for pod n/p failed with exit code {status}"
        elif disrupted:
            (condition,) = rule["onPodConditions"]
            assert condition == {"type": "DisruptionTarget", "status": "True"}
            matched = "Pod n/p has condition DisruptionTarget"
        if matched:
            action = rule["action"]
            return action, f"{matched} matching {action} rule at index {index}"
    return "Count", ""


def jobset_decision(status, disrupted):
    """What the JobSet does when a pod has failed, as its controller."""
    spec, _ = JOBS["JobSet"]
    action, message = job_decision(spec, status, disrupted)
    assert spec["backoffLimit"] == 0  # any failure fails the Job
    reason = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
    for rule in JOBSET["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(
            re.search(pattern, message) for pattern in patterns
        ):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("status", "disrupted", "job", "jobset"),
    [
        (2, False, "FailJob", "FailJobSet"),
        (75, False, "Count", "RestartJobSet"),
        (137, False, "Count", "RestartJobSet"),
        (1, False, "FailJob", "FailJobSet"),
        (143, True, "Ignore", "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "Ignore", "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "Ignore", "RestartJobSetAndIgnoreMaxRestarts"),
    ],
)
def test_an_error_ends_a_loss_restarts_and_a_disruption_is_not_counted(
    status, disrupted, job, jobset
):
    assert job_decision(JOBS["Job"][0], status, disrupted)[0] == job
    assert jobset_decision(status, disrupted) == jobset


def test_all_pods_may_fail_in_each_restart_of_the_job():
    assert JOB["spec"]["backoffLimit"] >= 10 * JOB["spec"]["completions"]
    assert JOB["spec"]["podReplacementPolicy"] == "Failed"
    assert JOB["spec"]["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("ends", "status", "recovers"),
    [
        ("exit 0", 0, False),
        ("exit 1", 1, False),
        ("exit 2", 2, False),
        ("exit 75", 75, True),
        ("exit 143", 75, True),
        ("kill -KILL $$", 75, True),
    ],
)
def test_skypilot_recovers_from_a_lost_process_only(tmp_path, ends, status, recovers):
    program = tmp_path / "qlora-jax"
    program.write_text(f'#!/bin/sh\necho "$@" > arguments\n{ends}\n')
    program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    script = TASK["run"].replace("/work", str(tmp_path))
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True)
    assert done.returncode == status
    assert (tmp_path / "arguments").read_text().split() == [
        *("train", "run.toml", "--mesh.coordinator", "10.0.0.1:3579"),
        *("--mesh.processes", "2", "--mesh.process", "1"),
    ]
    recovery = TASK["resources"]["job_recovery"]
    assert recovery["max_restarts_on_errors"] == 0
    assert (status in recovery["recover_on_exit_codes"]) == recovers


def test_a_process_under_ray_ends_with_its_worker(tmp_path):
    """The program that the Ray launcher puts between the worker and the training."""
    module = ast.parse((LAUNCH / "ray_train.py").read_text())
    (child,) = (
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CHILD"
    )
    worker = (
        "import os, subprocess, sys\n"
        "command = [sys.executable, '-c', sys.argv[1], str(os.getpid()), 'cat']\n"
        "process = subprocess.Popen(command)\n"
        "print(process.pid, flush=True)\n"
        "process.wait()"
    )
    # `cat` reads a pipe that stays open here, and writes to one that closes as it ends.
    with subprocess.Popen(
        [sys.executable, "-c", worker, child],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.stdin.write(b"runs\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"runs\n"
        process.kill()
        assert process.stdout.read() == b""
    # A worker that has ended before leaves nothing behind.
    late = [sys.executable, "-c", child, "0", "touch", str(tmp_path / "started")]
    assert subprocess.run(late, stderr=subprocess.PIPE).returncode == 1
    assert not (tmp_path / "started").exists()
