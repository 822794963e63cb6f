"""Files of torch.save are read without executing them, whatever they hold; what is damaged is a CheckpointError."""

from __future__ import annotations

import pickle
import random
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_checkpoint import CheckpointError, open_checkpoint
from ds_checkpoint.deepspeed import inert

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "deepspeed" / "stage3-bf16" / "global_step3"
FLOATS = {"data/0": struct.pack("<4f", 1, 2, 3, 4)}


def archive(path: Path, content: bytes, records: dict[str, bytes] = FLOATS) -> Path:
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", content, len(content))
    writer.write_record("byteorder", b"little", 6)
    for name, record in records.items():
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return path


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, member: str) -> bytes:
    return f"c{module}\n{member}\n".encode()


def tensor(
    offset: int = 0, size: str = "I4\n", stride: str = "I1\n", key: str = "0", numel: int = 4
) -> bytes:
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu")
    storage += f"I{numel}\ntQ".encode()
    rest = f"I{offset}\n({size}t({stride}t".encode() + b"\x89" + name("collections", "OrderedDict") + b")R"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + rest + b"tR"


def test_what_torch_saves_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    extra = torch.zeros(3)
    extra.note = "an attribute"  # type: ignore[attr-defined]
    saved: dict[str, Any] = {
        "view": shared[2:].view(2, 2).T,
        "shared": shared,
        "parameter": torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)),
        "empty": torch.empty(0, 3),
        "number": torch.tensor(7),
        "expanded": torch.tensor([5.0]).expand(3),
        "small": torch.tensor([1, 2], dtype=torch.uint16),
        "noted": extra,
        "others": (torch.Size([2, 1]), torch.device("cpu"), torch.float16, {1, 2}, frozenset("a"), 1 + 2j),
        "more": [slice(1, 2), bytearray(b"xy"), b"z", None, True, 10**30, {"deep": [("x",)]}],
    }
    saved["itself"] = saved["more"]
    file = tmp_path / "saved.pt"
    torch.save(saved, file)
    found = inert.read(file)
    for key in ("view", "shared", "parameter", "empty", "number", "expanded", "small", "noted"):
        assert torch.equal(found[key], saved[key]) and found[key].dtype == saved[key].dtype, key
    assert found["others"] == saved["others"] and found["more"] == saved["more"]
    assert found["itself"] is found["more"]
    assert found["view"].untyped_storage().data_ptr() == found["shared"].untyped_storage().data_ptr()


def test_a_torchscript_archive_is_refused_and_does_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "victim"

    class Writes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path = str(victim)
            self.x = torch.zeros(1)

        @torch.jit.export  # type: ignore[untyped-decorator]
        def __getstate__(self):  # type: ignore[no-untyped-def]
            # type: () -> Tuple[str, Tensor, bool]
            return (self.path, self.x, self.training)

        @torch.jit.export  # type: ignore[untyped-decorator]
        def __setstate__(self, state):  # type: ignore[no-untyped-def]
            # type: (Tuple[str, Tensor, bool]) -> None
            self.path = state[0]
            self.x = state[1]
            self.training = state[2]
            torch.save(torch.zeros(4), state[0])

        def forward(self, x):  # type: ignore[no-untyped-def]
            return x

    folder = tmp_path / "global_step1"
    folder.mkdir()
    (tmp_path / "latest").write_text("global_step1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Writes()).save(str(folder / "mp_rank_00_model_states.pt"))
    victim.unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="TorchScript archive"):
        open_checkpoint(tmp_path)
    assert not victim.exists()


def test_a_pickle_changes_nothing_of_the_process(tmp_path: Path) -> None:
    """BUILD sets attributes of whatever is on the stack: nothing of torch's may be there."""
    state = b"(N}(" + text("__len__") + name("torch._utils", "_rebuild_tensor_v2") + b"utb"
    defaults = b"(N}(" + text("__defaults__") + b"(NtutbN0"
    before = torch._utils._rebuild_tensor_v2.__defaults__
    content = b"\x80\x02](" + name("torch", "UntypedStorage") + state
    content += name("torch._utils", "_rebuild_tensor_v2") + defaults
    for module, member in [("torch", "Tensor"), ("torch", "float32"), ("torch", "Size"), ("os", "system")]:
        content += name(module, member) + b"}(" + text("broken") + b"Nub"
    content += tensor() + b"}(" + text("requires_grad") + b"\x88ub" + b"e."
    found = inert.read(archive(tmp_path / "a.pt", content))
    assert isinstance(found[0], inert.Stand) and found[-1] is not None
    assert len(torch.zeros(3).untyped_storage()) == 12
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    assert not any(hasattr(owner, "broken") for owner in (torch.Tensor, torch.float32, torch.Size))


@pytest.mark.parametrize(
    "content",
    [
        tensor(offset=1) + b".",
        tensor(size="I5\n") + b".",
        tensor(size="I-4\n") + b".",
        tensor(offset=-1) + b".",
        tensor(stride="I-1\n") + b".",
        tensor(size="I1000000000000\n", stride="I0\n") + b".",
        tensor(size="I4\nI2\n") + b".",
        tensor(numel=2**40) + b".",
        tensor(numel=2) + b".",
        tensor(key="1") + b".",
        tensor(size="F4.0\n") + b".",
        name("torch._utils", "_rebuild_tensor_v2") + b"(I1\ntR.",
        name("torch", "Size") + b"(I1\ntR.",
        name("builtins", "bytearray") + b"(L99999999999999L\ntR.",
        b"\x96" + struct.pack("<Q", 2**40) + b"x.",  # BYTEARRAY8
        b"r" + struct.pack("<I", 2**31 - 1) + b".",  # LONG_BINPUT without a value
        b"\x8d" + struct.pack("<Q", 2**62) + b"x.",  # BINUNICODE8
        b"(" * 100 + b"t" * 50 + b".",
        b"]" * 5 + b"a" * 40 + b".",
        b"(" * 200_000 + b"t" * 200_000 + b".",
        b"}(]Nu.",
        b"N}b.",
        b"\x82\x01.",  # EXT1
        b"NNR.",
        b"cos\nsystem\n.",
        b"",
        b"I" + b"9" * 5000 + b"\n.",
    ],
    ids=range(27),
)
def test_what_is_damaged_or_hostile_is_refused_or_inert(content: bytes, tmp_path: Path) -> None:
    file = archive(tmp_path / "a.pt", b"\x80\x02" + content)
    try:
        found = inert.read(file)
    except CheckpointError:
        return
    assert isinstance(found, (inert.Stand, tuple, list, dict, bytearray)), found


def test_a_large_index_of_the_memo_takes_no_memory(tmp_path: Path) -> None:
    content = b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b"."
    assert inert.read(archive(tmp_path / "a.pt", content)) is None


def test_archives_that_are_not_torchs(tmp_path: Path) -> None:
    cases = {"compressed": zipfile.ZIP_DEFLATED, "empty": None, "no pickle": zipfile.ZIP_STORED}
    for case, compression in cases.items():
        file = tmp_path / "a.pt"
        if compression is None:
            file.write_bytes(b"")
        else:
            with zipfile.ZipFile(file, "w", compression) as made:
                made.writestr("a/data.pkl" if case == "compressed" else "a/other", pickle.dumps([1] * 100))
        with pytest.raises(CheckpointError, match=r"a\.pt (is|was|cannot)"):
            inert.read(file)


def test_any_changed_byte_loads_or_is_a_checkpoint_error(tmp_path: Path) -> None:
    """Bytes of the pickle of a real checkpoint are changed, with the archive's own checksum made right again."""
    source = next(GOLDEN.glob("*rank_0*optim_states.pt"))
    with zipfile.ZipFile(source) as opened:
        names = {entry.filename.partition("/")[2]: entry.filename for entry in opened.infolist()}
        content = opened.read(names["data.pkl"])
        records = {key: opened.read(full) for key, full in names.items() if key.startswith("data/")}
    rng = random.Random(7)
    refused = 0
    for number in range(150):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        if number % 5 == 0:
            del changed[rng.randrange(len(changed)) :]
        try:
            inert.read(archive(tmp_path / "a.pt", bytes(changed), records))
        except CheckpointError:
            refused += 1
    assert 20 < refused < 150
