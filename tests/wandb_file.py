"""Read a W&B run file (`*.wandb`) back: LevelDB log framing of protobuf records. The SDK ships no reader."""

import json

BLOCK = 32768  # bytes; a block that has no room for another header ends in padding
HEADER = 7  # bytes of the file's header and of each chunk's: 4 of checksum, 2 of length, 1 of kind
FULL, LAST = 1, 4  # kinds of the chunks that end a record


def records(path):
    """Every whole record; a torn tail is skipped."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B", data[:HEADER]
    position = HEADER
    parts = []
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4:position + 6], "little"), data[position + 6]
        end = position + HEADER + length
        if end > len(data) or kind == 0:
            return
        parts.append(data[position + HEADER:end])
        position = end
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


class RunFile:
    """What one local run holds: `rows` of reports, and apart from them the rows of the samples' table."""

    def __init__(self, path):
        self.folder = path.parent
        self.rows, self.samples = [], []
        self.config, self.axes = {}, {}  # axes: metric → the metric over which it is drawn
        self.run_id = self.name = self.project = self.group = self.exit_code = None
        self.files = []  # those to upload, by name
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                       for item in record.history.item}
                (self.samples if "samples/_type" in row else self.rows).append(row)
            elif kind == "run":
                self.run_id, self.name, self.project = record.run.run_id, record.run.display_name, record.run.project
                self.group, self.host, self.commit = record.run.run_group, record.run.host, record.run.git.commit
                self.remote = record.run.git.remote_url
                self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "config":
                self.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            elif kind == "metric":
                self.axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
            elif kind == "files":
                self.files += [item.path for item in record.files.files]
            elif kind == "exit":
                self.exit_code = record.exit.exit_code


def run_files(folder):
    return [RunFile(path) for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))]
