"""The Typer app and the one place where errors become a line and an exit code.

Nothing here imports torch, MONAI or an image library: commands do so when they run.
"""

import logging
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated

import typer

from medmamba import __version__
from medmamba.cli.caches import place_caches
from medmamba.cli.check import check
from medmamba.cli.compare import compare
from medmamba.cli.convert import convert
from medmamba.cli.demo import demo
from medmamba.cli.doctor import doctor
from medmamba.cli.evaluate import evaluate
from medmamba.cli.examples import examples_of, exit_codes
from medmamba.cli.index import index
from medmamba.cli.info import info
from medmamba.cli.messages import drop_unheard, say
from medmamba.cli.plan import plan
from medmamba.cli.predict import predict
from medmamba.cli.preprocess import preprocess
from medmamba.cli.report import report
from medmamba.cli.select import select
from medmamba.cli.status import status
from medmamba.cli.train import train
from medmamba.cli.verify import verify
from medmamba.cli.watch import watch
from medmamba.errors import MedMambaError

EXIT_BUG = 1
EXIT_BROKEN_PIPE = 0

app = typer.Typer(
    name="medmamba",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=exit_codes(),
)
for _command in (
    plan,
    preprocess,
    train,
    predict,
    index,
    status,
    watch,
    evaluate,
    compare,
    check,
    report,
    select,
    demo,
    doctor,
    info,
    verify,
):
    app.command(epilog=examples_of(_command.__name__))(_command)
app.add_typer(convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"medmamba {__version__}")
        raise typer.Exit


@app.callback()
def medmamba(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks (accepted anywhere on the line).")
    ] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="More messages; -vv for all.")
    ] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Segment 3D medical images: plan from the data, train, predict, evaluate.

    [bold]Start here:[/bold] [cyan]medmamba demo[/cyan] runs the whole chain on real brain MRI.

    [bold]Your data[/bold] (nnU-Net raw format or Medical Segmentation Decathlon):

      medmamba plan Dataset004_Hippocampus -o work
      medmamba train work --max-time 20m
      medmamba predict -i images -o masks -m work/runs/lightm_unet_s/3d_fullres/fold_0
      medmamba evaluate labels masks
    """
    level = (
        logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    )
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr)


def main() -> None:
    """Run the command line; every failure ends in one line and a documented exit code."""
    place_caches()
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app([argument for argument in arguments if argument != "--debug"], prog_name="medmamba")
    except MedMambaError as error:
        if debug:
            traceback.print_exc()
        say(f"error [{error.code}]: {error.message}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("interrupted; what was finished is kept.")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone (`medmamba ... | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except Exception as error:
        _report_bug(error, debug=debug)
        sys.exit(EXIT_BUG)
    finally:
        drop_unheard()


def _report_bug(error: Exception, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    with tempfile.NamedTemporaryFile(
        "w", prefix="medmamba-traceback-", suffix=".log", delete=False, encoding="utf-8"
    ) as log:
        traceback.print_exc(file=log)
    say(
        f"error [E_INTERNAL]: {type(error).__name__}: {str(error) or 'no message'}. This is a bug "
        f"in medmamba; its traceback is in {Path(log.name)} (--debug shows it here)."
    )
