"""`ds run --emit`: each text is read back by its own language, with hostile words."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from comm import slurm
from ds_engine.cli.main import app
from ds_engine.launch.emit import FORMS, Job
from ds_engine.launch.emit.yaml import lines, scalar
from ds_engine.launch.plan import LaunchError
from engine.launching import clean_environ

HOSTILE = [
    "",
    "two words",
    "it's",
    '"quoted"',
    "$HOME `id` $(id) ${HOME}",
    "$$(HOME) $$$",
    "a;b|c&d>e<f",
    "back\\slash\\n",
    "%h {name} {{x}}",
    "line\nbreak\ttab\r",
    "*?[a]~!#",
    "--flag=x,y",
    "yes",
    "012",
    ": - {}",
    "ünï ☃ 😀",
    "\x7f\x85\u2028\ufeff",
    "'''\"\"\"",
]
text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


def job(**more: Any) -> Job:
    values = {f"V{i}": word for i, word in enumerate(HOSTILE)}
    base: dict[str, Any] = {
        "script": "my train.py",
        "arguments": tuple(HOSTILE),
        "environ": values,
        "folder": "/",
    }
    return Job(**{**base, "nodes": 2, "ranks_per_node": 4, "gpus_per_node": 4, **more})


RECORDER = """#!{python}
import json, os, sys
values = {{name: value for name, value in os.environ.items() if name.startswith("V")}}
with open({out!r}, "w") as file:
    json.dump([sys.argv[1:], os.getcwd(), values], file)
"""


def test_an_sbatch_script_hands_every_word_to_srun(tmp_path: Path) -> None:
    folder, srun, out = tmp_path / "it's a $folder", tmp_path / "bin" / "srun", tmp_path / "out.json"
    folder.mkdir()
    srun.parent.mkdir()
    srun.write_text(RECORDER.format(python=sys.executable, out=str(out)))
    srun.chmod(0o755)
    made = job(folder=str(folder), python="/opt/my python")
    script = tmp_path / "job.sh"
    script.write_text(FORMS["slurm"](made))
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    environ = {**os.environ, "PATH": f"{srun.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", str(script)], check=True, timeout=60, env=environ)
    argv, where, values = json.loads(out.read_text())
    assert argv == ["--kill-on-bad-exit=1", "/opt/my python", "-u", "my train.py", *HOSTILE]
    assert where == str(folder)
    assert {name: values[name] for name in made.environ} == made.environ
    directives = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
    wanted = ["--job-name=my-train", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"]
    assert directives == wanted
    assert not any(
        "gpus" in line for line in FORMS["slurm"](job(gpus_per_node=0)).split("\n") if "#SBATCH" in line
    )


def expanded(word: str) -> str:
    """What Kubernetes makes of a word, without a variable of that name."""
    return re.sub(r"\$(\$|\((\w+)\))", lambda m: "$" if m[1] == "$" else f"<{m[2]}>", word)


@pytest.mark.parametrize("form", ["kubernetes", "trainjob"])
def test_manifests(form: str) -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    made = job(image="registry/image: 1")
    manifest = yaml.safe_load(FORMS[form](made))
    spec = manifest["spec"]
    assert manifest["metadata"] == {"name": "my-train"}
    if form == "kubernetes":
        assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
        roles = spec["pytorchReplicaSpecs"]
        assert [(role, roles[role]["replicas"]) for role in roles] == [("Master", 1), ("Worker", 1)]
        assert spec["nprocPerNode"] == "4"
        pods = [part["template"]["spec"] for part in roles.values()]
        assert pods[0] == pods[1]
        ((container,), resources) = pods[0]["containers"], pods[0]["containers"][0]["resources"]
    else:
        assert (manifest["apiVersion"], manifest["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
        container = spec["trainer"]
        assert (container["numNodes"], container["numProcPerNode"]) == (2, 4)
        resources = container["resourcesPerNode"]
    assert container["image"] == "registry/image: 1" and resources == {"limits": {"nvidia.com/gpu": 4}}
    command = [expanded(word) for word in container["command"]]
    assert command == ["python", "-u", "-m", "torch.distributed.run", "my train.py", *HOSTILE]
    assert {entry["name"]: expanded(entry["value"]) for entry in container["env"]} == made.environ


def test_one_machine_has_no_workers_and_a_cpu_job_no_gpus() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    spec = yaml.safe_load(FORMS["kubernetes"](job(nodes=1, gpus_per_node=0, environ={})))["spec"]
    (container,) = spec["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert list(spec["pytorchReplicaSpecs"]) == ["Master"]
    assert container["resources"] == {} and container["env"] == []


@given(
    st.recursive(
        text | st.integers(), lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3)
    )
)
@settings(deadline=None)
def test_yaml_is_read_back(value: Any) -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    assert yaml.safe_load("\n".join(lines({"value": value}))) == {"value": value}
    assert scalar("😀") == '"\\U0001f600"'


@pytest.mark.parametrize("module", [False, True])
def test_a_program_for_ray_train(module: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a package `ray` that calls the function on one rank."""
    folder, out = tmp_path / "it's {here}", tmp_path / "out.json"
    folder.mkdir()
    record = RECORDER.format(python=sys.executable, out=str(out)).replace(
        "sys.argv[1:]", "[__name__, *sys.argv[1:]]"
    )
    (folder / "my_train.py").write_text("import beside\n" + record)
    (folder / "beside.py").write_text("")
    scaling: dict[str, Any] = {}

    class TorchTrainer:
        def __init__(self, function: Any, scaling_config: Any) -> None:
            self.fit = function

    for name in ("ray", "ray.train", "ray.train.torch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["ray.train"].ScalingConfig = lambda **given: scaling.update(given)  # type: ignore[attr-defined]
    sys.modules["ray.train.torch"].TorchTrainer = TorchTrainer  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    made = job(script="my_train" if module else "my_train.py", module=module, folder=str(folder))
    for name in made.environ:
        monkeypatch.setenv(name, "before")
    program = tmp_path / "entry.py"
    program.write_text(FORMS["ray"](made), encoding="utf-8")
    runpy.run_path(str(program), run_name="__main__")
    argv, where, values = json.loads(out.read_text())
    assert argv == ["__main__", *HOSTILE] and where == str(folder)
    assert {name: values[name] for name in made.environ} == made.environ
    wanted = {"num_workers": 8, "use_gpu": True, "resources_per_worker": {"GPU": 1}}
    assert scaling == {**wanted, "placement_strategy": "PACK"}
    assert "resources_per_worker" not in FORMS["ray"](job(gpus_per_node=0))
    sys.modules.pop("beside", None)


@pytest.mark.parametrize(
    ("script", "module", "name"),
    [
        ("/a b/My_Train (2).py", False, "my-train-2"),
        ("pkg.sub.Train", True, "train"),
        ("2024.py", False, "job-2024"),
        ("☃.py", False, "job"),
        (f"{'x' * 80}.py", False, "x" * 40),
    ],
)
def test_names_that_schedulers_accept(script: str, module: bool, name: str) -> None:
    assert job(script=script, module=module).name == name


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"nodes": 0}, "at least one machine is required"),
        ({"ranks_per_node": 0}, "at least one rank on each machine is required"),
        ({"gpus_per_node": -1}, "-1 GPUs"),
        ({"environ": {"A B": ""}}, "'A B' is not the name of an environment variable"),
    ],
)
def test_jobs_that_nobody_can_start(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(LaunchError, match=says):
        job(**wrong)


def emitted(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["run", *arguments])
    return result.exit_code, result.output


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "a b")
    monkeypatch.chdir(tmp_path)
    options = ["--nproc", "2", "--nnodes", "3", "--gpus-per-node", "0", "--export", "TOKEN", "--python", "py"]
    code, shown = emitted("--emit", "slurm", *options, "--config", "my ds.json", "train.py", "--lr", "a b")
    assert code == 0
    assert "#SBATCH --nodes=3\n#SBATCH --ntasks-per-node=2\nset -eu\nexport TOKEN='a b'\n" in shown
    assert shown.endswith("exec srun --kill-on-bad-exit=1 py -u train.py --config 'my ds.json' --lr 'a b'\n")
    code, shown = emitted("--emit", "ray", "--nproc", "2", "--module", "pkg.train", "x")
    assert code == 0 and "SCRIPT = 'pkg.train'\nARGUMENTS = ['x']\n" in shown
    code, shown = emitted("--emit", "kubernetes", "--nproc", "2", "--image", "mine", "train.py")
    assert code == 0 and 'image: "mine"' in shown and '- "python"\n' in shown
    for arguments, says in (
        (["--emit", "lsf", "--nproc", "2"], "--emit lsf: slurm, kubernetes, trainjob, ray are possible"),
        (["--emit", "slurm"], "--nproc is missing"),
        (
            ["--emit", "slurm", "--nproc", "2", "--export", "NO_SUCH"],
            "--export NO_SUCH: the variable is not set",
        ),
        (["--emit", "slurm", "--nproc", "0"], "at least one rank"),
    ):
        code, shown = emitted(*arguments, "train.py")
        assert code == 2 and f"cannot print the job: {says}" in shown.replace(
            "0 is not a number to start with: ", ""
        )


def test_a_printed_script_runs_under_slurm(tmp_path: Path) -> None:
    if slurm.missing() or os.getuid() != 0:
        pytest.skip(f"needs root and {', '.join(slurm.missing())} (Debian package slurm-wlm)")
    (tmp_path / "train.py").write_text(
        "import sys, ds_comm\n"
        "world = ds_comm.start(device='cpu', timeout_s=60)\n"
        "print(f'<{world.rank} of {world.world_size}, {world.source}, {sys.argv[1:]}>', flush=True)\n"
    )
    made = Job(
        script="train.py",
        arguments=("a b", "$HOME"),
        ranks_per_node=2,
        gpus_per_node=0,
        folder=str(tmp_path),
        python=sys.executable,
        environ={"GLOO_SOCKET_IFNAME": "lo"},
    )
    (tmp_path / "job.sh").write_text(FORMS["slurm"](made))
    with slurm.cluster(tmp_path / "slurm") as environ:
        command = ["sbatch", "--wait", "-o", str(tmp_path / "out"), str(tmp_path / "job.sh")]
        path = {**clean_environ(), **environ}
        sbatch = shutil.which("sbatch", path=environ["PATH"])
        assert sbatch is not None
        done = subprocess.run([sbatch, *command[1:]], env=path, cwd="/", timeout=120, check=False)
    printed = (tmp_path / "out").read_text()
    assert done.returncode == 0, printed
    for rank in range(2):
        assert f"<{rank} of 2, slurm, ['a b', '$HOME']>" in printed
