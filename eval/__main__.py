"""python -m eval {perplexity, choice, answers, judge, score, plot}: what a model is worth."""

from elo.common.errors import UserError, exit_status
from elo.common.fields import check_output
from elo.common.options import PATHS, Parser
from elo.runs.devices import DTYPES
from eval.figures import plot
from eval.judged import answers, judge, score
from eval.likelihood import choice, perplexity

COMMANDS = {module.__name__.rpartition(".")[2]: module for module in (perplexity, choice, answers, judge, score, plot)}
WITHOUT_MODEL = ("judge", "score", "plot")


def main() -> None:
    parser = Parser(prog="python -m eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    paths = {}  # of each command: what names files or directories that it reads, or goes on with
    for name, module in COMMANDS.items():
        subparser = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        if name not in WITHOUT_MODEL:
            subparser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of computation (%(default)s)")
        module.add_arguments(subparser)
        paths[name] = [action.dest for action in subparser._actions if action.metavar in PATHS]
        subparser.add_argument("--json", metavar="FILE", help="write the result here as well")
    arguments = parser.parse_args()
    given = [getattr(arguments, name) for name in paths[arguments.command] if name != "out"]
    inputs = [path for value in given if value for path in (value if isinstance(value, list) else [value])]
    check_output("--json", arguments.json, inputs)
    try:
        COMMANDS[arguments.command].main(arguments)
    except KeyboardInterrupt:
        raise UserError("stopped by Ctrl-C") from None


if __name__ == "__main__":
    exit_status(main)
