# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on 127.0.0.1: as much of its HTTP API as huggingface_hub needs to upload and load a model.

Repositories, branches, tags, commits, LFS, private and gated repositories. Everything lives in memory.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors",)


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=lambda: {"0" * 40: {}})  # sha: {path: content}
    refs: dict = field(default_factory=lambda: {"main": "0" * 40})  # branch or tag: sha

    def resolve(self, revision):
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer(ThreadingHTTPServer):
    """`with HubServer(token) as hub`: serves at `hub.endpoint` until the end of the block.

    before_put: None, or a function (oid, handler) called before an LFS object is received; True drops the connection
    in the middle of its body.
    """

    daemon_threads = True

    def __init__(self, token):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.repos, self.lfs, self.puts, self.before_put = token, {}, {}, [], None
        self.lock = threading.Lock()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that is gone is part of the tests."""


class Failure(Exception):
    def __init__(self, status, code="", message=""):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message or code}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _answer(self, content=b"", status=200, headers=()):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _route(self):
        path = unquote(urlsplit(self.path).path)
        if self.command == "PUT" and path.startswith("/lfs/"):
            return self._receive(path.removeprefix("/lfs/"))
        self.body = self._body()
        try:
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return function(self, **match.groupdict())
            raise Failure(404, "EntryNotFound", f"no route {self.command} {path}")
        except Failure as failure:
            self._answer({"error": failure.headers["X-Error-Message"]}, failure.status, failure.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _route

    def _authorised(self):
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _repo(self, repo_id, write=False):
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not self._authorised()):
            raise Failure(404 if self._authorised() else 401, "RepoNotFound", "Repository not found")
        if write and not self._authorised():
            raise Failure(403, "", "you need write access to this repository")
        if repo.gated and not write and self.command in ("GET", "HEAD") and "/resolve/" in self.path:
            raise Failure(403, "GatedRepo", f"Access to model {repo_id} is restricted")
        return repo

    def _files(self, repo_id, revision):
        repo = self._repo(repo_id)
        sha = repo.resolve(revision)
        if sha is None:
            raise Failure(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    def create(self):
        if not self._authorised():
            raise Failure(401, "", "Invalid username or password.")
        fields = json.loads(self.body)
        if fields["organization"] == "readonly":
            raise Failure(403, "", "You don't have the rights to create a model under the namespace readonly")
        repo_id = f"{fields['organization']}/{fields['name']}"
        private = fields.get("private") or fields.get("visibility") == "private"
        with self.server.lock:
            status = 409 if repo_id in self.server.repos else 200
            self.server.repos.setdefault(repo_id, Repo(private=bool(private)))
        self._answer({"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id}, status)

    def ref(self, repo_id, kind, name):
        repo = self._repo(repo_id, write=True)
        fields = json.loads(self.body or b"{}")
        if kind == "tag":  # the path names the commit that is tagged
            name, start = fields["tag"], name
        else:
            start = fields.get("startingPoint", "main")
        if name in repo.refs:
            raise Failure(409, "", "Reference already exists")
        repo.refs[name] = repo.resolve(start)
        self._answer({})

    def validate(self):
        self._answer({"errors": [], "warnings": []})

    def preupload(self, repo_id, revision):
        self._repo(repo_id, write=True)
        files = json.loads(self.body)["files"]
        modes = ["lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular" for file in files]
        entries = zip(files, modes, strict=True)
        self._answer({"files": [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for f, mode in entries]})

    def batch(self, repo_id):
        self._repo(repo_id, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.lfs:
                item["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{item['oid']}"}}
        self._answer({"transfer": "basic", "objects": objects})

    def _receive(self, oid):
        self.server.puts.append(oid)
        if self.server.before_put is not None and self.server.before_put(oid, self):
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.close_connection = True
            return self.connection.close()
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer({"error": "wrong content"}, 400)
        self.server.lfs[oid] = content
        self._answer()

    def commit(self, repo_id, revision):
        repo = self._repo(repo_id, write=True)
        if revision not in repo.refs:
            raise Failure(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        with self.server.lock:
            files = dict(repo.commits[repo.refs[revision]])
            for line in self.body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    if value["oid"] not in self.server.lfs:
                        raise Failure(400, "", f"LFS object {value['oid']} was never uploaded")
                    files[value["path"]] = self.server.lfs[value["oid"]]
            sha = hashlib.sha1(f"{repo_id} {len(repo.commits)} {revision}".encode()).hexdigest()
            repo.commits[sha] = files
            repo.refs[revision] = sha
        url = f"{self.server.endpoint}/{repo_id}/commit/{sha}"
        self._answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, repo_id, revision="main"):
        sha, files = self._files(repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._answer({"id": repo_id, "sha": sha, "private": self._repo(repo_id).private, "siblings": siblings})

    def tree(self, repo_id, revision, folder):
        _, files = self._files(repo_id, revision)
        self._answer(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in sorted(files.items())
                if path.startswith(folder or "")
            ]
        )

    def resolve(self, repo_id, revision, path):
        sha, files = self._files(repo_id, revision)
        if path not in files:
            raise Failure(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"', "X-Repo-Commit": sha}
        self._answer(files[path], headers=headers)


_ID = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = [  # methods, path, function; the first that matches answers
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", rf"/api/models/{_ID}/(?P<kind>branch|tag)/(?P<name>[^/]+)", Handler.ref),
    ("POST", rf"/api/models/{_ID}/preupload/{_REVISION}", Handler.preupload),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/api/models/{_ID}/commit/{_REVISION}", Handler.commit),
    ("GET", rf"/api/models/{_ID}/revision/{_REVISION}", Handler.info),
    ("GET", rf"/api/models/{_ID}/tree/{_REVISION}(/(?P<folder>.+))?", Handler.tree),
    ("GET", rf"/api/models/{_ID}", Handler.info),
    ("GET HEAD", rf"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
]
