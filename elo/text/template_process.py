"""Renders chat templates as transformers does, in a process of its own, which `chat_template` starts.

A template comes with a stranger's model. Jinja's sandbox keeps it from Python, but not from running forever or from
filling the memory: the operating system ends this process when it does.

A line of JSON in: {"template", "variables", "now", "messages", "renders": [[how many of the messages,
add_generation_prompt], ...]}; a line out: for each of them [text, null] or [null, why not].
"""

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, BYTES, LONGEST = 4, 2**29, 2**26  # of processor time in a request, of memory, characters of a result


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: transformers' mark of what is the assistant's, nothing but its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as the call block is that transformers makes of it.
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(16)
def compiled(template: str, now: float) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.fromtimestamp(now).strftime}
    return environment.from_string(template)


def render(request: dict[str, Any], count: int, add_generation_prompt: bool) -> str:
    messages = [dict(message) for message in request["messages"][:count]]  # which a template might change
    fields = {"tools": None, "documents": None, **request["variables"]}
    template = compiled(request["template"], request["now"])
    text = template.render(messages=messages, add_generation_prompt=add_generation_prompt, **fields)
    if len(text) > LONGEST:
        raise MemoryError
    return text


def limit(kind: int, soft: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main() -> None:
    limit(resource.RLIMIT_AS, BYTES)
    limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin:
        request = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + SECONDS)
        results: list[tuple[str | None, str | None]] = []
        for count, add_generation_prompt in request["renders"]:
            try:
                results.append((render(request, count, add_generation_prompt), None))
            except MemoryError:
                results.append((None, "it needs too much time or memory"))
            # Whatever a template does; its author may have meant to say something by it.
            except Exception as error:
                results.append((None, str(error)[:1000] or type(error).__name__))
        sys.stdout.write(json.dumps(results) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
