"""How the ranks that torchrun or srun has started find each other: all of one start and no others, or an error."""

import datetime
import os
import socket
import time

import torch.distributed as dist

from mini_llm.errors import UserError, first_line
from mini_llm.ranks import Heartbeat, RankFault, limit_of

CONNECT = 60  # seconds to connect to torchrun's store
START = 600  # seconds to wait for ranks that import torch, perhaps from a slow disk, or have failed before they joined
# The variables that torchrun sets for each process → those of srun, if that starts the ranks itself.
SLURM = dict(RANK="SLURM_PROCID", WORLD_SIZE="SLURM_NTASKS", LOCAL_RANK="SLURM_LOCALID",
             LOCAL_WORLD_SIZE="SLURM_NTASKS_PER_NODE", GROUP_RANK="SLURM_NODEID")


def launched(script):
    """[rank, number of ranks, local rank, number of local ranks, node], of torchrun or srun. Raises UserError."""
    for name, slurm in SLURM.items():
        if slurm in os.environ:
            os.environ.setdefault(name, os.environ[slurm])
    if missing := [name for name in (*SLURM, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"{', '.join(missing)} not set: start this by torchrun --nproc-per-node=2 {script} ..., on "
                        f"Slurm srun --ntasks-per-node=1 torchrun ... or, with --ntasks-per-node=N, srun python "
                        f"{script} ...; for one process, python train.py")
    for name in (*SLURM, "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise UserError(f"{name} is {os.environ[name]!r}: set it to a number, or start this by torchrun")
    for rank, size, where in (("RANK", "WORLD_SIZE", "in all"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "on each node")):
        if int(os.environ[rank]) >= int(os.environ[size]):  # ranks count from 0
            raise UserError(f"{rank} is {os.environ[rank]} and {size} {os.environ[size]}: set {size} (where srun "
                            f"starts the ranks, {SLURM[size]}) to the number of ranks {where}")
    return [int(os.environ[name]) for name in SLURM]


def join(backend, timeout):
    """Join the process group that torchrun's environment variables describe. Returns this rank's Heartbeat."""
    limit = limit_of(timeout)
    start = min(limit, datetime.timedelta(seconds=START))
    rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    host = os.environ["MASTER_ADDR"]
    # torchrun's store is up before its ranks start: if it does not answer, it has died together with torchrun.
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    connect = datetime.timedelta(seconds=CONNECT) if has_store else start
    try:
        # Not dist.rendezvous: in it, a rank 0 that holds the store waits for the others and cannot say for which.
        store = dist.TCPStore(host, port, size, not has_store and rank == 0, connect, wait_for_workers=False)
        store.set_timeout(limit)
        # With a prefix for each start: torchrun restarts ranks on the same store, which still holds the addresses and
        # heartbeats of the ranks before. Its count of restarts would not do, as it may differ between nodes.
        store = dist.PrefixStore(_roll_call(store, rank, size, start), store)
    except dist.DistError as error:
        if not has_store and "EADDRINUSE" in str(error):  # such as another job's on this node
            raise RankFault(f"port {port} of {host} is in use: set MASTER_PORT to one that is not") from None
        whose = "torchrun's" if has_store else "rank 0's"
        raise RankFault(f"rank {rank} cannot reach {whose} store at {host}:{port} ({first_line(error)}): start again, "
                        f"with --resume auto") from None
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except RuntimeError as error:
        raise RankFault(f"rank {rank} on {socket.gethostname()} cannot connect to the others: {first_line(error)}; if "
                        f"its name leads to another network, set GLOO_SOCKET_IFNAME to the interface, such as eth0, "
                        f"that leads to them") from None
    # Cloned for a connection of its own: on a shared one, heartbeats would wait for the main thread's operations.
    return Heartbeat(dist.PrefixStore("heartbeat", store.clone()), rank, size, timeout)


def _roll_call(store, rank, size, limit):
    """A name for this start that its ranks agree on, and none of an earlier start on the same store, whose keys remain.
    Raises RankFault if a rank is missing: torchrun ends only the others of that rank's node.

    Each rank publishes a name of its own. Rank 0 makes up the start's, and stores it under each of these until all have
    answered: what is gone does not answer. When a rank comes, it makes up another one for all, because a rank that has
    answered may be gone, too, and about to be replaced."""
    mine = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
    store.set(f"rank {rank}", mine)
    start, names, missing = "", None, [0]
    end = time.monotonic() + limit.total_seconds()
    while time.monotonic() < end:
        if rank == 0:
            known = {other: store.get(f"rank {other}").decode() for other in range(1, size)
                     if store.check([f"rank {other}"])}
            if known != names:
                start, names = f"{mine} {time.time_ns()}", known
                for name in names.values():
                    store.set(f"call of {name}", start)
            missing = [other for other in range(1, size)
                       if other not in names or not store.check([f"{start}: {names[other]} is here"])]
            if not missing:
                store.set(f"{start}: all are here", "")
        elif store.check([f"call of {mine}"]):
            start, missing = store.get(f"call of {mine}").decode(), []  # rank 0 is there, and knows of the others
            store.set(f"{start}: {mine} is here", "")
        if start and store.check([f"{start}: all are here"]):
            return start
        time.sleep(0.05)
    who = f"the first is rank {missing[0]}" if missing else "rank 0 says which"
    raise RankFault(f"{len(missing) or 'some'} of {size} ranks have not joined within {limit.seconds} s, {who}: what "
                    f"its node has printed may say why; start again")
