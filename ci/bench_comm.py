"""Training over slow links: bytes on the wire and time of a step, between hosts that are joined by a slow link only.

    ci/bench comm [--hosts 2] [--rates 100mbit,1gbit] [--systems ddp,bf16,powersgd2,...] [--steps 3] [--layers 6]
                  [--folder runs/bench-comm]

Needs root, `ip` and `tc` (iproute2), `unshare` and `nsenter` (util-linux). A host is a process in network, mount and
process namespaces of its own, with one rank; a bridge joins the hosts, and `tc tbf` limits what each sends.
Segmentation offload is off. All systems train the same model with the same batches, one after the other, in fresh
processes. Results are kept in --folder, one file for each system, and are not measured again.

Payload: what the interface's counters say a host sent during the measured steps, less 66 bytes of headers (Ethernet,
IP, TCP with timestamps) for each packet. "Exchange" is the time of a step less that of forward and backward without any
communication, which is measured in the same process: on a machine with fewer cores than hosts, computing takes long.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEADERS = 66
SYSTEMS = ("ddp", "bf16", "powersgd2", "powersgd4", "hook", "onebit", "zeroone")
WARM = 4  # steps before those that are measured: DDP arranges its buckets, PowerSGD and 1-bit Adam begin to compress
PORT = 29411
LABELS = {
    "ddp": "DDP, fp32",
    "bf16": "DDP, bf16 hook",
    "powersgd2": "DDP, PowerSGD rank 2",
    "powersgd4": "DDP, PowerSGD rank 4",
    "hook": "DDP, our 1-bit hook",
    "onebit": "`OneBitAdam`, compressed",
    "zeroone": "`ZeroOneAdam`, interval 4",
}


# -- hosts


class Host:
    """The first process of a host, and its address."""

    def __init__(self, pid: int, address: str) -> None:
        self.pid = pid
        self.address = address

    def command(self, *command: str) -> list[str]:
        """A command that runs on this host."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-p", "--", *command]


@contextlib.contextmanager
def hosts(count: int, rate: str) -> Iterator[list[Host]]:
    """Makes hosts; they end with the block, and with this process."""
    with contextlib.ExitStack() as stack:
        bridge = started(stack, "unshare", "--net", "sleep", "infinity")
        until(lambda: os.readlink(f"/proc/{bridge}/ns/net") != os.readlink("/proc/self/ns/net"))
        network(bridge, "ip", "link", "add", "name", "joined", "type", "bridge")
        network(bridge, "ip", "link", "set", "joined", "up")
        made = []
        for number in range(1, count + 1):
            outer = started(
                stack,
                *("unshare", "-n", "-m", "-p", "-f", "--mount-proc", "--kill-child", "sleep", "infinity"),
            )
            children = Path(f"/proc/{outer}/task/{outer}/children")
            until(lambda children=children: bool(children.read_text()))
            pid = int(children.read_text().split()[0])
            until(lambda pid=pid: Path(f"/proc/{pid}/comm").read_text().strip() == "sleep")
            ends = f"name slow0 netns {pid} type veth peer name port{number} netns {bridge}".split()
            subprocess.run(["ip", "link", "add", *ends], check=True)
            network(bridge, "ip", "link", "set", f"port{number}", "master", "joined", "up")
            network(pid, "ip", "link", "set", "lo", "up")
            network(pid, "ip", "link", "set", "slow0", "up")
            network(pid, "ip", "address", "add", f"10.79.0.{number}/24", "dev", "slow0")
            shape = f"tc qdisc add dev slow0 root tbf rate {rate} burst 128kb latency 400ms".split()
            network(pid, *shape)
            network(pid, sys.executable, __file__, "--no-offload", "slow0")
            made.append(Host(pid, f"10.79.0.{number}"))
        yield made


def started(stack: contextlib.ExitStack, *command: str) -> int:
    """Starts a process that ends with the stack, or with this process."""
    libc = ctypes.CDLL(None)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=lambda: libc.prctl(1, int(signal.SIGKILL))
    )

    def stop() -> None:
        process.kill()
        process.wait()

    stack.callback(stop)
    return process.pid


def network(pid: int, *command: str) -> None:
    """Runs a command in the network of a process."""
    subprocess.run(["nsenter", "-t", str(pid), "-n", "--", *command], check=True, timeout=60)


def until(condition: Callable[[], bool]) -> None:
    """Waits at most 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a host did not start within 20 s")
        time.sleep(0.02)


def no_offload(interface: str) -> None:
    """Turns off TCP segmentation offload (ETHTOOL_STSO) and generic segmentation offload (ETHTOOL_SGSO)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        for number in (0x1F, 0x24):
            value = ctypes.create_string_buffer(struct.pack("II", number, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            fcntl.ioctl(channel, 0x8946, request)  # SIOCETHTOOL


def sent() -> tuple[int, int]:
    """Bytes and packets that this host has sent."""
    folder = Path("/sys/class/net/slow0/statistics")
    if not folder.exists():  # /sys shows the network of the process that mounted it: read the other list
        fields = (
            next(x for x in Path("/proc/net/dev").read_text().splitlines() if "slow0:" in x)
            .split(":")[1]
            .split()
        )
        return int(fields[8]), int(fields[9])
    return int((folder / "tx_bytes").read_text()), int((folder / "tx_packets").read_text())


# -- one rank


def worker(system: str, steps: int, layers: int) -> None:
    """Trains, and prints what was measured as JSON."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(512, 8, 2048, 0.0, batch_first=True)
    model: torch.nn.Module = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    numel = sum(p.numel() for p in model.parameters())
    x = torch.randn(1, 16, 512, generator=torch.Generator().manual_seed(dist.get_rank()))
    target = torch.tanh(x.flip(2))
    alone = computing(model, x, target)
    model, optimizer = prepared(system, model)
    times = []
    measured = 12 if system == "zeroone" else steps
    before = (0, 0)
    for step in range(WARM + measured):
        if step == WARM:
            settle()
            before = sent()
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    settle()
    after = sent()
    payload = after[0] - before[0] - HEADERS * (after[1] - before[1])
    result = {
        "numel": numel,
        "step_s": sorted(times[WARM:])[measured // 2]
        if system != "zeroone"
        else sum(times[WARM:]) / measured,
        "payload": payload / measured,
        "formula": formula(system, numel, optimizer, measured),
        "loss": loss.item(),
        "alone_s": alone,
        "hosts": dist.get_world_size(),
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, result)
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(gathered), flush=True)
    dist.destroy_process_group()


def computing(model: Any, x: Any, target: Any) -> float:
    """Median time of forward and backward without communication, on all hosts at once."""
    import torch.distributed as dist

    times = []
    for _ in range(5):
        dist.barrier()
        begin = time.perf_counter()
        (model(x) - target).square().mean().backward()
        times.append(time.perf_counter() - begin)
        model.zero_grad()
    return sorted(times)[2]


def settle() -> None:
    """Waits until all ranks are here and nothing is under way."""
    import torch.distributed as dist

    dist.barrier()
    time.sleep(1.0)


def prepared(system: str, model: Any) -> tuple[Any, Any]:
    """The model and its optimizer."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

    from ds_comm.exchange import CompressedHook
    from ds_comm.optim import OneBitAdam, ZeroOneAdam

    if system == "onebit":
        return model, OneBitAdam(model.parameters(), lr=1e-4, freeze_step=2)
    if system == "zeroone":
        return model, ZeroOneAdam(
            model.parameters(), lr=1e-4, var_freeze_step=2, local_step_scaler=1, local_step_clipper=4
        )
    model = torch.nn.parallel.DistributedDataParallel(model)
    if system == "bf16":
        model.register_comm_hook(None, bf16_hook)
    elif system.startswith("powersgd"):
        state = powersgd.PowerSGDState(None, matrix_approximation_rank=int(system[8:]), start_powerSGD_iter=2)
        model.register_comm_hook(state, powersgd.powerSGD_hook)
    elif system == "hook":
        model.register_comm_hook(CompressedHook(start_step=2), CompressedHook.reduce)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def bf16_hook(
    _, bucket
):  # DistributedDataParallel compares annotations with types: without them it takes any
    """Averages gradients in bf16. That of torch does the same, but refuses gloo."""
    import torch
    import torch.distributed as dist

    half = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    work = dist.all_reduce(half, async_op=True)
    return work.get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))


def formula(system: str, numel: int, optimizer: Any, steps: int) -> float | None:
    """Bytes that this rank sends in a step, by formula; None where we have none."""
    import torch.distributed as dist

    from ds_comm.exchange import wire

    size = dist.get_world_size()
    if system in ("ddp", "bf16"):
        return wire.all_reduce_bytes(numel * (4 if system == "ddp" else 2), size)
    if system in ("onebit", "zeroone"):
        share = 0.25 if system == "zeroone" else 1.0
        return float(optimizer.compressed_state.wire_bytes + wire.all_reduce_bytes(16, size)) * share
    return None


# -- the measurement


def measure(made: list[Host], system: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs one system on all hosts."""
    environ = {
        **os.environ,
        "WORLD_SIZE": str(len(made)),
        "MASTER_ADDR": made[0].address,
        "MASTER_PORT": str(PORT),
    }
    environ |= {"GLOO_SOCKET_IFNAME": "slow0", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    own = [
        sys.executable,
        __file__,
        "--worker",
        system,
        "--steps",
        str(options.steps),
        "--layers",
        str(options.layers),
    ]
    processes = [
        subprocess.Popen(
            host.command(*own),
            env={**environ, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank, host in enumerate(made)
    ]
    try:
        outputs = [process.communicate(timeout=options.timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    line = next((line for line in outputs[0].splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(
            f"{system}: no result; exit statuses {[process.returncode for process in processes]}"
        )
    found: list[dict[str, Any]] = json.loads(line.removeprefix("RESULT "))
    return found


def table(count: int, rate: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown."""
    numel = next(iter(results.values()))[0]["numel"]
    rows = [f"{count} hosts, {rate}, {numel / 1e6:.1f} M parameters", ""]
    names = (
        "system",
        "payload per rank and step",
        "of fp32",
        "against the formula",
        "step",
        "exchange",
        "times faster",
    )
    rows += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    dense = results.get("ddp")
    for system, ranks in results.items():
        payload = sum(r["payload"] for r in ranks) / len(ranks)
        step = max(r["step_s"] for r in ranks)
        formulas = [r["formula"] for r in ranks]
        against = "" if formulas[0] is None else f"{payload / (sum(formulas) / len(ranks)) - 1:+.1%}"
        share = speed = ""
        exchange = spent(ranks)
        if dense is not None:
            share = f"1/{sum(r['payload'] for r in dense) / len(dense) / payload:.1f}"
            speed = f"{spent(dense) / exchange:.1f}"
        cells = [
            LABELS[system],
            f"{payload / 1e6:.3f} MB",
            share,
            against,
            f"{step:.2f} s",
            f"{exchange:.2f} s",
            speed,
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def spent(ranks: list[dict[str, Any]]) -> float:
    """Seconds of a step that are not forward or backward: exchange and optimizer."""
    return max(r["step_s"] for r in ranks) - max(r["alone_s"] for r in ranks)


def main() -> None:
    """Parses arguments, measures, prints tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--rates", default="100mbit,1gbit")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench-comm")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--no-offload", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.no_offload:
        no_offload(options.no_offload)
        return
    if options.worker:
        worker(options.worker, options.steps, options.layers)
        return
    missing = [name for name in ("ip", "tc", "unshare", "nsenter") if shutil.which(name) is None]
    if os.getuid() != 0 or missing:
        sys.exit(f"ci/bench comm: needs root and {', '.join(missing) or 'nothing else'}")
    options.folder.mkdir(parents=True, exist_ok=True)
    for rate in options.rates.split(","):
        results = {}
        for system in options.systems.split(","):
            kept = options.folder / f"{system}-{options.hosts}-{rate}-{options.layers}-{options.steps}.json"
            if not kept.exists():
                with hosts(options.hosts, rate) as made:
                    kept.write_text(json.dumps(measure(made, system, options)))
            results[system] = json.loads(kept.read_text())
        print(table(options.hosts, rate, results), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
