"""The proxy's command line: sends each prompt to a prefill instance, then the request to decode.

python3 toy_proxy_server.py --pd-disaggregation --host localhost --port 7802 \\
    --prefiller-host <ip> --prefiller-port 7800 --decoder-host <ip> --decoder-port 7801
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Run as a script in its own folder: find ucm in this checkout, and not this folder's modules as
    # top-level ones.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

try:
    from aiohttp import web
    from yarl import URL
except ModuleNotFoundError as error:
    raise SystemExit(f"the proxy needs {error.name}: pip install 'ucm[proxy]'") from None

from ucm.pd.relay import Instances, make_app

logger = logging.getLogger("ucm.pd")

# For streams that are still running when the proxy is told to stop.
SHUTDOWN_TIMEOUT_S = 10.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s")
    instances = Instances(
        prefill=URL.build(scheme="http", host=args.prefiller_host, port=args.prefiller_port),
        decode=URL.build(scheme="http", host=args.decoder_host, port=args.decoder_port),
    )
    logger.info("prefill %s, decode %s", instances.prefill, instances.decode)
    web.run_app(
        make_app(instances),
        host=args.host,
        port=args.port,
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        access_log=None,
        print=lambda line: logger.info("%s", line.splitlines()[0]),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="toy_proxy_server.py", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--host", default="localhost", help="address to listen on")
    parser.add_argument("--port", type=_port, default=8000)
    parser.add_argument(
        "--pd-disaggregation",
        action="store_true",
        help="the only mode so far, so it may be left out",
    )
    parser.add_argument("--prefiller-host", default="localhost")
    parser.add_argument("--prefiller-port", type=_port, default=8100)
    parser.add_argument("--decoder-host", default="localhost")
    parser.add_argument("--decoder-port", type=_port, default=8200)
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 1 to 65535 is")
    return int(text)


if __name__ == "__main__":
    main()
