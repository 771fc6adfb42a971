"""The scripts, with recording stand-ins for python and gcloud."""

import fnmatch
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, python

from supmim_jax import multihost


@pytest.fixture
def clone(tmp_path):
    """A copy of the scripts in a directory with a space in its name, and its active environment."""
    root = tmp_path / "a clone"
    root.mkdir()
    for name in ("launch", "tests/run.sh", "setup.py", "constraints.txt"):
        source, target = Path(REPOSITORY, name), root / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    for name in ("python", "ruff"):
        stand_in = environment / "bin" / name
        stand_in.write_text(f'#!/bin/bash\necho "{name} $*" >> "{tmp_path}/calls"\n')
        stand_in.chmod(0o755)
    return root, environment


def calls(clone, script: str, *arguments: str, **env) -> list[str]:
    """What a script runs, from another working directory."""
    root, environment = clone
    log = root.parent / "calls"
    log.unlink(missing_ok=True)
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", str(root / script), *arguments],
        check=True,
        cwd=root.parent,
        env=os.environ | {"PATH": path, "VIRTUAL_ENV": str(environment)} | env,
    )
    found = log.read_text().splitlines()
    assert found[0].startswith("python -c import sys")  # is it new enough?
    return found[1:]


def test_local_installs_once_trains_both_and_compares_them(clone):
    first, again = calls(clone, "launch/local.sh"), calls(clone, "launch/local.sh")
    assert "-m pip install" in first[0] and "--constraint constraints.txt" in first[0]
    out = f"{clone[0]}/runs/local"
    assert f"--config configs/debug_supervised.py --workdir {out}/supervised" in first[1]
    assert f"--config configs/debug.py --workdir {out}/supmim" in first[2]
    assert first[3].startswith("python -m supmim_jax.probe --split test")
    assert again == first[1:]
    elsewhere = calls(clone, "launch/local.sh", "results here")
    assert f"--workdir {clone[0].parent}/results here/supervised" in elsewhere[0]
    with (clone[0] / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert calls(clone, "launch/local.sh") == first


CACHES = [  # what is set, and what is then the directory of compiled programs
    ({"HOME": "/h"}, "/h/.cache/supmim_jax/compiled-*"),
    ({"HOME": "/h", "XDG_CACHE_HOME": "/x y"}, "/x y/supmim_jax/compiled-*"),
    ({"HOME": "/h", "JAX_COMPILATION_CACHE_DIR": "gs://b/c"}, "gs://b/c"),
]


@pytest.mark.parametrize(("given", "expected"), CACHES)
def test_local_keeps_compiled_programs_for_the_next_start(clone, monkeypatch, given, expected):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    stand_in = clone[1] / "bin" / "python"
    said = f'echo "$2 $JAX_COMPILATION_CACHE_DIR" >> "{clone[0].parent}/caches"\n'
    stand_in.write_text(stand_in.read_text() + said)
    calls(clone, "launch/local.sh", **given)
    lines = (clone[0].parent / "caches").read_text().splitlines()
    found = [
        x.partition(" ")[2] for x in lines if x.startswith(("supmim_jax.train", "supmim_jax.probe"))
    ]
    assert len(found) == 3 and all(fnmatch.fnmatch(x, expected) for x in found), found
    sources = Path(REPOSITORY, "launch/slurm.sbatch").read_text()
    assert sources.index("source launch/cache.sh") < sources.index("python -m supmim_jax.train")


def test_the_tests_install_their_extras_and_check_style_first(clone):
    found = calls(clone, "tests/run.sh", EXTRAS="test,parity")
    assert ".[test,parity]" in found[0]
    assert found[1:] == [
        "ruff check .",
        "ruff format --check .",
        "python -m pytest -rs --numprocesses 2 --dist loadfile --no-loadscope-reorder",
    ]


def test_all_is_rehearsed_on_each_kind_of_chip_and_a_failure_is_the_scripts(clone):
    root, environment = clone
    shutil.copytree(Path(REPOSITORY, "configs"), root / "configs")
    stand_in = environment / "bin" / "python"
    script = ["bash", str(root / "launch/rehearse_all.sh"), "out"]
    env = os.environ | {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}"}
    assert subprocess.run(script, cwd=root.parent, env=env).returncode == 0
    found = (root.parent / "calls").read_text().splitlines()
    assert len(found) == 14 * 4 and all(
        x.startswith("python -m supmim_jax.rehearse") for x in found
    )
    assert sum("tokens.cache" in line for line in found) == 5 * 4  # those of supmim
    assert sum("--topology v4:4x8x8 --config.mesh.fsdp=8" in line for line in found) == 14
    assert (root.parent / "out").is_dir()
    stand_in.write_text(stand_in.read_text() + "exit 2\n")
    one = subprocess.run([*script, "configs/supmim_b14_imagenet1k.py"], cwd=root.parent, env=env)
    assert one.returncode == 1


def test_an_old_python_is_refused(clone):
    root, environment = clone
    (environment / "bin" / "python").write_text("#!/bin/bash\necho 3.9; exit 1\n")
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    out = subprocess.run(
        ["bash", str(root / "launch/local.sh")],
        capture_output=True,
        text=True,
        env=env | {"PYTHON": str(environment / "bin" / "python")},
    )
    assert out.returncode == 2 and "needs Python 3.11 or newer" in out.stderr
    assert not (root / ".venv").exists()


# Plays a slice: `states` has a line for each time that its state is asked for while it is there,
# the last one stays; `codes` has the exit codes of the workers, a line for each run; a file
# `running` says that a run is there, once.
GCLOUD = r"""#!/bin/bash
cd "$(dirname "$0")"
[ "$1" != config ] || { cat project; exit; }
printf '%s\0' "$@" >> calls; printf '\n' >> calls
case "$*" in
  *" create "*) [ ! -e refusal ] || { cat refusal >&2; exit 1; }; touch slice ;;
  *" delete "*) rm -f slice ;;
  *describe*)
    [ -e slice ] || exit 1
    case "$*" in
      *tpu-vm*) head -n 1 states | grep -x "READY\|PREEMPTED" || exit 1 ;;
      *) head -n 1 states ;;
    esac
    [ "$(wc -l < states)" = 1 ] || sed -i 1d states ;;
  *"tail -n"*) ;;
  *"test ! -e ~/exit"*) rm running 2> /dev/null || exit 1 ;;
  *"cat ~/exit"*) head -n 1 codes | tr ' ' '\n'; sed -i 1d codes ;;
esac
"""
SLICE = [
    *("--name", "b14", "--zone", "z", "--type", "v5litepod-8", "--version", "v2"),
    *("--config", "configs/x.py", "--workdir", "gs://b/a b"),
]


@pytest.fixture
def pod(tmp_path):
    """A function that runs tpu_pod.sh against the stand-in: the outcome, and gcloud's arguments."""
    root, cloud = tmp_path / "clone", tmp_path / "cloud"
    shutil.copytree(Path(REPOSITORY, "launch"), root / "launch")
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *arguments], check=True)
    cloud.mkdir()
    (cloud / "gcloud").write_text(GCLOUD)
    (cloud / "gcloud").chmod(0o755)
    (cloud / "project").write_text("mine\n")

    def run(*arguments: str, states=("READY",), codes=("0 0",), there=False, path=None):
        for name, entries in (("states", states), ("codes", codes)):
            (cloud / name).write_text("".join(f"{x}\n" for x in entries))
        (cloud / "calls").unlink(missing_ok=True)
        if there:
            (cloud / "slice").touch()
            (cloud / "running").touch()
        out = subprocess.run(
            ["bash", str(root / "launch/tpu_pod.sh"), *SLICE, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
            | {"PATH": f"{cloud}:{os.environ['PATH'] if path is None else path}"}
            | {"TPU_POD_POLL": "0"},
        )
        calls = (cloud / "calls").read_text() if (cloud / "calls").exists() else ""
        return out, [x.split("\0") for x in calls.split("\0\n") if x]

    run.root, run.cloud = root, cloud
    return run


def verbs(calls: list[list[str]]) -> list[str]:
    """What was done to the slice, without the questions about its state."""
    found = []
    for call in calls:
        text = " ".join(call)
        for verb in ("create", "delete", "scp", "setsid", "cat ~/exit"):
            found += [verb] if verb in text else []
    return found


RUN = ["create", "scp", "setsid", "cat ~/exit"]
ONCE = [*RUN, "delete"]


def test_a_slice_is_made_used_and_deleted(pod):
    out, calls = pod("--", "--config.seed=1", states=("CREATING", "WAITING", "READY"))
    assert out.returncode == 0, out.stderr
    assert verbs(calls) == ONCE
    assert out.stderr.count("The slice is ") == 2
    assert all("--zone=z" in call for call in calls)
    assert sum("--worker=all" in call for call in calls) == 4  # copy, install, begin, exit codes


@pytest.mark.parametrize(
    ("arguments", "codes", "expected", "done"),
    [
        # That of the worst worker.
        *(("", [x], y, ONCE) for x, y in (("0 2", 2), ("1 3", 3), ("0 1", 1), ("143 129", 1))),
        *(("", ["130 143"], 130, ONCE), ("", [], 1, ONCE)),
        # A crash is run again on the same slice, up to the limit; what cannot be mended is not.
        ("--resume --attempts 3", ["1 0"] * 9, 1, [*RUN, *RUN[1:], *RUN[1:], "delete"]),
        *(("--resume", [f"{x} {x}", "0 0"], x, ONCE) for x in (2, 3, 130)),
        ("--keep", ["1 1", "0 0"], 1, RUN),  # one attempt, without --resume
    ],
)
def test_the_exit_code_and_what_is_tried_again(pod, arguments, codes, expected, done):
    out, calls = pod(*arguments.split(), codes=codes)
    assert out.returncode == expected and verbs(calls) == done


def test_a_preempted_run_is_made_again_and_goes_on(pod):
    states = ("WAITING", "READY", "PREEMPTED", "PREEMPTED", "READY")
    out, calls = pod("--resume", "--spot", states=states)
    assert out.returncode == 0, out.stderr
    again = verbs(calls)
    assert again.count("create") == again.count("setsid") == 2 and again[-1] == "delete"
    assert again.index("delete") < len(again) - 1 - again[::-1].index("create")
    assert "The slice is gone" in out.stderr and "Attempt 1 ended with 1" in out.stderr
    begun = [call for call in calls if "setsid" in " ".join(call)]
    assert begun[0] == begun[1]


def test_a_run_that_a_lost_terminal_left_is_followed_and_not_begun_again(pod):
    out, calls = pod("--resume", there=True)
    assert out.returncode == 0 and "The run is there" in out.stderr
    assert verbs(calls) == ["cat ~/exit", "delete"]


def test_a_request_that_fails_is_no_slice(pod):
    out, calls = pod(states=("WAITING", "FAILED"))
    assert out.returncode == 4 and "its state is FAILED" in out.stderr
    assert verbs(calls) == ["create", "delete"]


@pytest.mark.parametrize("reason", ["Quota exceeded for TPUs", "zone z is not found"])
def test_what_gcloud_refuses_is_told_and_not_asked_for_again(pod, reason):
    (pod.cloud / "refusal").write_text(f"ERROR: {reason}\n")
    out, calls = pod("--resume")
    assert out.returncode == 4 and verbs(calls) == ["create", "delete"]
    assert reason in out.stderr and "accelerator-types list --zone=z; quota:" in out.stderr


def test_without_gcloud_or_a_project_nothing_is_begun(pod):
    (pod.cloud / "project").write_text("\n")
    out, calls = pod()
    assert out.returncode == 2 and not calls and "gcloud config set project" in out.stderr
    (pod.cloud / "gcloud").unlink()
    needed = ("bash", "git", "dirname", "mktemp", "rm", "sed")
    for name in needed:  # of this machine's programs no others, so that a real gcloud is not found
        (pod.cloud / name).symlink_to(shutil.which(name))
    out, calls = pod(path="")
    assert out.returncode == 2 and not calls and "gcloud is not installed" in out.stderr
    assert pod("--dry_run")[0].returncode == 0


def test_edited_files_and_wrong_arguments_are_refused_before_anything(pod):
    (pod.root / "launch" / "note").write_text("new")
    out, calls = pod()
    assert out.returncode == 2 and not calls and "--allow_dirty" in out.stderr
    assert pod("--allow_dirty")[0].returncode == 0
    out, calls = pod("--nmae", "x")
    assert out.returncode == 2 and not calls and "unknown argument --nmae" in out.stderr
    out, calls = pod("--workdir", "")
    assert out.returncode == 2 and not calls and "--workdir is missing" in out.stderr


DRY = """\
gcloud compute tpus queued-resources create b14 --node-id=b14 --accelerator-type=v5litepod-8 \
--runtime-version=v2 --spot --zone=z
gcloud compute tpus tpu-vm describe b14 --format=value\\(state\\) --zone=z
gcloud compute tpus tpu-vm scp supmim_jax.tar.gz b14:supmim_jax.tar.gz --worker=all --quiet --zone=z
"""


def test_a_dry_run_prints_commands_that_a_shell_reads_back_and_runs_none(pod, tmp_path):
    odd = ["--config.model.name=it's", "--config.x=$HOME `id`", '--config.y=("a", "b c")', "", "*"]
    out, calls = pod("--dry_run", "--spot", "--", *odd)
    assert out.returncode == 0 and not calls and not out.stderr
    assert out.stdout.startswith(DRY), out.stdout
    commands = [x for x in split_lines(out.stdout) if x]
    assert all(x[:3] == ["gcloud", "compute", "tpus"] for x in commands)
    (begin,) = [x for x in commands if "setsid" in " ".join(x)]
    (remote,) = [x.removeprefix("--command=") for x in begin if x.startswith("--command=")]
    # What the worker's shell makes of it.
    stand_in = tmp_path / "bin" / "python"
    stand_in.parent.mkdir()
    say = 'printf \'%s\\0\' "$@" > ~/got; echo "$JAX_COMPILATION_CACHE_DIR" > ~/cache; exit 7'
    stand_in.write_text(f"#!/bin/bash\n{say}\n")
    stand_in.chmod(0o755)
    (tmp_path / "supmim_jax" / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "supmim_jax" / ".venv" / "bin" / "activate").write_text("")
    (tmp_path / "exit").write_text("0\n")  # of the attempt before
    env = os.environ | {"HOME": str(tmp_path), "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    wait = "\nwhile ! [ -s ~/exit ]; do sleep 0.1; done"
    subprocess.run(["bash", "-c", remote + wait], env=env, check=True, timeout=20)
    got = (tmp_path / "got").read_text().split("\0")[:-1]
    assert got[:3] == ["-m", "supmim_jax.train", "--distributed"]
    assert got[3:] == ["--config", "configs/x.py", "--workdir", "gs://b/a b", *odd]
    assert (tmp_path / "exit").read_text() == "7\n"
    assert (tmp_path / "cache").read_text() == "gs://b/a b/compiled\n"


def split_lines(text: str) -> list[list[str]]:
    """Commands of a script, a list of words each; one may go over several lines in quotes."""
    found, kept = [], ""
    for line in text.splitlines():
        kept += line + "\n"
        try:
            found.append(shlex.split(kept))
        except ValueError:
            continue
        kept = ""
    return found


def jobset(*arguments: str) -> subprocess.CompletedProcess:
    return python("launch/gke/jobset.py", *arguments)


ODD = ["--config", "configs/x.py", "--workdir", "gs://b/it's $(X)", '--config.y="$(HOME)": {#}']
TPU = ["tpu", "--name=b14", "--image=i", "--accelerator=tpu-v5-lite-podslice", "--topology=16x16"]
GPU = ["gpu", "--name=b14", "--image=i", "--accelerator=nvidia-h100-80gb", "--nodes=2"]


@pytest.mark.parametrize("kind", [TPU, GPU])
def test_a_jobset_has_what_jax_and_gke_need(kind):
    out = jobset(*kind, "--", *ODD)
    assert out.returncode == 0, out.stderr
    made = yaml.safe_load(out.stdout)
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["metadata"]["labels"]["xpk.google.com/workload"] == "b14"
    (job,) = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    hosts, resource, chips = (64, "google.com/tpu", 4) if kind is TPU else (2, "nvidia.com/gpu", 8)
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0
    assert spec["completions"] == spec["parallelism"] == hosts
    assert container["resources"]["limits"] == {resource: chips}
    assert container["command"][:4] == ["python", "-m", "supmim_jax.train", "--distributed"]
    assert [x.replace("$$", "$") for x in container["args"]] == ODD
    assert "$$(HOME)" in container["args"][-1]
    env = {x["name"]: x["value"].replace("$$", "$") for x in container["env"]}
    assert env.pop("JAX_COMPILATION_CACHE_DIR") == "gs://b/it's $(X)/compiled"
    (rule,) = spec["podFailurePolicy"]["rules"]
    ends = {"containerName": "train", "operator": "In", "values": [2, 3, 130]}
    assert rule["onExitCodes"] == ends
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 20
    if kind is TPU:
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert topology == "16x16" and env == {}
    else:
        where = {"JAX_COORDINATOR_ADDRESS": "b14-slice-job-0-0.b14:1234", "JAX_NUM_PROCESSES": "2"}
        assert env == where
        found = multihost.place("", 0, -1, env | {"JOB_COMPLETION_INDEX": "1"})
        assert found == multihost.Place("b14-slice-job-0-0.b14:1234", 2, 1)


def test_a_jobset_keeps_compiled_programs_where_it_is_told():
    for extra, workdir, expected in (
        ([], "--workdir=gs://b/x/", "gs://b/x/compiled"),
        (["--cache=gs://shared"], "--workdir=gs://b/x", "gs://shared"),
    ):
        out = jobset(*GPU, *extra, "--", "--config=c", workdir)
        (job,) = yaml.safe_load(out.stdout)["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        assert {"name": "JAX_COMPILATION_CACHE_DIR", "value": expected} in container["env"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TPU, "--", "--config", "x"], "--workdir of supmim_jax.train is missing"),
        ([*TPU, "--name=B_14", "--", *ODD], "must be at most 40 of a-z"),
        ([*TPU, "--topology=3x3", "--", *ODD], "not a number of hosts of 4 chips"),
        ([*TPU, "--topology=256", "--", *ODD], "--topology of the TPU slice is missing"),
    ],
)
def test_a_jobset_that_cannot_be_is_refused(arguments, message):
    out = jobset(*arguments)
    assert out.returncode == 2 and message in out.stderr and not out.stdout


def test_the_scripts_are_clean():
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    root = Path(REPOSITORY)
    scripts = [*root.glob("launch/*.s*"), *root.glob("tests/**/*.sh")]
    assert len(scripts) == 8
    subprocess.run([shellcheck, "-x", *scripts], check=True, cwd=root)
