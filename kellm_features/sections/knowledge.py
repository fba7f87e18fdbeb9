"""Sections of what a language model and an encoder do."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from kellm_features.sections.base import Section, Tuning

_SECRET = re.compile(r"api.?key|authorization|bearer|password|secret", re.IGNORECASE)


class ServerSettings(Section):
    """A server that speaks OpenAI's chat completions: vLLM's own, or any other. Its key comes from the environment."""

    base_url: Annotated[str, Field(description="up to /v1", json_schema_extra={"tuning": True})] = (
        "http://127.0.0.1:8000/v1"
    )
    concurrency: Annotated[int, Field(ge=1, le=4096, json_schema_extra={"tuning": True})] = 32
    timeout_s: Annotated[float, Field(gt=0, json_schema_extra={"tuning": True})] = 120.0
    max_attempts: Annotated[
        int,
        Field(
            ge=1, le=100, description="of one request, with backoff between them", json_schema_extra={"tuning": True}
        ),
    ] = 8
    request: Annotated[
        dict[str, Any], Field(description="further fields of every request, as in { temperature = 0.2 }")
    ] = Field(default={})

    @field_validator("base_url")
    @classmethod
    def _holds_no_secret(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^@?#\s]+", url):
            raise ValueError(
                "an address is http:// or https://, host and path; names, keys and queries do not belong into a file "
                "(the key comes from $OPENAI_API_KEY)"
            )
        return url

    @field_validator("request")
    @classmethod
    def _sends_no_secret(cls, request: dict[str, Any]) -> dict[str, Any]:
        for name in request:
            if _SECRET.search(name):
                raise ValueError(f"the field {name} looks like a secret, which no file may hold: set $OPENAI_API_KEY")
        return request


class VllmSettings(Section):
    """vLLM in this process; the names are vLLM's own."""

    tensor_parallel_size: Annotated[int, Field(ge=1, json_schema_extra={"tuning": True})] = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1, json_schema_extra={"tuning": True})] = 0.9
    max_model_len: Annotated[
        int | None,
        Field(ge=64, description="tokens of prompt and answer; None: the model's", json_schema_extra={"tuning": True}),
    ] = None
    quantization: Annotated[str | None, Field(description="as in awq, gptq, fp8; None: as the model says")] = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    enforce_eager: Annotated[bool, Tuning] = False
    enable_prefix_caching: Annotated[bool, Tuning] = True
    cpu_kvcache_gib: Annotated[
        int, Field(ge=1, description="of vLLM's CPU build", json_schema_extra={"tuning": True})
    ] = 1
    engine_args: Annotated[dict[str, Any], Field(description="further arguments of vLLM's engine")] = Field(default={})


class GenerateSettings(Section):
    """Descriptions of items and profiles of users."""

    side: Annotated[
        Literal["both", "item", "user"],
        Field(description="what is written; the other side's finished texts stay, and what lacks one gets a template"),
    ] = "both"
    engine: Annotated[str, Field(description="engine of the first `limit` items")] = "transformers"
    fallback_engine: Annotated[str, Field(description="engine of all other items and users")] = "template"
    user_engine: Annotated[str, Field(description="engine of the first `user_limit` users")] = "template"
    model: Annotated[
        str, Field(description="SmolLM2-135M-Instruct, a folder, a .gguf file, a hub id, or a server's model")
    ] = "SmolLM2-135M-Instruct"
    revision: Annotated[str | None, Field(description="of a hub id: branch, tag or commit; of a server: any name")] = (
        None
    )
    domain: Annotated[str, Field(description="a shipped domain or the path of a TOML file")] = "movies"
    limit: Annotated[int | None, Field(ge=0, description="items for `engine`, most popular first; None: all")] = 110
    user_limit: Annotated[
        int | None, Field(ge=0, description="users for `user_engine`, longest history first; None: all")
    ] = None
    min_history: Annotated[int, Field(ge=0, description="events that a user needs for `user_engine`")] = 1
    user_refresh: Annotated[
        Literal["history", "prompt"],
        Field(
            description="history: a profile is written again when the history changed; prompt: also when a digest did"
        ),
    ] = "history"
    max_tokens: Annotated[int, Field(ge=8, le=4096)] = 96
    user_max_tokens: Annotated[int | None, Field(ge=8, le=4096, description="None: max_tokens")] = None
    page_tokens: Annotated[
        int | None, Field(ge=32, le=32768, description="budget of page text in a prompt; None: the domain's")
    ] = None
    profile_tokens: Annotated[
        int | None,
        Field(ge=64, le=131072, description="budget of history and digests in a user's prompt; None: the domain's"),
    ] = None
    factors: Annotated[bool, Field(description="ask for one text per factor, as JSON under a schema")] = False
    min_grounding: Annotated[
        float,
        Field(
            ge=0, le=1, description="score below which a text is written again, then replaced by an extract; 0: never"
        ),
    ] = 0.5
    budget_tokens: Annotated[
        int | None,
        Field(
            ge=0,
            description="prompt and answer tokens of one run at most; the rest waits for the next run",
            json_schema_extra={"tuning": True},  # while anything waits, the stage runs again
        ),
    ] = None
    resume: Annotated[
        bool, Field(description="false: forget finished texts and begin anew", json_schema_extra={"tuning": True})
    ] = True
    max_failures: Annotated[
        int, Field(ge=1, description="failed requests in a row that end the run", json_schema_extra={"tuning": True})
    ] = 50
    batch_size: Annotated[int, Field(gt=0, json_schema_extra={"tuning": True})] = 16
    device: Annotated[
        str | None,
        Field(
            description="of the transformers engine; None: cuda where there is one", json_schema_extra={"tuning": True}
        ),
    ] = None
    server: ServerSettings = ServerSettings()
    vllm: VllmSettings = VllmSettings()


class EncodeSettings(Section):
    """Text to vectors."""

    model: Annotated[
        str,
        Field(description="all-MiniLM-L6-v2, a folder in sentence-transformers or transformers layout, or a hub id"),
    ] = "all-MiniLM-L6-v2"
    revision: Annotated[str | None, Field(description="of a hub id: branch, tag or commit")] = None
    long_texts: Annotated[
        Literal["chunk", "cut"],
        Field(description="beyond the model's window: mean of chunks, or the beginning alone as KAR and KELLMRec do"),
    ] = "chunk"
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"],
        Field(description="of weights and arithmetic; vectors are stored as float32"),
    ] = "float32"
    batch_size: Annotated[int, Field(gt=0, json_schema_extra={"tuning": True})] = 64
    device: Annotated[
        str | None, Field(description="None: cuda where there is one", json_schema_extra={"tuning": True})
    ] = None
    devices: Annotated[
        list[str] | None,
        Field(
            min_length=1,
            description="one process on each, as in ['cuda:0', 'cuda:1']; wins over device",
            json_schema_extra={"tuning": True},
        ),
    ] = None
