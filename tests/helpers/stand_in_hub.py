"""A Hub of one's own on 127.0.0.1: what huggingface_hub asks of the real one to publish and to fetch a model.

`HF_ENDPOINT` is read when huggingface_hub is imported, so that its users are processes of their own.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, unquote, urlsplit

# What a published run consists of.
FILES = {
    "README.md",
    "all_results.json",
    "config.json",
    "learning_rates.png",
    "lr_history.csv",
    "model.safetensors",
    "preprocessor_config.json",
}

TOKEN = "hf_aSecretThatMustNotGetOut"
LARGE = (".safetensors", ".png", ".pt", ".pth")


class StandInHub:
    """Repositories of the user `me` and of others, as folders on disk, one a branch.

    Args:
        root (`Path`): Where they are kept.

    Attributes:
        answers (`dict`): Part of a path to the status to answer with instead, and how many times:
            `{"/commit/": (500, 1)}`; status 0 breaks the connection.
        commits (`list`): Repository, branch and message of every commit ever made.
    """

    def __init__(self, root):
        self.root, self.answers, self.commits = Path(root), {}, []
        self.private, self.uploads, self.heads = set(), {}, {}
        self.forgotten = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def empty(self):
        """Forgets everything but how many commits there were: a user's cache goes by them."""
        for folder in self.root.iterdir():
            shutil.rmtree(folder)
        self.answers.clear()
        self.private.clear()
        self.uploads.clear()
        self.forgotten = len(self.commits)

    def folder(self, repo, revision="main"):
        """Of a branch, by its name or by its last commit."""
        return self.root / repo / quote(self.heads.get(revision, revision), safe="")

    def files(self, repo, revision="main"):
        """Names of a repository's files."""
        folder = self.folder(repo, revision)
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    def messages(self, repo, revision="main"):
        """The messages of a branch's commits."""
        return [message for *where, message in self.commits[self.forgotten :] if where == [repo, revision]]

    def head(self, repo, revision="main"):
        """The last commit of a branch."""
        if revision in self.heads:
            return revision
        number = sum((repo, revision) == commit[:2] for commit in self.commits)
        commit = hashlib.sha1(f"{repo}@{revision}#{number}".encode()).hexdigest()
        self.heads[commit] = revision
        return commit

    def environment(self, home, token=TOKEN):
        """The environment of a process that takes it for the Hub."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
        offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
        kept = {name: value for name, value in os.environ.items() if name not in offline}
        return {**kept, **own, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): ...

    def do_GET(self):
        self._answer(self._get)

    do_HEAD = do_GET

    def do_POST(self):
        self._answer(self._post)

    def do_PUT(self):
        self._answer(self._put)

    def _answer(self, handle):
        # A branch's name may hold a slash, which is quoted.
        parts = [unquote(part) for part in urlsplit(self.path).path.lstrip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for part, (status, times) in self.hub.answers.items():
            if part in self.path and times > 0:
                self.hub.answers[part] = (status, times - 1)
                if status == 0:
                    self.close_connection = True
                    return self.connection.close()
                return self._send(status, {"error": f"told to answer {status}"})
        self.known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        asks_who = parts == ["api", "whoami-v2"] or parts[-2:] == ["auth-check", "write"]
        if not self.known and (self.command == "POST" or asks_who):
            return self._send(401, {"error": "Invalid username or password."})
        return handle(parts, body)

    def _post(self, parts, body):
        if parts == ["api", "validate-yaml"]:
            return self._send(200, {"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[-4:] == ["info", "lfs", "objects", "batch"]:
            return self._batch(parts[0] + "/" + parts[1].removesuffix(".git"), json.loads(body))
        repo, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if not (self.hub.root / repo).is_dir():
            return self._missing("Repo")
        if not repo.startswith("me/"):
            return self._send(403, {"error": "You don't have the rights to write here"})
        if what == "branch":
            there = self.hub.folder(repo, revision).is_dir()
            self.hub.folder(repo, revision).mkdir(exist_ok=True)
            return self._send(409 if there else 200, {"error": "Reference already exists"} if there else {})
        if not self.hub.folder(repo, revision).is_dir():
            return self._missing("Revision")
        if what == "preupload":
            return self._send(200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]})
        return self._commit(repo, revision, body)

    def _create(self, data):
        repo = f"{data.get('organization') or 'me'}/{data['name']}"
        if not repo.startswith("me/"):
            return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        there = self.hub.folder(repo).exists()
        self.hub.folder(repo).mkdir(parents=True, exist_ok=True)
        # Clients before huggingface_hub 1.6 say private.
        if (data.get("visibility") == "private" or data.get("private")) and not there:
            self.hub.private.add(repo)
        answer = {"url": f"{self.hub.url}/{repo}", "name": repo}
        return self._send(409, {**answer, "error": "there already"}) if there else self._send(200, answer)

    def _mode(self, path):
        return {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}

    def _batch(self, repo, data):
        objects = []
        for item in data["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.hub.uploads else {"actions": action})})
        return self._send(200, {"transfer": "basic", "objects": objects})

    def _put(self, parts, body):
        if hashlib.sha256(body).hexdigest() != parts[-1]:
            return self._send(400, {"error": "another content"})
        self.hub.uploads[parts[-1]] = body
        return self._send(200, {})

    def _commit(self, repo, revision, body):
        lines = [json.loads(line) for line in body.splitlines()]
        [header] = [line["value"] for line in lines if line["key"] == "header"]
        changes = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            if line["key"] == "file"
            else self.hub.uploads[line["value"]["oid"]]
            for line in lines
            if line["key"] != "header"
        }
        for name, content in changes.items():
            file = self.hub.folder(repo, revision) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        self.hub.commits.append((repo, revision, header["summary"]))
        commit = self.hub.head(repo, revision)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        return self._send(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _get(self, parts, body):
        if parts == ["api", "whoami-v2"]:
            return self._send(200, {"name": "me", "type": "user", "orgs": []})
        is_api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4 if is_api else 2 :]
        if not (self.hub.root / repo).is_dir() or (repo in self.hub.private and not self.known):
            return self._missing("Repo")
        if rest[:1] == ["auth-check"]:
            allowed = repo.startswith("me/") or rest == ["auth-check"]
            return self._send(200 if allowed else 403, {} if allowed else {"error": "You don't have write access"})
        revision = rest[1] if len(rest) > 1 else "main"
        if not self.hub.folder(repo, revision).is_dir():
            return self._missing("Revision")
        files = sorted(self.hub.files(repo, revision))
        if not is_api:
            return self._file(repo, revision, "/".join(rest[2:]))
        if rest[:1] == ["tree"]:
            return self._send(200, [self._entry(repo, revision, file) for file in files])
        siblings = [{"rfilename": file} for file in files]
        info = {"id": repo, "modelId": repo, "sha": self.hub.head(repo, revision), "siblings": siblings, "tags": []}
        return self._send(200, info)

    def _file(self, repo, revision, name):
        file = self.hub.folder(repo, revision) / name
        commit = {"X-Repo-Commit": self.hub.head(repo, revision)}
        if not file.is_file():
            return self._missing("Entry", commit)
        content = file.read_bytes()
        return self._send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', **commit})

    def _entry(self, repo, revision, file):
        content = (self.hub.folder(repo, revision) / file).read_bytes()
        return {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _missing(self, what, headers=None):
        # As the Hub does, it does not tell strangers what is private.
        status = 401 if what == "Repo" and not self.known else 404
        return self._send(
            status, {"error": f"{what} not found"}, {"X-Error-Code": f"{what}NotFound", **(headers or {})}
        )

    def _send(self, status, answer, headers=None):
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class HubUser:
    """A process that takes the stand-in for the Hub and runs commands one after the other: importing takes longest.

    Args:
        hub (`StandInHub`): The stand-in.
        home (`Path`): Where it keeps its cache.
    """

    def __init__(self, hub, home):
        script = Path(__file__).with_name("hub_user.py")
        self.process = subprocess.Popen(
            [sys.executable, script], env=hub.environment(home), stdin=-1, stdout=-1, text=True, cwd=home
        )

    def metalr_hf(self, *command, token=TOKEN):
        """Runs a command line."""
        return self._run({"command": [str(part) for part in command], "token": token})

    def python(self, code, *argv, token=TOKEN, folder=None):
        """Runs code, with `argv` as its global."""
        return self._run({"code": code, "argv": [str(part) for part in argv], "token": token, "folder": folder})

    def _run(self, job):
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        return SimpleNamespace(**json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.kill()
        self.process.communicate()
