"""A Hugging Face Hub on this machine, for tests with the real huggingface_hub client.

    with HubServer() as hub:
        hub.users["hf_alice"] = User("alice")         # token -> user
        hub.fail("PUT", "/lfs/", cut_request=1000)    # the next upload breaks off after 1,000 bytes
        ...
        hub.repos["alice/model"].history()

It answers as the Hub does and refuses what the Hub refuses: a commit that names a large file nobody uploaded, an
upload that is not what its id says, invalid metadata in a model card, a token that may not write. Large files are
served from another port, as from the Hub's storage, which refuses requests that carry the Hub's token.

Clients find it by the environment variable HF_ENDPOINT, which huggingface_hub reads when it is imported. Set
HF_HUB_DISABLE_XET=1 too: this server speaks git-lfs, which the Hub does beside its newer Xet protocol.
`hub.environment(...)` has both for a process of its own; `hub.use_here(...)` makes this one a client.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_git import REPO_NAME, SHA, Blob, Refusal, Repo, User, check_path, read_card

PAGE = 50
"""Entries of a tree listing in one answer; the real Hub's are larger."""


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match, after `skip` that go well."""

    method: str
    path: re.Pattern[str]
    times: int
    skip: int
    status: int | None = None
    cut_request: int | None = None
    cut_response: int | None = None
    truncate: int | None = None
    flip: int | None = None
    lose_response: bool = False


class HubServer:
    """Use as a context manager. `url` is the endpoint; `requests` lists what was asked, as "METHOD path"."""

    def __init__(self, part_size: int = 8 * 2**20) -> None:
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size = part_size
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        self.secret = "signed"
        self.offers_xet = False  # it says that large files can be had by Xet, and then has no token for that

    def __enter__(self) -> HubServer:
        self.servers = []
        for handler in (Endpoint, Storage):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            self.servers.append(server)
        ports = [server.server_address[1] for server in self.servers]
        self.url, self.storage_url = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"  # two hosts
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment variables for a process that uses this Hub and keeps its downloads in `home`."""
        found = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        return found | {"NO_PROXY": "127.0.0.1,localhost", "HF_TOKEN": token or ""}

    def use_here(self, monkeypatch: Any, home: Path, token: str = "hf_alice") -> None:
        """Make this process a client, as if HF_ENDPOINT had been set before; its waits for a retry are cut short."""
        import huggingface_hub
        import transformers.utils.hub
        from huggingface_hub import constants

        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        huggingface_hub.close_session()

    def fail(self, method: str, path: str, *, times: int = 1, skip: int = 0, **what: Any) -> Fault:
        """Breaks the next `times` matching requests (`path`: a regular expression), after `skip` that are served.

        `status`: answered with that status. `cut_request`: after so many bytes of the request's body the
        connection is cut and nothing has happened. `cut_response`: the answer breaks off after so many bytes of its
        body. `truncate`: the answer is only so long and says so. `flip`: one bit of that byte of the answer is
        wrong. `lose_response`: done, but the connection is cut instead of an answer.
        """
        fault = Fault(method, re.compile(path), times, skip, **what)
        self.faults.append(fault)
        return fault

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path.search(path):
                    if fault.skip > 0:
                        fault.skip -= 1
                    elif fault.times > 0:
                        fault.times -= 1
                        return fault
        return None

    def count(self, pattern: str) -> int:
        """How many requests so far match this regular expression."""
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    """One request: a fault if one is due, else the first route that matches."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: HubServer
    routes: list[tuple[str, re.Pattern[str], Callable[..., None]]]

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(60)

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        with suppress(ConnectionError, TimeoutError):
            return super().handle_one_request()
        self.close_connection = True
        return None

    def do(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.fault = self.hub.next_fault(self.command, self.path)
        self.hub.requests.append(f"{self.command} {self.path}")
        try:
            self.body = self.read_body()
            if self.fault and self.fault.status:
                raise Refusal(self.fault.status, f"Injected {self.fault.status}")
            for method, pattern, handle in self.routes:
                match = pattern.fullmatch(url.path)
                if match and self.command in (method, "HEAD" if method == "GET" else method):
                    with self.hub.lock:
                        handle(self, **{key: unquote(value or "") for key, value in match.groupdict().items()})
                    return
            raise Refusal(404, f"Sorry, we can't find {self.command} {url.path}.")
        except Refusal as error:
            headers = {"X-Error-Message": error.message.splitlines()[0]}
            if error.code:
                headers["X-Error-Code"] = error.code
            if error.status == 429:
                headers["Retry-After"] = "0"
            self.answer({"error": error.message, **error.body}, status=error.status, headers=headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def read_body(self) -> bytes:
        cut = self.fault.cut_request if self.fault else None
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b"".join(self.chunks())
        else:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size if cut is None else min(cut, size))
            if cut is None and len(body) < size:
                raise ConnectionResetError("the client went away")
        if cut is not None:
            self.cut()
        return body

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def cut(self) -> None:
        """Close so that the client gets a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()
        raise ConnectionResetError("cut on purpose")

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError as error:
            raise Refusal(400, f"The body is no JSON: {error}") from error

    def answer(self, content: Any = None, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """JSON, or bytes as they are."""
        is_file = isinstance(content, bytes)
        data: bytes = content if is_file else json.dumps(content).encode()
        fault = self.fault
        if fault and fault.lose_response:
            self.cut()
        if fault and fault.flip is not None:
            data = data[: fault.flip] + bytes([data[fault.flip] ^ 1]) + data[fault.flip + 1 :]
        if fault and fault.truncate is not None:
            data = data[: fault.truncate]
        self.send_response(status)
        given = {"Content-Type": "application/octet-stream" if is_file else "application/json", **(headers or {})}
        for name, value in {"Content-Length": str(len(data)), **given}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.cut_response is not None:
            self.wfile.write(data[: fault.cut_response])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.wfile.write(data)

    def answer_file(self, data: bytes, headers: dict[str, str]) -> None:
        """A file, or the range of it that was asked for."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        headers = {"Accept-Ranges": "bytes", **headers}
        if not asked:
            return self.answer(data, headers=headers)
        start, end = asked[1], asked[2]
        first = int(start) if start else max(0, len(data) - int(end))
        last = min(int(end), len(data) - 1) if start and end else len(data) - 1
        if first > last:
            self.answer(
                {"error": "Range Not Satisfiable"}, status=416, headers={"Content-Range": f"bytes */{len(data)}"}
            )
            return None
        span = f"bytes {first}-{last}/{len(data)}"
        return self.answer(data[first : last + 1], status=206, headers={**headers, "Content-Range": span})


def route(table: list[Any], method: str, path: str) -> Callable[[Any], Any]:
    """In `path`, {repo} stands for a repository, {rev} for a quoted revision, {path} for the rest."""
    pattern = path.replace("{repo}", r"(?P<repo>[^/]+/[^/]+)").replace("{rev}", r"(?P<rev>[^/]+)")
    pattern = pattern.replace("{name}", r"(?P<name>[^/]+)").replace("{path}", r"(?P<path>.+)")

    def add(handle: Any) -> Any:
        table.append((method, re.compile(pattern), handle))
        return handle

    return add


HUB: list[Any] = []
STORAGE: list[Any] = []


class Endpoint(Handler):
    """huggingface.co: repositories, commits, and where files are."""

    routes = HUB

    def user(self) -> User | None:
        """Who asks. Refusal 401 for a token that is no one's."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def repo(self, name: str) -> Repo:
        """The repository, if the user may see it; a private one of others looks as if it were not there."""
        user, repo = self.user(), self.hub.repos.get(name)
        if repo is None or (repo.private and not (user and user.owns(repo.namespace))):
            if user is None:  # the client knows a 401 of https for a missing repository, but this is http
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def writer(self, namespace: str, what: str) -> User:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not user.owns(namespace):
            raise Refusal(403, f"You don't have the rights to {what} under the namespace {namespace!r}")
        if not user.write:
            raise Refusal(403, f"Forbidden: you must use a write token to {what}.")
        return user

    def writable(self, name: str, pr: bool = False) -> tuple[Repo, User]:
        repo, user = self.repo(name), self.user()
        if pr and user is not None and user.write:
            return repo, user
        return repo, self.writer(repo.namespace, "upload to a repository")

    def wants_pr(self) -> bool:
        return self.query.get("create_pr") == ["1"]

    @route(HUB, "GET", "/api/whoami-v2")
    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if user.write else "read"
        orgs = [{"name": name, "type": "org"} for name in user.orgs]
        self.answer({"type": "user", "name": user.name, "orgs": orgs, "auth": {"accessToken": {"role": role}}})

    @route(HUB, "POST", "/api/repos/create")
    def create(self) -> None:
        asked, user = self.json(), self.user()
        namespace = asked.get("organization") or (user.name if user else "")
        if asked.get("type", "model") != "model":
            raise Refusal(400, "this server has models only")
        self.writer(namespace, "create a model")
        if not REPO_NAME.match(asked["name"]):
            raise Refusal(400, f"Invalid repo name: {asked['name']}")
        name = f"{namespace}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            raise Refusal(409, "You already created this model repo", url=url)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repos[name] = Repo(name, private)
        self.answer({"url": url, "name": name, "id": f"{len(self.hub.repos):024x}"})

    @route(HUB, "DELETE", "/api/repos/delete")
    def delete(self) -> None:
        asked = self.json()
        repo, _ = self.writable(f"{asked['organization']}/{asked['name']}")
        del self.hub.repos[repo.id]
        self.answer({})

    @route(HUB, "POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        metadata = read_card(self.json()["content"])
        empty = {"message": "empty or missing yaml metadata in repo card"}
        self.answer({"errors": [], "warnings": [] if metadata else [empty]})

    @route(HUB, "GET", "/api/models/{repo}/auth-check(/write)?")
    def auth_check(self, repo: str) -> None:
        if self.path.endswith("/write"):
            self.writable(repo)
        self.repo(repo)
        self.answer({})

    @route(HUB, "POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self, repo: str, rev: str) -> None:
        found, _ = self.writable(repo, self.wants_pr())
        known = found.files(rev)
        files = []
        for file in self.json()["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            check_path(path)
            if len(sample) > 512 or len(sample) > file["size"]:
                raise Refusal(400, f"The sample of {path} is too long")
            mode = "lfs" if found.is_large(rev, path, file["size"], sample) else "regular"
            entry = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            if path in known:
                entry["oid"] = known[path].lfs or known[path].oid
            files.append(entry)
        self.answer({"files": files})

    @route(HUB, "POST", "/{repo}.git/info/lfs/objects/batch")
    def lfs_batch(self, repo: str) -> None:
        asked = self.json()
        self.writable(repo, pr="ref" not in asked)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256":
            raise Refusal(400, "only uploads by sha256")
        multipart = "multipart" in asked["transfers"]
        self.answer({"transfer": "basic", "objects": [self.lfs_object(o, repo, multipart) for o in asked["objects"]]})

    def lfs_object(self, asked: dict[str, Any], repo: str, multipart: bool) -> dict[str, Any]:
        oid, size = asked["oid"], asked["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
        if not re.fullmatch(r"[0-9a-f]{64}", oid) or size < 1:
            return answer | {"error": {"code": 422, "message": f"no object id or size: {oid}, {size}"}}
        if len(self.hub.objects.get(oid, b"")) == size:
            return answer
        put = f"{self.hub.storage_url}/lfs/{oid}"
        upload = {"href": f"{put}?size={size}&key={self.hub.secret}", "header": {}}
        if multipart and size > self.hub.part_size:
            count = -(-size // self.hub.part_size)
            parts = {str(k): f"{put}/parts/{k}?key={self.hub.secret}" for k in range(1, count + 1)}
            upload = {
                "href": f"{self.hub.url}/{repo}/lfs-complete?size={size}",
                "header": {"chunk_size": str(self.hub.part_size), **parts},
            }
        verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify", "header": {}}
        return answer | {"actions": {"upload": upload, "verify": verify}}

    @route(HUB, "POST", "/{repo}/lfs-complete")
    def lfs_complete(self, repo: str) -> None:
        asked, stored = self.json(), self.hub.parts
        oid, parts = asked["oid"], asked["parts"]
        if [part["partNumber"] for part in parts] != list(range(1, len(parts) + 1)):
            raise Refusal(400, "parts are missing or out of order")
        for part in parts:
            content = stored.get((oid, part["partNumber"]), b"")
            if part["etag"].strip('"') != hashlib.md5(content).hexdigest():
                raise Refusal(400, f"InvalidPart: {part['partNumber']}")
        content = b"".join(stored.pop((oid, part["partNumber"])) for part in parts)
        store(self.hub, oid, content, int(self.query["size"][0]))
        self.answer({})

    @route(HUB, "POST", "/{repo}.git/info/lfs/objects/verify")
    def lfs_verify(self, repo: str) -> None:
        self.repo(repo)
        asked = self.json()
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, f"Object {asked['oid']} does not exist")
        self.answer({})

    @route(HUB, "POST", "/api/models/{repo}/commit/{rev}")
    def commit(self, repo: str, rev: str) -> None:
        if self.headers.get("Content-Type") != "application/x-ndjson":
            raise Refusal(400, "Expected Content-Type application/x-ndjson")
        pr = self.wants_pr()
        found, user = self.writable(repo, pr)
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if header["key"] != "header" or not header["value"].get("summary"):
            raise Refusal(400, "The first line must be the header, with a summary")
        parent = header["value"].get("parentCommit")
        if parent and not found.sha(rev).startswith(parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(found.files(rev))
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        if not operations or files == found.files(rev):
            raise Refusal(400, "Nothing to commit")
        title, description = header["value"]["summary"], header["value"].get("description", "")
        sha, number = found.commit(rev, files, title, description, user.name, pr)
        done = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"}
        if number:
            done["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        self.answer(done)

    def apply(self, key: str, value: dict[str, Any], files: dict[str, Blob]) -> None:
        path = value["path"]
        check_path(path.rstrip("/"))
        if key == "file":
            try:
                content = base64.b64decode(value["content"], validate=True)
            except binascii.Error as error:
                raise Refusal(400, f"{path} is not base64") from error
            if b"\0" in content or len(content) > 10 * 2**20:
                raise Refusal(400, f"{path} is binary or larger than 10 MiB. Please use git-lfs or xet.")
            if path == "README.md":
                read_card(content.decode())
            files[path] = Blob(content)
        elif key == "lfsFile":
            content = self.hub.objects.get(value["oid"])
            if content is None or len(content) != value.get("size", len(content)):
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = Blob.pointer(value["oid"], len(content))
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
            for name in inside:
                del files[name]
        else:
            raise Refusal(400, f"Unknown operation {key}")

    @route(HUB, "GET", "/api/models/{repo}")
    def model(self, repo: str) -> None:
        self.revision(repo, "main")

    @route(HUB, "GET", "/api/models/{repo}/revision/{rev}")
    def revision(self, repo: str, rev: str) -> None:
        found = self.repo(repo)
        files = found.files(rev)
        card = read_card(files["README.md"].content.decode()) if "README.md" in files else {}
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
        if self.query.get("blobs"):
            for sibling in siblings:
                entry = files[sibling["rfilename"]].entry(sibling["rfilename"])
                lfs = {"sha256": entry["lfs"].pop("oid"), **entry["lfs"]} if "lfs" in entry else None
                sibling |= {"size": entry["size"], "blobId": entry["oid"], **({"lfs": lfs} if lfs else {})}
        tags = list(dict.fromkeys([*card.get("tags", []), *filter(None, [card.get("library_name")])]))
        known = {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card}
        self.answer(
            {"_id": "0", "id": repo, "modelId": repo, "author": found.namespace, "sha": found.sha(rev), "tags": tags}
            | {"private": found.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
            | {"siblings": siblings, "cardData": card, **known}
        )

    @route(HUB, "GET", "/api/models/{repo}/tree/{rev}(/{path})?")
    def tree(self, repo: str, rev: str, path: str) -> None:
        files = self.repo(repo).files(rev)
        prefix = f"{path}/" if path else ""
        inside = {name: blob for name, blob in files.items() if name.startswith(prefix)}
        if path and not inside:
            raise Refusal(404, f"{path} does not exist on {rev!r}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for name, blob in sorted(inside.items()):
            parts = name.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entries[name] = blob.entry(name)
        start = int(self.query.get("cursor", ["0"])[0])
        page, headers = list(entries.values())[start : start + PAGE], {}
        if start + PAGE < len(entries):
            query = f"recursive={str(recursive).lower()}&cursor={start + PAGE}"
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{query}>; rel="next"'
        self.answer(page, headers=headers)

    @route(HUB, "POST", "/api/models/{repo}/paths-info/{rev}")
    def paths_info(self, repo: str, rev: str) -> None:
        files = self.repo(repo).files(rev)
        paths = parse_qs(self.body.decode())["paths"]
        self.answer([files[path].entry(path) for path in paths if path in files])

    @route(HUB, "GET", "/api/models/{repo}/refs")
    def refs(self, repo: str) -> None:
        found = self.repo(repo)

        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        answer = {"branches": listed("heads", found.branches), "tags": listed("tags", found.tags), "converts": []}
        pulls = [
            {"name": str(n), "ref": f"refs/pr/{n}", "targetCommit": sha} for n, sha in sorted(found.pulls.items())
        ]
        self.answer(answer | ({"pullRequests": pulls} if self.query.get("include_prs") else {}))

    @route(HUB, "GET", "/api/models/{repo}/commits/{rev}")
    def commits(self, repo: str, rev: str) -> None:
        self.answer(
            [
                {"id": commit.sha, "title": commit.title, "message": commit.description}
                | {"date": "2026-01-01T00:00:00.000Z", "authors": [{"user": commit.author}]}
                for commit in self.repo(repo).history(rev)
            ]
        )

    @route(HUB, "POST", "/api/models/{repo}/branch/{name}")
    def branch(self, repo: str, name: str) -> None:
        found, _ = self.writable(repo)
        if SHA.match(name) or name.startswith("refs/"):
            raise Refusal(400, f"Invalid branch name {name}")
        if name in found.branches or name in found.tags:
            raise Refusal(409, f"Reference already exists: {name}")
        found.branches[name] = found.sha(self.json().get("startingPoint", "main") if self.body else "main")
        self.answer({})

    @route(HUB, "POST", "/api/models/{repo}/tag/{rev}")
    def tag(self, repo: str, rev: str) -> None:
        found, _ = self.writable(repo)
        name = self.json()["tag"]
        if name in found.branches or name in found.tags:
            raise Refusal(409, f"Tag {name} already exists")
        found.tags[name] = found.sha(rev)
        self.answer({})

    @route(HUB, "GET", "/{repo}/resolve/{rev}/{path}")
    def resolve(self, repo: str, rev: str, path: str) -> None:
        found = self.repo(repo)
        sha = found.sha(rev)
        blob = found.commits[sha].files.get(path)
        headers = {"X-Repo-Commit": sha}
        if blob is None:
            self.answer(
                {"error": "Entry not found"},
                status=404,
                headers=headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"},
            )
        elif blob.lfs is None:
            self.answer_file(blob.content, headers | {"ETag": f'"{blob.oid}"'})
        else:
            headers |= {"X-Linked-Size": str(blob.lfs_size), "X-Linked-Etag": f'"{blob.lfs}"'}
            if self.hub.offers_xet:
                headers |= {"X-Xet-Hash": blob.lfs, "X-Xet-Refresh-Route": f"{self.hub.url}/api/xet-read-token"}
            location = f"{self.hub.storage_url}/lfs/{blob.lfs}?key={self.hub.secret}&filename={quote(path, safe='')}"
            self.answer({}, status=302, headers=headers | {"Location": location})


class Storage(Handler):
    """The Hub's storage of large files, on another host: it knows signed addresses, and no tokens."""

    routes = STORAGE

    def check(self) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, "Only one auth mechanism allowed")
        if self.query.get("key") != [self.hub.secret]:
            raise Refusal(403, "SignatureDoesNotMatch")

    @route(STORAGE, "PUT", "/lfs/{name}")
    def put(self, name: str) -> None:
        self.check()
        store(self.hub, name, self.body, int(self.query["size"][0]))
        self.answer(b"", headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    @route(STORAGE, "PUT", "/lfs/{name}/parts/{path}")
    def put_part(self, name: str, path: str) -> None:
        self.check()
        if len(self.body) > self.hub.part_size:
            raise Refusal(400, "EntityTooLarge")
        self.hub.parts[name, int(path)] = self.body
        self.answer(b"", headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    @route(STORAGE, "GET", "/lfs/{name}")
    def get(self, name: str) -> None:
        self.check()
        self.answer_file(self.hub.objects[name], {"ETag": f'"{name}"'})


def store(hub: HubServer, oid: str, content: bytes, size: int) -> None:
    if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
        raise Refusal(400, f"The upload is not {oid} of {size} bytes")
    hub.objects[oid] = content
