"""The local Hub speaks to the real client, and refuses what the Hub refuses."""

from __future__ import annotations

import hashlib
import io
import json
import urllib.request
import warnings
from pathlib import Path
from urllib.error import HTTPError

import pytest
from hub_server import HubServer
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx2, by huggingface_hub 2.4

LARGE = bytes(range(256)) * 1000
ALICE = "alice/model"


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    api = HfApi(endpoint=hub.url)
    api.create_repo(ALICE)
    return api


def add(api: HfApi, files: dict[str, bytes], **more: object) -> str:
    operations = [CommitOperationAdd(name, io.BytesIO(content).read()) for name, content in files.items()]
    return api.create_commit(ALICE, operations, commit_message="add", **more).oid  # type: ignore[arg-type]


def test_what_is_committed_is_downloaded(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "model.safetensors": LARGE, "sparse/notes.txt": b"a\n", "plot.png": b"\x89PNG\0"}
    sha = add(api, files)
    folder = Path(snapshot_download(ALICE, local_dir=tmp_path / "copy"))
    assert {name: (folder / name).read_bytes() for name in files} == files
    info = api.model_info(ALICE, files_metadata=True)
    assert info.sha == sha
    assert [entry.title for entry in api.list_repo_commits(ALICE)] == ["add", "initial commit"]
    large = {sibling.rfilename: sibling.lfs for sibling in info.siblings or [] if sibling.lfs}
    assert {name: found.sha256 for name, found in large.items()} == {
        name: hashlib.sha256(files[name]).hexdigest() for name in ("model.safetensors", "plot.png")
    }
    metadata = get_hf_file_metadata(hf_hub_url(ALICE, "model.safetensors"), token="hf_alice")
    assert (metadata.size, metadata.commit_hash) == (len(LARGE), sha)
    assert hub.count("PUT /lfs/") == 2


def test_large_files_go_up_in_parts_and_only_once(hub: HubServer, api: HfApi) -> None:
    hub.part_size = 100_000
    add(api, {"model.safetensors": LARGE})
    assert hub.count("PUT /lfs/.*/parts/") == 3
    add(api, {"again.safetensors": LARGE})
    assert hub.count("PUT /lfs/") == 3
    assert hub.repos[ALICE].files("main")["again.safetensors"].lfs == hashlib.sha256(LARGE).hexdigest()
    assert not hub.parts


def test_listings(hub: HubServer, api: HfApi) -> None:
    add(api, {f"shards/{k:03}.txt": b"%d" % k for k in range(120)} | {"top.txt": b"x"})
    listed = {entry.path for entry in api.list_repo_tree(ALICE, recursive=True)}
    assert len(listed) == 123
    assert {entry.path for entry in api.list_repo_tree(ALICE)} == {".gitattributes", "shards", "top.txt"}
    assert hub.count("GET .*/tree/main.*cursor=") == 2
    assert [entry.path for entry in api.get_paths_info(ALICE, ["top.txt", "none"])] == ["top.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(ALICE, "nowhere"))
    assert api.file_exists(ALICE, "top.txt")
    assert not api.file_exists(ALICE, "nowhere.txt")


def test_branches_tags_pull_requests_deletions(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    first = add(api, {"a.txt": b"1"})
    api.create_tag(ALICE, tag="v1")
    api.create_branch(ALICE, branch="try", revision="main")
    add(api, {"a.txt": b"2"}, revision="try")
    pull = api.create_commit(
        ALICE, [CommitOperationAdd("b.txt", b"3")], commit_message="b", create_pr=True, token="hf_bob"
    )
    assert pull.pr_revision == "refs/pr/1"
    api.create_commit(ALICE, [CommitOperationDelete("a.txt")], commit_message="remove")
    assert set(hub.repos[ALICE].files("main")) == {".gitattributes"}

    def content(name: str, revision: str) -> bytes:
        return Path(hf_hub_download(ALICE, name, revision=revision)).read_bytes()

    assert [content("a.txt", revision) for revision in ("v1", first, "try")] == [b"1", b"1", b"2"]
    assert content("b.txt", "refs/pr/1") == b"3"
    refs = api.list_repo_refs(ALICE, include_pull_requests=True)
    assert {ref.name for ref in [*refs.branches, *refs.tags, *(refs.pull_requests or [])]} == {
        "main",
        "try",
        "v1",
        "1",
    }
    for revision in ("none", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download(ALICE, "a.txt", revision=revision)
        with pytest.raises(RevisionNotFoundError):
            add(api, {"a.txt": b"4"}, revision=revision)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(ALICE, branch="try")


def test_who_may_do_what(hub: HubServer, api: HfApi) -> None:
    api.create_repo("alice/hidden", private=True)
    api.create_repo(ALICE, exist_ok=True)
    assert api.whoami()["name"] == "alice"
    rows = [
        ("hf_wrong", lambda token: api.whoami(token), "Invalid user token"),
        ("hf_wrong", lambda token: api.create_repo("alice/b", token=token), "Invalid credentials"),
        (False, lambda token: api.create_repo("alice/b", token=token), "Invalid username or password"),
        ("hf_bob", lambda token: api.create_repo("alice/b", token=token), "403 Forbidden: You don't have the rights"),
        ("hf_alice_read", lambda token: api.create_repo("alice/b", token=token), "must use a write token"),
        ("hf_alice", lambda token: api.create_repo(ALICE, token=token), "409.*You already created this model repo"),
        ("hf_alice", lambda token: api.create_repo("alice/b!", token=token), "alphanumeric"),
        ("hf_bob", lambda token: add(api, {"a": b"1"}, token=token), "403 Forbidden"),
        ("hf_bob", lambda token: api.model_info("alice/hidden", token=token), "Repository Not Found"),
        (False, lambda token: api.model_info("alice/hidden", token=token), "Repository Not Found"),
        ("hf_alice", lambda token: api.model_info("alice/none", token=token), "Repository Not Found"),
    ]
    for token, ask, message in rows:
        with pytest.raises((HfHubHTTPError, ValueError), match=f"(?s){message}"):
            ask(token)
    assert api.model_info("alice/hidden").private
    assert set(hub.repos) == {ALICE, "alice/hidden"}
    assert len(hub.repos[ALICE].commits) == 1


def post(url: str, content: bytes, kind: str = "application/json", method: str = "POST") -> tuple[int, dict]:
    request = urllib.request.Request(url, content, {"Content-Type": kind}, method=method)
    if "/lfs/" not in url:
        request.add_header("Authorization", "Bearer hf_alice")
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read() or b"{}")
    except HTTPError as error:
        return error.code, json.loads(error.read())


def lines(*operations: dict) -> bytes:
    header = {"key": "header", "value": {"summary": "s", "description": ""}}
    return b"\n".join(json.dumps(line).encode() for line in (header, *operations))


def test_wrong_uploads_and_commits_are_refused(hub: HubServer, api: HfApi) -> None:
    oid, size = hashlib.sha256(LARGE).hexdigest(), len(LARGE)
    commit, kind = f"{hub.url}/api/models/{ALICE}/commit/main", "application/x-ndjson"
    file = {"key": "lfsFile", "value": {"path": "m.safetensors", "algo": "sha256", "oid": oid, "size": size}}
    before = dict(hub.repos[ALICE].branches)
    rows = [
        (post(commit, lines(file), kind), "does not exist"),
        (post(f"{hub.storage_url}/lfs/{oid}?size={size}&key=signed", LARGE[:-1], method="PUT"), "is not"),
        (post(f"{hub.storage_url}/lfs/{oid}?size={size}&key=x", LARGE, method="PUT"), "SignatureDoesNotMatch"),
        (post(commit, lines({"key": "file", "value": {"path": "../x", "content": "YQ=="}}), kind), "Invalid path"),
        (post(commit, lines({"key": "file", "value": {"path": "x", "content": "*"}}), kind), "not base64"),
        (post(commit, lines({"key": "file", "value": {"path": "x", "content": "AAAA"}}), kind), "binary"),
        (post(commit, lines({"key": "deletedFile", "value": {"path": "x"}}), kind), "doesn't exist"),
        (post(commit, lines(), kind), "Nothing to commit"),
        (post(commit, lines(file), "application/json"), "Content-Type"),
    ]
    for (status, answer), message in rows:
        assert 400 <= status < 500
        assert message in answer["error"]
    assert hub.repos[ALICE].branches == before
    assert not hub.objects


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("datasets: [/home/me/images]", r'"datasets\[0\]" with value "/home/me/images" is not valid'),
        ("base_model: ./backbone", '"base_model" with value "./backbone" is not valid'),
        ("base_model_relation: pruned", "base_model_relation"),
        ("tags: pruning", '"tags" must be an array'),
        ("model-index: [{name: m, results: [{task: {type: t}, dataset: {name: d}}]}]", '"dataset.type" is required'),
        ("tags: [", "Invalid YAML"),
    ],
)
def test_wrong_metadata_of_a_card_is_refused(hub: HubServer, api: HfApi, metadata: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add(api, {"README.md": f"---\n{metadata}\n---\n# m\n".encode()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        add(api, {"README.md": b"# m\n"})
    assert "empty or missing yaml metadata" in str(caught[0].message)
    add(api, {"README.md": b"---\ntags: [a]\nlibrary_name: timm\n---\n# m\n"})
    assert api.model_info(ALICE).tags == ["a", "timm"]
    assert ModelCard.load(ALICE).data.tags == ["a"]


def test_faults_of_upload(hub: HubServer, api: HfApi) -> None:
    """One fault the client gets over by itself; where it goes on, the client gives up and nothing has happened."""
    for fault in ({"cut_request": 1000}, {"status": 500}, {"status": 429}, {"lose_response": True}):
        hub.fail("PUT", "/lfs/", **fault)
        add(api, {f"{fault}.safetensors": LARGE + str(fault).encode()})
    head, stored = dict(hub.repos[ALICE].branches), len(hub.objects)
    hub.fail("PUT", "/lfs/", times=99, cut_request=1000)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'new.safetensors'"):
        add(api, {"new.safetensors": LARGE})
    assert (hub.repos[ALICE].branches, len(hub.objects)) == (head, stored)


def test_faults_of_download(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    add(api, {"model.safetensors": LARGE})

    def download(number: int = 0) -> bytes:
        return Path(hf_hub_download(ALICE, "model.safetensors", cache_dir=tmp_path / str(number))).read_bytes()

    hub.fail("GET", "/lfs/", cut_response=100_000)
    assert download(1) == LARGE, "the client asks for the rest"
    assert hub.count("GET /lfs/") == 2
    hub.fail("GET", "/lfs/", flip=7)
    assert download(2) != LARGE
    hub.fail("GET", "/lfs/", truncate=100)
    with pytest.raises(OSError, match="Consistency check failed"):
        download(3)
    hub.fail("HEAD", "/resolve/", times=99, status=500)
    with pytest.raises(LocalEntryNotFoundError):
        download(3)
    hub.faults.clear()
    assert download(3) == LARGE


def test_ranges(hub: HubServer, api: HfApi) -> None:
    add(api, {"model.safetensors": LARGE, "a.txt": b"abcdef"})
    request = urllib.request.Request(f"{hub.url}/{ALICE}/resolve/main/a.txt", headers={"Range": "bytes=2-3"})
    with urllib.request.urlopen(request) as answer:
        assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, b"cd", "bytes 2-3/6")
    request = urllib.request.Request(
        f"{hub.url}/{ALICE}/resolve/main/model.safetensors", headers={"Range": "bytes=-3"}
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.read() == LARGE[-3:]
    request = urllib.request.Request(f"{hub.url}/{ALICE}/resolve/main/a.txt", headers={"Range": "bytes=9-"})
    with pytest.raises(HTTPError, match="416"):
        urllib.request.urlopen(request)


def test_missing_things_have_the_error_of_their_kind(hub: HubServer, api: HfApi) -> None:
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(ALICE, "none.txt")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("alice/none", "none.txt")
    with pytest.raises(HfHubHTTPError, match=r"(?s)412.*A commit has happened since"):
        api.create_commit(ALICE, [CommitOperationAdd("a", b"1")], commit_message="x", parent_commit="0" * 40)
