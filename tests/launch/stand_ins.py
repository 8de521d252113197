"""Programs that stand in for gcloud, uv, clipjax, kubectl and Slurm's, on a PATH of their own: they record their calls and play
what a test scripts. Machines are folders, and what is sent to them runs there for real.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What `gcloud COMMAND --help` lists (Google Cloud SDK 528), as far as launchers could want it.
SSH = "--worker --command --ssh-flag --scp-flag --batch-size --internal-ip --tunnel-through-iap --recurse --compress"
FLAGS = {
    "compute tpus queued-resources create": "--node-id --node-count --node-prefix --accelerator-type --runtime-version --spot "
    "--async --valid-until-duration --network --subnetwork --service-account --reserved --internal-ips --labels --metadata",
    "compute tpus queued-resources describe": "--format",
    "compute tpus queued-resources delete": "--force --quiet --async",
    "compute tpus tpu-vm ssh": SSH,
    "compute tpus tpu-vm scp": SSH,
    "storage ls": "",
}
NEEDED = {
    "compute tpus queued-resources create": "--zone --accelerator-type --runtime-version",
    "compute tpus queued-resources describe": "--zone",
    "compute tpus queued-resources delete": "--zone",
    "compute tpus tpu-vm ssh": "--zone --worker --command",
    "compute tpus tpu-vm scp": "--zone --worker",
    "storage ls": "",
}


def parsed(arguments: Sequence[str]) -> tuple[str, list[str], dict[str, str]]:
    """The command, what stands by itself, and the flags of a call of gcloud's. Fails where gcloud would refuse it."""
    command = next((c for c in FLAGS if " ".join(arguments).startswith(f"{c} ")), None)
    assert command, f"no such command: {arguments}"
    rest = arguments[len(command.split()) :]
    flags = dict(a.partition("=")[::2] for a in rest if a.startswith("--"))
    unknown = flags.keys() - {*FLAGS[command].split(), "--project", "--zone"}
    assert not unknown, f"unknown to {command}: {unknown}"
    missing = {*NEEDED[command].split(), "--project"} - flags.keys()
    assert not missing, f"needed by {command}: {missing}"
    if command.endswith("create"):
        assert ("--node-id" in flags) != ("--node-count" in flags)
    return command, [a for a in rest if not a.startswith("--")], flags


# Without site-packages, and from its byte code: there are many calls.
START = "#!{python} -SE\nimport sys\nsys.path.insert(0, {folder!r})\nimport stand_ins\n"


class Stage:
    """A folder with the stand-ins on its PATH, a checkout with launch/ to start them from, and what they recorded."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.checkout = folder / "stage", folder / "checkout"
        for path in (self.folder / "bin", self.checkout):
            path.mkdir(parents=True)
        for name in ("gcloud", "uv", "kubectl", "srun", "scancel", "scontrol"):
            program = self.folder / "bin" / name
            program.write_text(
                START.format(python=sys.executable, folder=str(Path(__file__).parent)) + f"stand_ins.main({name!r})\n"
            )
            program.chmod(0o755)
        subprocess.run(["cp", "-r", ROOT / "launch", ROOT / "pyproject.toml", self.checkout], check=True)
        (self.checkout / "configs").mkdir()
        (self.checkout / "configs" / "c.py").write_text("def config(): ...\n")
        quick = {"POLL": "0.02", "RETRY_FIRST": "0", "RETRY_MOST": "0", "RETRY_PAUSE": "0", "RETRIES": "5"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CLIPJAX_", "SLURM_"))}
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        self.environment = inherited | quick | {"PATH": path, "STAGE": str(self.folder), "STAGE_WORKERS": "1"} | environment

    def commit(self) -> None:
        git = ["git", "-C", self.checkout, "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
            subprocess.run([*git, *command], check=True)

    def play(self, what: str, *acts: str) -> None:
        """What a stand-in does, call by call; the last act repeats."""
        (self.folder / what).write_text("\n".join(acts))

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        env = self.environment | environment
        command = ["bash", self.checkout / "launch" / script, *arguments]
        return subprocess.Popen(command, env=env, cwd=self.checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **environment)
        try:
            out, err = process.communicate(timeout=400)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self, program: str) -> list[list[str]]:
        path = self.folder / f"{program}.calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> list[str]:
        """The words of gcloud's calls that tell them apart, without the questions."""
        words = ("create", "delete", "scp", "install", "start", "follow", "wait", "stop", "status")
        commands = [[*c[:4], *c[-1].partition("--command=")[2].split()] for c in self.calls("gcloud")]
        found = ([w for w in words if w in c] for c in commands)
        return [f[-1] for f in found if f]

    def close(self) -> None:
        _end_training(self.folder)


def _act(stage: Path, what: str, who: str = "") -> str:
    """The next of the acts that the test scripted."""
    acts = (stage / what).read_text().splitlines() if (stage / what).exists() else [""]
    with (stage / f"{what}{who}.count").open("a+") as count:  # one line for each call
        fcntl.flock(count, fcntl.LOCK_EX)
        count.seek(0)
        n = len(count.readlines())
        count.write("x\n")
    return acts[min(n, len(acts) - 1)]


def _end_training(stage: Path) -> None:
    for path in stage.glob("machines/*/clipjax/.train/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(path.read_text()), signal.SIGKILL)
        path.unlink()


def gcloud(stage: Path, arguments: list[str]) -> int:
    command, names, flags = parsed(arguments)
    states = stage / "states"  # of the machines asked for: those to come; no file where there are none
    match command.split()[-1]:
        case "create":
            complaint = _act(stage, "create")
            if complaint and complaint != "fine":
                print(f"ERROR: (gcloud.compute.tpus.queued-resources.create) {complaint}", file=sys.stderr)
                return 1
            assert not states.exists(), "there is one already"
            states.write_text((_act(stage, "machines.become") or "ACTIVE").replace(" ", "\n"))
            several = [f"{flags['--node-prefix']}-{i}" for i in range(int(flags.get("--node-count", 0)))]
            for node in several or [flags["--node-id"]]:
                for i in range(int(os.environ["STAGE_WORKERS"])):
                    (stage / "machines" / f"{node}.{i}").mkdir(parents=True)
        case "describe":
            trouble = _act(stage, "describe")
            if trouble and trouble != "fine":
                print(f"ERROR: (gcloud) {trouble}", file=sys.stderr)
                return 1
            if not states.exists():
                print("ERROR: (gcloud) NOT_FOUND: Resource was not found", file=sys.stderr)
                return 1
            now, *later = states.read_text().splitlines()
            if later:
                states.write_text("\n".join(later))
            print(now)
        case "delete":
            assert states.exists(), "there is none"
            _end_training(stage)
            subprocess.run(["rm", "-rf", stage / "machines"], check=True)
            states.unlink()
        case "scp":
            source, _, (node, _, name) = names[0], None, names[1].partition(":")
            for machine in sorted(stage.glob(f"machines/{node}.*")):
                subprocess.run(["cp", source, machine / name], check=True)
        case "ssh":
            return _ssh(stage, names[0], flags)
        case "ls":
            listed = stage / "bucket" / names[0].removeprefix("gs://")
            print("\n".join(sorted(f"{names[0]}{path.name}/" for path in listed.glob("*"))))
    return 0


def _ssh(stage: Path, node: str, flags: dict[str, str]) -> int:
    """As gcloud's: on all workers at once, the status of the first that failed, 255 where the connection broke."""
    machines = sorted(stage.glob(f"machines/{node}.{'*' if flags['--worker'] == 'all' else flags['--worker']}"))
    assert machines, f"no machines of {node}"
    if _act(stage, "ssh." + flags["--command"].split("tpu_worker.sh ")[1].split()[0]) == "broken":
        return 255
    env = {name: value for name, value in os.environ.items() if name != "OLDPWD"}
    running = [
        subprocess.Popen(["bash", "-c", flags["--command"]], cwd=m, env=env | {"HOME": str(m)}, start_new_session=True)
        for m in machines
    ]
    while any(p.poll() is None for p in running):
        if "ACTIVE" not in (stage / "states").read_text():  # taken away while it ran
            for p in running:
                if p.poll() is None:
                    os.killpg(p.pid, signal.SIGKILL)
            _end_training(stage)
            return 255
        time.sleep(0.01)
    return next((p.returncode for p in running if p.returncode), 0)


CLIPJAX = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$HOME") $*" >>"$STAGE/trained"
env >"$STAGE/trained.environment"
machine=$(basename "$HOME")
act=$({python} -SEc "import sys, pathlib
sys.path.insert(0, {folder!r})
import stand_ins
print(stand_ins._act(pathlib.Path(sys.argv[1]), 'train', '.' + sys.argv[2]))" "$STAGE" "$machine")
for word in $act; do
  case $word in
  save) mkdir -p "$STAGE/bucket/b/run/checkpoints/$RANDOM$RANDOM" ;;
  taken) echo SUSPENDED >"$STAGE/states" && sleep 100 ;;
  slow) sleep 0.5 ;;
  until-signal) trap 'echo saved; exit 75' TERM && touch "$STAGE/ready.$machine" && while :; do sleep 0.02; done ;;
  *@*) [ "${{word#*@}}" != "$machine" ] || exit "${{word%@*}}" ;;
  *) exit "$word" ;;
  esac
done
exit 0
"""


def prepare(checkout: Path) -> None:
    """Installs the clipjax that plays `train`."""
    program = checkout / ".venv" / "bin" / "clipjax"
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(CLIPJAX.format(python=sys.executable, folder=str(Path(__file__).parent)))
    program.chmod(0o755)


def uv(stage: Path, arguments: list[str]) -> int:
    if arguments[0] == "venv":
        Path(".venv/bin").mkdir(parents=True, exist_ok=True)
        Path(".venv/bin/python").symlink_to(sys.executable)
    elif arguments[:2] == ["pip", "install"]:
        machine = Path(os.environ["HOME"]).name
        if _act(stage, "install", f".{machine}") == f"fails on {machine}":
            print(f"{machine}: No space left on device", file=sys.stderr)
            return 1
        (stage / "constraints").write_text(Path(arguments[arguments.index("--constraint") + 1]).read_text())
        prepare(Path())
    return 0


def kubectl(stage: Path, arguments: list[str]) -> int:
    if "apply" in arguments:
        (stage / "applied").write_text(sys.stdin.read())
    trouble = _act(stage, "kubectl")
    if trouble:
        print(f"error: {trouble}", file=sys.stderr)
    return 1 if trouble else 0


def srun(stage: Path, arguments: list[str]) -> int:
    """Each task runs for real; the status is the highest."""
    command = arguments[next(i for i, a in enumerate(arguments) if not a.startswith("-")) :]
    tasks = []
    for i in range(int(os.environ["STAGE_WORKERS"])):
        env = os.environ | {"SLURM_PROCID": str(i), "HOME": f"{stage}/task.{i}"}
        tasks.append(subprocess.Popen(command, env=env, start_new_session=True))
    (stage / "tasks").write_text(" ".join(str(t.pid) for t in tasks))
    return max(t.wait() for t in tasks)


def scancel(stage: Path, arguments: list[str]) -> int:
    assert arguments[0] == "--signal=TERM"
    for pid in (stage / "tasks").read_text().split():
        os.killpg(int(pid), signal.SIGTERM)
    return 0


def scontrol(stage: Path, arguments: list[str]) -> int:
    return 0


def main(name: str) -> None:
    stage = Path(os.environ["STAGE"])
    with (stage / f"{name}.calls").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    sys.exit(globals()[name](stage, sys.argv[1:]))
