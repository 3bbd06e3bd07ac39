"""`cdam serve`."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cdam_cli.model_options import FILE, complain, model_options

if TYPE_CHECKING:
    from cdam_server.settings.config import Settings

_HELP = """Serve explanations of Vision Transformers over gRPC.

Without options this serves the built-in demo model (handwritten digits in scenes). Every option is also an environment
variable, CDAM_ADDRESS for --address, and a key of the YAML file given by --config: address. Options win over the
environment, the environment over the file. SIGTERM or Ctrl-C ends it, once the requests in flight are answered.

There is neither TLS nor authentication, so only this machine is served by default: --address 0.0.0.0:8001 opens it.

\b
  cdam serve
  cdam serve --model vit_small_patch16_224 --pretrained
  cdam serve --model vit_base_patch14_dinov2 --checkpoint backbone.safetensors --head lesions.safetensors \\
             --outputs lesions.txt
  cdam serve --models-file models.yaml --max-batch-size 32
"""


@click.command(help=_HELP)
@click.option("--config", type=FILE, envvar="CDAM_CONFIG", help="YAML file of settings.")
@click.option("--address", metavar="HOST:PORT", help="Where to serve the API.  [127.0.0.1:8001]")
@click.option(
    "--admin-address", metavar="HOST:PORT", help="Where to serve /metrics, /livez, /readyz.  [127.0.0.1:8002]"
)
@model_options
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of registered concepts, made when the first one comes.  [~/.local/share/cdam-serve]",
)
@click.option(
    "--store",
    metavar="URL",
    help="postgresql://USER@HOST/DATABASE: where concepts are kept instead, for many servers; needs the extra "
    "`postgres`. A password is better given by the environment: CDAM_STORE or PGPASSWORD.",
)
@click.option("--device", help="auto, cpu, cuda, cuda:1, ...; several (cuda:0,cuda:1) have a process each.  [auto]")
@click.option("--threads", type=click.IntRange(min=0), help="Compute threads on a CPU; 0: torch's choice.  [0]")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "auto"]),
    help="Arithmetic of the trunk; auto: bf16 where the device is fast at it.  [fp32]",
)
@click.option(
    "--compile",
    is_flag=True,
    default=None,
    help="Compile the models for batches of 1, 2, 4, ... before the server is ready; needs a C++ compiler.",
)
@click.option(
    "--token-cache-mib",
    type=click.IntRange(min=0),
    metavar="MIB",
    help="Memory of the device for the trunk's output of recent images, for all models; 0: none.  [256]",
)
@click.option("--max-batch-size", type=click.IntRange(min=1), help="Most images in a batch.  [16]")
@click.option(
    "--max-queue-delay-microseconds",
    type=click.IntRange(min=0),
    help="Longest wait for a fuller batch while idle.  [0]",
)
@click.option("--max-pending", type=click.IntRange(min=1), help="Most requests being served; more are refused.  [256]")
@click.option(
    "--max-pending-passes",
    type=click.IntRange(min=1),
    help="Most work of all requests being served, in passes through the model.  [4096]",
)
@click.option(
    "--max-pending-mib",
    type=click.IntRange(min=1),
    metavar="MIB",
    help="Most memory of all requests being served, for their messages and pixels.  [256]",
)
@click.option(
    "--deadline-margin",
    type=click.FloatRange(1, 10),
    help="A request with a deadline is let in if its estimated time, so many times, fits into it. Rises by itself, up to 2.5, while answers come late.  [1.5]",
)
@click.option(
    "--compute-slots",
    type=click.IntRange(0, 16),
    help="Batches computed at once; 0: two on a GPU, up to four on a CPU.  [0]",
)
@click.option("--decode-threads", type=click.IntRange(1, 64), help="Threads that decode images.  [4]")
@click.option("--max-stream-items", type=click.IntRange(min=1), help="Most items of a stream in work at once.  [32]")
@click.option(
    "--max-connection-age-seconds",
    type=click.FloatRange(min=1),
    help="A connection is closed after this long, once its calls are answered, so that clients find new servers.  [300]",
)
@click.option(
    "--front-ends",
    type=click.IntRange(min=0, max=64),
    help="Processes that serve the API, beside one for each device; 0: all in one process.  [by the cores]",
)
@click.option("--max-message-bytes", type=click.IntRange(min=1024), help="Largest message.  [67108864]")
@click.option("--max-image-bytes", type=click.IntRange(min=1), help="Largest encoded image.  [33554432]")
@click.option("--max-image-pixels", type=click.IntRange(min=1), help="Most pixels of an image.  [50000000]")
@click.option("--max-patches", type=click.IntRange(min=1), help="Most patches of a requested input size.  [2500]")
@click.option("--max-targets", type=click.IntRange(min=1), help="Most targets of a request.  [100]")
@click.option("--max-samples", type=click.IntRange(min=1), help="Most draws or steps of a method.  [500]")
@click.option(
    "--max-passes",
    type=click.IntRange(min=1),
    help="Most passes through the whole model that a request's methods may take.  [1000]",
)
@click.option(
    "--max-evaluation-passes",
    type=click.IntRange(min=1),
    help="Most passes through the whole model that a sample of an evaluation may take.  [20000]",
)
@click.option("--max-concept-images", type=click.IntRange(min=1), help="Most images that a concept is made of.  [1000]")
@click.option(
    "--drain-wait-seconds",
    type=click.FloatRange(min=0),
    help="After SIGTERM new requests are still served for this long, while clients notice.  [0]",
)
@click.option("--drain-seconds", type=click.FloatRange(min=0), help="Then time for requests in flight.  [30]")
@click.option(
    "--watchdog-seconds",
    type=click.FloatRange(min=1),
    help="A computation that stands still for this long ends the server, with exit code 1.  [120]",
)
@click.option("--tracing-endpoint", metavar="URL", help="Where traces go (OTLP); needs the extra `tracing`.  [none]")
@click.option(
    "--log-format", type=click.Choice(["auto", "console", "json"]), help="auto: JSON unless on a terminal.  [auto]"
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least level to log.  [info]"
)
def serve(config: Path | None, **flags: Any) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    with complain():
        from cdam_server.operation import logs
        from cdam_server.settings.config import Settings
        from cdam_server.settings.specs import check_files

        settings = Settings.load(config, **flags)
        logs.configure(settings.log_format, settings.log_level)
        # Before torch is imported, which takes seconds: most mistakes are in a name or a path.
        check_files(settings.specs())
        _serve(settings)


def _serve(settings: "Settings") -> None:
    from cdam_server.processes.failure import ServerFailedError
    from cdam_server.processes.front_ends import number_of
    from cdam_server.settings.config import warn_of_unknown_variables
    from cdam_server.store import StoreUnusableError

    front_ends = number_of(settings)
    try:
        warn_of_unknown_variables()
        # As PID 1 of a container the process would not hear a SIGTERM while it loads; serving has a handler of its own.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if front_ends:
            from cdam_server.processes import supervisor

            asyncio.run(supervisor.serve(settings, front_ends))
            return
        from cdam_server import bootstrap
        from cdam_server.compute.catalog import load_catalog

        asyncio.run(bootstrap.serve(settings, load_catalog(settings)))
        # Requests that outlived the drain may still be computed, and their threads would keep the process.
        sys.stderr.flush()
        os._exit(0)
    except StoreUnusableError as error:
        raise click.ClickException(str(error)) from error
    except ServerFailedError as error:
        click.echo(f"Error: {error}", err=True)
        if front_ends:
            sys.exit(1)
        sys.stderr.flush()
        os._exit(1)  # its threads may be stuck
