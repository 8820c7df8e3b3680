"""How a process of a distributed run ends."""

import os
import sys

import torch.distributed as dist


def leave():
    """Ends this process, once all have come here, and without the interpreter's shutdown.

    FSDP2's default mesh keeps the process group, and with it gloo's threads, beyond `destroy_process_group`. Some
    shutdowns abort then: "terminate called without an active exception" (pytorch/pytorch#190489).
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
