"""Models of the Hugging Face hub: which files a repository has, which are cached, fetching and removing them.

The hub's own cache is the store, so files are shared with llama.cpp, mlx-lm and transformers, and HF_HOME,
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean there. What is cached is used without a request.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from emlocal.errors import EmlocalError, ModelError
from emlocal.files import Progress, check_space, disk_errors
from emlocal.models.folder import weight_files
from emlocal.models.gguf import shard_paths

# Tried in this order when no quantization is asked for. Q4_K_M is also llama.cpp's default for -hf.
DEFAULT_QUANTS = (
    *("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL", "Q5_K_M", "Q5_K_S", "Q5_0", "Q6_K", "Q8_0"),
    *("MXFP4", "BF16", "F16", "F32"),
)
REQUEST_SECONDS = 15.0
STALE_SECONDS = 24 * 3600.0  # a part not written to for so long belongs to no running download

_QUANT = re.compile(
    r"(?<![A-Z0-9])(?:UD-)?(?:I?Q[1-8](?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32)(?![A-Z0-9])"
)


def quant_of(file: str) -> str:
    """The quantization in a file's name, in capitals ("Q4_K_M"); empty if there is none."""
    found = _QUANT.findall(file.upper())
    return found[-1].replace("FP16", "F16").replace("FP32", "F32") if found else ""


def models_among(files: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The models in a list of files: first file -> all its files (shards). Projectors do not count."""
    ggufs = {f for f in files if f.lower().endswith(".gguf") and f.isprintable()}
    names = {f for f in ggufs if not re.search(r"mmproj|imatrix", f.lower())}
    models = {}
    for name in sorted(names):
        shards = tuple(p.as_posix() for p in shard_paths(Path(name)))
        if shards[0] == name and names.issuperset(shards):
            models[name] = shards
    return models


def choose(repo: str, files: Iterable[str], wanted: str | None) -> tuple[str, ...]:
    """The files of one model: `wanted` is a quantization, a file's name, or None for the default.

    Raises ModelError that lists what there is when nothing or more than one thing fits.
    """
    models = models_among(files)
    if not models:
        torch = " (the torch engine can run it as it is: --backend torch)" if weight_files(files) else ""
        raise ModelError(
            f"{repo} has no GGUF model",
            hint=f"look for a repository whose name ends in -GGUF, or see: emlocal models list{torch}",
        )
    if wanted and wanted.lower().endswith(".gguf"):
        found = [shards for shards in models.values() if wanted in shards]
    elif wanted:
        asked = wanted.upper()
        plain = asked.removeprefix(
            "UD-"
        )  # Unsloth's dynamic quantizations, which may be asked for without it
        found = [shards for first, shards in models.items() if quant_of(first).removeprefix("UD-") == plain]
        found = [shards for shards in found if quant_of(shards[0]) == asked] or found
    else:
        found = _default_among(models)
    if len(found) == 1:
        return found[0]
    quants = [quant_of(first) for first in models]
    unique = all(quants) and len(set(quants)) == len(quants)
    what = f"{repo} has {'more than one' if found else 'no'} {wanted or 'model of a default quantization'}"
    raise ModelError(
        f"{what}; it has {', '.join(sorted(quants if unique else models))}",
        hint=f"name one of them: {repo}:{(quants if unique else list(models))[0]}",
    )


def _default_among(models: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    if len(models) == 1:
        return list(models.values())
    for quant in DEFAULT_QUANTS:
        found = [shards for first, shards in models.items() if quant_of(first) == quant]
        if found:
            return found
    return []


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def cached_repos() -> list[str]:
    """Repositories of models in the cache, whatever is in them."""
    folders = _cache().glob("models--*--*/")
    return sorted(f.name.removeprefix("models--").replace("--", "/") for f in folders)


def cached_files(repo: str) -> dict[str, Path]:
    """Files of the newest cached snapshot: name in the repository -> path. No request is made."""
    from huggingface_hub.file_download import repo_folder_name

    folder = _cache() / repo_folder_name(repo_id=repo, repo_type="model")
    reference = folder / "refs" / "main"
    if not reference.is_file():
        return {}
    snapshot = folder / "snapshots" / reference.read_text("ascii", "replace").strip()
    # is_file() is false for a link whose blob is gone
    return {p.relative_to(snapshot).as_posix(): p for p in snapshot.rglob("*") if p.is_file()}


def remote_files(repo: str) -> dict[str, int]:
    """Files of the repository on the hub with their sizes in bytes (0: not told). One request."""
    from huggingface_hub import HfApi

    with disk_errors(_cache(), "HF_HOME"), hub_errors(repo):  # a token is read from HF_HOME
        info = HfApi().model_info(repo, files_metadata=True, timeout=REQUEST_SECONDS)
    return {s.rfilename: s.size or 0 for s in info.siblings or []}


def download(repo: str, sizes: dict[str, int], progress: Progress) -> list[Path]:
    """Fetch files of a repository into the cache; `sizes` are in bytes. Raises ModelError in one line."""
    from huggingface_hub import hf_hub_download

    cache, cached = _cache(), cached_files(repo)
    label, total = f"fetching {repo}", sum(sizes.values())
    needed = sum(size for name, size in sizes.items() if name not in cached)
    paths, before = [], 0
    with disk_errors(cache, "HF_HOME"):
        _remove_stale_parts(cache, repo)
        check_space(cache, needed, repo)
        for name, size in sizes.items():
            bar = _bar_class(partial(_report_sum, progress, label, before, total))
            with hub_errors(repo):
                paths.append(Path(hf_hub_download(repo, name, tqdm_class=bar)))
            before += size
    return paths


def _remove_stale_parts(cache: Path, repo: str) -> None:
    """Delete what killed downloads left behind: huggingface_hub can neither use nor finds it again."""
    from huggingface_hub.file_download import repo_folder_name

    blobs = cache / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    for part in blobs.glob("*.incomplete"):
        if time.time() - part.stat().st_mtime > STALE_SECONDS:
            part.unlink(missing_ok=True)


def _report_sum(progress: Progress, label: str, before: int, total: int, done: int) -> None:
    """Progress over all files of a download, of which `before` bytes are in files already here."""
    progress(label, before + done, total or None)


def _bar_class(report: Callable[[int], None]) -> type:
    """What huggingface_hub takes for a progress bar: prints nothing, reports the bytes done."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]
            self.done = 0

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            report(self.done)

        def update_transfer(self, n: float) -> None:
            """Bytes on the wire. That this exists tells Xet downloads to use one bar, not two."""

    return Bar


def remove(repo: str) -> tuple[int, int]:
    """Delete all cached revisions of a repository; returns how many files and bytes are gone."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    cache = _cache()
    with disk_errors(cache, "HF_HOME"):
        try:
            info = scan_cache_dir(cache)
        except CacheNotFound:
            return 0, 0
        repos = [r for r in info.repos if r.repo_id == repo and r.repo_type == "model"]
        info.delete_revisions(*(rev.commit_hash for r in repos for rev in r.revisions)).execute()
    return sum(r.nb_files for r in repos), sum(r.size_on_disk for r in repos)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises about `repo` into one line each. Errors of the disk pass through."""
    from huggingface_hub import constants, errors

    # httpx in huggingface_hub 1, httpx2 in 2: the root of what a lost connection raises.
    transport_error: type[BaseException] = errors.HfHubHTTPError.__bases__[0]
    hub = constants.ENDPOINT.removeprefix("https://")
    offline_hint = "models on this machine work without a network: emlocal models list"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: its owner wants its licence accepted first",
            hint=f"accept it at {constants.ENDPOINT}/{repo}, then log in: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{hub} has no model {repo}, or it is private",
            hint="check the name (emlocal models list); for a private one log in: hf auth login",
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise ModelError(
            f"{repo} is not on this machine, and HF_HUB_OFFLINE is set", hint=offline_hint
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(f"cannot reach {hub} to fetch {repo}", hint=offline_hint) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(
            f"{repo} no longer has that file", hint=f"see what it has: {constants.ENDPOINT}/{repo}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise ModelError(
            f"{hub} answered {status} for {repo}",
            hint="log in: hf auth login" if status in (401, 403) else "try again later",
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"{repo} is not a name a model can have", hint="see: emlocal models list") from error
    except transport_error as error:
        why = str(error) or type(error).__name__
        raise ModelError(f"cannot reach {hub} for {repo}: {why}", hint=offline_hint) from error
    except OSError as error:
        if error.errno is not None:
            raise
        # huggingface_hub's own complaint that fewer bytes came than were announced
        raise ModelError(
            f"the download of {repo} was cut off", hint="try again; nothing half is kept"
        ) from error


def hub_rows(
    name: str, split: str, limit: int | None = None, config: str | None = None
) -> list[Mapping[str, Any]]:
    """The first rows of ORG/NAME's split.

    Raises EmlocalError where the package is missing, or the hub or the dataset cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError as why:
        raise EmlocalError(
            f"there is no file {name}, and datasets of the hub need the package datasets",
            "pip install datasets",
        ) from why
    try:
        rows: Iterable[Mapping[str, Any]] = load_dataset(name, config, split=split, streaming=True)
        return list(islice(rows, limit))
    except (OSError, ValueError, RuntimeError) as why:  # what the package raises for names and networks
        said = str(why).splitlines()[0][:200] if str(why) else type(why).__name__
        raise EmlocalError(f"the dataset {name}:{split} cannot be had: {said}") from why
