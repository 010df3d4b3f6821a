"""The state behind `hub_server`: repositories as git sees them, objects of large files, users."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import yaml

GITATTRIBUTES = b"".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n".encode()
    for pattern in ("*.bin", "*.npz", "*.pickle", "*.pt", "*.pth", "*.safetensors", "*.tar", "*.zip", "*tfevents*")
)
REPO_NAME = re.compile(r"^(?![.-])(?!.*(--|\.\.))[\w.-]{1,96}(?<![.-])$")
HUB_ID = re.compile(r"^[\w][\w.-]*(/[\w][\w.-]*)?$")
SHA = re.compile(r"^[0-9a-f]{40}$")


class Refusal(Exception):
    """An answer that is not a success: status, message, and the code of the header X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Blob:
    """A file as git stores it; of a large file (`lfs`: its SHA-256) the content is a pointer."""

    content: bytes
    lfs: str | None = None
    lfs_size: int = 0

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def size(self) -> int:
        return self.lfs_size if self.lfs else len(self.content)

    @classmethod
    def pointer(cls, oid: str, size: int) -> Blob:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
        return cls(text.encode(), oid, size)

    def entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.lfs:
            entry["lfs"] = {"oid": self.lfs, "size": self.lfs_size, "pointerSize": len(self.content)}
        return entry


@dataclass(frozen=True)
class Commit:
    files: dict[str, Blob]
    title: str
    author: str
    parent: str | None
    description: str = ""

    @property
    def sha(self) -> str:
        tree = sorted((path, blob.oid) for path, blob in self.files.items())
        return hashlib.sha1(json.dumps([tree, self.title, self.description, self.parent]).encode()).hexdigest()


@dataclass
class User:
    """`orgs`: the other namespaces that the user may write to. `write`: what its token allows."""

    name: str
    write: bool = True
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass
class Repo:
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = Commit({".gitattributes": Blob(GITATTRIBUTES)}, "initial commit", self.namespace, None)
        self.commits[first.sha] = first
        self.branches["main"] = first.sha

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    def sha(self, revision: str) -> str:
        """The commit that a branch, tag, pull request or commit id stands for."""
        pull = re.fullmatch(r"refs/pr/(\d+)", revision)
        found = self.branches.get(revision) or self.tags.get(revision)
        if pull:
            found = self.pulls.get(int(pull[1]))
        if SHA.match(revision) and revision in self.commits:
            found = revision
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def files(self, revision: str) -> dict[str, Blob]:
        return self.commits[self.sha(revision)].files

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        found, sha = [], self.sha(revision)
        while sha:
            found.append(self.commits[sha])
            sha = found[-1].parent or ""
        return found

    def is_large(self, revision: str, path: str, size: int, sample: bytes) -> bool:
        """Whether the Hub wants this file as a large one: by .gitattributes, by its size, or because it is binary."""
        attributes = self.files(revision).get(".gitattributes", Blob(b"")).content.decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        by_name = any(fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)
        return size > 0 and (by_name or size > 10 * 2**20 or b"\0" in sample)

    def commit(
        self, revision: str, files: dict[str, Blob], title: str, description: str, author: str, pr: bool
    ) -> Any:
        """The new commit's id, and the pull request it opened, if any."""
        parent = self.sha(revision)
        pull = re.fullmatch(r"refs/pr/(\d+)", revision)
        if revision not in self.branches and not (pull and not pr):
            raise Refusal(400, f"Cannot commit to {revision}: not a branch", "RevisionNotFound" if pr else None)
        new = Commit(files, title, author, parent, description)
        self.commits[new.sha] = new
        if pr:
            number = 1 + max(self.pulls, default=0)
            self.pulls[number] = new.sha
            return new.sha, number
        if pull:
            self.pulls[int(pull[1])] = new.sha
        else:
            self.branches[revision] = new.sha
        return new.sha, None


def check_path(path: str) -> None:
    parts = path.split("/")
    if not path or path.startswith("/") or any(part in ("", ".", "..", ".git") for part in parts):
        raise Refusal(400, f"Invalid path: {path!r}")


def read_card(text: str) -> dict[str, Any]:
    """The metadata of a model card; Refusal 400 lists what the Hub would refuse in it."""
    match = re.match(r"^\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as error:
        raise Refusal(400, "Invalid YAML", errors=[{"message": f"Invalid YAML: {error}"}]) from error
    problems = list(_problems(data)) if isinstance(data, dict) else ["metadata is no mapping"]
    if problems:
        raise Refusal(400, problems[0], errors=[{"message": problem} for problem in problems])
    return data


def _problems(data: dict[str, Any]) -> Any:
    for key in ("library_name", "pipeline_tag", "license", "base_model_relation"):
        if not isinstance(data.get(key, ""), str):
            yield f'"{key}" must be a string'
    for key in ("tags", "datasets", "metrics"):
        if not isinstance(data.get(key, []), list) or not all(isinstance(item, str) for item in data.get(key, [])):
            yield f'"{key}" must be an array of strings'
    for k, dataset in enumerate(data.get("datasets", [])):
        if not HUB_ID.match(str(dataset)):
            yield f'"datasets[{k}]" with value "{dataset}" is not valid. Use a dataset id from https://hf.co/datasets.'
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not HUB_ID.match(str(base)):
            yield f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
    if data.get("base_model_relation", "finetune") not in ("finetune", "adapter", "quantized", "merge"):
        yield '"base_model_relation" must be one of [finetune, adapter, quantized, merge]'
    for model in data.get("model-index", []):
        if not model.get("name"):
            yield '"model-index[0].name" is required'
        for result in model.get("results", []):
            for key, needed in (("task", ("type",)), ("dataset", ("type", "name"))):
                yield from (f'"{key}.{name}" is required' for name in needed if not result.get(key, {}).get(name))
            for metric in result.get("metrics") or [{}]:
                yield from (f'"metrics.{name}" is required' for name in ("type", "value") if metric.get(name) is None)
