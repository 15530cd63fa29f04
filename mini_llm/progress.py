"""The progress bar."""

import threading

from tqdm import tqdm


class ProgressBar(tqdm):
    """tqdm's, without the process that its own lock, multiprocessing's, starts on macOS and, from Python 3.14 on, on
    Linux: it would outlive a rank that exits at once, and warn of a leak."""

    _lock = threading.RLock()
