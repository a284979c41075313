"""python -m eval {perplexity, choice, answers, judge, score, plot}: what a model is worth."""

from typing import Any

from elo.common.errors import UserError, exit_status
from elo.common.fields import check_output
from elo.common.options import Parser
from elo.runs.devices import DTYPES
from eval.figures import plot
from eval.judged import answers, judge, score
from eval.likelihood import choice, perplexity

COMMANDS = {
    "perplexity": perplexity,
    "choice": choice,
    "answers": answers,
    "judge": judge,
    "score": score,
    "plot": plot,
}
WITHOUT_MODEL = ("judge", "score", "plot")
# Options that name files or directories which a command reads, or goes on with.
INPUTS = (
    "model",
    "data",
    "samples",
    "bench_dir",
    "examples",
    "answers",
    "judge_prompts",
    "references",
    "files",
    "paths",
)


def main() -> None:
    parser = Parser(prog="python -m eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        subparser = commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        if name not in WITHOUT_MODEL:
            subparser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of computation (%(default)s)")
        module.add_arguments(subparser)
        subparser.add_argument("--json", metavar="FILE", help="write the result here as well")
    arguments = parser.parse_args()
    inputs = [path for name in INPUTS for path in as_list(getattr(arguments, name, None))]
    check_output("--json", arguments.json, inputs)
    try:
        COMMANDS[arguments.command].main(arguments)
    except KeyboardInterrupt:
        raise UserError("stopped by Ctrl-C") from None


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


if __name__ == "__main__":
    exit_status(main)
