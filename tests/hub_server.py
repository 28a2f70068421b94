"""
A server for tests that speaks the part of the Hugging Face Hub's protocol that `huggingface_hub` and `datasets` use:
model and dataset repositories, commits, large files over LFS, downloads, tokens, and faults on demand.

What is not served, among it pull requests, `.gitignore`, gated repositories and Xet, is answered with 404 or 501.
"""

import codecs
import contextlib
import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import textwrap
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


WRITE_TOKEN, READ_TOKEN, OTHER_TOKEN, UNKNOWN_TOKEN = "hf_good", "hf_good_read", "hf_good_other", "hf_unknown"
LARGE_ENDINGS = (".bin", ".parquet", ".pt", ".pth", ".safetensors")
LARGE_FILE = 10 * 2**20  # bytes from which even a text file goes through LFS
REPO = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
API = rf"/api/(?P<repo_type>models|datasets)/{REPO}"
PAGES = rf"/(?P<repo_type>datasets/)?{REPO}"
REVISION, PATH = r"(?P<revision>[^/]+)", r"(?P<path>.+)"
ROUTES = []


class HubError(Exception):
    """An error answer; `code` is what the client picks its exception by, and the message comes as a header too."""

    def __init__(self, status, message, code=None, **headers):
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message}, status, headers)


class Answer:
    def __init__(self, body=b"", status=200, headers=None):
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status, self.headers = status, dict(headers or {})
        if not isinstance(body, bytes):
            self.headers["Content-Type"] = "application/json"


@dataclass
class Call:
    """A request as the log keeps it: `received` bytes of body, and a `status` of None while it is served or if cut."""

    method: str
    path: str
    authorized: bool
    received: int = 0
    status: int | None = None


@dataclass
class Request:
    """A request as the endpoints take it."""

    user: str | None
    may_write: bool
    query: dict
    headers: dict
    body: bytes

    def json(self):
        return json.loads(self.body)

    def repo_key(self):
        """The repository that creation and deletion name in their body."""
        payload = self.json()
        owner = payload.get("organization") or self.user
        return payload.get("type") or "model", f"{owner}/{payload['name']}"


@dataclass
class Fault:
    method: str
    path: str
    times: float
    answer: Answer | None  # None cuts the connection


@dataclass
class File:
    content: bytes
    is_lfs: bool
    commit: str  # that last wrote it

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self):
        return f"oid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def blob_id(self):
        """Git's hash of what git stores, which for a large file is the pointer."""
        stored = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass
class Commit:
    sha: str
    title: str
    message: str
    parent: str | None
    files: dict[str, File]
    date: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}Z")

    def card_data(self):
        return card_data(self.files["README.md"].content.decode()) if "README.md" in self.files else {}


class Repo:
    """As on the Hub, a new repository has one commit, with the patterns of the files that go through LFS."""

    def __init__(self, repo_type, repo_id, private):
        self.repo_type, self.repo_id, self.private = repo_type, repo_id, private
        self.commits, self.branches, self.tags, self.objects = {}, {}, {}, {}
        sha = secrets.token_hex(20)
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LARGE_ENDINGS)
        files = {".gitattributes": File(attributes.encode(), False, sha)}
        self.add("main", Commit(sha, "initial commit", "", None, files))

    @property
    def owner(self):
        return self.repo_id.partition("/")[0]

    @property
    def page(self):
        return f"{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo_id}"

    def add(self, branch, commit):
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha

    def at(self, revision="main"):
        """The commit of a branch, a tag or a sha."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def history(self, revision="main"):
        """The commits from that of `revision` back to the first."""
        commit = self.at(revision)
        while commit:
            yield commit
            commit = self.commits.get(commit.parent)

    def is_large(self, path, size, sample):
        """By name, size or content, as the Hub decides for LFS from the first 512 bytes."""
        if size >= LARGE_FILE or path.endswith(LARGE_ENDINGS):
            return True
        try:
            codecs.getincrementaldecoder("utf-8")().decode(sample)
        except UnicodeDecodeError:
            return True
        return b"\0" in sample

    def describe(self, path, commit, expand=False):
        """A file or folder as listings show it."""
        file = commit.files.get(path)
        if file is None:
            names = sorted(name for name in commit.files if name.startswith(f"{path}/"))
            oids = "".join(commit.files[name].blob_id for name in names)
            return {"type": "directory", "oid": hashlib.sha1(oids.encode()).hexdigest(), "size": 0, "path": path}
        item = {"type": "file", "oid": file.blob_id, "size": len(file.content), "path": path}
        if file.is_lfs:
            item["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
        if expand:
            last = self.commits[file.commit]
            item["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
        return item


def card_data(readme):
    match = re.match(r"---\s*\n(.*?)\n---", readme, re.DOTALL)
    return yaml.safe_load(match[1]) or {} if match else {}


def folders(path):
    """The folders a path lies in."""
    parts = path.split("/")[:-1]
    return {"/".join(parts[: k + 1]) for k in range(len(parts))}


def is_true(query, name):
    return query.get(name, ["false"])[0].lower() in ("true", "1")


def route(method, path, write=False):
    """An endpoint, which takes the repository of its path if there is one, readable or, by `write`, writable."""

    def register(endpoint):
        ROUTES.append((method, re.compile(path), endpoint, write))
        return endpoint

    return register


class HubServer:
    """
    Context manager; `endpoint` is its address. Repositories live in memory: `repos["model", "user/name"]`.

    [`WRITE_TOKEN`] and [`READ_TOKEN`] belong to "user", [`OTHER_TOKEN`] to "other".
    """

    def __init__(self):
        self.tokens = {WRITE_TOKEN: ("user", True), READ_TOKEN: ("user", False), OTHER_TOKEN: ("other", True)}
        self.repos, self.calls, self.faults, self.uploads = {}, [], [], {}
        self.lock = threading.RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.http.server_close()

    def fail(self, method, path, status, times=1, headers=None, words="fault on demand"):
        """
        The next `times` requests whose path `path` (a regular expression) is found in fail with `status`, and with
        `words`: a text, or a list of texts as the check of metadata gives them.
        """
        body = {"error": words} if isinstance(words, str) else {"errors": [{"message": text} for text in words]}
        self.faults.append(Fault(method, path, times, Answer(body, status, headers)))

    def cut(self, method, path, times=1):
        """The next `times` such requests lose their connection in the middle of their body."""
        self.faults.append(Fault(method, path, times, None))

    def called(self, method, path):
        """The requests so far of this method and path (a regular expression)."""
        return [call for call in self.calls if call.method == method and re.search(path, call.path)]

    def take_fault(self, method, path):
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def serve(self, method, path, query, headers, body):
        user, may_write = None, False
        if authorization := headers.get("Authorization"):
            token = authorization.removeprefix("Bearer ")
            if token not in self.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            user, may_write = self.tokens[token]
        request = Request(user, may_write, query, headers, body)
        for served, pattern, endpoint, write in ROUTES:
            if served == ("GET" if method == "HEAD" else method) and (match := pattern.fullmatch(path)):
                parts = {name: part and unquote(part) for name, part in match.groupdict().items()}
                if "repo_id" in parts:
                    repo_type = (parts.pop("repo_type") or "models").strip("/")[:-1]
                    parts["repo"] = self.find(request, repo_type, parts.pop("repo_id"), write)
                answer = endpoint(self, request, **parts)
                return answer if isinstance(answer, Answer) else Answer(answer)
        raise HubError(404, f"Not served: {method} {path}")

    def authorize(self, request, owner):
        if request.user is None:
            # The client takes any 401 of a repository for a missing one, but knows its address only under https
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if not request.may_write:
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if request.user != owner:
            raise HubError(403, f'You don\'t have the rights to write under the namespace "{owner}"')

    def find(self, request, repo_type, repo_id, write=False):
        """A repository that the request may read, or write to; a private one of another user does not exist."""
        repo = self.repos.get((repo_type, repo_id))
        if repo is None or repo.private and request.user != repo.owner:
            if request.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            self.authorize(request, repo.owner)
        return repo

    @route("GET", "/api/whoami-v2")
    def whoami(self, request):
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        role = "write" if request.may_write else "read"
        return {"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": {"role": role}}}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        try:
            card_data(request.json()["content"])
        except yaml.YAMLError as error:
            return Answer({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return {"errors": [], "warnings": []}

    @route("POST", "/api/repos/create")
    def create(self, request):
        payload, key = request.json(), request.repo_key()
        self.authorize(request, key[1].partition("/")[0])
        known = key in self.repos
        repo = self.repos.setdefault(key, Repo(*key, payload.get("visibility") == "private"))
        answer = {"url": f"{self.endpoint}/{repo.page}", "name": repo.repo_id}
        return Answer(answer | {"error": "You already created this repo"}, 409) if known else answer

    @route("DELETE", "/api/repos/delete")
    def delete(self, request):
        repo = self.find(request, *request.repo_key(), write=True)
        del self.repos[repo.repo_type, repo.repo_id]
        return {}

    @route("PUT", rf"{API}/settings", write=True)
    def settings(self, request, repo):
        repo.private = request.json()["visibility"] == "private"
        return {"private": repo.private}

    @route("GET", rf"{API}(?:/revision/{REVISION})?")
    def info(self, request, repo, revision):
        commit = repo.at(revision or "main")
        card = commit.card_data()
        shown = {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        shown |= {"id": repo.repo_id, "author": repo.owner, "sha": commit.sha, "private": repo.private}
        shown |= {"gated": False, "disabled": False, "tags": card.get("tags") or [], "cardData": card}
        shown |= {"createdAt": [*repo.history()][-1].date, "lastModified": commit.date}
        shown["siblings"] = [{"rfilename": path} for path in sorted(commit.files)]
        if is_true(request.query, "blobs"):
            for sibling in shown["siblings"]:
                item = repo.describe(sibling["rfilename"], commit)
                sibling |= {"size": item["size"], "blobId": item["oid"]}
                if "lfs" in item:
                    sibling["lfs"] = item["lfs"] | {"sha256": item["lfs"]["oid"]}
        return shown

    @route("GET", rf"{API}/tree/{REVISION}(?:/{PATH})?")
    def tree(self, request, repo, revision, path):
        commit, prefix = repo.at(revision), f"{path}/" if path else ""
        files = [name for name in commit.files if name.startswith(prefix)]
        if not files and path:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        entries = {*files, *(folder for name in files for folder in folders(name) if folder.startswith(prefix))}
        if not is_true(request.query, "recursive"):
            entries = {entry for entry in entries if "/" not in entry[len(prefix) :]}
        return [repo.describe(entry, commit, is_true(request.query, "expand")) for entry in sorted(entries)]

    @route("POST", rf"{API}/paths-info/{REVISION}")
    def paths_info(self, request, repo, revision):
        commit, form = repo.at(revision), parse_qs(request.body.decode())
        existing = {*commit.files, *(folder for name in commit.files for folder in folders(name))}
        paths = [path for path in form.get("paths", []) if path in existing]
        return [repo.describe(path, commit, is_true(form, "expand")) for path in paths]

    @route("GET", rf"{API}/refs")
    def refs(self, request, repo):
        shown = {"converts": [], "pullRequests": []}
        for kind, folder, refs in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags)):
            shown[kind] = [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": sha} for n, sha in refs.items()]
        return shown

    @route("GET", rf"{API}/commits/{REVISION}")
    def list_commits(self, request, repo, revision):
        shared = {"authors": [{"user": repo.owner}]}
        history = repo.history(revision)
        return [shared | {"id": c.sha, "title": c.title, "message": c.message, "date": c.date} for c in history]

    @route("POST", rf"{API}/branch/{REVISION}", write=True)
    def create_branch(self, request, repo, revision):
        return self.create_ref(repo, repo.branches, revision, request.json().get("startingPoint", "main"))

    @route("POST", rf"{API}/tag/{REVISION}", write=True)
    def create_tag(self, request, repo, revision):
        return self.create_ref(repo, repo.tags, request.json()["tag"], revision)

    def create_ref(self, repo, refs, name, revision):
        if name in refs:
            raise HubError(409, f"Reference already exists: {name}")
        refs[name] = repo.at(revision).sha
        return {}

    @route("POST", rf"{API}/preupload/{REVISION}", write=True)
    def preupload(self, request, repo, revision):
        commit, answer = repo.at(revision), []
        for item in request.json()["files"]:
            mode = "lfs" if repo.is_large(item["path"], item["size"], b64decode(item["sample"])) else "regular"
            answer.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False})
            if item["path"] in commit.files:
                answer[-1]["oid"] = commit.files[item["path"]].etag
        return {"files": answer}

    @route("POST", rf"{PAGES}\.git/info/lfs/objects/batch", write=True)
    def lfs_batch(self, request, repo):
        objects = []
        for item in request.json()["objects"]:
            if item["oid"] not in repo.objects:
                signature = secrets.token_hex(8)  # the upload itself comes without a token
                self.uploads[signature] = (repo, item["oid"])
                hrefs = {"upload": f"/lfs/{signature}", "verify": f"/{repo.page}.git/info/lfs/objects/verify"}
                item["actions"] = {name: {"href": f"{self.endpoint}{path}"} for name, path in hrefs.items()}
            objects.append(item)
        return {"transfer": "basic", "objects": objects}

    @route("PUT", r"/lfs/(?P<signature>\w+)")
    def lfs_upload(self, request, signature):
        repo, oid = self.uploads[signature]
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced hash")
        repo.objects[oid] = request.body
        return Answer()

    @route("POST", rf"{PAGES}\.git/info/lfs/objects/verify", write=True)
    def lfs_verify(self, request, repo):
        item = request.json()
        if len(repo.objects.get(item["oid"], b"")) != item["size"]:
            raise HubError(404, "No object of this hash and size was uploaded")
        return Answer()

    @route("POST", rf"{API}/commit/{REVISION}", write=True)
    def commit(self, request, repo, revision):
        if "create_pr" in request.query:
            raise HubError(501, "Pull requests are not served")
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        header, head, sha = header["value"], repo.at(revision), secrets.token_hex(20)
        if header.get("parentCommit", head.sha) != head.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"].rstrip("/")
            if key == "file":
                files[path] = File(b64decode(value["content"]), False, sha)
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise HubError(400, f"The object that {path} points to was not uploaded")
                files[path] = File(repo.objects[value["oid"]], True, sha)
            elif key in ("deletedFile", "deletedFolder"):
                gone = [name for name in files if name == path or name.startswith(f"{path}/")]
                if not gone or key == "deletedFile" and gone != [path]:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                for name in gone:
                    del files[name]
            else:
                raise HubError(501, f"Not served: {key}")
        repo.add(revision, Commit(sha, header["summary"], header["description"], head.sha, files))
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{repo.page}/commit/{sha}"}

    @route("GET", rf"{PAGES}/resolve/{REVISION}/{PATH}")
    def resolve(self, request, repo, revision, path):
        commit = repo.at(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        file, status = commit.files[path], 200
        content, size = file.content, len(file.content)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(size)}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or size), size - 1)
            if start > end:
                raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
            content, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return Answer(content, status, headers)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body go out apart

    def body(self):
        """The body in pieces, of which a cut takes only the first."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline() or b"0", 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length", 0))
            yield self.rfile.read(length // 2)
            yield self.rfile.read(length - length // 2)

    def handle_request(self):
        url = urlsplit(self.path)
        call = Call(self.command, url.path, "Authorization" in self.headers)
        with self.hub.lock:
            self.hub.calls.append(call)
            fault = self.hub.take_fault(call.method, call.path)
        pieces = self.body()
        if fault and fault.answer is None:
            call.received = len(next(pieces))
            self.close_connection = True
            return
        body = b"".join(pieces)
        call.received = len(body)
        try:
            with self.hub.lock:
                query = parse_qs(url.query)
                answer = fault.answer if fault else self.hub.serve(self.command, url.path, query, self.headers, body)
        except HubError as error:
            answer = error.answer
        call.status = answer.status
        with contextlib.suppress(ConnectionError):  # of a client that was killed
            self.send_response(answer.status)
            for name, value in (answer.headers | {"Content-Length": str(len(answer.body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def log_message(self, *args):
        pass


def connect(server, monkeypatch, home, token=WRITE_TOKEN):
    """
    Lets the clients of this process, offline otherwise, push to `server`: they read the environment when imported.

    What they cache goes to the folder `home`, for even a push reads the model card; the caches of `datasets` stay
    where they are, so leave `load_dataset` to [`run_against`]. Xet is switched off as uploads choose it with no word
    from the server, which then has to speak it.
    """
    import datasets.config
    import transformers.utils.hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + template)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made once, with its address
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def environment(server, home, token=WRITE_TOKEN):
    """Returns the environment of a process whose Hub is `server` and whose caches are in `home`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    own = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
    return kept | own | ({"HF_TOKEN": token} if token else {})


def run_against(server, code, home, token=WRITE_TOKEN):
    """Runs Python code in a fresh process in this [`environment`]."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(server, home, token))
