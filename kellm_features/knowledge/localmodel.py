"""Language models in local files: which folder the settings mean, and the form in which a model reads a prompt."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kellm_features.artifacts import sha256_file
from kellm_features.errors import EngineError, MissingExtraError, first_line
from kellm_features.knowledge.engines.base import Failure, Prompt
from kellm_features.knowledge.modelfiles import hash_model, hub_folder, is_hub_id, quiet_loading, refuse_revision
from kellm_features.resources import EMBEDDED_LLM, package_file
from kellm_features.settings import GenerateSettings, user_cache_dir

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSION_S = 24 * 3600.0
"""No conversion takes so long: the embedded model's takes a minute."""


@dataclass(frozen=True)
class LocalModel:
    """A causal language model on this machine's disk."""

    folder: Path
    """In Hugging Face layout."""
    model_id: str
    """Its name, as it stands in the descriptions."""
    revision: str
    """The commit of a hub model; else SHA-256 of the files that it was read from."""


def local_model(settings: GenerateSettings) -> LocalModel:
    """The model that `generate.model` names, fetched and unpacked where it has to be.

    Accepted are the embedded model's name, a folder in Hugging Face layout, a .gguf file, and a hub id, whose version
    `generate.revision` chooses. A path that exists wins over a hub id of the same name.

    Raises:
        ConfigError: a revision of a model that has none.
        EngineError: no such model, or its files cannot be read.
        MissingExtraError: a .gguf file has to be unpacked and what does so is not installed.
    """
    name = settings.model
    source = package_file(EMBEDDED_LLM, _EMBEDDED_FILE) if name == EMBEDDED_MODEL else Path(name).expanduser()
    if source.exists():
        refuse_revision("generate", name, settings.revision)
    if source.is_dir():
        return LocalModel(source, source.name, hash_model(source))
    if source.is_file():
        revision = sha256_file(source)
        folder = convert_gguf(source, user_cache_dir() / "models" / revision)
        return LocalModel(folder, name if name == EMBEDDED_MODEL else source.stem, revision)
    if name.endswith(".gguf") or not is_hub_id(name):
        raise EngineError(
            f"'generate.model' is {name!r}, which is not on this machine: accepted are {EMBEDDED_MODEL}, "
            "a model folder, a .gguf file, or a hub id such as org/name"
        )
    folder = hub_folder(name, settings.revision, "generate.model")
    return LocalModel(folder, name, folder.name)


def convert_gguf(source: Path, target: Path) -> Path:
    """Unpack a GGUF file to a bfloat16 model folder, once; later calls return the folder as it is.

    The folder is written under a temporary name and renamed when whole, so that a kill leaves nothing half-made and
    two processes may convert at the same time.

    Raises:
        EngineError: the file is no model that transformers can read.
        MissingExtraError: torch, transformers, gguf or accelerate is not installed.
    """
    if target.exists():
        return target
    for module in ("torch", "transformers", "gguf", "accelerate"):
        require("llm", module, f"Unpacking {source.name}")
    import torch
    import transformers

    _remove_abandoned(target)
    temporary = target.parent / f"{target.name}.tmp-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True, exist_ok=True)
    logger.info("converting %s once; the result is kept in %s", source.name, target)
    options: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    # Since GGUF blocks can be computed on directly, unpacking has to be asked for.
    unpacked = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
    try:
        with quiet_loading():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source.parent, dtype=torch.bfloat16, quantization_config=unpacked, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **options)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        temporary.rename(target)
    except OSError as error:
        if not target.exists():  # else another process was faster
            raise EngineError(f"{source} cannot be converted into {target}: {error}") from error
    except Exception as error:  # a foreign file's parser may raise anything
        raise EngineError(f"{source} is not a GGUF model that transformers can read: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


class ChatForm:
    """The token ids of prompts, in the chat form that a model was trained on."""

    def __init__(self, folder: Path) -> None:
        """Load the tokenizer of a model folder.

        Raises:
            EngineError: the folder holds no tokenizer that transformers can read.
        """
        import transformers

        with loading(folder):
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                folder, padding_side="left", local_files_only=True
            )
        added = self.tokenizer.added_tokens_decoder.values()
        self._control = sorted({token.content for token in added if token.special}, key=len, reverse=True)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, up to where the answer begins.

        A control token that is spelled in the prompt's text loses its meaning: a page cannot end the user's turn.
        """
        system, user = self._without_control(prompt.system), self._without_control(prompt.user)
        if self.tokenizer.chat_template is None:
            text, special = f"{system}\n\n{user}\n", True
        else:
            text, special = self._chat(system, user), False  # the chat form spells its own special tokens
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _chat(self, system: str, user: str) -> str:
        import jinja2

        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError:  # some chat templates refuse a system turn
            messages = [{"role": "user", "content": f"{system}\n\n{user}"}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text)

    def _without_control(self, text: str) -> str:
        for token in self._control:
            text = text.replace(token, " ")
        return text


def beyond_window(prompt_tokens: int, max_tokens: int, window: int) -> Failure | None:
    """The failure of a request that has no room in the model's window, None for one that has."""
    if prompt_tokens + max_tokens <= window:
        return None
    return Failure(
        f"a prompt of {prompt_tokens} tokens and an answer of {max_tokens} exceed the {window} that the model reads: "
        "lower generate.page_tokens, generate.profile_tokens or generate.max_tokens"
    )


def require(extra: str, module: str, purpose: str) -> None:
    """Import an optional package, or say which extra brings it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise  # it is installed, and itself lacks something: a broken installation, which must not look absent
        raise MissingExtraError(extra, module, purpose) from error


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Load parts of a model: without transformers' progress bars, and with what goes wrong as `EngineError`."""
    try:
        with quiet_loading():
            yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise EngineError(f"the model in {folder} cannot be loaded: {first_line(error)}") from error


def _remove_abandoned(target: Path) -> None:
    """Delete what killed conversions left beside the target; by age, as other hosts may share the folder."""
    for leftover in target.parent.glob(f"{target.name}.tmp-*"):
        with suppress(FileNotFoundError):  # the other's conversion has ended
            if leftover.stat().st_mtime < time.time() - CONVERSION_S:
                shutil.rmtree(leftover, ignore_errors=True)
