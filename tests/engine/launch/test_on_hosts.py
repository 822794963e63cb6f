"""`ds run --hostfile` on real hosts: what ranks are given, how faults end, and what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import ds_engine
from ds_engine import __version__
from engine.jobs import on_ranks
from engine.launch import training
from engine.launching import Job, until
from harness.hosts import Network

_HOSTFILE = "host-a slots=2\nhost-b slots=2\n"
_WAITS = """
mark("up")
time.sleep(100)
"""


@pytest.fixture(params=[0, *(pytest.param(number, marks=pytest.mark.full) for number in range(1, 10))])
def repetition(request: pytest.FixtureRequest) -> int:
    """Faults are tried ten times in a full run."""
    number: int = request.param
    return number


def start(
    network: Network,
    folder: Path,
    source: str,
    *options: str,
    hostfile: str = _HOSTFILE,
    ssh: str | None = None,
    arguments: tuple[str, ...] = (),
    **environ: str,
) -> Job:
    """Starts `ds run --hostfile` on host-a."""
    (folder / "hostfile").write_text(hostfile)
    ssh = network.ssh_arguments if ssh is None else ssh
    return Job(
        folder,
        source,
        *("--hostfile", str(folder / "hostfile"), "--launcher-args", ssh, *options),
        arguments=arguments,
        prefix=network["host-a"].inside_folder(folder),
        **environ,
    )


def ranks_on(network: Network, name: str, job: Job) -> list[int]:
    """Process ids, as seen from here, of the job's ranks on a host."""
    script = str(job.folder / "script.py")
    return [
        pid for pid in network[name].processes(script) if pid not in network[name].processes("ds_engine run")
    ]


def launcher(network: Network) -> int:
    """Process id, as seen from here, of `ds run` on host-a."""
    (pid,) = network["host-a"].processes("-m ds_engine run")
    return pid


def nothing_left(network: Network, job: Job) -> bool:
    """Whether neither agents nor ranks are left on any host."""
    words = (str(job.folder), "ds_engine.launch.remote.agent")
    return until(
        lambda: not any(host.processes(word) for host in network.hosts.values() for word in words), 5.0
    )


def _hostile_strings() -> list[str]:
    pieces = [
        "$(touch pwned)",
        "`touch pwned`",
        "'",
        '"',
        "\\",
        "\n",
        "\t",
        " ",
        ";",
        "&&",
        "|",
        ">",
        "*",
        "~",
        "$HOME",
    ]
    pieces += ["%", "!", "#", "é", "漢", "\u2028", "-x", "--", "=", "{}", "\x07", "\r"]
    chooser = random.Random(0)
    texts = ["".join(chooser.choices(pieces, k=chooser.randint(1, 8))) for _ in range(200)]
    return ["", *pieces, *texts, os.fsdecode(b"not\xffutf8")]


def test_ranks_receive_their_numbers_and_every_word_as_it_is(network: Network, tmp_path: Path) -> None:
    source = """
import json
import socket
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"]
names += ["CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME"]
report = {name: os.environ[name] for name in names}
report["host"] = socket.gethostname()
report["argv"] = sys.argv[1:]
report["hostile"] = [os.environ[f"WORD_{i}"] for i in range(len(sys.argv) - 2)]
report["secret"] = os.environ.get("SECRET")
report["cwd"] = os.getcwd()
(HERE / f"report{RANK}").write_text(json.dumps(report))
"""
    words = [*_hostile_strings()]
    environ = {f"WORD_{i}": word for i, word in enumerate(words)}
    export = [option for name in environ for option in ("--export", name)]
    job = start(
        network,
        tmp_path,
        source,
        *export,
        hostfile="host-a slots=1\nhost-b slots=3 # large\n",
        arguments=("--", *words),
        SECRET="stays here",
        **environ,
    )
    code, _, err = job.finish()
    assert code == 0, err
    reports = [json.loads((tmp_path / f"report{rank}").read_text()) for rank in range(4)]
    for rank, report in enumerate(reports):
        local_rank = max(0, rank - 1)
        assert report["argv"] == ["--", *words]
        assert report["hostile"] == words
        assert report["secret"] == ("stays here" if rank == 0 else None)
        assert report["cwd"] == str(tmp_path)
        assert report["host"] == ("host-a" if rank == 0 else "host-b")
        assert (report["RANK"], report["WORLD_SIZE"]) == (str(rank), "4")
        assert (report["LOCAL_RANK"], report["LOCAL_WORLD_SIZE"]) == (
            str(local_rank),
            "1" if rank == 0 else "3",
        )
        assert report["GROUP_RANK"] == ("0" if rank == 0 else "1")
        assert (report["MASTER_ADDR"], report["GLOO_SOCKET_IFNAME"]) == ("host-a", "eth0")
        assert report["CUDA_VISIBLE_DEVICES"] == ("0" if rank == 0 else "0,1,2")
    assert len({report["MASTER_PORT"] for report in reports}) == 1
    assert not (tmp_path / "pwned").exists()
    assert "4 ranks on 2 machines (host-a: 1, host-b: 3), rank 0 at host-a:" in err
    assert nothing_left(network, job)


def test_one_machine_that_is_not_this_one(network: Network, tmp_path: Path) -> None:
    source = """
import socket
names = ["MASTER_ADDR", "GLOO_SOCKET_IFNAME", "WORLD_SIZE"]
print(socket.gethostname(), *(os.environ[name] for name in names))
"""
    job = start(network, tmp_path, source, hostfile="host-b slots=1\n")
    assert job.finish()[1] == "host-b host-b lo 1\n"


def _train_here(folder: str) -> None:
    (Path(folder) / f"here{dist.get_rank()}").write_text(training.train())


def test_training_is_that_of_one_machine_and_no_memory_is_shared(
    network: Network, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = """
from engine.launch import training
(HERE / f"peers{RANK}").write_text(training.peers())
(HERE / f"there{RANK}").write_text(training.train())
"""
    tests = str(Path(__file__).parents[2])
    code, _, err = start(network, tmp_path, source, PYTHONPATH=tests).finish()
    assert code == 0, err
    on_ranks(request, 4, _train_here, folder=str(tmp_path))
    for rank in range(4):
        assert (tmp_path / f"there{rank}").read_text() == (tmp_path / f"here{rank}").read_text()
        peers = (tmp_path / f"peers{rank}").read_text().split()
        assert not {"2", "3"} & set(peers) if rank < 2 else not {"0", "1"} & set(peers)
    assert (tmp_path / "peers0").read_text() in ("1", "none")
    assert [host.run("ls", "/dev/shm") for host in network.hosts.values()] == ["", ""]


@pytest.mark.usefixtures("repetition")
def test_a_rank_that_is_killed_is_named_with_its_host(network: Network, tmp_path: Path) -> None:
    job = start(network, tmp_path, _WAITS)
    pids = job.pids("up", 4)
    outside = ranks_on(network, "host-b", job)
    assert len(outside) == 2
    victim = next(
        pid for pid in outside if f"NSpid:\t{pid}\t{pids[3]}\n" in Path(f"/proc/{pid}/status").read_text()
    )
    os.kill(victim, signal.SIGKILL)
    code, _, err = job.finish()
    assert code == 128 + signal.SIGKILL
    assert f"[ds] rank 3 (host-b, pid {pids[3]}) failed first: killed by SIGKILL\n" in err
    assert "the other ranks: ranks 0-2 were terminated by the launcher" in err
    assert nothing_left(network, job)


_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@pytest.mark.skipif(not _FAKETIME.exists(), reason="needs libfaketime (Debian package libfaketime)")
@pytest.mark.parametrize(
    ("offset", "victim"),
    [("+1d", 3), pytest.param("-1d", 0, marks=pytest.mark.full)],
    ids=["ahead", "behind"],
)
@pytest.mark.usefixtures("repetition")
def test_a_wrong_clock_does_not_change_who_failed_first(
    offset: str, victim: int, network: Network, tmp_path: Path
) -> None:
    source = """
import select
def wait_for(name):  # without time.sleep, which libfaketime breaks
    while not (HERE / name).exists():
        select.select([], [], [], 0.01)
(HERE / "clock" / str(RANK)).write_text(str(time.time()))
mark("up")
for other in range(4):
    wait_for(f"up{other}")
if RANK == int(sys.argv[1]):
    os.kill(os.getpid(), 9)
wait_for("never")
"""
    (tmp_path / "clock").mkdir()
    # Only the time of day is wrong: clocks that measure intervals do not depend on it.
    clock = {"LD_PRELOAD": str(_FAKETIME), "FAKETIME": offset, "DONT_FAKE_MONOTONIC": "1"}
    with network["host-b"].sessions_with(**clock):
        job = start(network, tmp_path, source, arguments=(str(victim),))
        code, _, err = job.finish()
    assert code == 128 + signal.SIGKILL, err
    times = [float((tmp_path / "clock" / str(rank)).read_text()) for rank in range(4)]
    assert abs(times[2] - times[0]) > 80_000, "the clock of host-b is right"
    host = "host-b" if victim == 3 else "host-a"
    assert f"[ds] rank {victim} ({host}, pid " in err and "failed first: killed by SIGKILL\n" in err
    assert nothing_left(network, job)


def test_an_exception_on_another_host_is_shown_once(network: Network, tmp_path: Path) -> None:
    source = """
mark("up")
for other in range(4):
    wait_for(f"up{other}")
if RANK == 2:
    raise KeyError("the cause")
wait_for("never")
"""
    job = start(network, tmp_path, source, "--log-dir", str(tmp_path / "logs"))
    code, _, err = job.finish()
    assert code == 1
    assert err.count("KeyError: 'the cause'") == 1
    assert "[ds] rank 2 (host-b, pid " in err
    (folder,) = (tmp_path / "logs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [f"rank_{rank}.log" for rank in range(4)]
    assert "KeyError: 'the cause'" in (folder / "rank_2.log").read_text()
    assert nothing_left(network, job)


def _slow(network: Network, rate: str) -> None:
    network["host-b"].run(*f"tc qdisc add dev eth0 root tbf rate {rate} burst 1600 limit 100000".split())


def test_a_slow_link_is_told_from_a_dead_one(network: Network, tmp_path: Path) -> None:
    job = start(network, tmp_path, 'mark("up"); wait_for("go")', "--host-timeout", "4")
    job.pids("up", 4)
    _slow(network, "16kbit")
    try:
        time.sleep(7)  # longer than the limit
        (tmp_path / "go").touch()
        code, _, err = job.finish()
    finally:
        network["host-b"].run(*["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert code == 0, err
    assert nothing_left(network, job)


@pytest.mark.usefixtures("repetition")
def test_a_link_that_carries_almost_nothing_is_lost(network: Network, tmp_path: Path) -> None:
    job = start(network, tmp_path, _WAITS, "--host-timeout", "4")
    job.pids("up", 4)
    _slow(network, "8bit")
    try:
        code, _, err = job.finish()
    finally:
        network["host-b"].run(*["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert code == 1
    assert "machine host-b was lost first, with ranks 2, 3: no heartbeat for 4 s" in err
    assert nothing_left(network, job)


@pytest.mark.usefixtures("repetition")
def test_a_full_disk_on_one_host(network: Network, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    source = """
mark("up")
for other in range(4):
    wait_for(f"up{other}")
if RANK == 3:
    (HERE / "disk" / "checkpoint").write_bytes(bytes(1 << 20))
time.sleep(100)
"""
    network["host-b"].run("mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path / "disk"))
    try:
        job = start(network, tmp_path, source)
        code, _, err = job.finish()
    finally:
        network["host-b"].run("umount", str(tmp_path / "disk"))
    assert code == 1
    assert "[ds] rank 3 (host-b, pid" in err and "No space left on device" in err
    assert "what to do: the disk on host-b is full" in err
    assert nothing_left(network, job)


@pytest.mark.usefixtures("repetition")
def test_a_host_that_vanishes_is_lost_after_the_timeout(network: Network, tmp_path: Path) -> None:
    job = start(network, tmp_path, _WAITS, "--host-timeout", "4", "--grace", "1")
    job.pids("up", 4)
    with network["host-b"].unplugged():
        code, _, err = job.finish()
        assert code == 1
        assert "[ds] machine host-b was lost first, with ranks 2, 3: no heartbeat for 4 s\n" in err
        assert "terminated by the launcher" in err
        # The machine that vanished ends its ranks itself: it hears nothing from the launcher.
        assert until(lambda: not ranks_on(network, "host-b", job), 20.0)
    assert until(lambda: not network["host-b"].processes("ds_engine.launch.remote.agent"), 20.0)


@pytest.mark.usefixtures("repetition")
def test_all_processes_of_a_host_killed(network: Network, tmp_path: Path) -> None:
    job = start(network, tmp_path, _WAITS)
    job.pids("up", 4)
    for pid in [
        *network["host-b"].processes("ds_engine.launch.remote.agent"),
        *ranks_on(network, "host-b", job),
    ]:
        os.kill(pid, signal.SIGKILL)
    code, _, err = job.finish()
    assert code != 0
    assert "host-b was lost first, with ranks 2, 3: the connection ended" in err or "(host-b, pid" in err
    assert nothing_left(network, job)


@pytest.mark.usefixtures("repetition")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_rank_and_lets_it_save(
    number: signal.Signals, network: Network, tmp_path: Path
) -> None:
    source = """
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    mark("up")
    time.sleep(100)
except KeyboardInterrupt:
    time.sleep(0.2)
    mark("saved")
"""
    job = start(network, tmp_path, source)
    job.pids("up", 4)
    os.kill(launcher(network), number)
    code, _, err = job.finish()
    assert code == 128 + number
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(4))
    assert f"[ds] {number.name}: forwarded to 4 ranks" in err
    assert "failed first" not in err
    assert nothing_left(network, job)


@pytest.mark.usefixtures("repetition")
def test_kill_9_of_the_launcher_ends_the_ranks_of_all_hosts(network: Network, tmp_path: Path) -> None:
    source = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", str(HERE)])
mark("up")
time.sleep(100)
"""
    job = start(network, tmp_path, source, "--grace", "0.5")
    job.pids("up", 4)
    os.kill(launcher(network), signal.SIGKILL)
    job.finish()
    assert nothing_left(network, job)


def test_a_stopped_rank_is_told_from_a_lost_host(network: Network, tmp_path: Path) -> None:
    job = start(network, tmp_path, 'mark("up"); wait_for("go")', "--host-timeout", "4")
    job.pids("up", 4)
    stopped = ranks_on(network, "host-b", job)[0]
    os.kill(stopped, signal.SIGSTOP)
    assert job.process.stderr is not None
    said = b""
    while b"on host-b is stopped (SIGSTOP or a debugger)" not in said:
        line = job.process.stderr.readline()
        assert line, said
        said += line
    os.kill(stopped, signal.SIGCONT)
    (tmp_path / "go").touch()
    assert job.finish()[0] == 0


def test_a_terminal_that_accepts_nothing_does_not_end_the_job(network: Network, tmp_path: Path) -> None:
    source = """
signal.signal(signal.SIGUSR1, lambda *_: mark("told"))
mark("up")
for _ in range(100):
    print("x" * 10_000)
mark("printed")
wait_for("go")
"""
    job = start(network, tmp_path, source, "--host-timeout", "4")
    job.pids("up", 4)
    time.sleep(6)  # the pipe of our end is full, and nobody reads it
    os.kill(launcher(network), signal.SIGUSR1)
    assert until(lambda: all((tmp_path / f"told{rank}").exists() for rank in range(4)), 30.0)
    (tmp_path / "go").touch()
    code, out, err = job.finish()
    assert code == 0, err
    assert out.count("x") == 4 * 1_000_000
    assert all((tmp_path / f"printed{rank}").exists() for rank in range(4))


def test_what_is_refused_before_any_rank_starts(network: Network, tmp_path: Path) -> None:
    """Another version and another script on one host, and hosts that cannot be reached, all at once."""
    version = Path(ds_engine.__file__ or "")
    other = version.read_text().replace(f'__version__ = "{__version__}"', '__version__ = "0.0.9"')
    hostfile = "host-a slots=1\nhost-b slots=1\nhost-c slots=1\n10.77.0.99 slots=1\n"
    (tmp_path / "script.py").touch()
    with (
        network["host-b"].replaced(version, other),
        network["host-b"].replaced(tmp_path / "script.py", "print('another')"),
    ):
        job = start(network, tmp_path, 'mark("started")', hostfile=hostfile)
        code, _, err = job.finish()
    assert code == 2
    assert f"host-b has ds-engine 0.0.9, this machine {__version__}" in err
    assert "host-b has another '" in err and "script.py' in" in err
    assert "host-c cannot be used: the connection ended: ssh: Could not resolve hostname host-c" in err
    assert "10.77.0.99 cannot be used: the connection ended: ssh: connect to host 10.77.0.99 port 22: " in err
    assert not list(tmp_path.glob("started*"))
    assert nothing_left(network, job)


def test_a_key_that_the_host_refuses(network: Network, tmp_path: Path) -> None:
    job = start(
        network,
        tmp_path,
        'mark("started")',
        ssh=f"{network.ssh_arguments} -o IdentityFile=/dev/null -o User=nobody",
    )
    code, _, err = job.finish()
    assert code == 2
    assert "host-b cannot be used: the connection ended: " in err and "Permission denied (publickey" in err
    assert not list(tmp_path.glob("started*"))


@pytest.mark.parametrize("nproc", ["2"])
def test_one_command_on_each_machine(nproc: str, network: Network, tmp_path: Path) -> None:
    source = """
names = ["WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"]
(HERE / f"rank{RANK}").write_text(" ".join(os.environ.get(name, "none") for name in names))
"""
    jobs = [
        Job(
            tmp_path,
            source,
            *("--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", "host-a:23456", "--nproc", nproc),
            prefix=network[name].inside_folder(tmp_path),
        )
        for node, name in enumerate(("host-a", "host-b"))
    ]
    assert [job.finish()[0] for job in jobs] == [0, 0]
    reports = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(4)]
    for rank, report in enumerate(reports):
        assert report[:5] == ["4", str(rank % 2), str(rank // 2), "host-a", "23456"]
    assert reports[3][5] == "eth0"
