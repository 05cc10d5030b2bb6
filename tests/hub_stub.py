"""Stub of the Hugging Face hub's HTTP interface for uploads and downloads of a repository's files, on a free port.

Repositories of data sets are called `datasets/owner/name`. Parts of their files can be asked for."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_secret_of_the_tests"


class Hub(ThreadingHTTPServer):
    """Server with repositories by name, each a dictionary of files; safetensors are uploaded as Git LFS objects."""

    daemon_threads = True

    def __init__(self):
        self.repos, self.objects, self.calls, self.tokens = {}, {}, [], set()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status=200, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.calls.append(f"{self.command} {self.path}")
        if listed := re.match(r"/api/models/([\w.-]+/[\w.-]+)/tree/main", self.path):
            files = self.server.repos[listed[1]].items()
            return self.answer(body=[{"type": "file", "oid": "0", "size": len(b), "path": n} for n, b in files])
        if about := re.match(
            rf"/api/(datasets/[\w.-]+/[\w.-]+)(?:/tree/(?:main|{COMMIT})(?:/([\w/.-]+))?)?", self.path
        ):
            files = self.server.repos.get(about[1])
            if files is None:
                return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            listed = [lfs_entry(*file) for file in files.items() if file[0].startswith(about[2] or "")]
            return self.answer(
                body=listed if "/tree/" in self.path else {"id": about[1].removeprefix("datasets/"), "sha": COMMIT}
            )
        match = re.fullmatch(r"/((?:datasets/)?[\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", self.path)
        files = self.server.repos.get(match[1]) if match else None
        if files is None:
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if match[2] not in ("main", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="no such revision")
        if match[3] not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="no such file")
        content = files[match[3]]
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            return self.answer(206, content[int(part[1]) : int(part[2]) + 1])
        return self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    def do_PUT(self):
        self.server.objects[self.path.rsplit("/", 1)[-1]] = self.read()
        self.answer()

    def do_POST(self):
        body, server = self.read(), self.server
        server.tokens.add(self.headers.get("Authorization"))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if self.path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            server.repos.setdefault(name, {})
            return self.answer(200, {"url": f"{server.address}/{name}", "name": name, "id": name})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return self.answer(
                200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
            )
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{server.address}/lfs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        repo = re.search(r"/api/models/([\w.-]+/[\w.-]+)/commit/", self.path)[1]
        files = server.repos[repo]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = server.objects[value["oid"]]
        return self.answer(200, {"commitOid": COMMIT, "commitUrl": f"{server.address}/{repo}/commit/{COMMIT}"})


def lfs_entry(path, content):
    """What the hub lists of a file in Git LFS."""
    digest, size = hashlib.sha256(content).hexdigest(), len(content)
    lfs = {"oid": digest, "size": size, "pointerSize": 134}
    return {"type": "file", "oid": "0", "size": size, "path": path, "lfs": lfs}
