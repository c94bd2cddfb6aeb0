"""A Hub on the loopback interface: it keeps what the real client uploads, and fails where it is told to.

Only what publishing needs: creating a repository, permissions, validation of a card, LFS objects, commits, and reading
a card. Everything is in memory. The kinds of requests are the names in ROUTES, in the order of a publication.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROUTES = {
    "whoami": r"GET /api/whoami-v2",
    "create": r"POST /api/repos/create",
    "access": r"GET /api/models/(?P<repo>.+)/auth-check/write",
    "yaml": r"POST /api/validate-yaml",
    "preupload": r"POST /api/models/(?P<repo>.+)/preupload/main",
    "xet": r"GET /api/models/(?P<repo>.+)/xet-write-token/main",
    "cas": r"\w+ /xet/.*",
    "batch": r"POST /(?P<repo>.+)\.git/info/lfs/objects/batch",
    "put": r"PUT /lfs/(?P<oid>[0-9a-f]{64})",
    "verify": r"POST /lfs/verify",
    "commit": r"POST /api/models/(?P<repo>.+)/commit/main",
    "info": r"GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/main)?",
    "read": r"(GET|HEAD) /(?P<repo>[^/]+/[^/]+)/resolve/main/(?P<path>.+)",
}


@dataclass
class Repository:
    """What one repository holds."""

    private: bool
    files: dict = field(default_factory=dict)  # path -> bytes
    lfs: set = field(default_factory=set)  # paths of the files that came as LFS objects
    commits: list = field(default_factory=list)  # of each, the paths in it


@dataclass
class Fault:
    """What happens to requests of one kind.

    what: an HTTP status, "drop" (the connection closes unanswered), "drop after" (it closes once the request has been
    carried out) or "stall" (no answer for a minute). From request number `first` on, `times` of them.
    """

    kind: str
    what: int | str
    first: int = 0
    times: float = float("inf")
    headers: dict = field(default_factory=dict)
    seen: int = 0

    def hits(self, kind):
        """Whether this request, counted here, is one to fail."""
        if kind != self.kind:
            return False
        self.seen += 1
        return self.first < self.seen <= self.first + self.times


class HubServer(ThreadingHTTPServer):
    """The server and its state; use it as a context manager. `url` is what HF_ENDPOINT must be."""

    daemon_threads = True

    def __init__(self, tokens):
        """tokens: {token: user}; a user may write to the repositories of that name, and read all."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = tokens
        self.empty()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.released = threading.Event()  # ends what stalls

    def empty(self):
        """Forget all: no repositories, no faults. Objects that are there already would not be sent again."""
        self.repositories, self.objects = {}, {}
        self.requests = []  # kinds, in order of arrival
        self.fault = None
        return self

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that went away is nothing to report."""


class Refusal(Exception):
    """An answer with a status other than 200."""

    def __init__(self, status, message, code="", **more):
        super().__init__(message)
        self.status, self.content, self.headers = status, {"error": message, **more}, {"X-Error-Code": code}


class Handler(BaseHTTPRequestHandler):
    """One connection; a method per kind of request returns the JSON to answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: no waiting in between

    def log_message(self, *arguments):
        """Say nothing."""

    def do_GET(self):
        """Find the kind of the request, apply a fault or answer it."""
        body = self.read_body()
        line = f"{self.command} {self.path.split('?')[0]}"
        kind, match = next(
            ((kind, match) for kind, route in ROUTES.items() if (match := re.fullmatch(route, line))), (None, None)
        )
        with self.server.lock:
            self.server.requests.append(kind or line)
            fault = self.server.fault
            what = fault.what if fault and fault.hits(kind) else None
        try:
            if what == "stall":
                self.server.released.wait(60)
            if what in ("drop", "stall"):
                self.close_connection = True
                return
            if isinstance(what, int):
                page = f"<html><h1>{what}</h1></html>".encode()  # as gateways have it
                return self.answer(what, page, {"Content-Type": "text/html", **fault.headers})
            if kind is None:
                raise Refusal(404, f"no route for {line}")
            user = self.server.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            if user is None and kind not in ("put", "yaml", "read"):
                raise Refusal(401, "Invalid username or password.")
            with self.server.lock:
                answer = getattr(self, kind)(body, user=user, **match.groupdict())
            if what == "drop after":
                self.close_connection = True
                return
            commit = {"X-Repo-Commit": f"{1:040x}", "ETag": f'"{2:040x}"'}
            self.answer(200, answer, commit if kind == "read" else {})
        except Refusal as refusal:
            self.answer(refusal.status, refusal.content, refusal.headers)

    do_POST = do_PUT = do_HEAD = do_GET

    def read_body(self):
        """The request's body, which comes with a length or in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status, content, headers=()):
        """Send JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def repository(self, name, user=None):
        """The repository of that name, which `user`, when given, must be allowed to write to."""
        if name not in self.server.repositories:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if user is not None and user != name.split("/")[0]:
            raise Refusal(403, f"{user} may not write to {name}")
        return self.server.repositories[name]

    def create(self, body, user):
        """POST /api/repos/create; 409 with the address of one that exists."""
        wanted = json.loads(body)
        owner = wanted["organization"] or user
        name = f"{owner}/{wanted['name']}"
        if owner != user:
            raise Refusal(403, f"{user} may not create {name}")
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            raise Refusal(409, "You already created this model repo", url=url)
        self.server.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        return {"url": url}

    def whoami(self, body, user):
        """GET /api/whoami-v2."""
        return {"name": user, "orgs": []}

    def access(self, body, user, repo):
        """GET …/auth-check/write."""
        self.repository(repo, user)
        return {}

    def info(self, body, user, repo):
        """GET /api/models/…"""
        repository = self.repository(repo)
        return {"id": repo, "sha": f"{len(repository.commits):040x}", "siblings": []}

    def read(self, body, user, repo, path):
        """GET or HEAD …/resolve/main/…"""
        files = self.repository(repo).files
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return files[path]

    def yaml(self, body, user):
        """POST /api/validate-yaml."""
        if not json.loads(body)["content"].startswith("---\n"):
            raise Refusal(400, "no metadata")
        return {"errors": [], "warnings": []}

    def preupload(self, body, user, repo):
        """Which files are LFS objects (weights, as .gitattributes has it), and what of them is there already."""
        repository = self.repository(repo, user)
        answer = []
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith(".safetensors")
            oid = None
            if (content := repository.files.get(file["path"])) is not None:
                git = hashlib.sha1(b"blob %d\0" % len(content) + content)
                oid = hashlib.sha256(content).hexdigest() if lfs else git.hexdigest()
            mode = "lfs" if lfs else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def batch(self, body, user, repo):
        """Where to upload LFS objects to; no actions for those that are there."""
        self.repository(repo, user)
        answer = []
        for thing in json.loads(body)["objects"]:
            if thing["oid"] not in self.server.objects:
                actions = {"upload": f"/lfs/{thing['oid']}", "verify": "/lfs/verify"}
                thing["actions"] = {name: {"href": self.server.url + path} for name, path in actions.items()}
            answer.append(thing)
        return {"transfer": "basic", "objects": answer}

    def put(self, body, user, oid):
        """An LFS object; what does not have the hash that it was announced with is refused."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "wrong hash")
        self.server.objects[oid] = body
        return {}

    def verify(self, body, user):
        """POST to the verify address of an LFS object."""
        wanted = json.loads(body)
        if len(self.server.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "no such object")
        return {}

    def commit(self, body, user, repo):
        """The ndjson commit: all of its files, or none when one cannot be had."""
        repository = self.repository(repo, user)
        header, *lines = map(json.loads, body.splitlines())
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Refusal(400, "a commit starts with its header")
        files, lfs = {}, set()
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.server.objects:
                files[value["path"]] = self.server.objects[value["oid"]]
                lfs.add(value["path"])
            else:
                raise Refusal(400, f"cannot commit {line['key']} {value['path']}")
        repository.files |= files
        repository.lfs |= lfs
        repository.commits.append(sorted(files))
        oid = f"{len(repository.commits):040x}"
        return {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid}

    def xet(self, body, user, repo):
        """Where Xet storage is: here, at addresses that exist to fail."""
        self.repository(repo, user)
        return {"casUrl": f"{self.server.url}/xet", "accessToken": "xet", "exp": 4_000_000_000}
