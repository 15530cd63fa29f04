"""A W&B server on loopback, for tests: the real SDK (0.31.0) runs online against it, and it can be made to fail.

    with WandbServer() as server:
        subprocess.run([sys.executable, "program.py"], env=os.environ | server.environment)
        server.runs["loopback", "project", "run_id"].history

It answers what the SDK asks, read from the wire, not from a specification. By hand: `python tests/wandb_server.py`.
"""

import argparse
import base64
import contextlib
import gzip
import hashlib
import itertools
import json
import math
import mimetypes
import socket
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from wandb_graphql import Query

ENTITY = "loopback"
API_KEY = "0123456789abcdef" * 3
CREATED = "2026-01-01T00:00:00Z"
CRASHED_AFTER = 300  # seconds without a word from a running run, as W&B has it


def connection(nodes):
    """GraphQL's way of a list; always one page."""
    edges = [dict(node=node, cursor=str(number), version=node.get("version")) for number, node in enumerate(nodes)]
    page = dict(__typename="PageInfo", hasNextPage=False, endCursor=None)
    return dict(edges=edges, pageInfo=page, totalCount=len(edges))


def identifier(*parts):
    return base64.b64encode(":".join(map(str, parts)).encode()).decode()


class ServerRun:
    """What the server holds of one run."""

    def __init__(self, entity, project, run_id):
        self.entity, self.project, self.run_id = entity, project, run_id
        self.display_name = run_id
        self.group = self.job_type = self.notes = self.sweep = ""
        self.config, self.wandb_config, self.summary = {}, {}, {}  # wandb_config: what the SDK adds to the config
        self.files = {}  # name → bytes
        self.tags, self.alerts = [], []
        self.origin = None, None, None, None  # host, commit, program, repository
        self.writers = []  # of a shared run, in the order in which they came
        self.reported = "pending"  # the state that follows from what was said last
        self.exit_code = None
        self.stopped = False  # on its page
        self.seen = time.monotonic()  # when a word came last
        self._rows, self._events, self._console = {}, {}, {}  # (writer, offset) → line

    @property
    def state(self):
        silent = time.monotonic() - self.seen > CRASHED_AFTER
        return "crashed" if self.reported == "running" and silent else self.reported

    @property
    def history(self):
        return [json.loads(line) for line in self._in_order(self._rows)]

    def history_of(self, writer):
        return [json.loads(line) for (each, _), line in self._rows.items() if each == writer]

    def seen_by(self, writer):
        if writer and writer not in self.writers:
            self.writers.append(writer)

    @property
    def events(self):
        return [json.loads(line) for line in self._in_order(self._events)]

    def _in_order(self, lines):
        """By offset; rows of a shared run by arrival, for there every writer counts from zero."""
        return [lines[key] for key in (lines if self.writers else sorted(lines))]

    def upsert(self, displayName=None, config=None, groupName=None, jobType=None, notes=None, tags=None, sweep=None,
               state=None, host=None, commit=None, jobProgram=None, jobRepo=None, **_):
        self.seen = time.monotonic()
        said = host, commit, jobProgram, jobRepo
        self.origin = tuple(new or old for new, old in zip(said, self.origin, strict=True))
        self.display_name, self.group = displayName or self.display_name, groupName or self.group
        self.job_type, self.sweep = jobType or self.job_type, sweep or self.sweep
        self.notes, self.tags = self.notes if notes is None else notes, self.tags if tags is None else tags
        if config:
            # A writer of a shared run sends only what it knows of.
            sent = {name: item.get("value") for name, item in json.loads(config).items()}
            self.wandb_config |= sent.pop("_wandb", None) or {}
            self.config = self.config | sent if self.writers else sent
        if state or host:  # a trial is made before it starts
            self.reported = state or "running"

    def stream(self, writer, body):
        """One request of the file stream. `writer` is the client's id in shared mode, else empty."""
        self.seen = time.monotonic()
        self.seen_by(writer)
        for name, lines in (("wandb-history.jsonl", self._rows), ("wandb-events.jsonl", self._events),
                            ("output.log", self._console)):
            chunk = body.get("files", {}).get(name, {"offset": 0, "content": []})
            lines |= {(writer, chunk["offset"] + index): line for index, line in enumerate(chunk["content"])}
            if writer and lines is self._rows:  # shared writers leave the summary to the server
                for line in chunk["content"]:
                    self.summary |= json.loads(line)
        for line in body.get("files", {}).get("wandb-summary.json", {}).get("content", []):
            self.summary = self.summary | json.loads(line) if self.writers else json.loads(line)
        if body.get("preempting"):
            self.reported = "preempting"
        if body.get("complete"):
            self.exit_code = body.get("exitcode")
            failed = "preempted" if self.reported == "preempting" else "failed"
            self.reported = failed if self.exit_code else "finished"

    def matches(self, filters):
        """The part of W&B's MongoDB-like filters that is equality, $in, $and and $or."""
        mine = dict(group=self.group, jobType=self.job_type, job_type=self.job_type, state=self.state, tags=self.tags,
                    name=self.run_id, display_name=self.display_name, displayName=self.display_name, sweep=self.sweep)
        mine |= {f"config.{name}{end}": value for name, value in self.config.items() for end in ("", ".value")}
        for name, wanted in filters.items():
            if name in ("$and", "$or"):
                found = (all if name == "$and" else any)(self.matches(part) for part in wanted)
            else:
                choices = wanted.get("$in", [wanted.get("$eq")]) if isinstance(wanted, dict) else [wanted]
                value = mine.get(name)
                found = any(choice in value if isinstance(value, list) else choice == value for choice in choices)
            if not found:
                return False
        return True


class ServerArtifact:
    """One version. `files` has its names and bytes once it is committed; a reference's is its address."""

    def __init__(self, number, entityName, projectName, artifactTypeName, artifactCollectionName, digest, runName=None,
                 metadata=None, description=None, clientID=None, **_):
        self.id, self.run = identifier("Artifact", number), runName
        self.entity, self.project = entityName or ENTITY, projectName  # `wandb sync` names no entity
        self.name, self.type, self.digest = artifactCollectionName, artifactTypeName, digest
        self.metadata, self.description, self.client_id = json.loads(metadata or "{}"), description, clientID
        self.version, self.aliases, self.wanted = "", [], []  # without a version it is a draft
        self.files, self.manifest = {}, b"{}"

    @property
    def collection(self):
        return self.entity, self.project, self.name


class ServerSweep:
    def __init__(self, sweep_id, entity, project):
        self.id, self.entity, self.project = sweep_id, entity, project
        self.state = "PENDING"
        self.config, self.agents = {}, []
        self.runs = {}  # run id → its parameters

    def next_parameters(self):
        """The next run's parameters, or None when the grid is exhausted."""
        parameters = self.config.get("parameters", {})
        axes = [spec.get("values", [spec.get("value")]) for spec in parameters.values()]
        chosen = next(itertools.islice(itertools.product(*axes), len(self.runs), None), None)
        return None if chosen is None else dict(zip(parameters, chosen, strict=True))


class WandbServer:
    def __init__(self, port=0, on_request=None):
        self.runs, self.sweeps, self.artifacts = {}, {}, []
        self.requests = []  # (time, kind, run id)
        self.on_request = on_request or (lambda kind, run_id: None)
        self._port, self._http = port, None
        self._connections = set()
        self._lock = threading.RLock()  # of all of this state
        self._faults = {}  # endpoint → how it fails
        self._healed = threading.Event()  # ends what hangs
        self._blobs = {}  # digest → bytes of an artifact's file
        self._drafts = []  # artifacts, also those that are not committed yet
        self.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self):
        return dict(WANDB_BASE_URL=self.url, WANDB_API_KEY=API_KEY, WANDB_MODE="online", WANDB_ERROR_REPORTING="false",
                    WANDB_DISABLE_GIT="true", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")

    def start(self):
        handler = type("Handler", (Handler,), dict(server_state=self))
        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._http.daemon_threads = True
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True, name="wandb-server").start()

    def stop(self):
        """Close the socket and every connection; what the server knows stays."""
        if self._http is None:
            return
        self._http.shutdown()
        self._http.server_close()
        self._http = None
        self._healed.set()
        with self._lock:
            connections, self._healed = list(self._connections), threading.Event()
        for one in connections:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def fail(self, endpoint, how):
        """`how`: an HTTP status, "html", "hang" or "refuse". `endpoint`: "viewer", "upsert", "graphql", "filestream",
        "upload", "artifact", "all", or the name of a GraphQL operation; "upsert RUN_ID" and the like, of one run."""
        with self._lock:
            self._faults[endpoint] = how

    def heal(self):
        with self._lock:
            self._faults.clear()
            self._healed.set()
            self._healed = threading.Event()

    def _fault(self, names):
        with self._lock:
            return next((self._faults[name] for name in names if name in self._faults), None), self._healed

    def _seen(self, kind, run_id):
        with self._lock:
            self.requests.append((time.time(), kind, run_id))
            self.on_request(kind, run_id)

    # What GraphQL asks for, as dicts; functions where there are arguments, or where it would never end.

    def _root(self, writer):
        return dict(
            viewer=dict(__typename="User", id=identifier("User", 1), entity=ENTITY, username=ENTITY, name=ENTITY,
                        email="loopback@example.com", admin=False, flags="{}", apiKeys=connection([]),
                        teams=connection([dict(name=ENTITY)])),
            serverInfo=dict(cliVersionInfo={"max_cli_version": "9.0.0"}, features=[]),
            project=self._project, model=self._project, entity=lambda name="": self._entity(name),
            models=lambda entityName=None, **_: connection(
                [self._project(name, entity) for entity, name in {key[:2]: 0 for key in self.runs}
                 if entity == (entityName or ENTITY)]),
            upsertModel=lambda input: dict(project=self._project(**input), model=self._project(**input), inserted=True),
            artifact=lambda id: self._artifact(self._artifact_of(id)),
            clientIDMapping=lambda clientID: next((dict(serverID=one.id) for one in reversed(self._drafts)
                                                   if one.client_id == clientID), None),
            upsertBucket=lambda input: self._upsert_run(writer=writer, **input),
            deleteRun=lambda input: self._delete_run(**input),
            createRunFiles=lambda input: self._create_run_files(**input),
            markRunFilesUploaded=lambda input: dict(success=True),
            notifyScriptableRunAlert=lambda input: self._alert(**input),
            createArtifact=lambda input: self._create_artifact(**input),
            createArtifactManifest=lambda input: self._manifest(self._artifact_of(input["artifactID"])),
            updateArtifactManifest=lambda input: self._manifest(self._artifact_of(input["artifactManifestID"])),
            createArtifactFiles=lambda input: self._artifact_files(input["artifactFiles"]),
            commitArtifact=lambda input: dict(artifact=self._commit(self._artifact_of(input["artifactID"]))),
            upsertSweep=lambda input: self._upsert_sweep(**input),
            createAgent=lambda input: self._create_agent(**input),
            agentHeartbeat=lambda input: self._heartbeat(**input),
        )

    def _entity(self, name):
        return dict(__typename="Entity", id=identifier("Entity", name), name=name or ENTITY, isTeam=False,
                    xxhashDigestsEnabled=False)

    def _project(self, name=None, entityName=None, **_):
        entity, name = entityName or ENTITY, name or "uncategorized"

        def runs(filters=None, order=None, **_):
            ours = [run for run in self.runs.values() if (run.entity, run.project) == (entity, name)]
            found = [run for run in ours if run.matches(json.loads(filters or "{}"))]
            return found[::-1] if (order or "").startswith("-") else found

        def run(name=None, **_):
            found = self.runs.get((entity, project["name"], name))
            return found and self._run(found)

        def sweep(sweepName):
            found = self.sweeps.get(sweepName)
            return found and self._sweep(found)

        def membership(name="", aliasName="", collection=""):
            collection, _, alias = name.partition(":") if name else (collection, "", aliasName)
            versions = self._versions((entity, project["name"], collection))
            found = [one for one in versions if (alias or "latest") in (*one.aliases, one.version)]
            return self._membership(found[0]) if found else None

        def collection(name):
            versions = self._versions((entity, project["name"], name))
            return versions and self._collection(versions[0]) | dict(
                artifactMembership=lambda aliasName: membership(aliasName=aliasName, collection=name),
                artifacts=lambda **_: connection(map(self._artifact, reversed(versions)))) or None

        project = dict(
            __typename="Project", id=identifier("Project", entity, name), internalId=identifier("ProjectInternalId", 1),
            name=name, entityName=entity, entity=self._entity(entity), createdAt=CREATED, isBenchmark=False,
            readOnly=False, run=run, bucket=run, runs=lambda **asked: connection(map(self._run, runs(**asked))),
            runCount=lambda **asked: len(runs(**asked)), sweep=sweep, artifactCollection=collection,
            artifactCollectionMembership=lambda name: membership(name),
            artifact=lambda name: (membership(name) or {}).get("artifact"))
        return project

    def _run(self, run):
        def history(minStep=0, maxStep=math.inf, **_):
            return [json.dumps(row) for row in run.history if minStep <= row.get("_step", 0) < maxStep]

        def files(names=None, **_):
            return connection([self._file(f"{self.url}/files/{run.entity}/{run.project}/{run.run_id}", name, content)
                               for name, content in run.files.items() if not names or name in names])

        config = {name: dict(value=value) for name, value in (run.config | dict(_wandb=run.wandb_config)).items()}
        logged = [one for one in self.artifacts if one.run == run.run_id and one.project == run.project]
        return dict(
            __typename="Run", id=identifier("Run", "v1", run.run_id, run.project, run.entity), name=run.run_id,
            displayName=run.display_name, config=json.dumps(config), summaryMetrics=json.dumps(run.summary),
            systemMetrics="{}", state=run.state, group=run.group or None, jobType=run.job_type or None, tags=run.tags,
            notes=run.notes, description=run.notes, sweepName=run.sweep or None, createdAt=CREATED, heartbeatAt=CREATED,
            readOnly=False, stopped=run.stopped, exitcode=run.exit_code, projectId=1, commit=None,
            user=dict(name=ENTITY, username=ENTITY), project=lambda: self._project(run.project, run.entity),
            historyLineCount=len(run._rows), eventsLineCount=len(run._events), logLineCount=len(run._console),
            historyTail=json.dumps(run._in_order(run._rows)[-1:]),
            eventsTail=json.dumps(run._in_order(run._events)[-1:]),
            historyKeys=lambda: dict(lastStep=max((row.get("_step", 0) for row in run.history), default=-1),
                                     keys={name: {} for row in run.history for name in row}),
            wandbConfig=lambda keys: json.dumps(run.wandb_config), history=history,
            events=lambda **_: run._in_order(run._events),
            parquetHistory=lambda **_: dict(parquetUrls=[], liveData=[]),
            files=files, fileCount=len(run.files), outputArtifacts=lambda **_: connection(map(self._artifact, logged)))

    @staticmethod
    def _file(folder, name, content):
        url = f"{folder}/{urllib.parse.quote(name)}"
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        return dict(__typename="File", id=identifier("File", url), name=name, displayName=name, url=url, directUrl=url,
                    sizeBytes=len(content), mimetype=mimetypes.guess_type(name)[0], updatedAt=CREATED, md5=digest,
                    digest=digest, storagePath=name)

    def _upsert_run(self, name, modelName=None, entityName=None, writer="", **fields):
        key = entityName or ENTITY, modelName or "uncategorized", name
        inserted = key not in self.runs
        run = self.runs.setdefault(key, ServerRun(*key))
        run.seen_by(writer)
        run.upsert(**fields)
        return dict(bucket=self._run(run), inserted=inserted)

    def _delete_run(self, id, **_):
        _, _, name, project, entity = base64.b64decode(id).decode().split(":")
        del self.runs[entity, project, name]
        return dict(clientMutationId=None)

    def _create_run_files(self, entityName, projectName, runName, files):
        folder = f"{self.url}/files/{entityName}/{projectName}/{runName}"
        return dict(runID=runName, uploadHeaders=[], files=[
            dict(name=name, uploadUrl=f"{folder}/{urllib.parse.quote(name)}") for name in files])

    def _alert(self, runName, title, text, severity=None, projectName=None, entityName=None, **_):
        self.runs[entityName or ENTITY, projectName, runName].alerts.append((title, text, severity))
        return dict(success=True)

    def _artifact_of(self, artifact_id):
        return next((one for one in self._drafts if one.id == artifact_id), None)

    def _collection(self, one):
        return dict(__typename="ArtifactSequence", id=identifier("ArtifactSequence", one.entity, one.project, one.name),
                    name=one.name, project=lambda: self._project(one.project, one.entity), type=dict(name=one.type),
                    defaultArtifactType=dict(name=one.type), description=None, createdAt=CREATED, updatedAt=CREATED,
                    tags=connection([]), digestAlgorithm="MANIFEST_MD5")

    def _aliases(self, one):
        return [dict(__typename="ArtifactAlias", id=identifier("Alias", one.id, alias), alias=alias,
                     artifactCollection=self._collection(one)) for alias in one.aliases]

    def _artifact(self, one):
        if one is None:
            return None
        files = [(name, content) for name, content in one.files.items() if isinstance(content, bytes)]
        nodes = [self._file(f"{self.url}/artifact/{one.id}", name, content) for name, content in files]
        latest = next((other for other in self._versions(one.collection) if "latest" in other.aliases), None)
        return dict(
            __typename="Artifact", id=one.id, state="COMMITTED" if one.version else "PENDING", digest=one.digest,
            digestAlgorithm="MANIFEST_MD5", artifactType=dict(name=one.type), description=one.description,
            version=one.version, versionIndex=int(one.version[1:]) if one.version else None, tags=[],
            metadata=json.dumps(one.metadata),
            ttlDurationSeconds=-2, ttlIsInherited=True, historyStep=None, commitHash="", createdAt=CREATED,
            updatedAt=CREATED, size=sum(len(content) for _, content in files), fileCount=len(files),
            artifactSequence=self._collection(one) | dict(latestArtifact=latest and dict(id=latest.id)),
            aliases=self._aliases(one), files=lambda **_: connection(nodes),
            filesByManifestEntries=lambda **_: connection(nodes),
            currentManifest=self._manifest(one)["artifactManifest"],
            createdBy=lambda: self._run(self.runs[one.entity, one.project, one.run]) if one.run else None)

    def _membership(self, one):
        whole = self._artifact(one)
        return dict(__typename="ArtifactCollectionMembership", id=identifier("Membership", one.id), artifact=whole,
                    versionIndex=whole["versionIndex"], createdAt=CREATED, aliases=whole["aliases"],
                    artifactCollection=self._collection(one), files=whole["files"])

    def _create_artifact(self, aliases=(), **fields):
        one = ServerArtifact(len(self._drafts), **fields)
        # W&B keeps one version of identical contents; only its aliases move.
        one = next((old for old in self._versions(one.collection) if old.digest == one.digest), one)
        one.wanted = [alias["alias"] for alias in aliases or ()]
        if one.version:
            self._move_aliases(one, one.wanted)
        elif one not in self._drafts:
            self._drafts.append(one)
        return dict(artifact=self._artifact(one))

    def _manifest(self, one):
        url = f"{self.url}/manifest/{one.id}"
        return dict(artifactManifest=dict(id=one.id, file=dict(
            id=identifier("File", one.id), directUrl=url, uploadUrl=url, uploadHeaders=[])))

    def _artifact_files(self, wanted):
        nodes = []
        for spec in wanted:
            url = f"{self.url}/blob/{urllib.parse.quote(spec['md5'], safe='')}"
            nodes.append(dict(storagePath=spec["md5"], uploadUrl=None if spec["md5"] in self._blobs else url,
                              uploadHeaders=[], uploadMultipartUrls=None, artifact=dict(id=spec["artifactID"])))
        return dict(files=connection(nodes))

    def _commit(self, one):
        if not one.version:
            one.files = {name: self._blobs.get(entry["digest"], entry.get("ref"))
                         for name, entry in json.loads(one.manifest).get("contents", {}).items()}
            one.version = f"v{len(self._versions(one.collection))}"
            self.artifacts.append(one)
            self._move_aliases(one, [*one.wanted, "latest"])
        return self._artifact(one)

    def _versions(self, collection):
        return [one for one in self.artifacts if one.collection == collection]

    def _move_aliases(self, one, aliases):
        for other in self._versions(one.collection):
            other.aliases = [alias for alias in other.aliases if alias not in aliases]
        one.aliases = sorted({*one.aliases, *aliases})

    def _sweep(self, sweep):
        import yaml

        ours = [run for run in self.runs.values() if run.sweep == sweep.id]
        return dict(
            __typename="Sweep", id=identifier("Sweep", sweep.id), name=sweep.id, method=sweep.config.get("method"),
            displayName=sweep.config.get("name"), state=sweep.state, description=sweep.config.get("description"),
            config=yaml.safe_dump(sweep.config, sort_keys=False), createdAt=CREATED, updatedAt=CREATED, bestLoss=None,
            heartbeatAt=CREATED, runCount=len(ours), runs=lambda **_: connection(map(self._run, ours)),
            project=lambda: self._project(sweep.project, sweep.entity))

    def _upsert_sweep(self, id=None, config=None, entityName=None, projectName=None, state=None, **_):
        import yaml  # comes with the SDK, which sends YAML

        sweep_id = base64.b64decode(id).decode().split(":")[1] if id else f"sweep{len(self.sweeps)}"
        sweep = self.sweeps.setdefault(
            sweep_id, ServerSweep(sweep_id, entityName or ENTITY, projectName or "uncategorized"))
        sweep.config = yaml.safe_load(config) if config else sweep.config
        sweep.state = state or sweep.state
        return dict(sweep=self._sweep(sweep), configValidationWarnings=[])

    def _create_agent(self, sweep, **_):
        agent = identifier("Agent", sweep, len(self.sweeps[sweep].agents))
        self.sweeps[sweep].agents.append(agent)
        return dict(agent=dict(id=agent))

    def _heartbeat(self, id, runState="{}", **_):
        sweep = self.sweeps[base64.b64decode(id).decode().split(":")[1]]
        busy, commands = json.loads(runState or "{}"), []
        if not busy:
            parameters = sweep.next_parameters()
            if parameters is None:
                sweep.state, commands = "FINISHED", [dict(type="exit")]
            else:
                sweep.state, run_id = "RUNNING", f"{sweep.id}run{len(sweep.runs)}"
                sweep.runs[run_id] = parameters
                commands.append(dict(type="run", run_id=run_id, program=sweep.config.get("program"),
                                     args={name: dict(value=value) for name, value in parameters.items()}))
        return dict(agent=dict(id=id), commands=json.dumps(commands))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state = None

    def setup(self):
        super().setup()
        with self.server_state._lock:
            self.server_state._connections.add(self.connection)

    def finish(self):
        with self.server_state._lock:
            self.server_state._connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self):
        with contextlib.suppress(OSError):  # a client that was killed, or a server that was stopped
            super().handle()

    def log_message(self, *_):
        pass

    def reply(self, status, body, kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def serve(self):
        """Answer one request, or fail as told."""
        state, content = self.server_state, self.body()
        http = state._http
        parts = [*map(urllib.parse.unquote, self.path.split("?")[0].strip("/").split("/")), ""]
        query = None
        if parts[0] == "graphql":
            asked = json.loads(content)
            query = Query(asked["query"], asked.get("variables"))
            roots = {field[1] for field in query.fields}
            kind = {"viewer": "viewer", "upsertBucket": "upsert"}.get(min(roots, default=""), query.name)
            names = ["all", "graphql", kind, query.name, *(["artifact"] if "rtifact" in query.name else [])]
            variables = query.variables | (query.variables.get("input") or {})
            run_id = next((variables[key] for key in ("runName", "run", "name", "runId") if variables.get(key)), "")
        else:
            kind = "filestream" if parts[-2] == "file_stream" else "upload" if self.command == "PUT" else "download"
            names, run_id = ["all", kind], parts[3] if parts[0] == "files" and len(parts) > 3 else ""
        names.append(f"{kind} {run_id}")
        state._seen(kind, run_id)
        how, healed = state._fault(names)
        if how == "hang":
            healed.wait()
        if how == "refuse" or state._http is not http or http is None:  # stopped while this one hung
            self.close_connection = True
        elif how == "html":
            self.reply(200, b"<html><body>Please sign in to this network</body></html>", "text/html")
        elif isinstance(how, int):
            self.reply(how, {"error": f"injected {how}", "errors": [{"message": f"injected {how}"}]})
        elif query:
            self.graphql(query)
        else:
            self.transfer(kind, parts, content)

    do_GET = do_POST = do_PUT = serve

    def graphql(self, query):
        writer = self.headers.get("X-WANDB-CLIENT-ID", "")  # sent in shared mode
        with self.server_state._lock:
            try:
                answer = dict(data=query.answer(self.server_state._root(writer)))
            except Exception as error:  # the SDK must see an answer; the test sees the error in the SDK's log
                answer = dict(data=None, errors=[dict(message=f"{query.name}: {type(error).__name__}: {error}")])
        self.reply(200, answer)

    def transfer(self, kind, parts, content):
        """File streams, and files up and down: /files/<entity>/<project>/<run>/<name>, /artifact/<id>/<name>,
        /manifest/<id>, and /blob/<digest>, what artifacts are made of."""
        state = self.server_state
        with state._lock:
            run = state.runs.get(tuple(parts[1:4]))
            one = state._artifact_of(parts[1])
            name = "/".join(parts[2 if one else 4:-1])
            if kind == "filestream" and run:
                run.stream(self.headers.get("X-WANDB-ASYNC-CLIENT-ID", ""), json.loads(content))
                return self.reply(200, dict(stopped=run.stopped))
            if kind == "upload" and run:
                run.files[name] = content
            elif kind == "upload" and one:
                one.manifest = content
            elif kind == "upload":
                state._blobs[parts[1]] = content
            found = run.files.get(name) if run else one and (one.files.get(name) if name else one.manifest)
        if kind == "upload":
            return self.reply(200, b"")
        if found is None:
            return self.reply(404, dict(error="no such run or file"))
        return self.reply(200, found, "application/octet-stream")


def main():
    parser = argparse.ArgumentParser(description="A W&B server on loopback, to play with by hand.")
    parser.add_argument("--port", type=int, default=0)
    with WandbServer(parser.parse_args().port, lambda *seen: print(time.strftime("%X"), *seen, flush=True)) as server:
        for name, value in server.environment.items():
            print(f"export {name}={value}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
