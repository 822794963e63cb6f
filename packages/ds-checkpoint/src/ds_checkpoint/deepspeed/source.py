"""A DeepSpeed checkpoint with the interface of ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_checkpoint.deepspeed import files, inert, layout
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import codec
from ds_checkpoint.format.manifest import Entry, Manifest, Piece, check_pieces
from ds_checkpoint.read.checkpoint import Checkpoint

_OPTIONS = frozenset(
    {"lr", "initial_lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "alpha", "rho"}
)
"""Options of a parameter group that have the same meaning in every implementation of the optimizer."""
_OURS = frozenset(
    [
        "buffer_names",
        "checkpoint_parallel_dimensions",
        "data_sampler",
        "dp_world_size",
        "ds_config",
        "ds_version",
        "frozen_param_fragments",
        "frozen_param_shapes",
        "global_samples",
        "global_steps",
        "lr_scheduler",
        "module",
        "mp_world_size",
        "optimizer",
        "param_shapes",
        "random_ltd",
        "scheduler",
        "shared_params",
        "skipped_steps",
        "sparse_tensor_module_names",
        "universal_checkpoint_info",
    ]
)
"""Keys of the model file that are not part of the client state."""
_FAMILIES: Mapping[str, str] = {
    "adam": "adam",
    "adamw": "adam",
    "lamb": "lamb",
    "lion": "lion",
    "adagrad": "adagrad",
    "sgd": "sgd",
    "muon": "muon",
}
Raw = Mapping[str, Any]


class DeepSpeedCheckpoint(Checkpoint):
    """Reads stages 0 to 3 and the universal format by logical name and range.

    These files have no checksums, so damage is detected only if a file cannot be parsed.
    """

    def __init__(self, path: Path, order: Sequence[Sequence[str]] | None = None) -> None:
        """Opens the folder of one checkpoint.

        Args:
            order: names of the parameters in the order of the optimizer's groups, for stage 0, whose files contain
                only numbers. Default: the order of the model, which is right unless the groups have another order.

        Raises:
            CheckpointError: files are missing, unreadable, or have unknown contents.
        """
        self.path = Path(path)
        self.problems = []
        self._files = {}
        self._read = {}
        self._tensors: dict[tuple[str, str], Tensor] = {}
        self._entries: dict[str, dict[str, Entry]] = {}
        self._found = files.find(self.path)
        try:
            self._enter_all(order)
        except (CheckpointError, OSError):
            raise
        except Exception as error:  # the contents of a damaged or foreign file can cause any error
            raise CheckpointError(
                f"{self.path} is not what DeepSpeed writes ({type(error).__name__}: {error}): it is damaged, or "
                "was written by an unknown version"
            ) from error

    def _enter_all(self, order: Sequence[Sequence[str]] | None) -> None:
        models = [inert.read(file) for file in self._found.model]
        first: Raw = models[0]
        if not isinstance(first, Mapping) or not isinstance(first.get("module"), Mapping):
            raise CheckpointError(
                f"{self._found.model[0]} has no 'module': it is not a model file of DeepSpeed"
            )
        self._tied = dict(first.get("shared_params") or {})
        groups = [dict(group) for group in first.get("param_shapes") or []]
        if self._found.universal:
            optimizer = self._universal(groups)
        elif self._found.optim:
            optimizer = self._sharded(groups)
        else:
            optimizer = self._whole(first, order)
        trained = set(self._entries)
        self._module(models)
        self._frozen_names = [
            n for n, e in self._entries.items() if "param" in e and trained and n not in trained
        ]
        self.manifest = self._manifest(first, optimizer)

    def check_files(self, first: int = 0, stride: int = 1) -> None:
        """Does nothing: the constructor has opened all files."""

    # --- tensors

    def _put(
        self, fqn: str, state: str, shape: Iterable[int], parts: Iterable[tuple[Path, int, Tensor]]
    ) -> None:
        """Adds a logical tensor that consists of `(file, flat_offset, 1-D tensor)`."""
        pieces, dtype = [], torch.float32
        for file, offset, tensor in parts:
            key = f"{fqn}/{state}@{offset}"
            self._tensors[file.name, key] = tensor
            dtype = tensor.dtype
            pieces.append(Piece(file=file.name, key=key, flat_offset=offset, numel=tensor.numel(), crc32c=""))
        size = tuple(shape)
        checked = check_pieces(f"{state} of {fqn!r} in {self.path}", size, pieces)
        self._entries.setdefault(fqn, {})[state] = Entry(dtype=dtype, shape=size, pieces=checked)

    def _expect(self, parts: Iterable[tuple[Piece, int, int]]) -> None:
        """Does nothing: the files are memory-mapped, not read ahead."""

    def _read_piece(self, piece: Piece, first: int, out: Tensor) -> str | None:
        out.copy_(self._tensors[piece.file, piece.key][first : first + out.numel()])
        return None

    def _module(self, models: Sequence[Raw]) -> None:
        """Adds the tensors of the model files: parameters without an optimizer, and buffers."""
        file, first = self._found.model[0], models[0]
        buffers = set(first.get("buffer_names") or ())
        whole = [name for name, value in first["module"].items() if isinstance(value, Tensor)]
        seen: dict[tuple[int, int], str] = {}
        for name in whole:
            value = first["module"][name]
            if name in buffers:
                self._put(name, "buffer", value.shape, [(file, 0, value.reshape(-1))])
                continue
            memory = (value.untyped_storage().data_ptr(), value.storage_offset())
            if value.numel() and memory in seen and name not in self._entries:
                self._tied.setdefault(name, seen[memory])
            seen.setdefault(memory, name)
            if (
                name in self._entries
                or name in self._tied
                or name in (first.get("frozen_param_shapes") or {})
            ):
                continue
            if value.numel() == 0 and len(models) > 1:
                raise CheckpointError(f"{file} has no values of {name!r}, and no other file has them")
            self._put(name, "param", value.shape, [(file, 0, value.reshape(-1))])
        for name, shape in (first.get("frozen_param_shapes") or {}).items():
            self._frozen(name, tuple(shape), models)

    def _frozen(self, name: str, shape: tuple[int, ...], models: Sequence[Raw]) -> None:
        numel = math.prod(shape)
        part = -(-numel // len(models))
        parts = []
        for rank, model in enumerate(models):
            have = max(0, min(part, numel - rank * part))
            if have:
                fragment = model["frozen_param_fragments"][name].reshape(-1)[:have]
                parts.append((self._found.model[rank], rank * part, fragment))
        self._put(name, "param", shape, parts)

    # --- The optimizer: one method for each layout, which returns the parameter groups.

    def _sharded(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ranks = [inert.read(file)["optimizer_state_dict"] for file in self._found.optim]
        stage3 = "fp32_flat_groups" in ranks[0]
        masters = "fp32_flat_groups" if stage3 else "single_partition_of_fp32_groups"
        if masters not in ranks[0]:
            raise CheckpointError(
                f"{self._found.optim[0]} has neither of the two known layouts of DeepSpeed's optimizer files"
            )
        written = _number(ranks[0].get("partition_count"), len(ranks))
        models = len(self._found.model) if stage3 else written
        if not len(ranks) == written == models:
            raise CheckpointError(
                f"{self.path} was written by {max(written, models)} ranks, but has {len(ranks)} optimizer files and "
                f"{len(self._found.model)} model files: the checkpoint was not copied completely"
            )
        bases = [rank["optimizer_state_dict" if stage3 else "base_optimizer_state"] for rank in ranks]
        if stage3:
            sizes = [[flat.numel() for flat in rank[masters]] for rank in ranks]
            parts = list(layout.divided(groups, sizes))
        else:
            parts = list(layout.contiguous(groups, _slices(ranks, groups, masters)))
        self._enter(groups, parts, "param", [rank[masters] for rank in ranks])
        for state in _states(bases[0]):
            flats = [[_state(base, g, state) for g in range(len(ranks[0][masters]))] for base in bases]
            self._enter(groups, parts, state, flats)
        return _param_groups(bases[0], [len(group) for group in groups])

    def _enter(
        self,
        groups: Sequence[Mapping[str, Any]],
        parts: Iterable[layout.Part],
        state: str,
        flats: Sequence[Sequence[Tensor]],
    ) -> None:
        """Adds one state of every parameter, from the flat tensors of each rank."""
        shapes = {fqn: tuple(shape) for group in groups for fqn, shape in group.items()}
        parts_by_name: dict[str, list[tuple[Path, int, Tensor]]] = {fqn: [] for fqn in shapes}
        for part in parts:
            flat = flats[part.rank][part.index]
            file = self._found.optim[part.rank]
            if flat.ndim == 0:  # a number, the same on all ranks
                parts_by_name[part.fqn] = [(file, 0, flat.reshape(1))]
                shapes[part.fqn] = ()
            else:
                parts_by_name[part.fqn].append(
                    (file, part.flat_offset, flat[part.start : part.start + part.numel])
                )
        for fqn, tensors in parts_by_name.items():
            self._put(fqn, state, shapes[fqn], tensors)

    def _universal(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        shapes = {fqn: tuple(shape) for group in groups for fqn, shape in group.items()}
        shared = self.path / "zero" / "optimizer_state.pt"
        common: Raw = inert.read(shared) if shared.is_file() else {}
        for folder in sorted(p for p in (self.path / "zero").iterdir() if p.is_dir()):
            for file in sorted(folder.glob("*.pt")):
                value = inert.read(file)
                tensor = value["param"] if isinstance(value, dict) else value
                state = "param" if file.stem == "fp32" else file.stem
                fqn = folder.name
                if (
                    not isinstance(tensor, Tensor)
                    or tensor.ndim == 0
                    or tensor.numel() == 1 != math.prod(shapes[fqn])
                ):
                    self._put(fqn, state, (), [(file, 0, torch.as_tensor(tensor).reshape(1))])
                else:
                    # The files of all parameters have the same names.
                    self._put(fqn, state, shapes[fqn], [(file, 0, tensor.reshape(-1))])
        missing = [fqn for fqn in shapes if "param" not in self._entries.get(fqn, {})]
        if missing:
            raise CheckpointError(
                f"{self.path}/zero has no values of {missing[:5]}: the conversion is not complete"
            )
        base = common.get("optimizer_state_dict", common)
        base = base.get("base_optimizer_state", base.get("optimizer_state_dict", base))
        step = next((s["step"] for s in _all_states(base) if "step" in s), None)
        if step is not None:
            for fqn in shapes:
                if "step" not in self._entries[fqn]:
                    self._put(fqn, "step", (), [(shared, 0, torch.as_tensor(step).reshape(1))])
        return _param_groups(base, [len(group) for group in groups])

    def _whole(self, first: Raw, order: Sequence[Sequence[str]] | None) -> list[dict[str, Any]]:
        """Stage 0 numbers the parameters in the order of the optimizer's groups."""
        file, saved = self._found.model[0], first.get("optimizer")
        if not saved:
            return []
        base = saved.get("optimizer_state_dict", saved)
        if "param_groups" not in base:
            return []
        counts = [len(group["params"]) for group in base["param_groups"]]
        names = _names_of_numbers(first, base, counts, order)
        if names is None:
            warnings.warn(
                f"{self.path} numbers its optimizer states, and the order of the model does not tell which "
                "parameter each belongs to (frozen parameters?): only parameters are read, and optimizer states "
                "are left out",
                stacklevel=2,
            )
            return []
        masters = [tensor for group in saved.get("fp32_groups") or [] for tensor in group]
        if not masters and saved.get("fp32_groups_flat"):
            masters = _cut(saved["fp32_groups_flat"], names, counts, first["module"])
        for number, name in enumerate(names):
            shape = first["module"][name].shape
            master = masters[number] if masters else first["module"][name]
            self._put(name, "param", shape, [(file, 0, master.reshape(-1))])
            for state, value in base["state"].get(number, {}).items():
                tensor = torch.as_tensor(value)
                whole = tensor.numel() == math.prod(shape) and tensor.ndim > 0
                self._put(name, state, shape if whole else (), [(file, 0, tensor.reshape(-1))])
        return _param_groups(base, counts)

    # --- everything else

    def _manifest(self, first: Raw, groups: list[dict[str, Any]]) -> Manifest:
        blobs: dict[str, Tensor] = {}
        config = _config(first, self._found)
        wanted = (config.get("optimizer") or {}).get("type", "")
        values = {
            "counters": {
                "global_steps": int(first.get("global_steps") or 0),
                "global_samples": int(first.get("global_samples") or 0),
                "skipped_steps": int(first.get("skipped_steps") or 0),
            },
            "config": codec.encode(config, "ds_config", blobs, "config"),
            "versions": {"deepspeed": str(first.get("ds_version", "unknown"))},
            "optimizer": {
                "family": _FAMILIES.get(str(wanted).lower()),
                "groups": [
                    {
                        "num_params": group["num_params"],
                        "options": codec.encode(group["options"], "param_groups", blobs, "optimizer"),
                    }
                    for group in groups
                ],
            },
            "schedule": self._schedule(first, config, blobs),
            "client_state": self._client_state(first, blobs),
            "tied": self._tied,
            "frozen": self._frozen_names,
        }
        entries = {}
        for name, tensor in blobs.items():
            self._tensors["", name] = tensor.reshape(-1)
            piece = Piece(file="", key=name, flat_offset=0, numel=tensor.numel(), crc32c="")
            entries[name] = Entry(dtype=tensor.dtype, shape=tuple(tensor.shape), pieces=(piece,))
        return Manifest(
            tag=self.path.name,
            world_size=int(first.get("dp_world_size") or len(self._found.optim) or 1),
            saved_at_s=self._found.model[0].stat().st_mtime,
            files={},
            tensors={
                fqn: {state: (entry,) for state, entry in states.items()}
                for fqn, states in self._entries.items()
            },
            blobs=entries,
            values=values,
        )

    def _schedule(self, first: Raw, config: Raw, blobs: dict[str, Tensor]) -> dict[str, Any] | None:
        state = first.get("lr_scheduler")
        if not isinstance(state, dict):
            return None
        kind = (config.get("scheduler") or {}).get("type")
        try:
            return {"type": kind, "state": codec.encode(dict(state), "lr_scheduler", blobs, "schedule")}
        except ValueError as error:
            warnings.warn(f"{self.path}: the schedule is not read: {error}", stacklevel=2)
            return None

    def _client_state(self, first: Raw, blobs: dict[str, Tensor]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key, value in first.items():
            if key in _OURS:
                continue
            try:
                kept[key] = codec.encode(value, f"client_state[{key!r}]", blobs, "client")
            except ValueError as error:
                warnings.warn(f"{self.path}: left out: {error}", stacklevel=2)
        return kept


def _number(value: Any, default: int) -> int:
    if isinstance(value, (list, tuple)):
        value = value[0] if value else default
    return int(value) if value is not None else default


def _slices(
    ranks: Sequence[Raw], groups: Sequence[Mapping[str, Any]], masters: str
) -> list[list[dict[str, tuple[int, int]]]]:
    """Stages 1 and 2: parameters are stored in the order of `param_shapes`.

    `param_slice_mappings` is not used: with `round_robin_gradients` it has the order before the reordering, and
    masters that are read by it differ from the 16-bit parameters of the same checkpoint.
    """
    sizes = [
        ranks[0][masters][g].numel() for g in range(len(groups))
    ]  # only the parts of the last ranks are shorter
    paddings = ranks[0].get("param_alignment_paddings") or [[] for _ in groups]
    return layout.contiguous_slices(groups, sizes, len(ranks), paddings)


def _all_states(base: Any) -> list[Mapping[str, Any]]:
    if isinstance(base, (list, tuple)):  # "elastic": one dict for each group
        return [dict(state) for state in base]
    return list((base.get("state") or {}).values()) if isinstance(base, dict) else []


def _states(base: Any) -> list[str]:
    states = _all_states(base)
    return [
        name
        for name, value in (states[0] if states else {}).items()
        if isinstance(value, (Tensor, int, float))
    ]


def _state(base: Any, group: int, name: str) -> Tensor:
    return torch.as_tensor(_all_states(base)[group][name])


def _param_groups(base: Any, counts: Sequence[int]) -> list[dict[str, Any]]:
    groups = base.get("param_groups") if isinstance(base, dict) else None
    if not groups or len(groups) != len(counts):
        return [{"num_params": n, "options": {}} for n in counts]
    return [
        {"num_params": n, "options": {k: v for k, v in group.items() if k in _OPTIONS}}
        for n, group in zip(counts, groups, strict=True)
    ]


def _names_of_numbers(
    first: Raw, base: Raw, counts: Sequence[int], order: Sequence[Sequence[str]] | None
) -> list[str] | None:
    """Returns the parameter name for each number in a plain optimizer's state; None if it cannot be determined."""
    module: Mapping[str, Tensor] = first["module"]
    if order is not None and [len(group) for group in order] == list(counts):
        names = [name for group in order for name in group]
    else:
        buffers, memory, names = set(first.get("buffer_names") or ()), set(), []
        for name, value in module.items():
            at = (value.untyped_storage().data_ptr(), value.storage_offset())
            if name not in buffers and at not in memory:
                names.append(name)
                memory.add(at)
        if len(names) != sum(counts) or len(counts) > 1:
            return None
    for number, name in enumerate(names):
        for value in base["state"].get(number, {}).values():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != module[name].shape:
                return None
    return names


def _cut(
    flats: Sequence[Tensor], names: Sequence[str], counts: Sequence[int], module: Mapping[str, Tensor]
) -> list[Tensor]:
    """Splits the flat masters of the fused fp16 optimizer of stage 0, which has one for each group."""
    cut, at = [], 0
    for flat, count in zip(flats, counts, strict=True):
        start = 0
        for name in names[at : at + count]:
            numel = module[name].numel()
            cut.append(flat[start : start + numel])
            start += numel
        at += count
    return cut


def _config(first: Raw, checkpoint_files: files.Files) -> dict[str, Any]:
    config = first.get("ds_config")
    if config is None and checkpoint_files.optim:
        config = inert.read(checkpoint_files.optim[0]).get("ds_config")
    return dict(config) if isinstance(config, dict) else {}
