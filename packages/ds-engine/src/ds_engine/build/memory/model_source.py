"""Constructs the model for `ds plan`: from a function of the user, or from the config.json of a Hugging Face model."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_engine.build.memory.plan import load_factory

DEFAULT_TOKENS = 2048
"""Maximum default number of tokens of a sample."""

_WITH_LABELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")


def model_factory(
    where: str, *, tokens: int | None = None, arguments: Mapping[str, int] | None = None
) -> Callable[[], Any]:
    """Returns a function that makes the model, or the model and example inputs of one forward.

    Args:
        where: `package.module:function`, `file.py:function`, a Hugging Face `config.json`, or a folder with one.
        tokens: number of tokens of a sample, for Hugging Face models. Default: the model's longest sequence, at most
            2048.
        arguments: passed to the function by keyword.

    Raises:
        ValueError: there is no such function or file. The returned function raises it if it fails.
    """
    path = Path(where)
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{where!r}: there is no file {file}")
        return lambda: _hugging_face(file, tokens)
    if tokens is not None:
        raise ValueError(
            "--tokens is only for Hugging Face models; return example inputs from the function instead"
        )
    try:
        factory = load_factory(where)
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"{where!r} cannot be imported: {_place_of(error)}") from error
    return lambda: _called(partial(factory, **(arguments or {})), where)


def keywords_of(where: str) -> frozenset[str]:
    """Returns the names of the arguments that a user's function takes; none for a configuration of Hugging Face.

    Raises:
        ValueError: there is no such function.
    """
    path = Path(where)
    if path.is_dir() or path.suffix == ".json":
        return frozenset()
    return frozenset(inspect.signature(load_factory(where)).parameters)


def _called(factory: Callable[[], Any], where: str) -> Any:
    try:
        return factory()
    except Exception as error:
        raise ValueError(f"{where!r} failed: {_place_of(error)}") from error


def _place_of(error: BaseException) -> str:
    """The error in one line, with the last line of code before it."""
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{at}"


def _hugging_face(file: Path, tokens: int | None) -> tuple[nn.Module, dict[str, torch.Tensor] | None]:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise ValueError(
            f"{str(file)!r} needs transformers, which is not installed: pip install transformers"
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(str(file))
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"{str(file)!r} is not a configuration of a model that transformers {transformers.__version__} "
            f"knows: {error}"
        ) from error
    named = (getattr(config, "architectures", None) or [""])[0]
    made = getattr(transformers, named, None)
    config.use_cache = False  # training uses no cache of keys and values
    # On the meta device, in fp32: ds_config.json sets the dtype of training, not the model's configuration.
    model = (
        made(config) if made is not None else transformers.AutoModel.from_config(config, dtype=torch.float32)
    )
    return model, _text_inputs(model, config, tokens)


def _text_inputs(model: nn.Module, config: Any, tokens: int | None) -> dict[str, torch.Tensor] | None:
    """Returns one sample of tokens, with labels if the model computes a loss; None for a model without text input."""
    if getattr(model, "main_input_name", "") != "input_ids":
        return None
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    length = tokens or min(DEFAULT_TOKENS, int(limit or DEFAULT_TOKENS))
    if limit is not None and length > int(limit):
        raise ValueError(f"--tokens {length}: the model accepts at most {limit}")
    sample = torch.zeros(1, length, dtype=torch.long)
    named = type(model).__name__
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    return {"input_ids": sample} | (
        {"labels": sample} if takes_labels and named.endswith(_WITH_LABELS) else {}
    )
