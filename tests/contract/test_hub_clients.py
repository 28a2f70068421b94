"""The clients the trainers use, against the Hub of the tests: what they upload, read back, retry and raise."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.utils._http
import pytest
import torch
from hub_server import OTHER_TOKEN, READ_TOKEN, UNKNOWN_TOKEN, WRITE_TOKEN, HubServer, connect, run_against
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    get_session,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


TEXT, BINARY = "bright\n" * 10, bytes(range(256)) * 2000


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path)
        yield server


@pytest.fixture
def api(hub):
    api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
    api.create_repo("user/repo")
    return api


@pytest.fixture
def waits(monkeypatch):
    """The seconds the client would have slept before its retries."""
    waits = []
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=waits.append))
    return waits


def upload(api, content, path="file.bin", **kwargs):
    return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="user/repo", **kwargs)


def download(api, folder, path="file.bin", **kwargs):
    return Path(api.hf_hub_download("user/repo", path, cache_dir=folder, **kwargs)).read_bytes()


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_files_come_back_as_they_were(hub, api, tmp_path, repo_type):
    api.create_repo("user/repo", repo_type=repo_type, exist_ok=True)
    large = {"deep/er/b.bin": BINARY, "unknown-ending": BINARY, "zeros": bytes(100)}
    contents = large | {"a.txt": TEXT.encode(), "c d+é.json": b"{}"}
    for path, content in contents.items():
        upload(api, content, path, repo_type=repo_type)
    for path, content in contents.items():
        assert download(api, tmp_path, path, repo_type=repo_type) == content
    assert len(hub.called("PUT", "^/lfs/")) == 2  # an object is known by its hash the second time
    info = api.repo_info("user/repo", repo_type=repo_type, files_metadata=True)
    assert {s.rfilename for s in info.siblings} == {*contents, ".gitattributes"}
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in large.items()}
    assert {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs} == hashes
    assert all(call.status < 300 for call in hub.calls if "repos/create" not in call.path)


def test_a_folder_and_a_snapshot_of_it(hub, api, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags:\n- ppo\nlibrary_name: transformers\n---\n# Model\n")
    (folder / "sub" / "weights.safetensors").write_bytes(BINARY)
    api.upload_folder(repo_id="user/repo", folder_path=folder)
    snapshot = Path(snapshot_download("user/repo", endpoint=hub.endpoint, cache_dir=tmp_path / "cache"))
    for file in ("README.md", "sub/weights.safetensors"):
        assert (snapshot / file).read_bytes() == (folder / file).read_bytes()
    info = api.model_info("user/repo")
    assert info.tags == ["ppo"] and info.library_name == info.card_data.library_name == "transformers"
    calls = len(hub.called("POST", "/commit/"))
    api.upload_folder(repo_id="user/repo", folder_path=folder)
    assert len(hub.called("POST", "/commit/")) == calls  # nothing has changed


def test_every_revision_stays_readable(hub, api, tmp_path):
    first = upload(api, b"one").oid
    api.create_tag("user/repo", tag="v1")
    api.create_branch("user/repo", branch="side")
    second = upload(api, b"two").oid
    upload(api, b"three", revision="side")
    assert len({first, second}) == 2 and len(first) == len(second) == 40
    contents = {first: b"one", "v1": b"one", second: b"two", "main": b"two", None: b"two", "side": b"three"}
    for revision, content in contents.items():
        assert download(api, tmp_path, revision=revision) == content
    assert [c.commit_id for c in api.list_repo_commits("user/repo")][:2] == [second, first]
    refs = api.list_repo_refs("user/repo")
    assert {b.name for b in refs.branches} == {"main", "side"} and refs.tags[0].target_commit == first
    with pytest.raises(RevisionNotFoundError):
        download(api, tmp_path, revision="v2")
    with pytest.raises(RemoteEntryNotFoundError):
        download(api, tmp_path, "missing.bin")
    with pytest.raises(HfHubHTTPError) as raised:
        upload(api, b"four", parent_commit=first)
    assert raised.value.response.status_code == 412
    assert hub.repos["model", "user/repo"].at().files["file.bin"].content == b"two"


def test_trees_paths_and_deletions(hub, api):
    for path in ("a/one.txt", "a/b/two.txt", "three.txt"):
        upload(api, TEXT.encode(), path)
    listed = [item.path for item in api.list_repo_tree("user/repo", "a")]
    assert listed == ["a/b", "a/one.txt"]
    listed = {i.path: i for i in api.list_repo_tree("user/repo", recursive=True, expand=True)}
    assert {*listed} == {".gitattributes", "a", "a/b", "a/b/two.txt", "a/one.txt", "three.txt"}
    assert listed["a/one.txt"].last_commit.title == "Upload a/one.txt with huggingface_hub"
    assert [i.path for i in api.get_paths_info("user/repo", ["a", "three.txt", "no"])] == ["a", "three.txt"]
    with HfFileSystem(endpoint=hub.endpoint).open("user/repo/three.txt", block_size=10) as file:
        file.seek(7)
        assert file.read(6) == b"bright"
    url, session = hf_hub_url("user/repo", "three.txt", endpoint=hub.endpoint), get_session()
    part = session.get(url, headers={"Range": "bytes=7-12"})
    assert part.status_code == 206 and part.content == b"bright" and part.headers["Content-Range"] == "bytes 7-12/70"
    assert session.get(url, headers={"Range": "bytes=70-"}).status_code == 416
    api.delete_folder("a/b", "user/repo")
    api.create_commit("user/repo", [CommitOperationDelete("a/one.txt")], commit_message="less")
    assert api.list_repo_files("user/repo") == [".gitattributes", "three.txt"]
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("a/one.txt", "user/repo")


def test_repositories_come_and_go(hub, api):
    with pytest.raises(HfHubHTTPError) as raised:
        api.create_repo("user/repo")
    assert raised.value.response.status_code == 409
    assert api.create_repo("user/repo", exist_ok=True).repo_id == "user/repo"
    assert api.create_repo("short", repo_type="dataset").repo_id == f"{api.whoami()['name']}/short"
    with pytest.raises(HfHubHTTPError) as raised:
        api.create_repo("other/repo")
    assert raised.value.response.status_code == 403
    with pytest.raises(ValueError, match="Invalid metadata"):
        upload(api, b"---\ntags: [\n---\n", "README.md")
    api.delete_repo("user/repo")
    assert not api.repo_exists("user/repo") and api.repo_exists("user/short", repo_type="dataset")


def test_a_private_repository_is_for_its_owner(hub, api, tmp_path):
    upload(api, BINARY)
    api.update_repo_settings("user/repo", private=True)
    assert api.model_info("user/repo").private
    for token, status in ((False, 401), (OTHER_TOKEN, 404)):
        reader = HfApi(endpoint=hub.endpoint, token=token)
        with pytest.raises(RepositoryNotFoundError) as raised:
            reader.model_info("user/repo")
        assert raised.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            download(reader, tmp_path)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        download(HfApi(endpoint=hub.endpoint, token=UNKNOWN_TOKEN), tmp_path)
    assert download(HfApi(endpoint=hub.endpoint, token=READ_TOKEN), tmp_path) == BINARY
    api.create_repo("user/secret", private=True)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.endpoint, token=False).model_info("user/secret")


def test_wrong_and_read_only_tokens(hub, api):
    upload(api, BINARY)
    for token, status in ((UNKNOWN_TOKEN, 401), (READ_TOKEN, 403), (OTHER_TOKEN, 403)):
        with pytest.raises(HfHubHTTPError) as raised:
            upload(HfApi(endpoint=hub.endpoint, token=token), b"other")
        assert raised.value.response.status_code == status and type(raised.value) is HfHubHTTPError
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(endpoint=hub.endpoint, token=UNKNOWN_TOKEN).whoami()
    # A repository that is there need not be created
    HfApi(endpoint=hub.endpoint, token=READ_TOKEN).create_repo("user/repo", exist_ok=True)
    assert not any(token in str(hub.calls) for token in (WRITE_TOKEN, READ_TOKEN, UNKNOWN_TOKEN))
    assert hub.called("POST", "/commit/")[0].authorized and not hub.called("PUT", "^/lfs/")[0].authorized


def test_what_is_retried(hub, api, waits, tmp_path):
    hub.fail("POST", "/preupload/", 429, headers={"Retry-After": "7"})
    hub.fail("PUT", "^/lfs/", 500, times=2)
    upload(api, BINARY)
    assert waits == [8.0, 1, 2] and download(api, tmp_path) == BINARY
    assert [call.status for call in hub.called("PUT", "^/lfs/")] == [500, 500, 200]
    waits.clear()
    hub.fail("PUT", "^/lfs/", 503, times=float("inf"))
    with pytest.raises(RuntimeError, match="Error while uploading 'file.bin'") as raised:
        upload(api, BINARY[1:])
    assert waits == [1, 2, 4, 8, 8] and raised.value.__cause__.response.status_code == 503


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_a_commit_is_not_retried(hub, api, waits, status):
    hub.fail("POST", "/commit/", status, headers={"Retry-After": "1"})
    with pytest.raises(HfHubHTTPError) as raised:
        upload(api, TEXT.encode(), "a.txt")
    assert raised.value.response.status_code == status and not waits
    assert "a.txt" not in api.list_repo_files("user/repo")
    upload(api, TEXT.encode(), "a.txt")
    assert "a.txt" in api.list_repo_files("user/repo")


@pytest.mark.parametrize("source", [bytes, Path])
def test_a_connection_lost_in_an_upload(hub, api, waits, tmp_path, source):
    """The Hub has seen a part of the file, and takes the whole of it when the client tries again."""
    hub.cut("PUT", "^/lfs/", times=2)
    content = BINARY * 10
    (tmp_path / "file.bin").write_bytes(content)
    upload(api, content if source is bytes else tmp_path / "file.bin")
    puts = hub.called("PUT", "^/lfs/")
    assert [call.status for call in puts] == [None, None, 200] and waits == [1, 2]
    assert all(0 < call.received < len(content) for call in puts[:2]) and puts[2].received == len(content)
    assert download(api, tmp_path / "cache") == content


def test_an_object_that_was_not_uploaded_as_announced_is_not_committed(hub, api):
    addition = CommitOperationAdd("file.bin", BINARY)
    api.preupload_lfs_files("user/repo", [addition], free_memory=False)
    hub.repos["model", "user/repo"].objects.clear()
    assert get_session().put(hub.endpoint + hub.called("PUT", "^/lfs/")[0].path, content=b"other").status_code == 400
    with pytest.raises(HfHubHTTPError, match="was not uploaded"):
        api.create_commit("user/repo", [addition], commit_message="add")


def test_a_dataset_and_a_model_in_a_fresh_process(hub, policy, tokenizer, rankings, tmp_path):
    """Pushed as a trainer's process does, offline but for this server, and loaded by one that has nothing else."""
    rankings.push_to_hub("user/rankings", split="train", private=True)
    rankings.select([1]).push_to_hub("user/rankings", split="test")
    policy.push_to_hub("user/policy")
    tokenizer.push_to_hub("user/policy")
    assert (tmp_path / "hub" / "models--user--policy").exists()  # not the user's cache
    files = hub.repos["model", "user/policy"].at().files
    assert files["model.safetensors"].is_lfs and not files["config.json"].is_lfs
    code = f"""
        import torch
        from datasets import load_dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        splits = load_dataset("user/rankings")
        model = AutoModelForCausalLM.from_pretrained("user/policy")
        ids = AutoTokenizer.from_pretrained("user/policy")("the film was", return_tensors="pt")["input_ids"]
        torch.save([splits["train"].to_dict(), splits["test"].to_dict(), splits["train"].features, ids,
                    model(ids).logits.detach()], "{tmp_path}/loaded.pt")
    """
    done = run_against(hub, code, tmp_path / "home", token=READ_TOKEN)
    assert done.returncode == 0, done.stderr[-3000:]
    train, test, features, ids, logits = torch.load(tmp_path / "loaded.pt", weights_only=False)
    assert train == rankings.to_dict() and test == rankings[1:2] and features == rankings.features
    assert ids.tolist() == [tokenizer("the film was")["input_ids"]]
    assert torch.equal(policy(ids).logits, logits)
    refused = run_against(
        hub, "from huggingface_hub import dataset_info; dataset_info('user/rankings')", tmp_path, None
    )
    assert refused.returncode == 1 and "RepositoryNotFoundError" in refused.stderr
