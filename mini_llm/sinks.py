"""Where reports are written on this machine: metrics.jsonl and TensorBoard's files. (W&B's is in wandb_sink.py.)"""

import contextlib
import json
import logging
import os
import time

from mini_llm.files import RECORD_HEAD, replacing, sync, without_infinity

log = logging.getLogger("mini_llm")


class JsonlSink:
    """One JSON object per line: a report, or an `event`: the configuration at the start, a sample, the exit … On
    resume, lines after the checkpoint's step are removed, except for alerts: the run will write them again."""

    def __init__(self, path, start_step):
        old = path if start_step and path.is_file() else os.devnull  # a named pipe would block
        # A new file: whoever still sends what a killed start has written keeps the old one.
        with replacing(path) as draft, open(draft, "wb") as file, open(old, "rb") as before:
            for line in before:
                head = RECORD_HEAD.match(line)
                if head and (head["event"] == b"alert" or int(head["step"]) <= start_step) and line.endswith(b"}\n"):
                    file.write(line)
            file.flush()
            sync(file.fileno())
        self.path = path
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self.unwritten = b""
        self.failed = False  # in the last attempt, of which a warning has told

    def place(self):
        """The file's path, and the byte offset of the next record."""
        return str(self.path), self.path.stat().st_size

    def log(self, step, record):
        row = {"step": step, "time": time.time(), **without_infinity(record)}
        self.unwritten += json.dumps(row).encode() + b"\n"
        self._write()

    def _write(self):
        """Append all pending records. If that fails (disk full), undo it and retry with the next record."""
        whole = os.fstat(self.file.fileno()).st_size
        try:
            left = memoryview(self.unwritten)
            while left:
                left = left[self.file.write(left):]
            self.unwritten, self.failed = b"", False
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.file.fileno(), whole)
            if not self.failed:
                log.warning("%s cannot be written (%s); its rows are kept and written when it can be", self.path,
                            error.strerror)
            self.failed = True

    def close(self, exit_code):
        if self.unwritten:
            self._write()
        if self.unwritten:
            log.error("%s lacks its last %d rows", self.path, self.unwritten.count(b"\n"))
        self.file.close()


class TensorboardSink:
    """The numbers of the reports, and the samples."""

    def __init__(self, folder, start_step):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)
        self.broken = False

    def log(self, step, record):
        if record.get("event") == "sample":
            self._unless_broken(self.writer.add_text, "samples", record["text"], step)
        elif "event" not in record:
            for name, value in record.items():
                if isinstance(value, (int, float)):
                    self._unless_broken(self.writer.add_scalar, name, value, step)

    def close(self, exit_code):
        self._unless_broken(self.writer.close)

    def _unless_broken(self, write, *args):
        try:
            if not self.broken:
                write(*args)
        except Exception as error:  # an error of its writer thread, such as a full disk
            log.warning("TensorBoard's events are no longer written: %s", error)
            self.broken = True
