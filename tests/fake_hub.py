"""A local server that answers as the Hugging Face Hub does and records what is uploaded.

It knows the requests that huggingface_hub 2.4 makes to create a repository, to commit regular and LFS files, and to
look up and download files. Anything else gets 404 and is in `unknown`. Clients must be processes of their own, with
`environment()`: huggingface_hub reads the endpoint when it is imported.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


USER = "someone"
TOKEN = "hf_" + "x" * 34


class FakeHub:
    """`with FakeHub() as hub:` serves on a free port of this machine.

    Attributes:
        repos: contents of all repositories, {repo_id: {path: bytes}}.
        commits: (repo_id, message, sorted paths) of every commit, in order.
        requests: (method, path) of every request, in order; `mark` puts (None, name) between them.
        unknown: the requests that no answer is known to.
    """

    def __init__(self):
        self.repos, self.commits, self.requests, self.unknown = {}, [], [], []
        self._objects = {}  # uploaded LFS objects by SHA-256
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home):
        """Environment variables of a client that is logged in here and keeps its cache under `home`."""
        settings = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return os.environ | settings | switches | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def writes(self, stage=None):
        """Requests other than GET and HEAD, of one stage (what came after its mark, up to the next one) or of all."""
        marks = [i for i, (method, _) in enumerate(self.requests) if method is None]
        requests = self.requests
        if stage is not None:
            start = self.requests.index((None, stage))
            requests = self.requests[start : next((i for i in marks if i > start), None)]
        return [request for request in requests if request[0] not in (None, "GET", "HEAD")]

    def respond(self, method, path, body):
        """Status, headers and body of an answer. `body` is what was sent."""
        for pattern, methods, answer in (
            (r"/mark/(.+)", "GET", self._mark),
            (r"/api/whoami-v2", "GET", self._whoami),
            (r"/api/validate-yaml", "POST", self._validate),
            (r"/api/repos/create", "POST", self._create),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", "POST", self._preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "POST", self._lfs_batch),
            (r"/lfs/([0-9a-f]{64})", "PUT", self._lfs_put),
            (r"/api/models/([^/]+/[^/]+)/commit/main", "POST", self._commit),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", "GET", self._model_info),
            (r"/api/models/([^/]+/[^/]+)/tree/[^/]+(/.*)?", "GET", self._tree),
            (r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", "GET HEAD", self._resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match and method in methods.split():
                return answer(*match.groups(), body)
        self.unknown.append((method, path))
        return _error(404, "EntryNotFound", f"the fake Hub does not know {method} {path}")

    def _mark(self, name, body):
        self.requests[-1] = (None, name)
        return _json({})

    def _whoami(self, body):
        return _json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def _validate(self, body):
        card = json.loads(body)["content"]
        yaml.safe_load(card.split("---")[1])
        return _json({"errors": [], "warnings": []})

    def _create(self, body):
        sent = json.loads(body)
        repo_id = f"{sent.get('organization') or USER}/{sent['name']}"
        answer = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            return _json(answer, status=409)
        self.repos[repo_id] = {}
        return _json(answer)

    def _preupload(self, repo_id, body):
        if repo_id not in self.repos:
            return _error(404, "RepoNotFound", repo_id)
        large = (".safetensors", ".bin", ".png")
        modes = {
            file["path"]: "lfs" if file["path"].endswith(large) else "regular" for file in json.loads(body)["files"]
        }
        return _json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def _lfs_batch(self, repo_id, body):
        objects = [
            {**sent, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{sent['oid']}"}}}
            for sent in json.loads(body)["objects"]
        ]
        return _json({"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    def _lfs_put(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return _error(400, "BadRequest", f"{oid} is not the hash of what was sent")
        self._objects[oid] = body
        return _json({})

    def _commit(self, repo_id, body):
        header, *operations = [json.loads(line) for line in body.splitlines()]
        files = self.repos[repo_id]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self._objects[value["oid"]]
            else:
                return _error(400, "BadRequest", f"the fake Hub does not know the operation {operation['key']}")
        paths = sorted(operation["value"]["path"] for operation in operations)
        self.commits.append((repo_id, header["value"]["summary"], paths))
        url = f"{self.endpoint}/{repo_id}/commit/{self._revision(repo_id)}"
        return _json({"success": True, "commitUrl": url, "commitOid": self._revision(repo_id)})

    def _revision(self, repo_id):
        return f"{len([commit for commit in self.commits if commit[0] == repo_id]):040x}"

    def _model_info(self, repo_id, body):
        if repo_id not in self.repos:
            return _error(404, "RepoNotFound", repo_id)
        siblings = [{"rfilename": path} for path in self.repos[repo_id]]
        return _json({"id": repo_id, "sha": self._revision(repo_id), "siblings": siblings, "tags": []})

    def _tree(self, repo_id, folder, body):
        if folder or repo_id not in self.repos:
            return _error(404, "EntryNotFound" if folder else "RepoNotFound", repo_id)
        sizes = {path: len(content) for path, content in self.repos[repo_id].items()}
        return _json([{"type": "file", "path": p, "size": size, "oid": "0" * 40} for p, size in sizes.items()])

    def _resolve(self, repo_id, path, body):
        if repo_id not in self.repos:
            return _error(404, "RepoNotFound", repo_id)
        if path not in self.repos[repo_id]:
            return _error(404, "EntryNotFound", path)
        content = self.repos[repo_id][path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": self._revision(repo_id), "Accept-Ranges": "bytes"}
        return 200, headers | {"Content-Type": "application/octet-stream"}, content


def _json(value, status=200, content_type="application/json"):
    return status, {"Content-Type": content_type}, json.dumps(value).encode()


def _error(status, code, message):
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    return status, headers, json.dumps({"error": message}).encode()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def _answer(self):
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        needs_token = self.command in ("POST", "DELETE") and path != "/api/validate-yaml"
        if needs_token and self.headers["Authorization"] != f"Bearer {TOKEN}":
            status, headers, content = _error(401, "Unauthorized", "a request that writes needs a token")
        else:
            status, headers, content = self.hub.respond(self.command, path, body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *arguments):
        pass
