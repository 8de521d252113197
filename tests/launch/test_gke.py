"""launch/gke.yaml as launch/gke.sh fills it in, and what is handed to kubectl."""

import math

import pytest
import yaml

from clipjax import aot
from tests.launch.stand_ins import Stage

JOB = ["--context", "c", "--name", "run-1", "--image", "i/j:k", "--topology", "v5e:16x16", "--workdir", "gs://b/run"]
TRAIN = ["configs/c.py", "--train.steps", "10"]

# The fields of JobSet v1alpha2 (https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2) and of Job and Pod below it that the
# template may have, and their types; a misspelt one would be ignored without a message.
PLACE = {"cloud.google.com/gke-tpu-accelerator": str, "cloud.google.com/gke-tpu-topology": str, "cloud.google.com/gke-spot": str}
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str}],
    "ports": [{"containerPort": int}],
    "resources": {"limits": {"google.com/tpu": int}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "hostNetwork": bool,
    "dnsPolicy": str,
    "serviceAccountName": str,
    "nodeSelector": PLACE,
    "tolerations": [{"key": str, "operator": str, "effect": str}],
    "containers": [CONTAINER],
    "volumes": [{"name": str, "emptyDir": {"medium": str}}],
}
BY_STATUS = {"rules": [{"action": str, "onExitCodes": {"containerName": str, "operator": str, "values": [int]}}]}
MACHINES = {
    "completionMode": str,
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "podFailurePolicy": BY_STATUS,
    "template": {"spec": POD},
}
FAILURE = {"maxRestarts": int, "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}]}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": str}},
    "spec": {"failurePolicy": FAILURE, "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": MACHINES}}]},
}


def check(value, schema, path="jobset"):
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        assert value.keys() <= schema.keys(), f"{path}: {value.keys() - schema.keys()}"
        for key in value:
            check(value[key], schema[key], f"{path}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), path
        for i, one in enumerate(value):
            check(one, schema[0], f"{path}[{i}]")
    else:
        assert type(value) is schema, f"{path} = {value!r}"


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def rendered(stage, *options, train=TRAIN):
    done = stage.run("gke.sh", "render", *JOB, *options, *train)
    assert done.returncode == 0, done.stderr
    jobset = yaml.safe_load(done.stdout)
    check(jobset, JOBSET)
    job = jobset["spec"]["replicatedJobs"][0]
    return jobset, job, job["template"]["spec"], job["template"]["spec"]["template"]["spec"]


def test_a_jobset_for_a_slice(stage):
    jobset, job, machines, pod = rendered(stage)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "run-1"
    assert jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] == "cloud.google.com/gke-nodepool"
    assert job["replicas"] == 1
    assert machines["parallelism"] == machines["completions"] == 64
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    (container,) = pod["containers"]
    assert container["image"] == "i/j:k"
    assert container["command"] == ["launch/tpu_flags.sh", "launch/retry.sh", ".venv/bin/clipjax", "train"]
    assert container["args"] == [*TRAIN, "--workdir", "gs://b/run"]
    assert container["env"] == []
    assert container["resources"]["limits"]["google.com/tpu"] == 4


def test_by_the_status_it_starts_again_or_not(stage):
    jobset, _, machines, pod = rendered(stage, "--restarts", "7")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    (rule,) = machines["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "In"
    assert {2, 3} <= {*rule["onExitCodes"]["values"]}
    assert not {0, 1, 75, 137, 143} & {*rule["onExitCodes"]["values"]}
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert machines["backoffLimit"] == 0  # any other fails the job with another reason, and the set starts again
    assert pod["restartPolicy"] == "Never"  # else no podFailurePolicy
    assert pod["terminationGracePeriodSeconds"] >= 120


def test_texts_of_any_kind_arrive_as_they_are(stage):
    odd = ["configs/c.py", "--data.spec", """it's "a" \\d & ${HOME} #: {x}""", "--train.steps", "0x10", "yes", ""]
    pod = rendered(stage, "--env", "A=b='c' \\n", "--env", "B=", train=odd)[3]
    assert pod["containers"][0]["args"] == [*odd, "--workdir", "gs://b/run"]
    assert pod["containers"][0]["env"] == [{"name": "A", "value": "b='c' \\n"}, {"name": "B", "value": ""}]


@pytest.mark.parametrize(
    ("topology", "label", "machines", "chips"),
    [
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x2", "tpu-v5-lite-podslice", 1, 4),
        ("v6e:2x4", "tpu-v6e-slice", 1, 8),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4),
        ("v4:2x2x1", "tpu-v4-podslice", 1, 4),
        ("v5p:4x4x8", "tpu-v5p-slice", 32, 4),
        ("tpu7x:2x2x2", "tpu7x", 2, 4),
    ],
)
def test_machines_follow_from_the_topology(stage, topology, label, machines, chips):
    kind, _, shape = topology.partition(":")
    assert shape in aot.TOPOLOGIES[kind].split()  # one that `clipjax plan` takes, too
    _, job, spec, pod = rendered(stage, "--topology", topology, "--slices", "3", "--spot")
    assert job["replicas"] == 3
    assert spec["completions"] == machines
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": shape,
        "cloud.google.com/gke-spot": "true",
    }


@pytest.mark.parametrize("kind", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_what_can_be_planned_can_be_started(stage, kind):
    for shape in aot.TOPOLOGIES[kind].split():
        _, _, machines, pod = rendered(stage, "--topology", f"{kind}:{shape}")
        chips = machines["completions"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
        assert chips == math.prod(map(int, shape.split("x")))


def test_cubes_of_any_number_make_a_slice(stage):
    assert rendered(stage, "--topology", "v5p:4x4x12")[2]["completions"] == 48


@pytest.mark.parametrize("option", ["context", "name", "image", "topology", "workdir"])
def test_what_is_missing_is_asked_for_by_name(stage, option):
    at = JOB.index(f"--{option}")
    without = JOB[:at] + JOB[at + 2 :]
    done = stage.run("gke.sh", "apply", *without, *TRAIN)
    assert done.returncode == 2
    assert f"--{option}, or CLIPJAX_{option.upper()}: " in done.stderr
    assert done.stderr.count("CLIPJAX_") == 1
    assert stage.calls("kubectl") == []
    done = stage.run("gke.sh", "apply", *without, *TRAIN, **{f"CLIPJAX_{option.upper()}": JOB[at + 1]})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["apply", *JOB], "CONFIG.py"),
        (["apply", *JOB, "--name", "Run_1", *TRAIN], "--name = 'Run_1': must consist of a-z"),
        (["apply", *JOB, "--topology", "v5e-256", *TRAIN], "--topology = 'v5e-256': must be"),
        (["apply", *JOB, "--topology", "v3:2x2", *TRAIN], "--topology = 'v3:2x2': must be"),
        (["apply", *JOB, "--topology", "v5e:2x2x1", *TRAIN], "v5e comes as 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16\n"),
        (["apply", *JOB, "--topology", "v5e:1x2", *TRAIN], "--topology = 'v5e:1x2': there are no such slices"),
        (["apply", *JOB, "--topology", "v6e:32x32", *TRAIN], "--topology = 'v6e:32x32': there are no such slices"),
        (["apply", *JOB, "--topology", "v4:4x4", *TRAIN], "--topology = 'v4:4x4': there are no such slices"),
        (["apply", *JOB, "--topology", "v4:1x1x1", *TRAIN], "v4 comes as 2x2x1, 2x2x2, 2x2x4, 2x4x4, and AxBxC with A <= B <= C"),
        (["apply", *JOB, "--topology", "v5p:8x4x4", *TRAIN], "--topology = 'v5p:8x4x4': there are no such slices"),
        (["apply", *JOB, "--topology", "v5p:4x4x6", *TRAIN], "--topology = 'v5p:4x4x6': there are no such slices"),
        (["apply", *JOB, "--topology", "v5p:16x16x28", *TRAIN], "multiples of four, up to 6144 chips"),
        (["apply", *JOB, "--workdir", "runs/x", *TRAIN], "--workdir = 'runs/x': must be gs://"),
        (["apply", *JOB, "--slices", "0", *TRAIN], "--slices = '0': must be"),
        (["apply", *JOB, "--restarts", "-1", *TRAIN], "--restarts = '-1': must be"),
        (["apply", *JOB, "--env", "1=2", *TRAIN], "--env = '1=2': must be NAME=VALUE"),
        (["apply", *JOB, "--image"], "--image: needs a value"),
        (["apply", *JOB, "--gpu", *TRAIN], "unknown option --gpu"),
        (["start"], "no command start"),
    ],
)
def test_wrong_use_is_refused(stage, arguments, message):
    done = stage.run("gke.sh", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert stage.calls("kubectl") == []


def test_a_config_that_this_checkout_lacks_is_named(stage):
    for name, file in (("clip_b99", "configs/clip_b99.py"), ("mine.py", "mine.py")):
        done = stage.run("gke.sh", "apply", *JOB, name)
        assert done.stderr == f"gke: CONFIG.py|NAME = '{name}': is not in this checkout; the image must have it as {file}\n"
    assert stage.run("gke.sh", "apply", *JOB, *TRAIN).stderr == ""


def test_a_name_that_is_not_filled_in_is_refused(stage):
    template = stage.checkout / "launch" / "gke.yaml"
    template.write_text(template.read_text().replace("${SLICES}", "${SLIZES}"))
    done = stage.run("gke.sh", "apply", *JOB, *TRAIN)
    assert done.returncode == 2
    assert "SLIZES" in done.stderr
    assert stage.calls("kubectl") == []


def test_kubectl_gets_it(stage):
    assert stage.run("gke.sh", "apply", *JOB, *TRAIN).returncode == 0
    assert stage.calls("kubectl") == [["--context=c", "apply", "--filename=-"]]
    assert yaml.safe_load((stage.folder / "applied").read_text()) == rendered(stage)[0]
    for command in ("status", "logs", "delete"):
        assert stage.run("gke.sh", command, "--context", "c", "--name", "run-1").returncode == 0
    assert [c[1:4] for c in stage.calls("kubectl")[1:]] == [
        ["get", "jobset", "run-1"],
        ["get", "pods", "--selector=jobset.sigs.k8s.io/jobset-name=run-1"],
        ["logs", "--follow", "--container=train"],
        ["delete", "jobset", "run-1"],
    ]
    assert {c[0] for c in stage.calls("kubectl")} == {"--context=c"}


def test_a_failure_of_kubectl_is_returned(stage):
    stage.play("kubectl", "the server could not find the requested resource (jobset)")
    done = stage.run("gke.sh", "apply", *JOB, *TRAIN)
    assert done.returncode == 1
    assert "could not find the requested resource" in done.stderr


def test_a_dry_run_prints_and_runs_nothing(stage):
    done = stage.run("gke.sh", "apply", "--dry-run", *JOB, *TRAIN)
    *text, command = done.stdout.splitlines()
    assert done.returncode == 0
    assert yaml.safe_load("\n".join(text)) == rendered(stage)[0]
    assert command == "kubectl --context=c apply --filename=-"
    for command in ("status", "logs", "delete"):
        assert "kubectl --context=c" in stage.run("gke.sh", command, "--dry-run", *JOB).stdout
    assert stage.calls("kubectl") == []
