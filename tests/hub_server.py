"""A small Hub on the loopback interface: the part of the Hub's HTTP API that huggingface_hub calls, kept in memory.

Repositories of models have a true history: every commit has a hash, branches and tags point at commits, and old
commits stay readable. Binary files go through Git LFS and are served by redirect, the others are part of the commit.
A request without a route gets the answer 501 and is noted in `Hub.unknown`.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_dummy"


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool = False

    @property
    def oid(self):
        return sha256(self.data) if self.lfs else hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def entry(self, path):
        """The file's entry in the listing of a tree."""
        lfs = {"lfs": {"oid": self.oid, "size": len(self.data), "pointerSize": 130}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.data), "oid": self.oid, **lfs}


@dataclass
class Commit:
    title: str
    files: dict[str, File]
    parent: "Commit | None" = None

    def __post_init__(self):
        content = [self.title, self.parent and self.parent.sha, {path: file.oid for path, file in self.files.items()}]
        self.sha = hashlib.sha1(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass
class Repo:
    branches: dict[str, Commit] = field(default_factory=lambda: {"main": Commit("initial commit", {})})
    tags: dict[str, Commit] = field(default_factory=dict)
    by_sha: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self):
        self.by_sha[self.branches["main"].sha] = self.branches["main"]

    def commit(self, branch, title, files):
        self.branches[branch] = Commit(title, files, self.branches[branch])
        self.by_sha[self.branches[branch].sha] = self.branches[branch]
        return self.branches[branch]

    def history(self, branch="main"):
        """Commits from the first to the latest."""
        commits = [self.branches[branch]]
        while commits[-1].parent is not None:
            commits.append(commits[-1].parent)
        return commits[::-1]

    def files(self, revision="main"):
        """{path: content}"""
        return {path: file.data for path, file in self.find(revision).files.items()}

    def find(self, revision):
        for refs in (self.branches, self.tags, self.by_sha):
            if revision in refs:
                return refs[revision]
        raise Refused(404, "RevisionNotFound")


class Refused(Exception):
    """An error response: status, the Hub's error code, and more headers."""

    def __init__(self, status, code="", headers=None, **body):
        super().__init__(status, code)
        self.status, self.headers, self.body = status, {"X-Error-Code": code, **(headers or {})}, body


class Hub:
    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.unknown: list[str] = []
        self.url = ""
        self.lock = threading.RLock()

    def repo(self, name):
        if name not in self.repos:
            raise Refused(404, "RepoNotFound")
        return self.repos[name]

    # One method per route; each returns the answer's JSON, or (status, headers, content).

    def create(self, request):
        name = f"{request.json['organization']}/{request.json['name']}"
        url = f"{self.url}/{name}"
        if name in self.repos:
            raise Refused(409, url=url, error="You already created this model repo")
        self.repos[name] = Repo()
        return {"url": url, "name": name}

    def validate_yaml(self, request):
        check_card(request.json["content"])
        return {"errors": [], "warnings": []}

    def preupload(self, request, name, revision):
        existing = self.repo(name).find(revision).files
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if b"\0" in base64.b64decode(file["sample"]) else "regular",
                    "shouldIgnore": False,
                    "oid": existing[file["path"]].oid if file["path"] in existing else None,
                }
                for file in request.json["files"]
            ]
        }

    def commit(self, request, name, branch):
        repo = self.repo(name)
        if branch not in repo.branches:
            raise Refused(404, "RevisionNotFound")
        lines = [json.loads(line) for line in request.body.splitlines()]
        files = dict(repo.branches[branch].files)
        for key, value in [(line["key"], line["value"]) for line in lines]:
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[value["path"]] = File(self.lfs[value["oid"]], lfs=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(501, error=f"unknown operation {key}")
        if "README.md" in files:
            check_card(files["README.md"].data.decode())
        sha = repo.commit(branch, title, files).sha
        return {"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}

    def lfs_batch(self, request, name):
        objects = []
        for wanted in request.json["objects"]:
            upload = {"href": f"{self.url}/lfs/{wanted['oid']}"}
            actions = {"upload": upload, "verify": {"href": f"{self.url}/lfs/verify"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.lfs else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, request, oid):
        if sha256(request.body) != oid:
            raise Refused(422, error="the content is not what its hash says")
        self.lfs[oid] = request.body
        return {}

    def lfs_verify(self, request):
        if len(self.lfs[request.json["oid"]]) != request.json["size"]:
            raise Refused(422, error="wrong size")
        return {}

    def lfs_content(self, request, oid):
        return 200, {"ETag": f'"{oid}"'}, self.lfs[oid]

    def branch(self, request, name, branch):
        repo = self.repo(name)
        if branch in repo.branches:
            raise Refused(409, error="Reference already exists")
        repo.branches[branch] = repo.find(request.json.get("startingPoint", "main"))
        return {}

    def tag(self, request, name, revision):
        repo = self.repo(name)
        if request.json["tag"] in repo.tags:
            raise Refused(409, error="Reference already exists")
        repo.tags[request.json["tag"]] = repo.find(revision)
        return {}

    def info(self, request, name, revision="main"):
        commit = self.repo(name).find(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": name, "sha": commit.sha, "siblings": siblings, "private": False, "tags": []}

    def tree(self, request, name, revision):
        """List the whole repository; other listings are not served."""
        if "recursive=true" not in request.path.lower():
            raise Refused(501)
        return [file.entry(path) for path, file in self.repo(name).find(revision).files.items()]

    def resolve(self, request, name, revision, path):
        commit = self.repo(name).find(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise Refused(404, "EntryNotFound", headers)
        file = commit.files[path]
        if file.lfs:
            headers |= {"X-Linked-Size": str(len(file.data)), "X-Linked-Etag": f'"{file.oid}"'}
            # under another name, because huggingface_hub takes a file's size and hash from a redirect that leaves the Hub
            storage = self.url.replace("127.0.0.1", "localhost")
            return 302, {**headers, "Location": f"{storage}/lfs/{file.oid}"}, b""
        return 200, {**headers, "ETag": f'"{file.oid}"'}, file.data


NAME, REVISION = "([^/]+/[^/]+)", "([^/]+)"
ROUTES = [
    ("POST", "/api/repos/create", Hub.create),
    ("POST", "/api/validate-yaml", Hub.validate_yaml),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", Hub.preupload),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", Hub.commit),
    ("POST", f"/api/models/{NAME}/branch/{REVISION}", Hub.branch),
    ("POST", f"/api/models/{NAME}/tag/{REVISION}", Hub.tag),
    ("GET", f"/api/models/{NAME}", Hub.info),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", Hub.info),
    ("GET", f"/api/models/{NAME}/tree/{REVISION}", Hub.tree),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Hub.lfs_upload),
    ("POST", "/lfs/verify", Hub.lfs_verify),
    ("GET", "/lfs/([0-9a-f]{64})", Hub.lfs_content),
    ("GET", f"/{NAME}/resolve/{REVISION}/(.+)", Hub.resolve),
]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def check_card(text):
    """Refuse a card, as the Hub does, if its metadata is no YAML or its `base_model` is no repository's name."""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    base = ((yaml.safe_load(match[1]) if match else None) or {}).get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base)):
        raise Refused(400, errors=[{"message": f'"base_model" with value "{base}" is not valid'}], warnings=[])


def make_handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # headers and content in one packet: the second of two would wait 40 ms

        def answer(self):
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_json = self.headers.get("Content-Type") in ("application/json", "application/vnd.git-lfs+json")
            self.json = json.loads(self.body) if is_json else None
            try:
                if "Transfer-Encoding" in self.headers:
                    raise Refused(501, error="chunked")
                if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise Refused(401, error="Invalid username or password.")
                with hub.lock:
                    result = self.dispatch(urlsplit(self.path).path)
                status, headers, content = result if isinstance(result, tuple) else (200, {}, result)
            except Refused as refused:
                status, headers, content = refused.status, refused.headers, refused.body
            except Exception as error:  # not 500, after which huggingface_hub would retry
                status, headers, content = 501, {}, {"error": repr(error)}
            if status == 501:
                hub.unknown.append(f"{self.command} {self.path} {content or ''}")
            if not isinstance(content, bytes):
                content, headers = json.dumps(content).encode(), {**headers, "Content-Type": "application/json"}
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(content)}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = answer

        def dispatch(self, path):
            method = "GET" if self.command == "HEAD" else self.command
            for route_method, pattern, function in ROUTES:
                # quoted slashes belong to a name, so names are unquoted after the match
                match = re.fullmatch(pattern, path)
                if match and method == route_method:
                    return function(hub, self, *map(unquote, match.groups()))
            raise Refused(501)

        def log_message(self, *args):
            pass

    return Handler


@contextmanager
def running_hub():
    """Serve a new, empty Hub on a free port of this machine until the block ends."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub)) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
