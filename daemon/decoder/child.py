"""The decoding process: paths in, tensors or refusals out, until its parent hangs up.

Started by `lungwatch.daemon.decoder.process` as ``python -m``, with the channel as its
standard input.
"""

import os
from multiprocessing.connection import Connection
from pathlib import Path

from lungwatch.daemon.decoder import confinement


def main() -> None:
    """Serve until the channel is closed."""
    confinement.detach()
    connection = Connection(confinement.replace_stdin())
    setup = connection.recv()
    confinement.limit(setup.memory_mb)

    # After the limits, and after the signals are out of the way: this takes its time.
    import cv2  # noqa: PLC0415

    from lungwatch.daemon.decoder import faults, wire  # noqa: PLC0415
    from lungwatch.daemon.decoding import decode  # noqa: PLC0415

    cv2.setNumThreads(1)
    connection.send_bytes(wire.READY)
    while True:
        path = Path(os.fsdecode(connection.recv_bytes()))
        try:
            faults.strike(path)
            decoded = decode(
                path,
                policy=setup.policy,
                spec=setup.spec,
                overlay_side_px=setup.overlay_side_px,
                gate_spec=setup.gate_spec,
            )
        except Exception as error:  # everything goes back to whoever asked
            error.__traceback__ = None  # and with it whatever filled the memory
            wire.send_error(connection, error)
        else:
            wire.send_decoded(connection, decoded)


if __name__ == "__main__":
    try:
        main()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent hung up
    except MemoryError:
        os._exit(confinement.OUT_OF_MEMORY)
