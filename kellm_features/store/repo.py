"""What feature_store.yaml says of the online store, read without importing Feast.

A serving process needs the project's name and where the online store is, and nothing else of Feast.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import yaml

from kellm_features.errors import StoreError
from kellm_features.settings import expand_environment
from kellm_features.store.catalog import Layout

FEAST_YAML = "feature_store.yaml"
REDIS_TYPE: Final = "kellm_features.store.redis.KellmRedisOnlineStore"
SQLITE_TYPE: Final = "kellm_features.store.sqlite.KellmSqliteOnlineStore"
RedisType = Literal["redis", "redis_cluster", "redis_sentinel"]


@dataclass(frozen=True)
class OnlineConfig:
    """Where a repository's rows are served from."""

    repo: Path
    project: str
    kind: Literal["redis", "sqlite"]
    path: Path | None = None
    """SQLite: the database."""
    connection_string: str = ""
    """Redis: `host:port,option=value,…` as Feast has it; may hold a password, so it is never printed."""
    redis_type: RedisType = "redis"
    sentinel_master: str = "mymaster"
    layout: Layout = "stock"
    """Redis: how embedding views are stored."""

    @property
    def where(self) -> str:
        """The store's place for messages, without secrets."""
        return str(self.path) if self.kind == "sqlite" else f"Redis {redis_address(self.connection_string)}"


def redis_address(connection_string: str) -> str:
    """The `host:port` parts of a connection string, and nothing else of it: the rest may be of a password."""
    return ",".join(part for part in connection_string.split(",") if re.fullmatch(r"[^=:]+:\d+", part))


def read_online_config(repo: Path | str) -> OnlineConfig:
    """The online store of a Feast repository.

    Args:
        repo: the folder with feature_store.yaml. `${NAME}` in it is taken from the environment, as Feast does.

    Raises:
        StoreError: no such file, not readable, or an online store that cannot switch versions.
    """
    repo = Path(repo).resolve()
    path = repo / FEAST_YAML
    try:
        tree = yaml.safe_load(expand_environment(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise StoreError(
            f"{repo} holds no {FEAST_YAML}: name a Feast repository, or run  kellm publish  to make one"
        ) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StoreError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    online = tree.get("online_store") if isinstance(tree, dict) else None
    if not isinstance(online, dict) or not isinstance(tree.get("project"), str):
        raise StoreError(f"{path} needs `project` and a mapping `online_store`; see the template of  kellm init")
    kind = {SQLITE_TYPE: "sqlite", REDIS_TYPE: "redis"}.get(str(online.get("type")))
    if kind is None:
        raise StoreError(
            f"{path}: online_store.type is {online.get('type')!r}, which overwrites rows in place and cannot switch "
            f"versions; set it to {SQLITE_TYPE} or {REDIS_TYPE} (both take the options of Feast's own)"
        )
    if kind == "sqlite":
        return OnlineConfig(
            repo, tree["project"], "sqlite", path=repo / Path(str(online.get("path", "data/online.db")))
        )
    return OnlineConfig(
        repo,
        tree["project"],
        "redis",
        connection_string=str(online.get("connection_string", "localhost:6379")),
        redis_type=cast(RedisType, _choice(path, online, "redis_type", ("redis", "redis_cluster", "redis_sentinel"))),
        sentinel_master=str(online.get("sentinel_master", "mymaster")),
        layout=cast(Layout, _choice(path, online, "layout", ("stock", "packed"))),
    )


def _choice(path: Path, online: dict[str, Any], key: str, accepted: tuple[str, ...]) -> str:
    value = str(online.get(key, accepted[0]))
    if value not in accepted:
        raise StoreError(f"{path}: online_store.{key} is {value!r}; accepted: {', '.join(accepted)}")
    return value
