"""The verbs as one app: growth inspect | grow | shrink | transfer | train | check | demo."""

import typer

from growth.cli.check import check
from growth.cli.demo import demo
from growth.cli.grow import grow
from growth.cli.inspect import inspect
from growth.cli.shrink import shrink
from growth.cli.train import train
from growth.cli.transfer import transfer

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a larger transformer out of a trained one (grow), a smaller one (shrink), or one that is "
    "cheap to run (transfer), and train it on.",
)
for verb in (inspect, grow, shrink, transfer, train, check, demo):
    app.command()(verb)
