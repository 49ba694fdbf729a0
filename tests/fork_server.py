"""A process that has imported what a rank imports, and forks a rank whenever it is asked to: seconds less for each.

Its standard input is a socket. A message is [arguments, environment] in JSON with two descriptors: one for what the rank prints, and
one for its process number and, when it has ended, its status, four bytes each. Closing the socket ends the server.
"""

import gc
import json
import os
import runpy
import selectors
import socket
import struct
import sys


def serve() -> list[str]:
    """Returns only in a rank: its arguments, with everything else in place."""
    asked = socket.socket(fileno=0)
    selector = selectors.DefaultSelector()
    selector.register(asked, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is asked:
                message, descriptors, *_ = socket.recv_fds(asked, 2**20, 2)
                if not message:
                    sys.exit()
                output, told = descriptors
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    os.close(told)
                    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                    os.dup2(output, 1)
                    os.dup2(output, 2)
                    arguments, environment = json.loads(message)
                    os.environ.clear()
                    os.environ.update(environment)
                    return arguments
                os.write(told, struct.pack("i", pid))
                os.close(output)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, told))
            else:
                pid, told = key.data
                selector.unregister(key.fileobj)
                os.close(key.fd)
                os.write(told, struct.pack("i", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
                os.close(told)


if __name__ == "__main__":
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "DEEPSPEED_LOG_LEVEL": "warning"}  # as launch/pretrain.py does before it imports them
    import torch

    from launch.ranks import processes

    processes.device_name()
    import torch._dynamo  # as torch's optimizers do when they are made

    from launch.training import assembly  # noqa: F401

    gc.freeze()
    sys.argv = serve()
    if "OMP_NUM_THREADS" in os.environ:  # which torch reads when it is imported
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    runpy.run_path(sys.argv[0], run_name="__main__")
